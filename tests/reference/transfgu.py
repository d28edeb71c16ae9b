"""Adapters for `transfgu.*`: windows, concept maps, mask transformer, losses, scores and whole steps of TransFGU."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics import SegmentationScore
from grouping import concepts as maps
from grouping import segments, windows
from lightning_modules.transfgu.module import TransFGU
from losses import concepts
from models.mask_decoder import MaskDecoder
from retrieval import kmeans
from tests.reference import training as replay

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _bootstrap(case: Case, things: bool) -> Case:
    logits = _tensor(case["in_logits"]).requires_grad_()
    taught = bool(case["cfg_has_teacher"])
    teacher = _tensor(case["in_teacher_logits"]) if taught else None
    soft, _, evidence = concepts.soft_labels(_tensor(case["in_pseudo_label"]), teacher, background=things)
    permutation = _tensor(case["in_negative_permutation"]) if taught else None
    alpha = concepts.negative_weight(int(case["cfg_epoch_since_reset"])) if taught else 0.0
    loss = concepts.bootstrapped(logits, soft, permutation, alpha)
    unsure = concepts.thing_uncertainty(logits, evidence) if things else concepts.uncertainty(logits)
    total = loss.mean() + 0.3 * unsure.mean()
    total.backward()
    results = {
        "out_labels": soft.argmax(1),
        "out_loss_cat": loss,
        "out_loss_uncertainty": unsure,
        "out_mean_loss_cat": loss.mean(),
        "out_mean_loss_uncertainty": unsure.mean(),
        "out_weighted_sum": total,
        "out_grad_logits": logits.grad,
    }
    return {name: value.detach().numpy() for name, value in results.items()}


def things_bootstrap_loss(case: Case) -> Case:
    return _bootstrap(case, things=True)


def thingstuff_bootstrap_loss(case: Case) -> Case:
    return _bootstrap(case, things=False)


def cls_emb_loss(case: Case) -> Case:
    rows = _tensor(case["in_cls_emb"]).requires_grad_()
    pairs = concepts.embedding_diversity(rows)
    pairs.mean().backward()
    results = {"out_loss_pairs": pairs, "out_loss_mean": pairs.mean(), "out_grad_cls_emb": rows.grad}
    return {name: value.detach().numpy() for name, value in results.items()}


def binarize_mask(case: Case) -> Case:
    return {"out_mask": maps.kept_mass(_tensor(case["in_values"]), float(case["cfg_keep_fraction"])).numpy()}


def concept_map(case: Case) -> Case:
    row, values = _tensor(case["in_attn"])[:, :, 0], _tensor(case["in_values"])
    gradient = maps.class_row_gradient(row, values, _tensor(case["in_centroids"]), lambda x: x, divisor=len(row))
    found = maps.concept_maps(row, gradient, float(case["cfg_keep_fraction"]))
    return {"out_maps": found.unflatten(2, (int(case["cfg_h"]), int(case["cfg_w"]))).numpy()}


def kmeans_centroids(case: Case) -> Case:
    """Centroids are plain means of their members, in lexicographic order."""
    points, count = _tensor(case["in_features"]), int(case["cfg_k"])
    settings = {"spherical": False, "seed": int(case["cfg_seed"]), "iterations": int(case["cfg_niter"])}
    found = kmeans.fit(points, count, **settings)
    labels = kmeans.assign(points, found.centroids, spherical=False)
    means = segments.segment_means(points, labels, count)
    order = np.lexsort(means.numpy().T[::-1])
    return {"out_centroids_sorted": means.numpy()[order], "out_labels_sorted": order.argsort()[labels.numpy()]}


def crop_boxes(case: Case) -> Case:
    boxes, counts = windows.crop_boxes(int(case["cfg_h"]), int(case["cfg_w"]), case["cfg_scales"].tolist())
    return {"out_boxes_y0x0y1x1_inclusive": boxes.numpy(), "out_count_per_scale": np.array(counts)}


def mask_decoder(case: Case) -> Case:
    weights = {name.removeprefix("w."): _tensor(value) for name, value in case.items() if name.startswith("w.")}
    dim, in_dim = weights["proj_dec.weight"].shape
    ratio = weights["blocks.0.mlp.fc1.weight"].shape[0] / dim
    settings = {"layers": int(case["cfg_layers"]), "heads": int(case["cfg_heads"]), "mlp_ratio": ratio}
    network = MaskDecoder(in_dim, weights["cls_emb"].shape[1], dim, **settings).eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        _, classes, masks = network(_tensor(case["in_patch_tokens"]))
    return {"out_masks": masks.numpy(), "out_cls_embeddings": classes.numpy()}


def hungarian_metric(case: Case) -> Case:
    """Ours has clusters in rows and orders scores by class."""
    count = int(case["cfg_n_class"])
    metric = SegmentationScore(count, count)
    metric.update(_tensor(case["in_preds"]), _tensor(case["in_labels"]))
    found = metric.compute()
    cluster_of = found.mapping.argsort()
    counts = found.counts.T
    recalls = np.diagonal(found.histogram) / np.maximum(found.histogram.sum(0), 1)
    recalls = np.where(found.histogram.sum(0) > 0, recalls, np.nan)
    return {
        "out_histogram": counts.astype(float),
        "out_match_gt": np.arange(count),
        "out_match_cluster": cluster_of,
        "out_histogram_reordered": counts[found.mapping].astype(float),
        "out_iou_by_cluster": found.iou[found.mapping],
        "out_mean_iou": np.array(found.miou),
        "out_pixel_accuracy": np.array(found.acc),
        "out_mean_class_accuracy": np.array(100 * np.nanmean(recalls)),
    }


# Whole steps.


def training(case: Case) -> Case:
    """Whole steps of the released loop with its restarts, and its evaluation, by the real method."""
    views, maps = (_tensor(case[name]) for name in ("in_views", "in_maps"))
    batches = [
        replay.batch(views[step], None, augmented=views[step], **{"augmented.maps": maps[step]})
        for step in range(len(views))
    ]
    # Steps are counted from 0 in some cases and from 1 in others: the last one has a teacher.
    taught = case.get("in_permutation_steps", np.zeros(0, np.int64))
    first = int(taught.max()) - (len(views) - 1) if len(taught) else 0
    permutations = dict(zip((taught - first).tolist(), _tensor(case.get("in_permutations", taught)), strict=True))
    classes = case["in_initial__decoder.cls_emb"].shape[1]
    drawn = {
        "_maps": lambda self, batch, size: resized(batch["augmented.maps"], size),
        "_permutation": lambda self: permutations[int(self.global_step)],
    }
    with tempfile.TemporaryDirectory() as name, patch.multiple(TransFGU, **drawn):
        folder = Path(name)
        model = replay.method(case, _words(case, classes), folder, classes)
        for copy in (model.teacher, model.initial):
            copy.load_state_dict(model.decoder.state_dict())
        data = replay.Recorded(batches, _per_epoch(case))
        steps = replay.train(model, data, folder, len(batches), watch=lambda model: {"restarts": model.restarts})
        results: Case = {}
        if "in_val_images" in case:
            found = replay.scores(model, steps, replay.pictures(case["in_val_images"]), case["in_val_labels"])["own"]
            results["out_scores"] = np.array([found.miou, found.acc])
    logged, restarts = steps.logged, steps.seen["restarts"]
    terms = {name: name for name in ("cross_entropy", "uncertainty", "diversity")} | {"total": "loss"}
    results |= {f"out_{name}": logged[ours] for name, ours in terms.items()}
    results |= {name: value for name, value in steps.first_gradients(clipped=True).items() if "decoder" in name}
    last = len(views) - 1
    at = [int(restarts.argmax()) - 1, int(restarts.argmax()), last] if restarts.any() else [last]
    results |= {name: value for name, value in steps.after(at).items() if name.startswith("out_after__decoder.")}
    if restarts.any():
        teacher = steps.after(at[1:2])
        results |= {name: value for name, value in teacher.items() if name.startswith("out_after__teacher.")}
    return results | {"out_after_steps": np.array(at) + first}


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps on another grid than the tokens', as the release brings them there."""
    return maps if tuple(maps.shape[-2:]) == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _setting(case: Case, *names: str, default: Any) -> Any:
    """The first of these `cfg_` values that a case has; the released one where it names none of them."""
    return next((case[f"cfg_{name}"].tolist() for name in names if f"cfg_{name}" in case), default)


