"""The adapter for whole runs of CAUSE: the book, then head and prototypes of both heads, by the real method.

Each phase is a run of its own, as `phases` makes them: weights and bank of the one before, and a new optimiser. It runs
in float64: the inputs of some ReLU lie nearer to 0 than float32 rounding, and the side they fall on shows in the next
gradients.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lightning_modules import cause as method
from tests.reference import training as replay

Case = dict[str, np.ndarray]
MLP = {"f1": "linear", "f2.0": "nonlinear.0", "f2.2": "nonlinear.2"}
TR = {
    "query_pos": "positions",
    "tr.self_attn": "self_attention",
    "tr.multihead_attn": "cross_attention",
    "tr.linear1": "hidden",
    "tr.linear2": "out",
    **{f"tr.norm{number + 1}": f"norms.{number}" for number in range(3)},
    **{f"tr.{theirs}": f"head.{ours}" for theirs, ours in MLP.items()},
}
"""Layers of both heads: the authors' names and ours."""
PARTS = {
    "codebook": "book",
    "cluster_probe": "own",
    "linear.f": "linear_probe.classifier",
    "projection_head.f": "projection",
    "projection_head_ema.f": "teacher_projection.copy",
    "head": "head",
    "head_ema": "teacher.copy",
}
PLACES = {"linear": "f1", "nonlinear": "f2"}
"""Places of dropout that the cases call otherwise."""
HEADS = ("mlp", "tr")


def arrivals(concepts: Tensor, permutations: Iterator[Tensor]) -> Tensor:
    """The order of rows of concepts int64 [n] by recorded permutations, one for each concept present, ascending."""
    found = [(concepts == concept).nonzero().flatten()[next(permutations)] for concept in concepts.unique()]
    return torch.cat(found)


def ours(name: str) -> str:
    """Our name of a weight of the authors'."""
    part = next(part for part in sorted(PARTS, key=len, reverse=True) if name == part or name.startswith(f"{part}."))
    rest = name[len(part) :].removeprefix(".")
    if part in ("head", "head_ema"):
        layer = next(key for key in (*TR, *MLP) if rest == key or rest.startswith(f"{key}."))
        rest = (TR | MLP)[layer] + rest[len(layer) :]
    return ".".join(filter(None, (PARTS[part], rest)))


class Draws:
    """The draws of a phase of a case under the names and arguments of the functions that draw them in the method."""

    def __init__(self, case: Case, phase: str) -> None:
        """phase: the part of the names that says which draws these are, as `book`, `mlp` or `tr_proto`."""
        self.case, self.phase, self.p = case, phase, float(case["cfg_dropout_p"])
        self.concepts: list[Tensor] = []
        """Of the sampled patches, step by step."""
        if f"in_{phase}_perm" in case:
            lengths = case[f"in_{phase}_perm_len"].tolist()
            self.permutations = iter(replay.tensor(case[f"in_{phase}_perm"]).split(lengths))

    def functions(self) -> dict[str, Any]:
        """The method's functions that draw, by name."""
        return {name: getattr(self, name) for name in ("cell_order", "own_element_masks", "arrival_order")}

    def cell_order(self, seed: int, step: int, pictures: int, count: int, side: int) -> Tensor:
        return replay.tensor(self.case[f"in_{self.phase}_order"][step]).reshape(pictures, count)

    def arrival_order(self, seed: int, step: int, concepts: Tensor) -> Tensor:
        self.concepts.append(concepts)
        return arrivals(concepts, self.permutations)

    def own_element_masks(
        self, seed: int, purpose: str, step: int, shape: tuple[int, ...], p: float, device: Any
    ) -> Tensor:
        """purpose: cause.dropout.<use>.<place>. Maps of sampled patches are wanted as rows, rows picture by picture."""
        use, place = purpose.split(".")[2:]
        used = "" if use == "prototypes" else f"{use}_"
        mask = replay.kept(self.case, f"in_{self.phase}_keep_{used}{PLACES.get(place, place)}", self.p)[step]
        if place in PLACES:
            return mask.flatten(2).mT if len(shape) == 3 else mask
        return mask.transpose(0, 1) if place == "hidden" or place.startswith("residual") else mask


