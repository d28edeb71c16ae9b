"""Concept maps of TransFGU: where a picture supports each concept, from the gradient of its class token.

The loss of concept c is 1 - cos(class token, centroid c), or with another `power` a product of the two. It depends on
the last attention through the class token's row alone, so its gradient by that row is (gradient at the class token's
head outputs) . (value vectors): the small vectors of all concepts come from one batched vector-Jacobian product,
without a backward through the network.

Glossary: B pictures, K concepts, H heads, T = 1 + h w tokens (the class token first), d channels of a head, D = H d.
Source: Yin et al., TransFGU (ECCV 2022).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import exact, real


@torch.no_grad()
def kept_mass(values: Tensor, share: float = 0.8) -> Tensor:
    """The fewest entries of each row [...,L] >= 0 that hold `share` of its sum: bool [...,L]; none where all are zero.

    Entries whose cumulative share, in ascending order, is above 1 - share.
    """
    values = real(values)
    ordered, places = values.sort(dim=-1, stable=True)
    total = ordered.sum(-1, keepdim=True)
    kept = (ordered / torch.where(total > 0, total, 1.0)).cumsum(-1) > 1 - share
    return torch.zeros_like(kept).scatter_(-1, places, kept & (total > 0))


def class_row_gradient(
    attention: Tensor,
    values: Tensor,
    centroids: Tensor,
    token: Callable[[Tensor], Tensor],
    divisor: int = 1,
    power: float = 1.0,
) -> Tensor:
    """Gradient of each concept's loss by the class token's attention, mean over heads, patches only: [B,K,T-1].

    Args:
        attention: [B,H,T] class row of the last attention after its softmax.
        values: [B,H,T,d] value vectors of the last block.
        centroids: [K,D'] concepts, any length.
        token: the class token [B,D'] from its head outputs [B,D] (projection, residual, MLP, norm; the identity where
            there is none). Rows must not depend on each other.
        divisor: the released loss is a mean over the loader's batch, so its gradient is smaller by it.
        power: of the token's length that its product with a concept is divided by. 1, the released cosine, takes the
            token's own direction out of the gradient: what a concept has in common with the whole picture is no
            evidence for it. With 0 the evidence of a place is all that it has in common with the concept.
    """
    with exact(attention.device):
        attention, values = real(attention.detach()), real(values.detach())
        outputs = torch.einsum("bht,bhtd->bhd", attention, values).flatten(1)
        concepts = F.normalize(real(centroids.detach()), dim=1)
        with torch.enable_grad():
            outputs.requires_grad_()
            found = token(outputs)
            likeness = found @ concepts.T / found.norm(dim=1, keepdim=True).clamp(min=1e-12) ** power
        eye = torch.eye(len(concepts), dtype=likeness.dtype, device=likeness.device)
        seeds = -eye[:, None, :].expand(-1, len(likeness), -1) / divisor  # one row a concept
        small = torch.autograd.grad(likeness, outputs, seeds, is_grads_batched=True)[0]  # [K,B,D]
        small = small.unflatten(2, values.shape[1::2])
        return torch.einsum("kbhd,bhtd->bkt", small, values[:, :, 1:]) / values.shape[1]


def concept_maps(attention: Tensor, gradient: Tensor, share: float = 0.8) -> Tensor:
    """Maps of all concepts, [B,K,T-1]: attention divided by its largest entry, plus evidence; 0 where that is against.

    attention [B,H,T] as above; gradient [B,K,T-1] of `class_row_gradient`. Evidence is the negative gradient where it
    is positive, and of it the entries that hold `share` of the sum.
    """
    mean = real(attention.detach()).mean(1)[:, 1:]
    mean = mean / mean.amax(1, keepdim=True)
    evidence = (-gradient).clamp(min=0)
    evidence = evidence * kept_mass(evidence, share)
    return torch.where(gradient > 0, 0.0, mean[:, None] + evidence)
