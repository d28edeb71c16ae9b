"""The clustering transformer of HSG (CVPR 2022): queries gather the segments of a picture into groups.

As DETR's transformer (post-norm, positions added to queries and keys), with batch norms in the place of layer norms,
an initial target made from mean and spread of the encoded nodes, and groups ordered by their largest logit. Source:
HSG (CVPR 2022), twke18/HSG. Shapes: B pictures, M nodes, K queries, d dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.errors import ConfigError
from common.precision import real

_FLOOR = 1e-12
"""Added to a sum of squares before its root, whose gradient at zero is infinite."""


class NodeNorm(nn.Module):
    """Batch norm over the rows [M,B,d] of all pictures and all ranks; padded rows count only where no mask is given.

    As torch's SyncBatchNorm in training (running variance unbiased), running statistics in evaluation. Statistics are
    float32 under any precision.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, rows: Tensor, padding: Tensor | None = None) -> Tensor:
        """Rows [...,d] and padding bool [...] -> the same shape, float32 (float64 for float64 rows)."""
        rows = real(rows)
        if padding is None and not (self.training and distributed.active()):
            state = self.running_mean, self.running_var, self.weight, self.bias
            channels = rows.transpose(1, -1)
            return F.batch_norm(channels, *state, self.training, self.momentum, self.eps).transpose(1, -1)
        mean, variance = self._batch(rows, padding) if self.training else (self.running_mean, self.running_var)
        return (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias

    def _batch(self, rows: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = torch.ones_like(rows[..., :1]) if padding is None else (~padding)[..., None].to(rows.dtype)
        axes = tuple(range(rows.dim() - 1))
        sums = _over_ranks(torch.cat([(rows * kept).sum(axes), kept.sum()[None]]))
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        variance = _over_ranks(((rows - mean).square() * kept).sum(axes)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return mean, variance


def _over_ranks(values: Tensor) -> Tensor:
    return distributed.gather(values[None], grad=True).sum(0)


class Projection(nn.Module):
    """BN(W ReLU(x)), without bias: the two heads on the decoded queries."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        self.norm = NodeNorm(dim)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(self.linear(F.relu(rows)))


class Attention(nn.MultiheadAttention):
    """torch's attention, its weights and their names, over rows [n,B,d] and keys and values [m,B,d].

    Where queries and keys are the same rows, as in all self-attention here, one product makes both of them.
    """

    def forward(self, rows: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> Tensor:
        """What each row finds, [n,B,d]; hidden bool [B,m]: not attended to. Rows that are keys are the same object."""
        dim, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if rows is keys:
            asked, placed = F.linear(rows, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, dim=2)
        else:
            asked = F.linear(rows, weight[:dim], bias[:dim])
            placed = F.linear(keys, weight[dim : 2 * dim], bias[dim : 2 * dim])
        held = F.linear(values, weight[2 * dim :], bias[2 * dim :])
        shown = None if hidden is None else ~hidden[:, None, None]
        parts = (part.unflatten(2, (self.num_heads, -1)).permute(1, 2, 0, 3) for part in (asked, placed, held))
        found = F.scaled_dot_product_attention(*parts, shown, self.dropout if self.training else 0.0)
        return self.out_proj(found.permute(2, 0, 1, 3).flatten(2))


class Layer(nn.Module):
    """An encoder layer, or with `cross` a decoder layer."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, cross: bool):
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.attention_norm = NodeNorm(dim)
        self.cross = Attention(dim, heads, dropout) if cross else None
        self.cross_norm = NodeNorm(dim) if cross else None
        self.widen, self.narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.output_norm = NodeNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        rows: Tensor,
        positions: Tensor,
        hidden: Tensor | None = None,
        counted: Tensor | None = None,
        memory: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """rows, positions [n,B,d]; hidden bool [B,n]: not attended to; counted bool [n,B]: padding of the norms;
        memory: nodes [M,B,d], the same with positions, and their padding [B,M]."""
        placed = rows + positions
        found = self.attention(placed, placed, rows, hidden)
        rows = self.attention_norm(rows + self.dropout(found), counted)
        if self.cross is not None:
            values, keys, padding = memory
            found = self.cross(rows + positions, keys, values, padding)
            rows = self.cross_norm(rows + self.dropout(found))
        found = self.narrow(self.dropout(F.relu(self.widen(rows))))
        return self.output_norm(rows + self.dropout(found), counted)


class ClusteringTransformer(nn.Module):
    """Nodes of a picture -> K groups: centroids, features for the next level, and logits of every node.

    Args:
        dim: d of nodes, positions and queries.
        heads, layers, hidden, dropout: of encoder and decoder; `hidden` is the width of the feed-forward parts.
        faithful: padded slots count in the statistics of the batch norms, in the spread of the nodes and in the order
            of the groups, as released; results then depend on how many slots there are. False: they count nowhere.
        features: whether a next level needs features; DDP wants no parameter without a gradient.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        layers: int = 2,
        hidden: int = 256,
        dropout: float = 0.1,
        faithful: bool = False,
        features: bool = True,
    ):
        super().__init__()
        self.dim, self.faithful = dim, faithful
        self.encoder = nn.ModuleList(Layer(dim, heads, hidden, dropout, cross=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(dim, heads, hidden, dropout, cross=True) for _ in range(layers))
        self.decoder_norm = NodeNorm(dim)
        self.summary = nn.Linear(2 * dim, 2 * dim, bias=False)
        self.summary_norm = NodeNorm(2 * dim)
        self.target = nn.Linear(2 * dim, dim)
        for name, weight in self.named_parameters():  # the projections below keep torch's default
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
            elif name.endswith(("in_proj_bias", "out_proj.bias")):
                nn.init.zeros_(weight)
        self.centroids, self.features = Projection(dim), Projection(dim) if features else None

    def forward(
        self, nodes: Tensor, padding: Tensor | None, queries: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Centroids [B,K,d], features [B,K,d] or None, logits [B,K,M] and encoded nodes [B,M,d], float32.

        nodes and positions [B,M,d], padding bool [B,M] (true: no node; a picture has at least one) or None, queries
        [K,d]. Groups come by descending largest logit, so a group belongs to no fixed query. Logits of padded slots are
        as the encoder left them; without `faithful` they do not decide the order.

        Raises:
            ConfigError: training with one picture in all: batch norm over pictures needs two.
        """
        if self.training and len(nodes) * distributed.world_size() < 2:
            raise ConfigError("data.batch_size=1: the clustering transformer normalises over pictures; use 2 or more")
        with torch.autocast(nodes.device.type, enabled=False):
            nodes, positions = (real(rows).transpose(0, 1) for rows in (nodes, positions))
            counted = None if self.faithful or padding is None else padding.T
            memory = nodes
            for layer in self.encoder:
                memory = layer(memory, positions, padding, counted)
            summary = self.summary_norm(self.summary(torch.cat(self._spread(memory, padding), dim=1)))
            groups = self.target(F.relu(summary)).repeat(len(queries), 1, 1)
            asked = real(queries)[:, None].expand_as(groups)
            for layer in self.decoder:
                groups = layer(groups, asked, memory=(memory, memory + positions, padding))
            groups, memory = self.decoder_norm(groups).transpose(0, 1), memory.transpose(0, 1)
            rows = groups.flatten(0, 1)
            centroids, features = (
                None if head is None else head(rows).view_as(groups) for head in (self.centroids, self.features)
            )
            logits = centroids @ memory.mT / self.dim**0.5
            judged = logits if padding is None or self.faithful else logits.masked_fill(padding[:, None], -torch.inf)
            order = judged.amax(2).argsort(dim=1, descending=True, stable=True)[:, :, None]
            parts = (centroids, features, logits)
            ordered = (None if part is None else part.gather(1, order.expand_as(part)) for part in parts)
            return *ordered, memory

    def _spread(self, memory: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the encoded nodes [M,B,d], both [B,d]."""
        if padding is None:
            return memory.mean(0), _root(memory.var(0))
        kept = (~padding).T[:, :, None].to(memory.dtype)
        count, inside = kept.sum(0), memory * kept
        mean = inside.sum(0) / count.clamp(min=1)
        if self.faithful:  # a padded slot counts as a node at zero
            return mean, _root((inside - mean).square().sum(0) / (count + 1))
        return mean, _root(((memory - mean) * kept).square().sum(0) / (count - 1).clamp(min=1))


def _root(values: Tensor) -> Tensor:
    return (values + _FLOOR).sqrt()
