"""Adapters for the saved cases of SmooSeg: energies, prototypes, projector, read-out and whole steps."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from evaluation import readout
from lightning_modules import smooseg as method
from losses import smoothness as losses
from models.heads import SegmentationHead
from models.momentum import towards
from tests.reference import training as replay

Case = dict[str, np.ndarray]
LAYERS = {"cluster1.0": "linear", "cluster2.0": "nonlinear.0", "cluster2.2": "nonlinear.2"}
"""Layers of the projector: the authors' names and ours."""
NAMES = {
    "prediction.local_clusters": "student",
    "prediction.global_clusters": "teacher",
    **{f"projection.{a}.{part}": f"head.{b}.{part}" for a, b in LAYERS.items() for part in ("weight", "bias")},
}


def _leaf(case: Case, name: str) -> Tensor:
    return replay.tensor(case[name]).requires_grad_()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def pair_energy(case: Case) -> Case:
    features = replay.tensor(case["in_signal1"]), replay.tensor(case["in_signal2"])
    labels = _leaf(case, "in_probs1"), _leaf(case, "in_probs2")
    loss, gaps = losses.pair_energy(features, labels, float(case["cfg_shift"]), bool(case["cfg_pointwise"]))
    loss.mean().backward()
    return {
        "out_loss": _array(loss),
        "out_discontinuity": _array(gaps),
        "out_grad_probs1": _array(labels[0].grad),
        "out_grad_probs2": _array(labels[1].grad),
    }


def _found(case: Case, labels: Tensor) -> losses.Smoothness:
    shifts = {kind: float(case[f"cfg_shift_{kind}"]) for kind in losses.KINDS}
    rule = bool(case["cfg_pointwise"])
    return losses.smoothness(
        replay.tensor(case["in_signal"]), labels, replay.tensor(case["in_perm"]), shifts, pointwise=rule
    )


def _gaps(found: losses.Smoothness) -> Case:
    return {f"out_{kind}_discontinuity": _array(gap) for kind, gap in found.discontinuities.items()}


def smoothness(case: Case) -> Case:
    labels = _leaf(case, "in_probs")
    found = _found(case, labels)
    total = sum(found.energies.values())
    total.backward()
    energies = {f"out_{kind}": _array(energy) for kind, energy in found.energies.items()}
    return energies | _gaps(found) | {"out_smooth_loss": _array(total), "out_grad_probs": _array(labels.grad)}


def energy(case: Case) -> Case:
    student, teacher = _leaf(case, "in_inner_student"), _leaf(case, "in_inner_teacher")
    labels = losses.soft_labels(teacher, float(case["cfg_temperature"]))
    found = _found(case, labels)
    smooth, data = sum(found.energies.values()), losses.data_term(student, teacher.detach())
    (smooth + data).backward()
    return _gaps(found) | {
        "out_probs": _array(labels),
        "out_target": _array(teacher.argmax(1)),
        "out_smooth_loss": _array(smooth),
        "out_data_loss": _array(data),
        "out_grad_inner_teacher": _array(teacher.grad),
        "out_grad_inner_student": _array(student.grad),
    }


def predictor(case: Case) -> Case:
    code, student = _leaf(case, "in_code"), _leaf(case, "in_student")
    teacher, alpha = replay.tensor(case["in_teacher"]), float(case["cfg_alpha"])
    learnt, taught = readout.cosines(code.detach(), student), readout.cosines(code, teacher)
    (learnt.square().sum() + taught.pow(3).sum()).backward()
    results = {
        "out_inner_student": _array(learnt),
        "out_inner_teacher": _array(taught),
        "out_grad_code": _array(code.grad),
        "out_grad_student": _array(student.grad),
    }
    for count in (1, 2):
        towards(teacher, student, alpha)
        results[f"out_teacher_after_{count}"] = _array(teacher.clone())
    return results