class Phase:
    """One phase of a case, trained by the real method."""

    def __init__(self, case: Case, folder: Path, words: list[str], start: dict[str, Tensor], draws: Draws, data: str):
        """start: weights by our names. data: what the pictures are of, `book`, `head` or `proto`."""
        self.case = case
        images, labels = replay.pictures(case[f"in_{data}_images"]), case.get(f"in_{data}_labels")
        batches = [replay.batch(part, None if labels is None else labels[t]) for t, part in enumerate(images)]
        size = f"data.train_size=[{images.shape[-2]},{images.shape[-1]}]"
        self.model = replay.method(case, [*_words(case), size, *words], folder, int(case["cfg_num_classes"]))
        for head in (self.model.head, self.model.teacher.copy):
            for norm in getattr(head, "norms", ()):
                norm.eps = float(case["cfg_tr_layernorm_eps"])
        self.model.double()
        shapes = {name: value.shape for name, value in self.model.state_dict().items()}
        self.model.load_state_dict({k: v.reshape(shapes[k]) for k, v in start.items()}, strict=False)
        self.states: list[dict[str, Tensor]] = []
        self.draws = draws
        with patch.multiple(method, **draws.functions()):
            data = replay.Recorded(batches, len(batches))
            self.steps = replay.train(self.model, data, folder, len(batches), self._watch)

    def _watch(self, model: Any) -> dict[str, Tensor]:
        state = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
        self.states.append(replay.copied(state))
        return {"counts": model.bank.counts}

    def after(self, name: str, like: np.ndarray) -> np.ndarray:
        """A weight of the authors' after every step."""
        return torch.stack([state[ours(name)].reshape(like.shape) for state in self.states]).numpy()

    def first_gradient(self, name: str, like: np.ndarray) -> np.ndarray:
        return self.steps.gradients[0][ours(name)].reshape(like.shape).numpy()

    def norms(self, *beginnings: str) -> np.ndarray:
        """Norms of the gradients of the weights that begin so, together, before clipping, step by step."""
        chosen = ([g for name, g in step.items() if name.startswith(beginnings)] for step in self.steps.gradients)
        return np.array([float(torch.stack([g.double().norm() for g in found]).norm()) for found in chosen])

    def scores(self, step: int, flip: bool = False, pictures: slice = slice(None)) -> dict[str, Any]:
        """The real validation after so many steps."""
        self.model.load_state_dict(self.states[step - 1], strict=False)
        OmegaConf.set_readonly(self.model.cfg, False)
        OmegaConf.update(self.model.cfg, "evaluation.flip", flip)
        images = replay.pictures(self.case["in_val_images"][pictures])
        return replay.scores(self.model, self.steps, images, self.case["in_val_labels"][pictures])

    def linear(self, step: int) -> float:
        """The released linear accuracy: a mean over batches."""
        size, count = int(self.case["cfg_val_batch"]), len(self.case["in_val_images"])
        parts = (slice(first, first + size) for first in range(0, count, size))
        return float(np.mean([self.scores(step, pictures=part)["linear"].acc for part in parts]))


