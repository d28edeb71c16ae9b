"""Adapters for the saved cases of PriMaPs-EM: masks, votes, losses, prototypes, scores and whole steps."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.crf import DenseCRF, as_bytes
from evaluation.metrics import SegmentationScore
from evaluation.probes import ClusterProbe
from evaluation.readout import upsample
from grouping import principal
from lightning_modules.primaps import module
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
    found = principal.Scatters(rows[None]).directions(chosen[None])
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


# Whole steps.

INIT, EM = "in_init_initial__", "in_em_initial__"
NAMES = {
    "seghead.weight_v": "running.direction",
    "seghead.weight_g": "running.gain",
    "cluster_probe.ema_model.weight_v": "momentum.copy.direction",
    "cluster_probe.ema_model.weight_g": "momentum.copy.gain",
    "linear_probe.weight": "linear_probe.classifier.weight",
    "linear_probe.bias": "linear_probe.classifier.bias",
}
"""Of the EM: the authors' names and ours."""
CENTRES = "cluster_probe.cluster_centers.weight_v"
"""The prototypes of the initialisation. The running ones, which begin at the same place, rest in the release; here they
are the same."""
LINEAR = {theirs: ours for theirs, ours in NAMES.items() if ours.startswith("linear_probe.")}
STARTED = {CENTRES: "running.direction"} | LINEAR
"""Of the initialisation."""


def training(case: Case) -> Case:
    """The PCA start, the steps of the initialisation and of the EM in one run, their scores and the final test, by the
    real method. Two things are put in on the way: the signs that the start has, and the new linear probe of the EM."""
    started = len(case["in_init_images"])
    steps = started + len(case["in_em_images"])
    seen = Seen()
    with tempfile.TemporaryDirectory() as name, patch.multiple(module, **seen.functions()):
        folder = Path(name)
        model = replay.method(case, _words(case, started), folder, int(case["cfg_num_classes"]))
        pictures = replay.pictures(case["in_pca_images"])
        data = replay.Recorded(_batches(case), steps, lambda purpose: pictures, len(case["in_init_images"][0]))

        def before(model: Any) -> dict[str, Tensor]:
            if model.global_step == 0:
                seen.directions = _array(model.running.direction.clone())
                _put(model, _given(case, INIT, STARTED))
                model.momentum.update(0.0)
            elif model.global_step == started:
                _put(model, _given(case, EM, NAMES))
                _renew(model, float(case["cfg_lr_seghead"]))
            return {}

        def watch(model: Any) -> dict[str, Tensor]:
            seen.states.append(replay.copied(dict(model.state_dict())))
            return {}

        ran = replay.train(model, data, folder, steps, watch, before)
        results = _scores(case, model, ran, seen.states, started)
    results |= {
        "out_pca_prototypes": seen.directions,
        "out_em_prediction": np.stack(seen.predictions),
        "out_em_pseudo": np.stack(seen.labels),
        "out_em_class_weight": np.stack(seen.weights),
    }
    for part, rows, own in (("init", slice(0, started), "cluster"), ("em", slice(started, None), "seghead")):
        linear, loss = (np.array([float(row[name]) for row in ran.values[rows]]) for name in ("linear_probe", "loss"))
        results |= {f"out_{part}_linear": linear, f"out_{part}_{own}": loss, f"out_{part}_total": linear + loss}
        for theirs, ours in (STARTED if part == "init" else NAMES).items():
            shape = case[f"in_{part}_initial__{theirs}"].shape
            after = np.stack([_array(state[ours]) for state in seen.states[rows]])
            results[f"out_{part}_after__{theirs}"] = after.reshape(-1, *shape)
            gradient = ran.gradients[rows][0].get(ours)
            if gradient is not None:
                results[f"out_{part}_grad0__{theirs}"] = _array(gradient).reshape(shape)
    return results


class Seen:
    """What the method found on the way, out of the functions of its module that are watched."""

    def __init__(self) -> None:
        self.directions = np.empty(0)
        self.predictions: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.states: list[dict[str, Tensor]] = []

    def functions(self) -> dict[str, Any]:
        def vote(masks: Tensor, prediction: Tensor, *args: Any) -> Tensor:
            self.predictions.append(_array(prediction))
            found = majority(masks, prediction, *args)
            self.labels.append(_array(found))
            return found

        def loss(*args: Any) -> tuple[Tensor, Tensor]:
            found = balanced_cross_entropy(*args)
            self.weights.append(_array(found[1]))
            return found

        return {"majority": vote, "balanced_cross_entropy": loss}


