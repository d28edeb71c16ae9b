"""The adapter for whole epochs of IIC: passes of head A and head B in turn, and what head B says before and after each.

The case's pictures carry the grey that their edges are taken of, rounded before they were changed; it is put in the
place of the grey of the colours. It runs in float64: Adam makes steps of gradients that are zero but for rounding.
"""

import ast
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import torch
from torch import Tensor

import config
from engine import setup
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.information import iic as method
from losses import information
from models.scratch import net10a as networks
from tests.reference import training as replay

Case = dict[str, np.ndarray]
HEADS = {"head_A.": "head_a.", "head_B.": "head_b."}


def ours(name: str) -> str:
    """Our name of a weight of the authors'."""
    for theirs, own in HEADS.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs).replace(".0.weight", ".weight")
    return name.replace("trunk.", "backbone.net.", 1)


def floats(array: np.ndarray) -> Tensor:
    """Pictures [...,4,H,W] in 0..1, float64: uint8 ones are divided, in float32, float ones are as they are."""
    return (replay.pictures(array) if array.dtype == np.uint8 else replay.tensor(array)).double()


def seen_channels(case: Case, pictures: Tensor) -> Tensor:
    """What a data set would give: the colours alone where edges are looked at, else all four channels."""
    return pictures[..., :3, :, :] if case["cfg_sobel"] else pictures


def greys(case: Case) -> Callable[[Tensor], Tensor]:
    """`networks.grey`, from the fourth channel of the case's pictures."""
    known = {}
    for name in ("in_images1", "in_images2", "in_val_images"):
        for picture in floats(case[name]).flatten(0, -4):
            known[picture[:3].contiguous().numpy().tobytes()] = picture[3:]

    def grey(colours: Tensor) -> Tensor:
        return torch.stack([known[one.detach().contiguous().numpy().tobytes()] for one in colours])

    return grey


def words(case: Case) -> list[str]:
    widths = [width for width, _ in ast.literal_eval(str(case["cfg_layers"])) if width != "M"]
    sobel = bool(case["cfg_sobel"])
    create = {"in_chans": 3 if sobel else 4, "widths": widths, "padding": 1, "sobel": sobel}
    steps_per_epoch, total = 2 * int(case["cfg_steps_per_pass"]), len(case["in_head"])
    drops = [(epoch - 1) * steps_per_epoch / total + 1e-9 for epoch in case["cfg_lr_schedule"].tolist()]
    settings = {
        "num_clusters": int(case["cfg_classes_b"]),
        "over_clusters": int(case["cfg_classes_a"]),
        "sub_heads": int(case["cfg_sub_heads"]),
        "half_side": int(case["cfg_half_side"]),
        "balance": [float(case["cfg_lambda_a"]), float(case["cfg_lambda_b"])],
        "collapsed": not case["cfg_uncollapsed"],
        "head_b_first": bool(case["cfg_head_b_first"]),
        "pass_steps": "null",
        "idle_head": "moves",
        "head_padding": bool(case["cfg_head_padding"]),
        "align_corners": bool(case["cfg_align_corners"]),
        "sparse_shift": [int(case["cfg_sparse_min"]), int(case["cfg_sparse_max"])],
        "mask": "none" if case["in_mask"].all() else "labels",
    }
    return [
        "trainer=cpu",
        "trainer.progress=none",
        "data=folder",
        f"data.channels={3 if sobel else 4}",
        "method=iic",
        "backbone=net10a",
        *(f"backbone.create.{key}={value}" for key, value in create.items()),
        *(f"method.{key}={value}" for key, value in settings.items()),
        f"optim.network.lr={float(case['cfg_lr'])}",
        f"optim.network.weight_decay={float(case['cfg_weight_decay'])}",
        f"optim.network.schedule={'step' if drops else 'constant'}",
        f"optim.network.milestones={drops}",
        f"optim.network.drop={float(case['cfg_lr_mult'])}",
    ]


def made(case: Case) -> UnsupervisedSegmenter:
    """The method with the case's weights."""
    setup.begin()
    count = int(case["cfg_classes_b"])
    model = setup.build_model(config.compose(words(case)), replay.classes(count))
    initial = {ours(name): value for name, value in replay.given(case, replay.INITIAL).items()}
    unknown = model.load_state_dict(initial, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"initial weights that the method does not have: {', '.join(unknown)}")
    for part in model.backbone.net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum, part.eps = float(case["cfg_bn_momentum"]), float(case["cfg_bn_eps"])
    return model.double()


