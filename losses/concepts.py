"""Losses of TransFGU on concept maps: bootstrapping with permuted negatives, uncertainty, class embeddings.

Pure functions, float32 inside. Every draw (the permutation of the classes) is given by the caller.

Glossary: B pictures, C classes, h x w patches; Q = soft labels, y = their class.
Source: Yin et al., TransFGU (ECCV 2022); code: damo-cv/TransFGU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import exact, real

BACKGROUND = 0.1
"""Level below which the background's score grows; it wins where all classes are below half of it."""


def min_max(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Concept maps [B,C,h,w] from 0 to 1 over all classes and places of a picture, and which pictures are constant.

    A constant map has no range: it is given as zeros and marked, bool [B]. Detached.
    """
    maps = real(maps.detach())
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    flat = high <= low
    return (maps - low) / torch.where(flat, 1.0, high - low), flat.flatten()


def soft_labels(maps: Tensor, teacher: Tensor | None = None, background: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What the student learns: Q [B,C,h,w], pictures without evidence bool [B], and places with evidence bool [B,h,w].

    Args:
        maps: [B,C,h,w] concept maps, or with `background` [B,C-1,h,w].
        teacher: logits [B,C,h,w]; their softmax counts for half.
        background: a first class that wins where no concept reaches half of BACKGROUND.

    A picture whose map is constant has class 0 everywhere, as released, where the quotient is not a number.
    """
    scaled, flat = min_max(maps)
    strongest = scaled.amax(1)
    evidence = (strongest > BACKGROUND) & ~flat[:, None, None]
    if background:
        scaled = torch.cat([F.relu(BACKGROUND - strongest)[:, None], scaled], 1)
    if teacher is not None:
        scaled = 0.5 * real(teacher.detach()).softmax(1) + 0.5 * scaled
    return torch.where(flat[:, None, None, None], 0.0, scaled), flat, evidence


def bootstrapped(logits: Tensor, soft: Tensor, permutation: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Cross-entropy of each place with its class, less alpha times that with a permuted one: [B,h,w].

    Args:
        logits: [B,C,h,w] of the student, with gradient.
        soft: Q; the class of a place is that of its largest entry, the lowest of equals.
        permutation: int64 [C], drawn once a batch: the negative is the largest entry of Q with its classes permuted.
        alpha: weight of the negative.
    """
    logits = real(logits)
    loss = F.cross_entropy(logits, soft.argmax(1), reduction="none")
    if permutation is None:
        return loss
    return loss - alpha * F.cross_entropy(logits, soft[:, permutation].argmax(1), reduction="none")


def negative_weight(epochs: int) -> float:
    """Alpha by the epochs since the student started anew: 0.03, 0.04, ... 0.10, then 0.10."""
    return min(0.03 + 0.01 * epochs, 0.1)


def uncertainty(logits: Tensor) -> Tensor:
    """1 less the distance of the two largest probabilities at each place: logits [B,C,h,w] -> [B,h,w]."""
    top = real(logits).softmax(1).topk(2, dim=1).values
    return 1 - (top[:, 0] - top[:, 1])


def thing_uncertainty(logits: Tensor, evidence: Tensor, total: Tensor | None = None) -> Tensor:
    """Mean of `uncertainty` without the background (class 0) over places with evidence bool [B,h,w]: a scalar.

    total: what the sum is divided by where it is not the number of places here (several ranks: their mean). NaN where
    no place of the batch has evidence, as released: the caller skips the step.
    """
    return (uncertainty(logits[:, 1:]) * evidence).sum() / (evidence.sum() if total is None else total)


def embedding_diversity(embeddings: Tensor) -> Tensor:
    """1 + cosine of each pair of classes i < j, in row-major order: unit rows [B,C,D] -> [B,C(C-1)/2]."""
    rows = real(embeddings)
    first, second = torch.triu_indices(rows.shape[1], rows.shape[1], 1, device=rows.device)
    with exact(rows.device):
        return 1 + torch.bmm(rows, rows.mT)[:, first, second]
