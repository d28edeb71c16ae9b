"""`leopart.training`: steps of Leopart by the real module, on a transformer of two blocks.

Crops, their boxes, initial weights, the rows that drop path keeps and the patches that enter the queue are those of the
case; names are turned into ours.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.base.transforms import Replay
from lightning_modules.representations import leopart
from lightning_modules.representations.crops import GLOBALS, cut
from losses.representations import aligned_clusters as losses
from tests.reference import training

Case = dict[str, np.ndarray]
HEAD = {"prototypes.weight": "prototypes"} | {
    f"projection_head.{layer}.{part}": f"mlp.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")
}
"""Weights of the head: the authors' names and ours."""
TEACHER = "teacher."
KINDS = ("global", "local")


def ours(name: str) -> str:
    """Our name of a weight of the authors', of the student's or, after `teacher.`, of the teacher's."""
    own = name.removeprefix(TEACHER)
    if own in HEAD:
        return f"teacher_head.copy.{HEAD[own]}" if own != name else f"head.{HEAD[own]}"
    return f"teacher.copy.net.{own}" if own != name else f"backbone.net.{own}"


def theirs(case: Case) -> list[str]:
    """The authors' names of the student's weights."""
    return [name for name in training.given(case, training.INITIAL) if not name.startswith(TEACHER)]


class Kept(nn.Module):
    """Drop path whose draws are recorded: bool [B], one pass a call in training."""

    def __init__(self, keep: list[Tensor], p: float) -> None:
        super().__init__()
        self.waiting, self.p = keep, p

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.waiting.pop(0)[:, None, None] / (1 - self.p) if self.training else tokens


def words(case: Case) -> list[str]:
    """Words of a configuration with the crops, the loss and the optimiser of a case."""
    if (case["cfg_adam_betas"].tolist(), float(case["cfg_adam_eps"])) != ([0.9, 0.999], 1e-8):
        raise ValueError("AdamW with other constants than torch's")
    if float(case["cfg_layer_norm_eps"]) != 1e-6 or int(case["cfg_depth"]) != 2 or case["cfg_crop_numbers"][0] != 2:
        raise ValueError("another epsilon of layer norms than 1e-6, not two blocks, or not two large crops")
    (large, small), batch = case["cfg_crop_sizes"].tolist(), case["in_globals"].shape[2]
    weights = training.given(case, training.INITIAL)
    hidden, prototypes = weights["projection_head.0.weight"], weights["prototypes.weight"]
    found = [
        "method=leopart",
        "backbone.frozen=false",
        "method.train_blocks=null",
        f"data.batch_size={batch}",
        f"data.train_size={large}",
        "method.num_clusters=3",
        f"method.prototypes={len(prototypes)}",
        f"method.head.hidden={len(hidden)}",
        f"method.head.dim={prototypes.shape[1]}",
        f"method.crops.global_size={large}",
        f"method.crops.local_size={small}",
        f"method.crops.local_count={int(case['cfg_crop_numbers'][1])}",
        "method.attention.tokens=fg",
        "method.attention.by=class",
        f"method.attention.mass={float(case['cfg_mask_mass'])}",
        f"method.attention.blur={float(case['cfg_mask_blur_sigma'])}",
        f"method.attention.kernel={int(case['cfg_mask_blur_kernel'])}",
        f"method.attention.smallest={int(case['cfg_mask_smallest'])}",
        "method.teacher.head=own",
        f"method.teacher.momentum={float(case['cfg_momentum_start'])}",
        f"method.teacher.momentum_end={float(case['cfg_momentum_end'])}",
        f"method.queue.size={int(case['cfg_queue_length'])}",
        "method.queue.prototypes=student",
        f"method.sinkhorn.epsilon={float(case['cfg_epsilon'])}",
        f"method.sinkhorn.iterations={int(case['cfg_sinkhorn_iterations'])}",
        f"method.temperature={float(case['cfg_temperature'])}",
        f"method.cells={int(case['cfg_roi'])}",
        "method.skipped=count",
    ]
    for group in ("backbone", "head"):
        values = {"optimizer": "adamw", "schedule": "cosine", "warmup": 0}
        values |= {"lr": float(case[f"cfg_lr_{group}_start"]), "lr_end": float(case["cfg_lr_end"])}
        values |= {f"weight_decay{end}": float(case[f"cfg_weight_decay{part}"]) for end, part in ENDS.items()}
        found += [f"optim.{group}.{key}={value}" for key, value in values.items()]
    return found


ENDS = {"": "_start", "_end": "_end"}


def build(case: Case, folder: Path) -> leopart.Leopart:
    start = training.given(case, training.INITIAL)
    network = {f"{training.VIT}{name}": case[f"{training.INITIAL}{name}"] for name in theirs(case) if name not in HEAD}
    heads = {ours(name): value for name, value in start.items() if name.removeprefix(TEACHER) in HEAD}
    known = {name: value for name, value in case.items() if not name.startswith(training.INITIAL)}
    known |= network | {f"{training.INITIAL}{name}": value.numpy() for name, value in heads.items()}
    model = training.method(known, words(case), folder, 3)
    block, kinds = model.backbone.net.blocks[-1], ("globals", "locals")
    for number, name in enumerate(("drop_path1", "drop_path2")):  # of attention, of the MLP
        keep = [training.tensor(case[f"in_keep_{kind}"]) for kind in kinds]
        passes = [part[step, number] for step in range(len(keep[0])) for part in keep]
        setattr(block, name, Kept(passes, float(case["cfg_drop_path"])))
    return model