def batches(case: Case) -> Iterator[dict[str, Any]]:
    """Step by step, without the places that a small batch leaves empty."""
    first, second = (seen_channels(case, floats(case[f"in_images{number}"])) for number in (1, 2))
    for step, count in enumerate(case["in_count"].tolist()):
        labels = np.where(case["in_mask"][step, :count] > 0, 0, 255)
        back = replay.tensor(case["in_affine"][step, :count])
        copies = {"copy": second[step, :count], "copy.to_first": back}
        yield replay.batch(first[step, :count], labels, **copies)


class Steps(replay.Steps):
    """As of every case, with the network among the gradients, under the authors' names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = {ours(name): name for name in names}

    def on_before_optimizer_step(self, trainer: L.Trainer, model: UnsupervisedSegmenter, optimizer: Any) -> None:
        named = model.named_parameters()
        found = {self.names[name]: value.grad for name, value in named if name in self.names and value.grad is not None}
        self.gradients.append(replay.copied(found))

    def on_train_batch_end(self, trainer: L.Trainer, model: UnsupervisedSegmenter, *args: Any) -> None:
        super().on_train_batch_end(trainer, model, *args)
        state = model.state_dict()
        self.weights[-1] = replay.copied({theirs: state[own] for own, theirs in self.names.items()})

    def gradient(self, step: int, idle: str, prefix: str) -> Case:
        """Of one step, without those of the head whose turn it was not."""
        found = self.gradients[step]
        return {f"{prefix}{name}": value.numpy() for name, value in found.items() if not name.startswith(idle)}


def judged(model: UnsupervisedSegmenter, steps: Steps, case: Case) -> tuple[list[float], int, np.ndarray]:
    """Accuracies of head B's sub-heads, the best of them, and its matching."""
    images = seen_channels(case, floats(case["in_val_images"]))
    labels = np.where(case["in_val_mask"] > 0, case["in_val_labels"], 255)
    found = []
    for number in range(len(model.sub_losses)):
        model.sub_losses.zero_()
        model.sub_losses[number] = -1
        found.append(replay.scores(model, steps, images, labels)["own"])
    accuracies = [scores.acc / 100 for scores in found]
    best = int(np.argmax(accuracies))
    return accuracies, best, found[best].mapping


def training(case: Case) -> Case:
    with tempfile.TemporaryDirectory() as folder, patch.object(networks, "grey", greys(case)):
        return _trained(case, Path(folder))


def _trained(case: Case, folder: Path) -> Case:
    model, per_pass, calls = made(case), int(case["cfg_steps_per_pass"]), []

    def watched(first: Tensor, second: Tensor, *args: Any) -> information.Information:
        found = information.mutual_information(first, second, *args)
        calls.append((first.detach(), second.detach(), found))
        return found

    steps = Steps(list(replay.given(case, replay.INITIAL)))
    rows = list(batches(case))
    trainer = setup.build_trainer(model.cfg, len(rows), [steps], [], folder)
    model.total_steps = len(rows)
    with (
        patch.object(method, "to_first", lambda views: views["copy.to_first"]),
        patch.object(method, "mutual_information", watched),
    ):
        trainer.fit(model, datamodule=replay.Recorded(rows, per_pass))
    idle = [f"head_{'AB'[1 - head]}." for head in case["in_head"].tolist()]
    losses, plain = (np.array([float(getattr(call[2], name).detach()) for call in calls]) for name in ("loss", "plain"))
    shape = len(rows), int(case["cfg_sub_heads"])
    result = {
        "out_loss": losses.reshape(shape),
        "out_loss_no_lamb": plain.reshape(shape),
        "out_total": steps.logged["loss"],
        "out_probs1": calls[0][0].numpy(),
        "out_probs2": calls[0][1].numpy(),
        **steps.gradient(0, idle[0], "out_grad0__"),
        **steps.gradient(per_pass, idle[per_pass], "out_grad_second__"),
        **steps.after(),
    }
    initial = replay.given(case, replay.INITIAL)
    states = [initial, *steps.weights[2 * per_pass - 1 :: 2 * per_pass]]
    rounds = []
    for state in states:
        model.load_state_dict({ours(name): value for name, value in state.items()}, strict=False)
        rounds.append(judged(model, steps, case))
    return result | {
        "out_accuracy": np.array([accuracies for accuracies, _, _ in rounds]),
        "out_best": np.array([accuracies[best] for accuracies, best, _ in rounds]),
        "out_match": np.stack([mapping for _, _, mapping in rounds]),
    }
