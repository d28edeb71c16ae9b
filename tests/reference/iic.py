"""Adapters for the saved cases of IIC: loss, sparse shift, edges, network, read-out and whole epochs."""

import ast

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import SegmentationScore
from losses import information
from models.scratch import net10a as networks
from tests.reference import iic_training
from tests.reference import training as replay

Case = dict[str, np.ndarray]

training = iic_training.training


def _leaf(case: Case, name: str) -> Tensor:
    return replay.tensor(case[name]).requires_grad_()


def _loss(case: Case, collapsed: bool) -> Case:
    first, second = _leaf(case, "in_x1"), _leaf(case, "in_x2")
    found = information.mutual_information(
        first,
        second,
        int(case["cfg_half_T_side_dense"]),
        float(case["cfg_lamb"]),
        collapsed,
        mask=replay.tensor(case["in_mask"]),
        to_first=replay.tensor(case["in_affine2_to_1"]),
        align_corners=bool(case["cfg_align_corners"]),
        sparse_shift=tuple(int(value) for value in case["in_sparse_shift_xy"]),
    )
    found.loss.backward()
    return {
        "out_loss": found.loss.detach().numpy(),
        "out_loss_no_lamb": found.plain.detach().numpy(),
        "out_grad_x1": first.grad.numpy(),
        "out_grad_x2": second.grad.numpy(),
    }


def loss_collapsed(case: Case) -> Case:
    return _loss(case, collapsed=True)


def loss_uncollapsed(case: Case) -> Case:
    return _loss(case, collapsed=False)


def sparse_shift(case: Case) -> Case:
    x, y = (int(value) for value in case["in_shift_xy"])
    return {"out_data": information.shifted(replay.tensor(case["in_data"]), x, y).numpy()}


def sobel(case: Case) -> Case:
    """The saved pictures carry their grey; edges are taken of that."""
    image = replay.tensor(case["in_image"])
    colours = 3 if case["cfg_include_rgb"] else 0
    grey, infrared = image[:, colours : colours + 1], image[:, colours + 1 :]
    edges = networks.sobel(grey)
    return {"out_image": torch.cat([image[:, :colours], edges, infrared], 1).numpy()}


def trunk_narrow(case: Case) -> Case:
    image = replay.tensor(case["in_image"])
    net = network(str(case["cfg_layers"]), image.shape[1]).eval()
    net.load_state_dict({key.removeprefix("w."): replay.tensor(case[key]) for key in case if key.startswith("w.")})
    with torch.no_grad():
        return {"out_feats": net(image)[-1].numpy()}


def head(case: Case) -> Case:
    features, weights = replay.tensor(case["in_feats"]), replay.tensor(case["in_weights"])
    size = (int(case["cfg_input_sz"]),) * 2
    heads = networks.InformationHead(features.shape[1], weights.shape[1], int(case["cfg_num_sub_heads"]))
    heads.load_state_dict({f"heads.{number}.weight": value for number, value in enumerate(weights)})
    with torch.no_grad():
        return {"out_probs": torch.stack(heads(features, size)).numpy()}


def match(case: Case) -> Case:
    clusters, classes = int(case["cfg_preds_k"]), int(case["cfg_targets_k"])
    policy = {"hung": "hungarian", "orig": "many_to_one"}[str(case["cfg_mode"])]
    metric = SegmentationScore(clusters, classes, matching=policy)
    predicted, true = replay.tensor(case["in_preds"]), replay.tensor(case["in_targets"])
    metric.update(predicted, true)
    scores = metric.compute()
    return {
        "out_match_pred": np.arange(clusters),
        "out_match_target": scores.mapping,
        "out_reordered": scores.mapping[case["in_preds"]],
        "out_accuracy": np.array(scores.acc / 100),
    }


def network(layers: str, channels: int, **settings) -> networks.Net10a:
    """The network of a case's list of (width, dilation) and ('M', None)."""
    convolutions = [layer for layer in ast.literal_eval(layers) if layer[0] != "M"]
    assert tuple(dilation for _, dilation in convolutions) == networks.DILATIONS
    return networks.Net10a(channels, [width for width, _ in convolutions], **settings)