class Crops(training.Recorded):
    """Batches whose crops get their places after the transfer, as those of a run do."""

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        for name in [key for key in batch if key.startswith(KINDS)]:
            corner, end = (part.flip(1) for part in batch.pop(f"boxes.{name}").split(2, dim=1))
            place, size = torch.cat([corner, end - corner], dim=1), tuple(batch[name].shape[-2:])
            batch[f"{name}.params"] = Replay(place, torch.zeros(len(place), dtype=torch.bool), size, size)
        return batch


def batches(case: Case, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for step in range(int(case["cfg_steps"])):
        crops = [training.pictures(part) for part in (*case["in_globals"][step], *case["in_locals"][step])]
        boxes = training.tensor(case["in_crops"][step]).unbind(1)
        views = dict(zip(names, crops, strict=True)) | dict(
            zip((f"boxes.{name}" for name in names), boxes, strict=True)
        )
        yield training.batch(crops[0], None, **views)


class Watched:
    """What the loss was given, and the weights after each step."""

    def __init__(self, case: Case) -> None:
        self.case, self.names = case, theirs(case)
        self.picks = list(training.tensor(case["in_queue_pick"]).flatten(0, 1))
        self.seen: dict[str, list[Tensor]] = {}
        self.states: list[dict[str, Tensor]] = []
        self.gradients: dict[str, Tensor] = {}
        self.queued: list[bool] = []

    def keep(self, name: str, value: Tensor) -> None:
        self.seen.setdefault(name, []).append(value.detach().clone())

    def pick(self, *_: Any) -> Tensor:
        return self.picks.pop(0)

    def sinkhorn(self, logits: Tensor, *rules: Any) -> Tensor:
        batch, tokens = (
            self.case["in_globals"].shape[2],
            self.case["in_globals"].shape[-1] // int(self.case["cfg_patch"]),
        )
        self.queued.append(len(logits) > batch * tokens**2)
        return SINKHORN(logits, *rules)

    def aligned(
        self, targets: Tensor, logits: Any, cells: Tensor, size: int, temperature: float, masks: Tensor, *more: Any
    ):
        parts = [cut(mask[:, None].float(), cells[:, number], size) for number, mask in enumerate(masks)]
        self.keep("out_kept", torch.stack([losses.inside(part) for part in parts]))
        self.keep("out_foreground", masks)
        self.keep("out_assignments", targets.movedim(2, -1).flatten(1, 3))
        return ALIGNED(targets, logits, cells, size, temperature, masks, *more)

    def watch(self, model: leopart.Leopart) -> dict[str, Tensor]:
        held = [bank.ordered().flip(0) for bank in model.banks]
        padded = [torch.cat([rows, rows.new_zeros(model.banks[0].size - len(rows), rows.shape[1])]) for rows in held]
        self.keep("out_queue", torch.stack(padded))
        self.states.append(training.copied(model.state_dict()))
        if not self.gradients:
            grads = {name: value.grad for name, value in model.named_parameters()}
            self.gradients = training.copied({name: grads[ours(name)] for name in self.names})
        return {}


SINKHORN, ALIGNED = leopart.sinkhorn_targets, leopart.aligned_loss


def run(case: Case) -> Case:
    watched = Watched(case)
    replaced = {"queue_picks": watched.pick, "sinkhorn_targets": watched.sinkhorn, "aligned_loss": watched.aligned}
    with tempfile.TemporaryDirectory() as folder, patch.multiple(leopart, **replaced):
        model = build(case, Path(folder))
        data = Crops(list(batches(case, model.view_names)), int(case["cfg_steps_per_epoch"]))
        logged = training.train(model, data, Path(folder), int(case["cfg_steps"]), watch=watched.watch).logged
    found = {name: torch.stack(values).numpy() for name, values in watched.seen.items()}
    found |= {"out_loss": logged["loss"], "out_queue_used": np.array(watched.queued).reshape(-1, len(GLOBALS))}
    states, last = watched.states, watched.states[-1]
    found["out_prototypes"] = torch.stack([state["head.prototypes"] for state in states[1:-1]]).numpy()
    chosen = [states[int(step) - 1] for step in case["cfg_out_after_steps"]]
    for name in watched.names:
        found[f"out_grad0__{name}"] = watched.gradients[name].numpy()
        found[f"out_after__{name}"] = torch.stack([state[ours(name)] for state in chosen]).numpy()
        found[f"out_after__{TEACHER}{name}"] = last[ours(f"{TEACHER}{name}")].numpy()
    model.eval()
    tokens = model.backbone.features(training.pictures(case["in_val_images"])).map
    return found | {"out_val_tokens": tokens.flatten(2).mT.numpy()}
