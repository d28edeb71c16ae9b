"""Graphs over the segments of a picture. Source: HSG (CVPR 2022)."""

import torch
from torch import Tensor

from common.precision import exact


@torch.no_grad()
def knn_graph(
    nodes: Tensor,
    padding: Tensor,
    knn: int | None,
    views: Tensor | None = None,
    view_count: int = 1,
    scale: float = 5.0,
    binary: bool = True,
) -> Tensor:
    """The graph of each picture's segments, float32 [B,M,M], not symmetric, no gradient.

    Entries are exp(scale * x_i . x_j), 0 towards and from padding, and 0 on the diagonal where a picture has more than
    one node. Of every row and every view the entries stay that reach the row's knn-th largest among the columns of that
    view (equal ones all stay; a view of fewer nodes keeps them all).

    Args:
        nodes: [B,M,D] unit rows.
        padding: bool [B,M], true where a slot holds no node.
        knn: arcs of a node into each view; None keeps all.
        views: int64 [B,M] in 0..view_count-1 (any value on padding); None: all nodes are of one view.
        binary: entries that stay are 1.
    """
    valid = ~padding
    with exact(nodes.device):
        rows = nodes.detach().float()
        weights = (scale * torch.bmm(rows, rows.mT)).exp()
    weights = weights * (valid[:, :, None] & valid[:, None, :])
    several = valid.sum(1) > 1
    eye = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    weights = weights.masked_fill(eye & several[:, None, None], 0.0)
    if knn is not None:
        kept = torch.zeros_like(weights, dtype=torch.bool)
        for view in range(view_count if views is not None else 1):
            members = valid if views is None else valid & (views == view)
            own = weights.masked_fill(~members[:, None, :], -torch.inf)
            best = own.topk(min(knn, own.shape[2]), dim=2).values
            last = (members.sum(1).clamp(1, best.shape[2]) - 1)[:, None, None].expand(-1, own.shape[1], 1)
            kept |= (own >= best.gather(2, last)) & members[:, None, :]
        weights = weights * kept
    return (weights > 0).float() if binary else weights
