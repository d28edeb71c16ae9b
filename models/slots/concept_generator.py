"""From vectors that all pictures share to concepts of one picture (ACSeg, Li et al., CVPR 2023, section 3).

Blocks of cross-attention from the concepts to the patches, attention among the concepts, and two layers for each; no
release says how they are normed, see NORMS. B pictures, P patches, C channels, M concepts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError, one_of
from common.precision import real

NORMS = ("pre", "output")
"""Where a block has its three layer norms: on what enters each part (`pre`), or on what leaves it, before that is added
to the concepts (`output`). Weights have the same shapes."""
INPUTS = ("unit", "raw")
"""Of patches as keys and values: at a root mean square of 1, since cosines do not see lengths, or as they come."""
USUAL_HEADS = 6


class ConceptGenerator(nn.Module):
    """Patches [B,P,C] -> concepts [B,M,C] in the same space.

    Attributes:
        prototypes: [M,C], what the concepts of every picture begin as; standard normal.

    Args:
        heads: of both attentions; None: the largest number up to 6 that divides C.
        hidden: width between the two layers.
        norm: see NORMS.
        start: what each part adds at first, as a share of what torch's initialisation makes it add. Small, the concepts
            begin as the prototypes, which differ; at 1 what is common to all of them moves them all to one group.
        inputs: see INPUTS.

    Raises ConfigError for heads that do not divide C, and for unknown words.
    """

    def __init__(
        self, count: int, dim: int, *, layers: int = 6, heads: int | None = None, hidden: int = 1024, norm: str = "pre",
        inputs: str = "unit", start: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        one_of("norm", norm, NORMS)
        one_of("inputs", inputs, INPUTS)
        if heads is None:
            heads = max(n for n in range(1, USUAL_HEADS + 1) if dim % n == 0)
        if dim % heads:
            raise ConfigError(
                f"method.generator.heads={heads}: must divide the {dim} channels of the features; choose a divisor, or "
                "null for the largest up to 6"
            )
        self.inputs = inputs
        self.prototypes = nn.Parameter(torch.randn(count, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, norm == "pre", start) for _ in range(layers))

    def forward(self, patches: Tensor, left_out: Tensor | None = None) -> Tensor:
        """`left_out` bool [B,P]: patches that no concept looks at (padding); at least one stays in each picture."""
        if self.inputs == "unit":
            patches = F.normalize(real(patches), dim=2) * patches.shape[2] ** 0.5
        concepts = self.prototypes.expand(len(patches), -1, -1)
        for block in self.blocks:
            concepts = block(concepts, patches, left_out)
        return concepts


class Block(nn.Module):
    """Cross-attention, attention among the concepts, two layers with GELU; each is added to what it began with."""

    def __init__(self, dim: int, heads: int, hidden: int, before: bool, start: float) -> None:
        super().__init__()
        self.before = before
        self.cross = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.own = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        with torch.no_grad():
            ends = (self.cross.out_proj, self.own.out_proj, self.layers[2]) if before else self.norms
            for value in (value for end in ends for value in (end.weight, end.bias)):
                value.mul_(start)

    def forward(self, concepts: Tensor, patches: Tensor, left_out: Tensor | None) -> Tensor:
        def cross(x: Tensor) -> Tensor:
            return few_queries(self.cross, x, patches, left_out)

        def own(x: Tensor) -> Tensor:
            return self.own(x, x, x, need_weights=False)[0]

        for part, norm in zip((cross, own, self.layers), self.norms, strict=True):
            concepts = concepts + (part(norm(concepts)) if self.before else norm(part(concepts)))
        return concepts


def few_queries(attention: nn.MultiheadAttention, queries: Tensor, rows: Tensor, left_out: Tensor | None) -> Tensor:
    """What `attention` gives for queries [B,M,C] over rows [B,P,C] as keys and values, [B,M,C]; without dropout.

    Where M is small it is cheaper to project the queries back to the rows, and what was gathered of the rows forward,
    than all rows to keys and values. Keys' bias adds the same to all rows and is lost in the softmax. left_out: see
    `ConceptGenerator.forward`.
    """
    heads, dim = attention.num_heads, queries.shape[2]
    to_query, to_key, to_value = attention.in_proj_weight.split(dim)
    of_query, _, of_value = attention.in_proj_bias.split(dim)
    asked = F.linear(queries, to_query, of_query).unflatten(2, (heads, -1))  # [B,M,H,d]
    asked = torch.einsum("bmhd,hdc->bmhc", asked, to_key.unflatten(0, (heads, -1))).flatten(1, 2)
    logits = asked @ rows.to(asked.dtype).mT * (dim // heads) ** -0.5  # [B,M*H,P]
    if left_out is not None:
        logits = logits.masked_fill(left_out[:, None], -torch.inf)
    gathered = logits.softmax(2).to(asked.dtype) @ rows.to(asked.dtype)
    gathered = gathered.unflatten(1, (-1, heads))
    found = torch.einsum("bmhc,hdc->bmhd", gathered, to_value.unflatten(0, (heads, -1))).flatten(2)
    return attention.out_proj(found + of_value)