def _words(case: Case, started: int) -> list[str]:
    names = {
        "method.ema.every": "ema_every",
        "method.ema.decay": "ema_decay",
        "method.gamma": "gamma",
        "optim.linear_probe.lr": "lr_linear",
        "optim.prototypes.lr": "lr_cluster",
    }
    return [
        "method=primaps",
        "method.centred=false",
        f"method.num_clusters={int(case['cfg_num_classes'])}",
        f"method.start.steps={started}",
        "evaluation.linear_mean=all",
        *(f"{key}={case[f'cfg_{name}'].item()}" for key, name in names.items()),
    ]


def _batches(case: Case) -> list[dict[str, Any]]:
    """Of both parts; the first has no masks, and its view is not looked at. Ids are one higher, so that none is 0."""
    mean, std = (replay.tensor(case[name]).view(3, 1, 1) for name in ("in_mean", "in_std"))
    found = []
    for images, labels in zip(replay.pictures(case["in_init_images"]), case["in_init_labels"], strict=True):
        nothing = torch.zeros(labels.shape, dtype=torch.int64)
        found.append(replay.batch(images, labels, augmented=images, pseudo=nothing))
    names = ("labels", "augmented", "masks")
    arrays = [case[f"in_em_{name}"] for name in names]
    for images, labels, view, masks in zip(replay.pictures(case["in_em_images"]), *arrays, strict=True):
        ids = np.where(masks == int(case["cfg_ignore"]), 255, masks.astype(np.int64) + 1)
        view = replay.tensor(view) * std + mean
        found.append(replay.batch(images, labels, augmented=view, pseudo=replay.tensor(ids)))
    return found


def _given(case: Case, prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Initial weights under our names."""
    return {ours: replay.tensor(case[f"{prefix}{theirs}"]) for theirs, ours in names.items()}


def _put(model: Any, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    for name, value in weights.items():
        state[name].copy_(value.reshape(state[name].shape))


def _renew(model: Any, rate: float) -> None:
    """The EM of the release has a new linear probe with a new optimiser, and a learning rate of its own."""
    for child in model.optimizers().optimizer.children:
        for value in model.linear_probe.parameters():
            child.state.pop(value, None)
        for group in child.param_groups:
            if group["name"] == "prototypes":
                group["base_lr"] = rate


def _scores(case: Case, model: Any, ran: replay.Steps, states: list[dict[str, Tensor]], started: int) -> Case:
    """mIoU and accuracy of slow prototypes, running ones and linear probe after each epoch, and of the final test,
    which averages with the mirrored picture. In the initialisation the running ones of the release are the start."""

    def validated(state: dict[str, Tensor], flip: bool) -> dict[str, Any]:
        model.load_state_dict(state)
        OmegaConf.set_readonly(model.cfg, False)
        OmegaConf.update(model.cfg, "evaluation.flip", flip)
        return replay.scores(model, ran, replay.pictures(case["in_val_images"]), case["in_val_labels"])

    def scores(state: dict[str, Tensor], running: dict[str, Tensor], flip: bool = False) -> list[float]:
        found = validated(state, flip)
        fast = {name: running[name.replace("momentum.copy.", "running.")] for name in state if "momentum.copy." in name}
        parts = found["own"], validated(state | fast, flip)["own"], found["linear"]
        return [value for part in parts for value in (part.miou, part.acc)]

    every = int(case["cfg_steps_per_epoch"])
    first = states[0] | {"running.direction": replay.tensor(case[f"{INIT}seghead.weight_v"]).flatten(1)}
    init, em = states[:started][every - 1 :: every], states[started:][every - 1 :: every]
    return {
        "out_init_scores": np.array([scores(state, first) for state in init]),
        "out_em_scores": np.array([scores(state, state) for state in em]),
        "out_test_scores": np.array(scores(states[-1], states[-1], flip=True)),
    }