def _head(case: Case, prefix: str) -> SegmentationHead:
    """The projector with the weights `<prefix>cluster1_0_weight` and so on."""
    weights = {
        f"{ours}.{part}": replay.tensor(case[name])
        for theirs, ours in LAYERS.items()
        for part in ("weight", "bias")
        if (name := f"{prefix}{theirs.replace('.', '_')}_{part}") in case
    }
    dim, channels = weights["linear.weight"].shape[:2]
    head = SegmentationHead(channels, dim, nonlinear="nonlinear.0.weight" in weights, activation=nn.SiLU)
    head.load_state_dict(weights)
    return head


def projector(case: Case) -> Case:
    head = _head(case, "w__")
    code = head(replay.tensor(case["in_feats"]))
    code.square().sum().backward()
    return {"out_code": _array(code), "out_grad_cluster1_weight": _array(head.linear.weight.grad)}


def train_step(case: Case) -> Case:
    head = _head(case, "w__projector_")
    student, teacher = nn.Parameter(replay.tensor(case["w__student"])), replay.tensor(case["w__teacher"])
    adam = torch.optim.Adam(
        [
            {"params": head.parameters(), "lr": float(case["cfg_lr_projector"])},
            {"params": [student], "lr": float(case["cfg_lr_predictor"])},
        ]
    )
    smooth, data = [], []
    for features, partners in zip(case["in_feats"], case["in_perm"], strict=True):
        code = head(replay.tensor(features))
        taught, learnt = readout.cosines(code, teacher), readout.cosines(code.detach(), student)
        labels = losses.soft_labels(taught, float(case["cfg_temperature"]))
        found = _found({**case, "in_signal": features, "in_perm": partners}, labels)
        smooth.append(sum(found.energies.values()))
        data.append(losses.data_term(learnt, taught.detach()))
        towards(teacher, student, float(case["cfg_alpha"]))
        adam.zero_grad()
        (smooth[-1] + data[-1]).backward()
        adam.step()
    after = {
        f"after__projector_{theirs.replace('.', '_')}_{part}": _array(value)
        for theirs, ours in LAYERS.items()
        for part in ("weight", "bias")
        if (value := dict(head.named_parameters()).get(f"{ours}.{part}")) is not None
    }
    return after | {
        "out_smooth_loss": _array(torch.stack(smooth)),
        "out_data_loss": _array(torch.stack(data)),
        "after__student": _array(student),
        "after__teacher": _array(teacher),
    }


@torch.no_grad()
def cluster_predict(case: Case) -> Case:
    names = "in_code", "in_code_of_flipped", "in_teacher"
    code, mirrored, teacher = (replay.tensor(case[name]) for name in names)
    code = readout.flip_average(code, mirrored)
    size = int(case["cfg_height"]), int(case["cfg_width"])
    found = readout.cluster_log_probs(code, teacher, size, float(case["cfg_alpha"]))
    return {
        "out_log_probs": _array(found),
        "out_argmax": _array(readout.predict(readout.dot_products(code, teacher), size)),
    }


# Whole steps.


def training(case: Case) -> Case:
    """Whole steps of the released loop, its validations, its test and its final evaluation, by the real method."""
    images = replay.pictures(case["in_images"])
    batches = [replay.batch(part, label) for part, label in zip(images, case["in_labels"], strict=True)]
    ours = {replay.INITIAL + NAMES[name.removeprefix(replay.INITIAL)]: value for name, value in _starts(case).items()}
    renamed = {name: value for name, value in case.items() if not name.startswith(replay.INITIAL)} | ours
    draws = Draws(case)
    with tempfile.TemporaryDirectory() as name, patch.multiple(method, **draws.functions()):
        folder = Path(name)
        model = replay.method(renamed, _words(case), folder, int(case["cfg_classes"]))
        kept: list[dict[str, Tensor]] = []
        steps = replay.train(model, replay.Recorded(batches, len(batches)), folder, len(batches), _watched(kept))
        results = _scored(case, model, steps, kept)
    logged, theirs = steps.logged, {ours: name for name, ours in NAMES.items()}
    results["out_total"] = logged["loss"]
    results["out_data"] = logged["data"]
    results["out_smooth"] = logged["within"] + logged["across"]
    for kind in losses.KINDS:
        results[f"out_{kind}"] = logged[kind]
        results[f"out_{kind}_discontinuity"] = logged[f"discontinuity_{kind}"]
    for found in (steps.first_gradients(), steps.after()):
        for name, value in found.items():
            prefix, part = name.split("__")
            if part in theirs:
                results[f"{prefix}__{theirs[part]}"] = value
    results[f"out_after__{theirs['teacher']}"] = steps.seen["teacher"]
    return results


