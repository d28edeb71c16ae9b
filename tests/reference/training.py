"""What adapters of the kinds `<method>.training` share: whole steps of a real method with the draws of a case.

A case holds weights of a small vision transformer (`in_vit__*`, DINO's names), initial weights (`in_initial__*`, the
names of our state dict) and all that was drawn. An adapter

1. makes the method: `model = method(case, words, folder, count)`, from the words of its configuration, with the case's
   transformer as its backbone and the case's initial weights. What the case calls equal to another part (a momentum
   copy) the adapter copies itself; `folder` is an empty one (`tempfile.TemporaryDirectory`);
2. puts the case's draws in place of the keyed ones: `unittest.mock.patch.multiple(<module of the method>, ...)`;
3. trains: `steps = train(model, Recorded(batches, steps_per_epoch), folder, total_steps)`. A real Trainer runs, so
   optimiser, schedules, clipping, probes and every hook are those of a run. `batch(...)` makes a batch;
4. reads `steps.logged["contrastive"]` [T] (logged as train/contrastive; `total` is what was differentiated),
   `steps.first_gradients()`, `steps.after()`, `steps.gradients` (of every step, before clipping), `steps.seen`;
5. scores: `scores(model, steps, images, labels)["cluster"].miou`, by the real validation.

All of it is read from `in_` and `cfg_` arrays, never from results.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import config
from common.spec import ClassMeta
from engine import setup
from evaluation.matching import Scores
from lightning_modules.base import UnsupervisedSegmenter

Case = dict[str, np.ndarray]
Watch = Callable[[UnsupervisedSegmenter], dict[str, Tensor]]
VIT, INITIAL = "in_vit__", "in_initial__"


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def given(case: Case, prefix: str) -> dict[str, Tensor]:
    """The arrays whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor(array) for name, array in case.items() if name.startswith(prefix)}


def pictures(array: np.ndarray) -> Tensor:
    """uint8 [...,3,H,W] -> float32 in 0..1, as the loader makes them."""
    return tensor(array).float().div_(255)


def kept(case: Case, name: str, p: float) -> Tensor:
    """A recorded channel dropout, bool [...,C] -> 0 or 1 / (1 - p), float32."""
    return tensor(case[name]).float().div_(1.0 - p)


# ---------------------------------------------------------------------------------------------- the method


def backbone_words(case: Case, folder: Path) -> list[str]:
    """Words that make the case's transformer the backbone; its weights go through a file, as anybody's do."""
    weights = given(case, VIT)
    file = folder / "vit.pth"
    torch.save(weights, file)
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    create = {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": int(case["cfg_heads"]),
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "true" if "blocks.0.attn.qkv.bias" in weights else "false",
    }
    inside = ", ".join(f"{key}: {value}" for key, value in create.items())
    mean, std = (case[name].astype(float).tolist() for name in ("in_mean", "in_std"))
    return [
        "backbone=dino_vits8",
        f"backbone.weights={file}",
        f"backbone.create={{{inside}}}",
        f"backbone.mean={mean}",
        f"backbone.std={std}",
    ]


