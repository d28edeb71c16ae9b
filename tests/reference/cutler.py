"""Adapters for `cutler.*`: DropLoss, and what stays after a detector has looked again."""

import numpy as np
import torch

from models.detection import losses, merging

Case = dict[str, np.ndarray]


def droploss(case: Case) -> Case:
    """The case counts the object as class 0 and the background as class 1; the loss does not care."""
    boxes, true = (torch.from_numpy(case[f"in_{name}_boxes_xyxy"]) for name in ("pred", "gt"))
    logits, classes = torch.from_numpy(case["in_class_logits"]), torch.from_numpy(case["in_class_target"])
    found = losses.best_overlap(boxes, true)
    weights = losses.drop_weights(found, float(case["cfg_iou_thresh"]))
    results = {
        "out_iou_max": found,
        "out_weights": weights,
        "out_loss_cls": losses.class_loss(logits, classes, weights),
        "out_loss_cls_no_drop": losses.class_loss(logits, classes, losses.drop_weights(found, None)),
    }
    return {name: value.numpy() for name, value in results.items()}


def selftrain_merge(case: Case) -> Case:
    old, new = (torch.from_numpy(case[f"in_{name}_masks"]) for name in ("old", "pred"))
    scores = torch.from_numpy(case["in_pred_scores"])
    found = merging.merge(old, new, scores, float(case["cfg_score_threshold"]), float(case["cfg_iou_threshold"]))
    results = {"out_pred_kept": found.new, "out_iou": found.shared, "out_old_kept": found.old}
    return {name: value.numpy() for name, value in results.items()}