def _per_epoch(case: Case) -> int:
    epochs = _setting(case, "epochs", "num_epochs", default=4)
    return int(_setting(case, "steps_per_epoch", "epoch_steps", default=len(case["in_views"]) // epochs))


def _words(case: Case, classes: int) -> list[str]:
    """Shapes are those of the arrays; the page of the kind names no `cfg_` value but says which were the run's."""
    views, maps = case["in_views"].shape, case["in_maps"].shape
    dim = case["in_initial__decoder.cls_emb"].shape[2]
    weights = _setting(case, "weights", "loss_weights", default=[1.0, 0.3, 1.0])
    named = (("cross_entropy", "cat"), ("uncertainty", "unc"), ("diversity", "emb"))
    weights = [
        _setting(case, *(f"weight_{name}" for name in names), *(f"{name}_weight" for name in names), default=value)
        for names, value in zip(named, weights, strict=True)
    ]
    intervals = _setting(case, "interval", "intervals", "restart_interval", "teacher_update_interval", default=2)
    start = _setting(case, "start", "start_epoch", "restart_start", "bootstrapping_start_epoch", default=2)
    lr = _setting(case, "lr", "lr_decoder", "learning_rate", default=1e-4)
    decay = _setting(case, "decay", "weight_decay", "wd", default=5e-4)
    clamp = _setting(case, "clamp", "clip", "clip_value", "grad_clamp", default=1.0)
    heads = _setting(case, "decoder_heads", "dec_heads", "heads_decoder", default=case["cfg_heads"].item())
    layers = len({name.split(".")[2] for name in case if name.startswith("in_initial__decoder.blocks.")})
    ratio = case["in_initial__decoder.blocks.0.mlp.fc1.weight"].shape[0] / dim
    dropout = _setting(case, "decoder_dropout", "dropout", default=0.0)
    size = list(views[-2:])
    return [
        "method=transfgu",
        f"method.num_clusters={classes}",
        f"method.background={str(classes == maps[2] + 1).lower()}",
        "method.empty=first",
        f"method.augment.size={size}",
        f"method.stage.size={[2 * side for side in size]}",
        f"data.train_size={[2 * side for side in size]}",
        "method.crops.size=null",
        f"method.decoder.dim={dim}",
        f"method.decoder.layers={layers}",
        f"method.decoder.heads={int(heads)}",
        f"method.decoder.mlp_ratio={ratio}",
        f"method.decoder.dropout={dropout}",
        *(f"method.weights.{names[0]}={value}" for names, value in zip(named, weights, strict=True)),
        f"method.restarts.epoch={_per_epoch(case)}",
        "method.restarts.repeat=1",
        f"method.restarts.start={int(start)}",
        f"method.restarts.intervals={intervals if isinstance(intervals, list) else [int(intervals)]}",
        *(
            f"optim.{group}.{key}={value}"
            for group in ("decoder", "decoder_1d")
            for key, value in (("lr", lr), ("clip_value", clamp))
        ),
        f"optim.decoder.weight_decay={decay}",
        "evaluation.cluster_init=normal",
    ]
