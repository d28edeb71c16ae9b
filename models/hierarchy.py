"""Two levels of groups over the segments of a picture, each level a clustering transformer. Source: HSG (CVPR 2022).

Code: twke18/HSG. Shapes: B pictures, M nodes (segments of a picture, padded), d dimension, F
fine and G coarse groups.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.precision import real
from models.clustering import ClusteringTransformer


def compose(fine_logits: Tensor, coarse_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memberships of both levels and the transition between them: P1 [B,F,M], C [B,G,F], P2 = C P1 [B,G,M].

    fine_logits [B,F,M] of nodes, coarse_logits [B,G,F] of fine groups; a softmax over groups makes them probabilities.
    So the columns of P2 sum to 1. float32 (float64 for float64 logits); gradient reaches both. Padded nodes have
    memberships as well.
    """
    with torch.autocast(fine_logits.device.type, enabled=False):
        fine, transition = (real(logits).softmax(1) for logits in (fine_logits, coarse_logits))
        return fine, transition, transition @ fine


def nested_labels(fine_labels: Tensor, transition: Tensor) -> Tensor:
    """Coarse labels that never split a fine group: int64 labels [B,...] in 0..F-1 and C [B,G,F] -> labels [B,...].

    Every fine group goes as a whole to its likeliest coarse one; the largest entry of P2 may split it. Negative labels
    stay.
    """
    flat = fine_labels.flatten(1)
    return transition.argmax(1).gather(1, flat.clamp(min=0)).where(flat >= 0, flat).view_as(fine_labels)


def group_means(nodes: Tensor, labels: Tensor, padding: Tensor, groups: int, normalise: bool = False) -> Tensor:
    """Mean of the valid nodes of each group, [B,groups,d], zero where it has none; at unit length where asked.

    nodes [B,M,d], labels int64 [B,M] in 0..groups-1, padding bool [B,M] (true: no node). Gradient reaches the nodes.
    """
    kept = labels.where(~padding, groups)
    numbers = torch.arange(groups, device=labels.device)
    members = (kept[:, None, :] == numbers[:, None]).to(nodes.dtype)
    with torch.autocast(nodes.device.type, enabled=False):
        means = (members @ nodes) / members.sum(2, keepdim=True).clamp(min=1)
    return F.normalize(means, dim=2) if normalise else means


class PositionTables(nn.Module):
    """Learned positions of a map: a table of columns and one of rows, half of the dimension each.

    The release fails on maps longer than its tables; here the tables are then resampled linearly to the length wanted.
    """

    def __init__(self, dim: int, length: int = 50):
        super().__init__()
        self.columns = nn.Parameter(torch.rand(length, dim // 2))
        self.rows = nn.Parameter(torch.rand(length, dim - dim // 2))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """[h,w,d]: column part, then row part."""
        rows, columns = (_stretched(table, side) for table, side in zip((self.rows, self.columns), size, strict=True))
        across = columns[None].expand(size[0], -1, -1)
        return torch.cat([across, rows[:, None].expand(-1, size[1], -1)], dim=2)


def _stretched(table: Tensor, length: int) -> Tensor:
    if length <= len(table):
        return table[:length]
    return F.interpolate(table.T[None], size=length, mode="linear", align_corners=True)[0].T


@dataclass(frozen=True)
class Hierarchy:
    """Groups of the nodes of B pictures at both levels. Order of groups: see `ClusteringTransformer`."""

    fine: Tensor
    """P1 [B,F,M], probabilities."""
    coarse: Tensor
    """P2 [B,G,M], probabilities."""
    transition: Tensor
    """C [B,G,F]."""
    fine_centroids: Tensor
    """[B,F,d], not normalised."""
    coarse_centroids: Tensor
    """[B,G,d], not normalised."""

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """The likeliest fine and coarse group of each node, int64 [B,M] each; padded slots have labels as well."""
        return self.fine.argmax(1), self.coarse.argmax(1)

    @property
    def nested(self) -> tuple[Tensor, Tensor]:
        """As `labels`, but every coarse group is a union of fine ones."""
        fine = self.fine.argmax(1)
        return fine, nested_labels(fine, self.transition)


class HierarchicalGrouping(nn.Module):
    """The two transformers with their queries; `groups` is (fine, coarse). Other arguments: `ClusteringTransformer`."""

    def __init__(self, dim: int, groups: tuple[int, int] = (8, 4), **transformer):
        super().__init__()
        self.groups = groups
        self.fine = ClusteringTransformer(dim, **transformer)
        self.coarse = ClusteringTransformer(dim, **transformer, features=False)
        self.fine_queries, self.coarse_queries = (nn.Parameter(torch.randn(count, dim)) for count in groups)

    def forward(self, nodes: Tensor, padding: Tensor, positions: Tensor) -> Hierarchy:
        """nodes [B,M,d] unit prototypes, positions [B,M,d] means over their pixels, padding bool [B,M] (true: no node).

        Gradient reaches nodes and positions.
        """
        centroids, features, logits, _ = self.fine(nodes, padding, self.fine_queries, positions)
        places = group_means(positions, logits.argmax(1), padding, self.groups[0])
        coarse_centroids, _, coarse_logits, _ = self.coarse(features, None, self.coarse_queries, places)
        fine, transition, coarse = compose(logits, coarse_logits)
        return Hierarchy(fine, coarse, transition, centroids, coarse_centroids)
