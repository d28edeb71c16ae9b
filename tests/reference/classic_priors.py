"""Adapters for the saved cases of IIC's trained baselines: places of patches, what is cut out there, and losses."""

import numpy as np
from torch import Tensor

from lightning_modules.patch_pairs import places
from lightning_modules.patch_pairs.base import mean_cost
from lightning_modules.patch_pairs.context_prediction import ContextPrediction
from lightning_modules.patch_pairs.cooccurrence import log_loss
from tests.reference.training import tensor

Case = dict[str, np.ndarray]


def _frame(case: Case) -> tuple[tuple[int, int], int]:
    size = int(case["cfg_input_size"])
    return (size, size), int(case["cfg_patch_side"])


def context_patches(case: Case) -> Case:
    first, other = places.in_direction(
        case["in_uniform_centre"], case["in_uniform_radius"], case["in_position"], *_frame(case)
    )
    return {"out_centre": first, "out_other": other}


def cooccurrence_patches(case: Case) -> Case:
    adjacent = case["in_uniform_adjacent"] < places.ADJACENT
    first, other = places.adjacent_or_far(
        case["in_uniform_centre"], adjacent, case["in_draw_a"], case["in_draw_b"], *_frame(case)
    )
    return {"out_centre": first, "out_other": other, "out_adjacent": adjacent}


def patch_pair(case: Case) -> Case:
    maps, side = tensor(case["in_features"]), int(case["cfg_patch_side"])
    return {
        f"out_patch_{name}": places.cut_features(
            maps, _everywhere(case, name, len(maps)), side, tuple(maps.shape[-2:])
        ).numpy()
        for name in ("centre", "other")
    }


def _everywhere(case: Case, name: str, pictures: int) -> Tensor:
    """The place of a case, one for the whole batch, for each picture [B,2]."""
    return tensor(case[f"in_{name}"]).expand(pictures, 2)


def _loss(case: Case, costs_of) -> Case:
    logits, mask = tensor(case["in_logits"]).requires_grad_(), tensor(case["in_mask"]).bool()
    kept = places.counted(mask, *(_everywhere(case, name, len(mask)) for name in ("centre", "other")))
    loss = mean_cost(costs_of(logits), kept, kept.sum())
    loss.backward()
    return {"out_loss": loss.detach().numpy(), "out_grad_logits": logits.grad.numpy()}


def context_loss(case: Case) -> Case:
    target = tensor(case["cfg_position"]).expand(len(case["in_logits"]))
    return _loss(case, lambda logits: ContextPrediction.losses(logits, target))


def cooccurrence_loss(case: Case) -> Case:
    target = tensor(case["cfg_adjacent"]).expand(len(case["in_logits"]))
    return _loss(case, lambda logits: log_loss(logits[:, 0], target, "probabilities"))
