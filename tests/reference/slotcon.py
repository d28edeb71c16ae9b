"""Adapters for the saved cases of SlotCon: grouping, crops, losses, optimiser, schedules, and a whole step."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

import config
from common.distributed import EVERYONE
from datamodules.base.transforms import Replay
from engine import setup
from lightning_modules.base.lars import Lars
from lightning_modules.base.optim import CompositeOptimizer, cosine, scheduled
from lightning_modules.representations import slotcon as method
from lightning_modules.representations.crops import crop_boxes as boxes_of
from lightning_modules.representations.crops import shared_boxes
from losses.representations.slot_contrast import place_distillation
from losses.representations.slot_contrast import slot_contrast as contrast
from losses.self_distillation import moved_centre
from models.slots import prototypes as slots
from tests.reference import training as replay
from tests.support.ranks import on_two_ranks

Case = dict[str, np.ndarray]
LAYERS = ("0", "1", "3", "4", "6")


def _leaf(case: Case, name: str) -> Tensor:
    return replay.tensor(case[name]).requires_grad_()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def grouping(case: Case) -> Case:
    maps, prototypes = _leaf(case, "in_x"), _leaf(case, "in_prototypes")
    found = slots.group(maps, prototypes, float(case["cfg_temp"]), float(case["cfg_eps"]))
    found.vectors.square().sum().backward()
    return {
        "out_slots": _array(found.vectors),
        "out_scores": _array(found.scores),
        "out_grad_x_of_sum_of_squares": _array(maps.grad),
        "out_grad_prototypes_of_sum_of_squares": _array(prototypes.grad),
    }


def inverse_augmentation(case: Case) -> Case:
    scores = _leaf(case, "in_scores")
    found = method.part(scores, replay.tensor(case["in_coords"]), replay.tensor(case["in_flags"]))
    found.square().sum().backward()
    return {"out_aligned": _array(found), "out_grad_scores_of_sum_of_squares": _array(scores.grad)}


def crop_boxes(case: Case) -> Case:
    crops = [replay.tensor(case[f"in_box{number}"]).float() for number in (1, 2)]
    flags, frame = replay.tensor(case["in_flags"]).bool(), (1, 1)
    places = boxes_of([Replay(boxes, flags[:, own], frame, frame) for own, boxes in enumerate(crops)])
    shared = shared_boxes(places[0], torch.ones(2, 2), places[1])
    sides = (shared[:, 0, 1, 2:] - shared[:, 0, 1, :2]).clamp(min=0) * crops[0][:, 2:].flip(1)
    return {
        "out_coords1": _array(shared[:, 0, 1]),
        "out_coords2": _array(shared[:, 1, 0]),
        "out_intersection": _array(sides.prod(1).round().long()),
    }


def self_distill(case: Case) -> Case:
    student, teacher, centre = (
        _leaf(case, "in_student"),
        *(replay.tensor(case[f"in_{n}"]) for n in ("teacher", "center")),
    )
    loss = place_distillation(
        student, teacher, centre, float(case["cfg_student_temp"]), float(case["cfg_teacher_temp"])
    )
    loss.backward()
    return {"out_loss": _array(loss), "out_grad_student": _array(student.grad)}


def _centre(rank: int, rows: Tensor, centre: Tensor, momentum: float) -> Tensor:
    return moved_centre(centre, rows[rank], momentum)


def center(case: Case) -> Case:
    rows, centre = replay.tensor(case["in_teacher"]), replay.tensor(case["in_center"])
    rest = centre.flatten(), float(case["cfg_momentum"])
    found = on_two_ranks(_centre, rows, *rest)[0] if rows.dim() == 3 else moved_centre(rest[0], rows, rest[1])
    return {"out_center": _array(found)[None]}


# Contrast of slots.


def _mlp(case: Case, prefix: str, rank: int = 0) -> slots.ProjectionMLP:
    """A projector or predictor with the weights `<prefix>mlp__0__weight` and so on, of 1x1 convolutions or layers; with
    a first axis of ranks, or without."""

    def of(layer: str, part: str) -> Tensor:
        value = replay.tensor(case[f"{prefix}mlp__{layer}__{part}"])
        value = value.squeeze((2, 3)) if value.dim() == 4 else value
        matrix = part == "weight" and layer in ("0", "3", "6")
        return value[rank] if value.dim() > (2 if matrix else 1) else value

    weights = {f"{layer}.{part}": of(layer, part) for layer in LAYERS for part in ("weight", "bias")}
    (hidden, wide), dim = weights["0.weight"].shape, len(weights["6.weight"])
    found = slots.ProjectionMLP(wide, hidden, dim, "batch")
    found.load_state_dict(weights, strict=False)
    return found


def _contrast(rank: int, case: Case, ranked: bool) -> dict[str, Tensor]:
    """One rank's loss, masks, counts and gradients, as released: a mean over its own anchors."""

    def own(name: str) -> Tensor:
        return replay.tensor(case[name][rank] if ranked else case[name])

    predictor = _mlp(case, "w__", rank) if int(case["cfg_predictor"]) else nn.Identity()
    student, teacher = own("in_slots_student").requires_grad_(), own("in_slots_teacher")
    present = {name: slots.winners(own(f"in_scores_{name}")) > 0 for name in ("student", "teacher")}
    anchors = present["student"] & present["teacher"]
    loss = contrast(
        student, teacher, anchors, present["teacher"], predictor, float(case["cfg_tau"]), EVERYONE, per_rank=True
    )
    loss.backward()
    grads = {f"w__mlp__{name.replace('.', '__')}": value.grad for name, value in predictor.named_parameters()}
    results = {"out_loss": loss.detach(), "out_grad_slots_student": student.grad}
    results |= {f"out_grad_{name}": value for name, value in grads.items()}
    candidates = EVERYONE.gather(present["teacher"])
    results |= {f"out_mask_{name}": mask for name, mask in present.items()}
    return results | {"out_num_anchors": anchors.sum(), "out_num_candidates": candidates.sum()}


