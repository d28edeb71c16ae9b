"""Labels by retrieval: the labels of the nearest rows of a labelled bank, and their vote. Reads labels, plainly.

Source: SegSort (ICCV 2019) section 3.4; HSG (CVPR 2022).
"""

import torch
from torch import Tensor

from retrieval import search


def nearest_labels(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> Tensor:
    """Labels of the k rows of the bank with the largest dot product, nearest first: [Q,k].

    queries [Q,D], bank [M,D], labels int64 [M]; k is clamped to M.
    """
    return labels[search.nearest(queries, bank, k)[1]]


def vote(labels: Tensor, classes: int) -> Tensor:
    """The most frequent of the labels [Q,k] in 0..classes-1 of each query, int64 [Q]; of equals the smallest."""
    counts = torch.zeros(len(labels), classes, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(1, labels.long(), torch.ones_like(labels, dtype=torch.int64)).argmax(1)


def agreement(found: Tensor, labels: Tensor) -> Tensor:
    """Share of the retrieved labels [Q,k] that equal the query's own [Q], 0..1; a scalar."""
    return (found == labels[:, None]).float().mean()