def classes(count: int) -> ClassMeta:
    """Classes without meaning, of any number."""
    return ClassMeta(tuple(f"class {n}" for n in range(count)), tuple((n % 256, n // 256, 0) for n in range(count)))


def method(case: Case, words: Sequence[str], folder: Path, count: int) -> UnsupervisedSegmenter:
    """The method of `words` for `count` classes, on the case's transformer, with the case's initial weights."""
    setup.begin()
    words = ["trainer=cpu", "trainer.progress=none", "data=folder", *backbone_words(case, folder), *words]
    model = setup.build_model(config.compose(words), classes(count))
    unknown = model.load_state_dict(given(case, INITIAL), strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"initial weights that the method does not have: {', '.join(unknown)}")
    return model


# ---------------------------------------------------------------------------------------------- steps


def batch(images: Tensor, labels: np.ndarray | None, first: int = 0, **views: Any) -> dict[str, Any]:
    """A batch as the loader makes it: pictures [B,3,H,W] in 0..1, labels [B,H,W] (None: the case has none), views."""
    everywhere = torch.ones(len(images), *images.shape[-2:], dtype=torch.bool)
    made = {"image": images, "valid": everywhere, "index": torch.arange(first, first + len(images)), **views}
    if labels is not None:
        made["label"] = tensor(labels).long()
    return made


class Recorded(L.LightningDataModule):
    """Stands for the data of a run: batches that are there already.

    `passes` gives the pictures [N,3,H,W] of a pass that the method asks for besides (`datamodule.loader`), by its
    `purpose`; they come in batches of `size`.
    """

    def __init__(
        self,
        batches: Sequence[dict[str, Any]],
        steps_per_epoch: int,
        passes: Callable[[str], Tensor] | None = None,
        size: int = 1,
    ) -> None:
        super().__init__()
        self.batches, self.steps_per_epoch = batches, steps_per_epoch
        self.passes, self.size = passes, size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def loader(self, *args: Any, purpose: str, **kwargs: Any) -> "Pass":
        return Pass(self.passes(purpose), self.size)

    def sync_broken(self) -> None:
        """No file is read, so none is broken."""


class Pass:
    """Batches of pictures without labels."""

    def __init__(self, images: Tensor, size: int) -> None:
        self.dataset, self.size = images, size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = 0
        for part in self.dataset.split(self.size):
            yield batch(part, None, first)
            first += len(part)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.size)


class Steps(L.Callback):
    """What happened in every step, in order. Names are those of the method's state dict, its backbone left out."""

    def __init__(self, watch: Watch | None = None, before: Watch | None = None) -> None:
        self.watch, self.before = watch, before
        self.gradients: list[dict[str, Tensor]] = []
        """Before clipping."""
        self.clipped: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        """After the step."""
        self.values: list[dict[str, Tensor]] = []
        self.looked: list[dict[str, Tensor]] = []
        self.trainer: L.Trainer | None = None

    def on_train_batch_start(self, trainer: L.Trainer, model: UnsupervisedSegmenter, *args: Any) -> None:
        self.trainer = trainer
        self.looked.append(copied(self.before(model) if self.before else {}))

    def on_before_optimizer_step(self, trainer: L.Trainer, model: UnsupervisedSegmenter, optimizer: Any) -> None:
        self.gradients.append(gradients(model))

    def on_train_batch_end(
        self, trainer: L.Trainer, model: UnsupervisedSegmenter, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.clipped.append(gradients(model))
        self.weights.append(copied(dict(own(model))))
        logged = {name.removeprefix("train/"): value.clone() for name, value in trainer.callback_metrics.items()}
        self.values.append({**logged, "total": outputs["loss"].detach().clone()})
        self.looked[-1] |= copied(self.watch(model) if self.watch else {})

    @property
    def logged(self) -> dict[str, np.ndarray]:
        """[T] of everything that was logged as train/<name>, by name, and `total`."""
        return stacked(self.values)

    @property
    def seen(self) -> dict[str, np.ndarray]:
        """[T,...] of what `before` and `watch` looked at."""
        return stacked(self.looked)

    def first_gradients(self, clipped: bool = False) -> Case:
        """As out_grad0__<name>."""
        first = (self.clipped if clipped else self.gradients)[0]
        return {f"out_grad0__{name}": value.numpy() for name, value in first.items()}

    def after(self, steps: Sequence[int] | None = None) -> Case:
        """As out_after__<name> [T,...], after all steps or after those with these numbers (the first is 0)."""
        chosen = self.weights if steps is None else [self.weights[step] for step in steps]
        return {f"out_after__{name}": values for name, values in stacked(chosen).items()}


def own(model: UnsupervisedSegmenter) -> Iterator[tuple[str, Tensor]]:
    """The method's parameters, copies that follow by momentum among them, by name."""
    return ((name, value) for name, value in model.named_parameters() if not name.startswith("backbone."))


def gradients(model: UnsupervisedSegmenter) -> dict[str, Tensor]:
    return copied({name: value.grad for name, value in own(model) if value.grad is not None})


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]} if rows else {}


def train(
    model: UnsupervisedSegmenter,
    data: Recorded,
    folder: Path,
    total_steps: int,
    watch: Watch | None = None,
    before: Watch | None = None,
) -> Steps:
    """Train on the batches of `data`, one a step. `total_steps`: of the whole run, which schedules go by.

    What `before` and `watch` look at before and after every step is kept in `Steps.seen`.
    """
    steps = Steps(watch, before)
    trainer = setup.build_trainer(model.cfg, len(data.batches), [steps], [], folder)
    model.total_steps = total_steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")  # cases evaluate once, at their end
        trainer.fit(model, datamodule=data)
    return steps


# ---------------------------------------------------------------------------------------------- scores


def scores(model: UnsupervisedSegmenter, steps: Steps, images: Tensor, labels: np.ndarray) -> dict[str, Scores]:
    """The real validation of the trained method on pictures [N,3,H,W] in 0..1, one by one: read-out -> scores."""
    rows = [batch(images[n : n + 1], labels[n : n + 1], n) for n in range(len(images))]
    steps.trainer.validate(model, dataloaders=DataLoader(rows, batch_size=None), verbose=False)
    return model.validated