def slot_contrast(case: Case) -> Case:
    """Where no slot is an anchor the released loss is no number; ours is the guarded one under both names."""
    if int(case["cfg_world"]) > 1:
        ranks = on_two_ranks(_contrast, case, True)
        found = {name: np.stack([_array(rank[name]) for rank in ranks]) for name in ranks[0]}
    else:
        found = {name: _array(value) for name, value in _contrast(0, case, False).items()}
    guarded = {name.replace("out_", "out_guarded_", 1): found[name] for name in found if "mask" not in name}
    return found | (guarded if not np.any(found["out_num_anchors"]) else {})


# Schedules and the optimiser.


def momentum_schedule(case: Case) -> Case:
    total = int(case["cfg_total_steps"])
    return {"out_momentum": np.array([cosine(float(case["cfg_base"]), 1.0, k, total) for k in range(total + 1)])}


def _schedule(case: Case) -> dict[str, Any]:
    return {
        "schedule": "cosine",
        "base_lr": float(case["cfg_base_lr"]),
        "lr_end": float(case["cfg_eta_min"]),
        "warmup": int(case["cfg_warmup_epochs"]) * int(case["cfg_iters_per_epoch"]),
        "warmup_from": 1 / int(case["cfg_warmup_multiplier"]),
    }


def lr_schedule(case: Case) -> Case:
    group, total = _schedule(case), int(case["cfg_epochs"]) * int(case["cfg_iters_per_epoch"])
    return {"out_lr": np.array([scheduled(group, step, total)["lr"] for step in range(total + 1)])}


def lars(case: Case) -> Case:
    weights = {name: nn.Parameter(value) for name, value in replay.given(case, "w__").items()}
    names = ("lr", "weight_decay", "momentum", "eta")
    settings = {name: float(case[f"cfg_{name}"]) for name in names} | {"optimizer": "lars", "owner": "method"}
    optimizer = CompositeOptimizer([{"params": weights.values(), **settings}])
    assert [type(child) for child in optimizer.children] == [Lars]
    after: dict[str, list[np.ndarray]] = {f"after__{name}": [] for name in weights}
    for step in range(len(next(iter(replay.given(case, "in_grad_").values())))):
        for name, weight in weights.items():
            weight.grad = replay.tensor(case[f"in_grad_{name}"][step])
        optimizer.step()
        for name, weight in weights.items():
            after[f"after__{name}"].append(_array(weight).copy())
    return {name: np.stack(values) for name, values in after.items()}


def prototype_retrieval(case: Case) -> Case:
    scores = slots.cosines(replay.tensor(case["in_features"]), replay.tensor(case["in_prototypes"]))
    found = slots.picture_scores(scores)
    near = found.T.topk(int(case["cfg_topk"]), dim=1).indices
    return {"out_scores": _array(scores), "out_image_scores": _array(found), "out_neighbours": _array(near)}