def _starts(case: Case) -> Case:
    return {name: value for name, value in case.items() if name.startswith(replay.INITIAL)}


def _watched(kept: list[dict[str, Tensor]]) -> replay.Watch:
    """Keeps the weights after every step, and shows the teacher."""

    def watch(model: Any) -> dict[str, Tensor]:
        kept.append(replay.copied(dict(model.state_dict())))
        return {"teacher": model.teacher}

    return watch


def _scored(case: Case, model: Any, steps: replay.Steps, kept: list[dict[str, Tensor]]) -> Case:
    """Validations after the recorded steps, without the last, incomplete batch; the test; the final evaluation, which
    averages with the mirrored picture."""

    def scores(step: int, images: str, count: int | None = None, flip: bool = False) -> list[float]:
        model.load_state_dict(kept[step - 1])
        OmegaConf.set_readonly(model.cfg, False)
        OmegaConf.update(model.cfg, "evaluation.flip", flip)
        found = replay.scores(model, steps, replay.pictures(case[f"in_{images}_images"])[:count],
                              case[f"in_{images}_labels"][:count])["own"]  # fmt: skip
        return [found.miou, found.acc]

    size = int(case["cfg_batch_size"])
    whole = len(case["in_val_images"]) // size * size
    return {
        "out_val_scores": np.array([scores(int(step), "val", whole) for step in case["cfg_val_steps"]]),
        "out_test_scores": np.array(scores(int(case["cfg_tested_step"]), "test")),
        "out_scores": np.array(scores(len(kept), "test", flip=True)),
    }


def _words(case: Case) -> list[str]:
    names = {
        "method.dim": "dim",
        "method.temperature": "temperature",
        "method.ema": "alpha",
        "method.pointwise": "pointwise",
        "method.dropout.p": "dropout_p",
        "method.dropout.signal": "dropout",
        "method.terms.within.shift": "pos_intra_shift",
        "method.terms.across.shift": "neg_inter_shift",
        "optim.head.lr": "lr1",
        "optim.prototypes.lr": "lr2",
    }
    return [
        "method=smooseg",
        f"method.num_clusters={int(case['cfg_classes']) + int(case['cfg_extra_clusters'])}",
        f"method.projection={'nonlinear' if 'in_initial__projection.cluster2.0.weight' in case else 'linear'}",
        *(f"{key}={str(case[f'cfg_{name}'].item()).lower()}" for key, name in names.items()),
        "evaluation.extra=stego_compat",
    ]


class Draws:
    """The draws of a case under the names and arguments of the functions that draw them in the method."""

    def __init__(self, case: Case) -> None:
        self.case, self.p = case, float(case["cfg_dropout_p"])

    def functions(self) -> dict[str, Any]:
        """The method's functions that draw, by name."""
        return {name: getattr(self, name) for name in ("own_channel_masks", "random_negatives")}

    def own_channel_masks(self, seed: int, purpose: str, step: int, maps: Tensor, p: float) -> Tensor | None:
        """purpose: smooseg.dropout.<use>."""
        use = purpose.rsplit(".", 1)[-1]
        return replay.kept(self.case, f"in_keep_{use}", self.p)[step] if p > 0 else None

    def random_negatives(self, seed: int, step: int, *args: Any, **keys: Any) -> Tensor:
        return replay.tensor(self.case["in_perm"])[step][None]
