"""By the attention of the class token: the object of a picture, after MaskDistill (Van Gansbeke et al., 2022), and all
of its foreground, after Leopart (Ziegler and Asano, CVPR 2022).

The object: patches that the class token looks at vote, by their keys, for all patches that are like them; the mask is
what gets a positive vote and hangs together with the patch that is looked at most. The released code multiplies all
keys with all keys; one product with the sum of the voters' keys gives the same.
Shapes: B pictures, L heads, N = h*w patches (row by row), T tokens, d numbers of a head, C = L*d, n patches chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from common.errors import ConfigError, one_of
from common.precision import exact, real
from grouping.masks import component_at, without_specks

TOPK_POLICIES = ("stable", "positive_only", "released")
"""Which patches are chosen where fewer than n have a score above 0, after the filter has set the others to 0: `stable`
fills up with those of equal score in raster order, `positive_only` does without them, `released` takes the order of
`torch.topk`, which leaves that of equals open."""


@dataclass(frozen=True)
class AttentionMasks:
    """What was found in B pictures. No gradient."""

    masks: Tensor
    """bool [B,h,w]: the object; 4-connected."""
    sources: Tensor
    """int64 [B]: the patch of the largest score, which the object holds."""
    chosen: list[Tensor]
    """int64 [n] of each picture: the patches that may vote, from the largest score down."""
    kept: Tensor
    """bool [B,N]: patches that the mass filter left."""
    seeds: Tensor
    """float32 [B,N]: the row of the source in the graph of keys; of the chosen, those above 0 vote."""


@torch.no_grad()
def class_scores(queries: Tensor, keys: Tensor, prefix: int = 1, heads: Sequence[int] | None = None) -> Tensor:
    """How much the class token (token 0) looks at each patch, float32 [B,N]: mean over heads of query-key products.

    queries, keys [B,L,T,d] as projected, without scale and softmax; patches begin at token `prefix`. heads: which are
    averaged (all where None; the release leaves out the last of six). Raises ConfigError for a head that is not there.
    """
    count = queries.shape[1]
    heads = list(range(count) if heads is None else heads)
    if not heads or min(heads) < 0 or max(heads) >= count:
        raise ConfigError(f"heads={heads}: the network has heads 0 to {count - 1}; name some of them")
    with exact(queries.device):
        rows = real(queries)[:, heads, :1] @ real(keys)[:, heads, prefix:].mT
    return rows.squeeze(2).mean(1)


def mass_filter(scores: Tensor, mass: float) -> Tensor:
    """The patches that hold the share `mass` of the sum of scores [B,N]: bool [B,N].

    Scores are added up from the smallest; a patch stays where the share so far is above 1 - mass. With scores below 0,
    as released, shares may fall again on the way.
    """
    ordered, order = scores.sort(dim=1)
    share = (ordered / scores.sum(1, keepdim=True)).cumsum(1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, share > 1 - mass)


@torch.no_grad()
def attention_foreground(
    weights: Tensor, mass: float = 0.65, *, sigma: float = 0.6, kernel: int = 7, specks: int = 2
) -> Tensor:
    """The cells that hold the share `mass` of the class token's attention [B,h,w], once it is blurred: bool [B,h,w].

    weights: after the softmax, heads averaged, any sum. sigma and kernel (odd) of the Gaussian in cells, borders
    reflected; on a grid too small for it the kernel shrinks. Pieces of at most `specks` cells (8-connected) are left
    out. Float32 inside, also under autocast. Leopart trains with a mass of 0.6 and reads out with 0.65.
    """
    rows = real(weights)
    if min(rows.shape[-2:]) > 1:
        widths = [min(kernel, 2 * side - 1) for side in (rows.shape[-1], rows.shape[-2])]
        with exact(rows.device):
            rows = gaussian_blur(rows, widths, [sigma, sigma])
    kept = mass_filter(rows.flatten(1), mass).view_as(rows)
    return without_specks(kept, specks + 1)


@torch.no_grad()
def attention_masks(
    scores: Tensor,
    keys: Tensor,
    size: tuple[int, int],
    *,
    topk: float = 0.4,
    mass: float = 0.5,
    topk_policy: str = "stable",
) -> AttentionMasks:
    """One mask a picture; detached, float32 inside, also under autocast.

    scores [B,N] as of `class_scores`, keys [B,N,C] of all heads side by side, as projected; size h, w. topk: share of
    the N patches that are chosen (at least one). mass: see `mass_filter`. topk_policy: see TOPK_POLICIES.
    Raises ConfigError for an unknown policy and shares outside 0 to 1.
    """
    one_of("topk_policy", topk_policy, TOPK_POLICIES)
    for name, value in (("topk", topk), ("mass", mass)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name}={value:g}: expected a share above 0, at most 1")
    scores, keys = real(scores), real(keys)
    kept = mass_filter(scores, mass)
    left = scores * kept
    count = max(1, int(topk * scores.shape[1]))
    if topk_policy == "released":
        order = left.topk(count, dim=1, sorted=True).indices
    else:
        order = left.sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = list(order)
    if topk_policy == "positive_only":
        chosen = [row[: max(1, int((values[row] > 0).sum()))] for row, values in zip(order, left, strict=True)]
    with exact(scores.device):
        seeds = (keys @ keys.gather(1, order[:, :1, None].expand(-1, -1, keys.shape[2])).mT).squeeze(2)
        found = [_object(*parts, size) for parts in zip(keys, seeds, chosen, strict=True)]
    masks = torch.stack(found) if found else kept.new_zeros(0, *size)
    return AttentionMasks(masks, order[:, 0], chosen, kept, seeds)


def _object(keys: Tensor, seeds: Tensor, chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask bool [h,w] of one picture from keys [N,C], the source's row [N] and the patches that may vote [n]."""
    voters = chosen[seeds[chosen] > 0]
    votes = keys @ keys[voters].sum(0)
    return component_at((votes > 0).unflatten(0, size), int(chosen[0]), connectivity=4)