# A whole step.


class Pixels(nn.Module):
    """A 1x1 convolution, a batch norm and a ReLU: the encoder of the case, as a network of timm."""

    def __init__(self, width: int, in_chans: int = 3, **_: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(in_chans, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.feature_info = [{"num_chs": width, "reduction": 1, "module": "act"}]


@register_model
def pixels(pretrained: bool = False, **settings: Any) -> nn.Module:
    return build_model_with_cfg(Pixels, "pixels", pretrained, **settings)


PARTS = {
    "encoder_q": "student.net", "encoder_k": "backbone.net", "projector_q": "head.projector",
    "projector_k": "teacher.projector", "grouping_q": "head", "grouping_k": "teacher", "predictor_slot": "predictor",
}  # fmt: skip
"""The authors' networks, and ours."""


def _ours(name: str) -> str:
    """Our name of a weight of the authors', `encoder_q__conv__weight` and so on."""
    part, rest = name.split("__", 1)
    rest = "prototypes" if part.startswith("grouping") else rest.removeprefix("mlp__").replace("__", ".")
    return f"{PARTS[part]}.{rest}"


def _words(case: Case) -> list[str]:
    hidden, width = case["w__projector_q__mlp__0__weight"].shape[:2]
    prototypes, dim = case["w__grouping_q__slot_embed__weight"].shape
    settings = {
        "num_clusters": prototypes,
        "dim": dim,
        "codes": "projected",
        "head.hidden": hidden,
        "head.norm": "batch",
        "temperature.student": float(case["cfg_student_temp"]),
        "temperature.teacher": float(case["cfg_teacher_temp"]),
        "grouping_weight": float(case["cfg_group_loss_weight"]),
        "contrast.temperature": float(case["cfg_tau"]),
        "contrast.mean": "rank",
        "momentum": float(case["cfg_teacher_momentum"]),
        "centre_momentum": float(case["cfg_center_momentum"]),
    }
    return [
        "trainer=cpu", "trainer.progress=none", "data=folder", "method=slotcon", "backbone=resnet18",
        "backbone.timm=pixels", "backbone.weights=none", "backbone.frozen=false", f"backbone.create={{width: {width}}}",
        "backbone.mean=[0, 0, 0]", "backbone.std=[1, 1, 1]",
        *(f"method.{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


def _made(case: Case) -> method.SlotCon:
    setup.begin()
    model = setup.build_model(config.compose(_words(case)), replay.classes(2))
    state = model.state_dict()
    given = {_ours(name): value for name, value in replay.given(case, "w__").items()}
    unknown = [name for name in given if name not in state]
    if unknown:
        raise ValueError(f"weights that the method does not have: {', '.join(unknown)}")
    model.load_state_dict({name: value.reshape(state[name].shape) for name, value in given.items()}, strict=False)
    model.centre.copy_(replay.tensor(case["in_center"]).flatten())
    return model


def train_step(case: Case) -> Case:
    """One step of a run that has made `cfg_step` of them, by the real method."""
    model, names = _made(case), [name.removeprefix("w__") for name in case if name.startswith("w__")]
    shared = [tuple(replay.tensor(case[f"in_{what}{own}"]) for what in ("coords", "flags")) for own in (1, 2)]
    crops = {name: replay.tensor(case[f"in_crop{own + 1}"]) for own, name in enumerate(method.CROPS)}
    data = replay.Recorded([replay.batch(crops[method.CROPS[0]], None, **crops)], 1)

    def resumed(model: Any) -> dict[str, Tensor]:
        progress = model.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.completed = int(case["cfg_step"])
        return {}

    with tempfile.TemporaryDirectory() as folder, patch.object(method, "shares", lambda views: shared):
        steps = replay.train(model, data, Path(folder), int(case["cfg_total_steps"]), before=resumed)
    state, gradients = model.state_dict(), steps.gradients[0]
    results = {"out_loss": steps.logged["loss"][0], "after__center": _array(model.centre)[None]}
    for name in names:
        shape, own = case[f"w__{name}"].shape, _ours(name)
        if own in gradients:
            results[f"out_grad__{name}"] = _array(gradients[own].reshape(shape))
        elif own.startswith(("backbone.", "teacher.")):
            results[f"after__{name}"] = _array(state[own].reshape(shape))
    return results
