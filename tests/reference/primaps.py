"""Adapters for the saved cases of PriMaPs-EM: masks, votes, losses, prototypes, scores and whole steps."""

import numpy as np
import torch
from torch import Tensor

from evaluation.crf import DenseCRF, as_bytes
from evaluation.metrics import SegmentationScore
from evaluation.probes import ClusterProbe
from evaluation.readout import upsample
from grouping import principal
from losses.pseudo_labels import balanced_cross_entropy, majority
from models.heads import PrototypeHead
from models.momentum import Momentum, warmed_up
from tests.reference import training as replay

Case = dict[str, np.ndarray]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pictures in the cases of single functions, which do not hold them."""


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def principal_direction(case: Case) -> Case:
    rows, chosen = replay.tensor(case["in_feats"]).flatten(1), replay.tensor(case["in_remaining"]).flatten()
    found = principal.principal_directions(rows[None], chosen[None])
    samples = rows[:, chosen].double()
    centred = samples - samples.mean(1, keepdim=True)
    share = (found[0].double() @ centred).square().sum() / centred.square().sum()
    return {"out_direction": _array(found), "out_explained_share": _array(share)}


def mask_stack(case: Case) -> Case:
    maps, given = replay.tensor(case["in_feats"])[None], replay.tensor(case["in_directions"])[None]
    (found,) = principal.principal_masks(maps, float(case["cfg_threshold"]), given)
    log_probs, background, filtered = principal.label_log_probs(found.masks)
    return {
        "out_num_masks": np.array(len(found.masks)),
        "out_seed_index": _array(found.seeds),
        "out_masks": _array(found.masks),
        "out_remaining": _array(found.left),
        "out_filtered": _array(filtered),
        "out_guarded_background": _array(background),
        "out_guarded_log_probs": _array(log_probs),
    }


def refine_labels(case: Case) -> Case:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    image = as_bytes(replay.tensor(case["in_image"]) * std + mean)
    (beliefs,) = DenseCRF()(image[None], [replay.tensor(case["in_log_probs"])[None]])
    labels = beliefs[0].argmax(0)
    return {"out_labels": _array(torch.where(labels == 0, int(case["cfg_ignore"]), labels))}


def assign_classes(case: Case) -> Case:
    masks, prediction = (replay.tensor(case[name]) for name in ("in_mask_ids", "in_prediction"))
    found = majority(masks, prediction, int(prediction.max()) + 1, int(case["cfg_ignore"]))
    return {"out_pseudo": _array(found)}


def _head(direction: np.ndarray, gain: np.ndarray) -> PrototypeHead:
    """The authors' arrays of any shape [K,C,...] and [K,...]."""
    direction = replay.tensor(direction).flatten(1)
    head = PrototypeHead(direction.shape[1], len(direction))
    head.start(direction)
    head.gain.data.copy_(replay.tensor(gain).flatten())
    return head


def focal_loss(case: Case) -> Case:
    head = _head(case["in_weight_v"], case["in_weight_g"])
    labels = replay.tensor(case["in_pseudo"])
    labels = torch.where(labels == int(case["cfg_ignore"]), 255, labels)
    logits = head(replay.tensor(case["in_feats"]))
    loss, weights = balanced_cross_entropy(logits, labels, float(case["cfg_gamma"]))
    loss.backward()
    return {
        "out_logits": _array(upsample(logits, tuple(labels.shape[-2:]))),
        "out_class_weight": _array(weights),
        "out_loss": _array(loss),
        "out_grad_weight_v": _array(head.direction.grad).reshape(case["in_weight_v"].shape),
        "out_grad_weight_g": _array(head.gain.grad).reshape(case["in_weight_g"].shape),
    }


def ema(case: Case) -> Case:
    directions, gains = case["in_online_v"], case["in_online_g"]
    head = _head(directions[0], gains[0])
    slow = Momentum(head)
    decay, kept = [0.0], [replay.copied(dict(slow.copy.named_parameters()))]
    for count in range(1, len(directions)):
        head.load_state_dict(_head(directions[count], gains[count]).state_dict())
        decay.append(warmed_up(count, float(case["cfg_beta"])))
        slow.update(decay[-1])
        kept.append(replay.copied(dict(slow.copy.named_parameters())))
    found = replay.stacked(kept)
    return {
        "out_decay": np.array(decay),
        "out_ema_v": found["direction"],
        "out_ema_g": found["gain"],
        "out_final_logits": _array(slow(replay.tensor(case["in_feats"]))),
    }


def cluster_loss(case: Case) -> Case:
    codes, directions = replay.tensor(case["in_feats"]), replay.tensor(case["in_weight_v"])
    probe = ClusterProbe(directions.shape[1], len(directions))
    probe.clusters.data.copy_(directions.flatten(1))
    cosines = probe.cosines(codes)
    loss = probe.loss(codes)
    loss.backward()
    return {
        "out_cosine": _array(cosines),
        "out_labels": _array(cosines.max(1).indices),
        "out_loss": _array(loss),
        "out_grad_weight_v": _array(probe.clusters.grad).reshape(case["in_weight_v"].shape),
    }


def pca_init(case: Case) -> Case:
    moments = principal.Moments.of(replay.tensor(case["in_feats"]))
    return {"out_prototypes": _array(moments.directions(int(case["cfg_num_classes"])))}


def metrics(case: Case) -> Case:
    classes = int(case["cfg_num_classes"])
    matching = "hungarian" if bool(case["cfg_hungarian"]) else "identity"
    metric = SegmentationScore(classes + int(case["cfg_extra_clusters"]), classes, matching, "merge")
    for prediction, target in zip(case["in_pred"], case["in_target"], strict=True):
        metric.update(replay.tensor(prediction), replay.tensor(target))
    found = metric.compute()
    return {
        "out_stats": found.counts,
        "out_histogram": found.histogram[:classes],
        "out_miou_percent": np.array(found.miou),
        "out_accuracy_percent": np.array(found.acc),
        "out_class_iou_percent": found.iou,
    }