def training(case: Case) -> Case:
    """All three phases, the last one with labels kept out of the teacher and as released, for both heads."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = {"book": replay.tensor(case["in_book_initial__codebook"])}
        book = Phase(case, folder, ["method.phase=book"], start, Draws(case, "book"), "book")
        initial = case["in_book_initial__codebook"]
        results = {
            "out_book_loss": book.steps.logged["modularity"],
            "out_book_grad0__codebook": book.first_gradient("codebook", initial),
            "out_book_after__codebook": book.after("codebook", initial),
        }
        for kind in HEADS:
            results |= _head_and_prototypes(case, folder, kind, book.states[-1]["book"])
    return results


def _head_and_prototypes(case: Case, folder: Path, kind: str, book: Tensor) -> Case:
    prefix = f"in_{kind}_initial__"
    names = {name.removeprefix(prefix): value for name, value in case.items() if name.startswith(prefix)}
    start = {"book": book} | {ours(name): replay.tensor(value) for name, value in names.items()}
    followed = (part for part in names if part.startswith(("head.", "projection_head.")))
    taught = {part.replace("head.", "head_ema.", 1): names[part] for part in followed}
    start |= {ours(name): replay.tensor(value) for name, value in taught.items()}
    words = [f"method.head={kind}", f"optim.head.clip_norm={float(case[f'cfg_clip_{kind}'])}"]
    head = Phase(case, folder, [*words, "method.phase=head"], start, Draws(case, kind), "head")
    logged, count = head.steps.logged, int(case["cfg_head_steps_per_epoch"])
    ends = range(count, len(head.states) + 1, count)
    pictures = case["in_head_images"].shape[:2]
    results = {
        f"out_{kind}_contrastive": logged["contrastive"],
        f"out_{kind}_linear": logged["linear_probe"],
        f"out_{kind}_total": logged["contrastive"] + logged["linear_probe"],
        f"out_{kind}_grad_norm": head.norms("head.", "projection.", "linear_probe."),
        f"out_{kind}_code_index": torch.stack(head.draws.concepts).reshape(*pictures, -1).numpy(),
        f"out_{kind}_bank_counts": head.steps.seen["counts"],
        f"out_{kind}_bank_feats": head.model.bank.rows()[0].numpy(),
        f"out_{kind}_linear_accuracy": np.array([head.linear(step) for step in ends]),
        **{f"out_{kind}_grad0__{name}": head.first_gradient(name, value) for name, value in names.items()},
        **{f"out_{kind}_after__{name}": head.after(name, value) for name, value in {**names, **taught}.items()},
    }
    for mode, prototypes in (("free", "free"), ("released", "labels")):
        own = [*words, *_schedules(case), "method.phase=prototypes", f"method.prototypes={prototypes}"]
        state = head.states[-1] | {"own": replay.tensor(case[f"in_{kind}_proto_initial__cluster_probe"])}
        last = Phase(case, folder, own, state, Draws(case, f"{kind}_proto"), "proto")
        results |= _prototypes(case, last, f"out_{kind}_proto_{mode}", names, taught, leaked=mode == "released")
    return results


def _prototypes(case: Case, last: Phase, prefix: str, names: Case, taught: Case, leaked: bool) -> Case:
    logged, count = last.steps.logged, int(case["cfg_proto_steps_per_epoch"])
    initial = {name: value for name, value in case.items() if name.endswith("_proto_initial__cluster_probe")}
    weights = {name: value for name, value in names.items() if name.startswith("linear.")}
    weights["cluster_probe"] = next(iter(initial.values()))
    teacher = {name: value for name, value in taught.items() if name.startswith("head_ema.")} if leaked else {}
    epochs = range(count, len(last.states) + 1, count)
    tested = last.scores(len(last.states), flip=True)["own"]

    def scored(step: int) -> list[float]:
        own = last.scores(step)["own"]
        return [own.miou, own.acc, last.linear(step)]

    return {
        f"{prefix}_modularity": logged["modularity"],
        f"{prefix}_linear": logged["linear_probe"],
        f"{prefix}_grad_norm": last.norms("linear_probe.", *(["teacher."] if leaked else [])),
        **{f"{prefix}_grad0__{name}": last.first_gradient(name, v) for name, v in {**weights, **teacher}.items()},
        **{f"{prefix}_after__{name}": last.after(name, value) for name, value in weights.items()},
        **{f"{prefix}_after__{name}": last.after(name, value)[-1] for name, value in teacher.items()},
        f"{prefix}_scores": np.array([scored(step) for step in epochs]),
        f"{prefix}_test_scores": np.array([tested.miou, tested.acc]),
    }


def _words(case: Case) -> list[str]:
    settings = {
        "method.num_clusters": "num_classes",
        "method.dim": "reduced_dim",
        "method.projection_dim": "projection_dim",
        "method.hidden": "tr_hidden",
        "method.concepts": "num_concepts",
        "method.cell": "grid",
        "method.temperature": "temp_contrastive",
        "method.modularity_temperature": "temp_modularity",
        "method.near": "pos",
        "method.far": "neg",
        "method.bank": "bank_max",
        "method.ema": "ema",
        "method.dropout": "dropout_p",
        **{f"optim.{group}.lr": "lr" for group in ("book", "head", "prototypes", "linear_probe")},
        **{f"optim.{group}.weight_decay": "weight_decay" for group in ("head", "linear_probe")},
    }
    return [
        "method=cause",
        "phases=[]",
        "method.clipping=joint",
        "method.centre=false",
        "method.start=uniform",
        *(f"{key}={case[f'cfg_{name}'].item()}" for key, name in settings.items()),
    ]


def _schedules(case: Case) -> list[str]:
    """Of the last phase: the rate drops after every so many epochs."""
    steps, every = len(case["in_proto_images"]), int(case["cfg_proto_lr_epochs"] * case["cfg_proto_steps_per_epoch"])
    drops = [(step + 0.5) / steps for step in range(every, steps, every)]
    values = {"schedule": "step", "milestones": drops, "drop": float(case["cfg_proto_lr_factor"])}
    groups = "head", "prototypes", "linear_probe"
    return [f"optim.{group}.{key}={value}" for group in groups for key, value in values.items()]
