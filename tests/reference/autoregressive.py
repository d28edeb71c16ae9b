"""Adapters for the saved cases of the autoregressive method: masked convolutions, orders, blocks, attention, loss."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from losses import information
from models.scratch import ordered, orders
from tests.reference import training as replay

Case = dict[str, np.ndarray]
PARTS = {"qconv": "query", "kconv": "key", "vconv": "value", "att_conv": "project", "out_conv": "merge"}
"""Convolutions of the attention: the reproduction's names and ours."""


def _leaf(case: Case, name: str) -> Tensor:
    return replay.tensor(case[name]).requires_grad_()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def _weights(case: Case, names: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The arrays `w__<layer>__<part>` of a case as a state dict; `names` renames layers."""
    found = [name.split("__")[1:] for name in case if name.startswith("w__")]
    return {
        f"{names[layer] if names else layer}.{part}": replay.tensor(case[f"w__{layer}__{part}"])
        for layer, part in found
    }


def masked_conv(case: Case) -> Case:
    maps, weight = _leaf(case, "in_x"), replay.tensor(case["in_weight"])
    conv = ordered.MaskedConv2d(weight.shape[1], weight.shape[0], weight.shape[2])
    conv.load_state_dict({"weight": weight, "bias": replay.tensor(case["in_bias"])})
    results: dict[str, list[Tensor]] = {"y": [], "grad_x_of_sum_of_squares": [], "grad_weight_of_sum_of_squares": []}
    for order in case["cfg_orderings"]:
        found = conv(maps, int(order))
        grads = torch.autograd.grad(found.square().sum(), [maps, conv.weight])
        for kept, value in zip(results.values(), (found, *grads), strict=True):
            kept.append(value)
    return {f"out_{name}": _array(torch.stack(values)) for name, values in results.items()}


def orderings(case: Case) -> Case:
    side, kernel = int(case["cfg_side"]), int(case["cfg_kernel"])
    conv = ordered.MaskedConv2d(1, 1, kernel)
    picture = torch.zeros(1, 1, 2 * kernel + 1, 2 * kernel + 1, requires_grad=True)
    numbers = tuple(orders.ORDERS)

    def reach(order: int) -> Tensor:
        (seen,) = torch.autograd.grad(conv(picture, order)[0, 0, kernel, kernel], picture)
        return seen[0, 0] != 0

    def stacked(function: Any) -> np.ndarray:
        return np.stack([function(order, side, side).numpy() for order in numbers])

    return {
        "out_conv_reach": np.stack([reach(order).numpy() for order in numbers]),
        "out_pixel_rank": stacked(orders.ranks),
        "out_attention_mask": stacked(ordered.past_mask),
        "out_released_attention_mask": stacked(ordered.misplaced_mask),
    }


def residual_block(case: Case) -> Case:
    maps = replay.tensor(case["in_x"])
    block = ordered.ResidualBlock(maps.shape[1])
    block.load_state_dict(_weights(case))
    return {"out_y": np.stack([_array(block(maps, int(order))) for order in case["cfg_orderings"]])}


def decoder(case: Case) -> Case:
    maps, weight = replay.tensor(case["in_x"]), replay.tensor(case["in_weight"])
    head = ordered.Decoder(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": replay.tensor(case["in_bias"])})
    size = [int(side) * int(case["cfg_upsample"]) for side in maps.shape[-2:]]
    return {"out_probs": _array(head.probabilities(maps, size))}


def attention(case: Case) -> Case:
    """What the reproduction means (the target), and what it does (shown beside)."""
    maps, weights = replay.tensor(case["in_x"]), _weights(case, PARTS)

    def results(rule: str, name: str) -> Case:
        part = ordered.OrderedAttention(maps.shape[1], len(weights["query.weight"]), **ordered.ATTENTION[rule])
        part.load_state_dict(weights)
        return {f"out_{name}_ordering{order}": _array(part(maps, order)) for order in (0, 1, 4)}

    return results("multiplied", "y") | results("reproduction", "released_y")


def mi_loss(case: Case) -> Case:
    first, second, reach = _leaf(case, "in_out1"), _leaf(case, "in_out2"), int(case["cfg_T"])
    joint = information.joint_of_box(first, second, reach)
    pairs = len(first) * (2 * reach + 1) ** 2
    loss = information.information_of_counts(joint, pairs, float(case["cfg_eps"]))
    loss.backward()
    return {"out_loss": _array(loss), "out_grad_out1": _array(first.grad), "out_grad_out2": _array(second.grad)}
