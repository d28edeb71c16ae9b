"""Adapters for the saved cases of DINOSAUR: slot attention, decoders, scores, schedule and whole steps."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from evaluation import matching, readout
from evaluation import slots as scores
from lightning_modules.base import optim
from lightning_modules.slots import dinosaur as method
from models.slots.decoders import MLPDecoder, TransformerDecoder
from models.slots.slot_attention import InputMLP, SlotAttention
from tests.reference import training as replay

Case = dict[str, np.ndarray]
WEIGHTS = "in_w_"
ATTENTION = {
    "norm_input.": "norm_tokens.",
    "norm_slots.": "norm_slots.",
    "to_q.": "to_query.",
    "to_k.": "to_key.",
    "to_v.": "to_value.",
    "gru.": "gru.",
    "ff_mlp.module.0.": "norm_mlp.",
    "ff_mlp.module.1.": "mlp.0.",
    "ff_mlp.module.3.": "mlp.2.",
}
"""Parts of slot attention: the authors' names and ours."""
WITHOUT = "norm_slots.bias"
"""It shifts the logits of all slots alike, and so does nothing."""
INPUTS = {"0.": "norm.", "1.": "layers.0.", "3.": "layers.2."}
DECODER = {
    "pos_embed": "positions",
    "bos_token": "first",
    "inp_transform.": "inputs.",
    "cond_transform.": "memory.",
    "decoder.layers.": "layers.",
    "decoder.": "layers.",
}
PARTS = {
    "conditioning.slots_mu": "start.mean",
    "conditioning.slots_logsigma": "start.log_deviation",
    **{f"perceptual_grouping.slot_attention.{a}": f"attention.{b}" for a, b in ATTENTION.items()},
    **{f"perceptual_grouping.positional_embedding.layers.1.{a}": f"inputs.{b}" for a, b in INPUTS.items()},
    **{f"object_decoder.{a}": f"decoder.{b}" for a, b in DECODER.items()},
}


NORM = {"weight": 1.0, "bias": 0.0}
"""Of the norm behind the last block, which a case lacks: features are of before it."""


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def _ours(name: str, parts: dict[str, str]) -> str:
    """Our name of a weight."""
    for theirs, ours in parts.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise KeyError(name)


def _weights(case: Case, parts: dict[str, str]) -> dict[str, Tensor]:
    """The weights of a case of one module, by our names."""
    given = {name.replace("__", "."): value for name, value in replay.given(case, WEIGHTS).items()}
    return {_ours(name, parts): value for name, value in given.items() if not name.endswith(WITHOUT)}


def slot_attention(case: Case) -> Case:
    weights = _weights(case, ATTENTION)
    dim, channels = weights["to_key.weight"].shape
    module = SlotAttention(channels, dim, int(case["cfg_iters"]), float(case["cfg_eps"]))
    module.load_state_dict(weights)
    features, start = (replay.tensor(case[f"in_{name}"]).requires_grad_() for name in ("features", "slots_init"))
    slots, attention = module(features, start)
    slots.square().sum().backward()
    module.iterations = 1
    first, seen = module(features, start)
    return {
        "out_slots": _array(slots),
        "out_attn": _array(attention),
        "out_slots_step1": _array(first),
        "out_attn_step1": _array(seen),
        "out_grad_features_sumsq": _array(features.grad),
        "out_grad_slots_init_sumsq": _array(start.grad),
    }


def input_mlp(case: Case) -> Case:
    weights = _weights(case, INPUTS)
    module = InputMLP(*reversed(weights["layers.2.weight"].shape))
    module.load_state_dict(weights)
    return {"out_features": _array(module(replay.tensor(case["in_features"])))}


def _decoded(case: Case, module: Any) -> Case:
    module.load_state_dict(_weights(case, DECODER))
    slots, target, side = (
        replay.tensor(case["in_slots"]), replay.tensor(case["in_target"]), int(case["cfg_image_size"])
    )  # fmt: skip
    told, masks = module.eval()(slots, target, _grid(case))
    return {
        "out_reconstruction": _array(told),
        "out_masks": _array(masks),
        "out_masks_as_image": _array(readout.upsample(masks.unflatten(2, _grid(case)), (side, side))),
        "out_loss_mse": _array(F.mse_loss(told, target)),
    }


def _grid(case: Case) -> tuple[int, int]:
    side = round(case["in_target"].shape[1] ** 0.5)
    return side, side


def mlp_decoder(case: Case) -> Case:
    sizes = case["in_slots"].shape[-1], case["in_target"].shape[-1]
    return _decoded(case, MLPDecoder(*sizes, _grid(case), case["cfg_hidden"].tolist()))


def transformer_decoder(case: Case) -> Case:
    sizes = case["in_slots"].shape[-1], case["in_target"].shape[-1]
    return _decoded(case, TransformerDecoder(*sizes, int(case["cfg_layers"]), int(case["cfg_heads"])))


def ari_mbo(case: Case) -> Case:
    count = case["in_pred_masks"].shape[1]
    groups = replay.tensor(case["in_pred_masks"]).argmax(1)
    true = replay.tensor(case["in_true_masks_with_bg"]).bool()
    counted = ~replay.tensor(case["in_ignore"])[:, 0].bool()
    fg, whole, best, matched, ignoring = [], [], [], [], []
    for own, masks, inside in zip(groups, true, counted, strict=True):
        ids, foreground = masks.int().argmax(0), masks[1:].any(0)
        fg.append(scores.adjusted_rand(own[foreground], ids[foreground]))
        whole.append(scores.adjusted_rand(own.flatten(), ids.flatten()))
        found = scores.overlaps(own, count, masks[1:])
        if len(found):
            best.append(scores.best_overlap(found))
            matched.append(scores.matched_overlap(found))
        if len(found := scores.overlaps(own, count, masks[1:], inside)):
            ignoring.append(scores.best_overlap(found))
    return {
        "out_fg_ari": np.array(fg),
        "out_ari": np.array(whole),
        "out_mbo": np.array(np.mean(best)),
        "out_mean_hungarian_iou": np.array(np.mean(matched)),
        "out_mbo_with_ignore": np.array(np.mean(ignoring)),
    }


SCORED = {
    "hungarian_ignore_bg": ("hungarian_iou", "drop"),
    "hungarian_unmatched_bg": ("hungarian_iou", "rest"),
    "hungarian_plain": ("hungarian_iou", "drop"),
    "majority_ignore_bg": ("many_to_one_iou", "drop"),
}


class Regions:
    """A method whose regions and clusters are given."""

    def __init__(self, masks: Tensor, clusters: Tensor) -> None:
        self.found = masks, clusters

    def clustered_regions(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.found


def semantic_miou(case: Case) -> Case:
    clusters, classes = int(case["cfg_n_clusters"]), int(case["cfg_n_classes"]) + 1
    model = Regions(replay.tensor(case["in_pred_masks"]), replay.tensor(case["in_cluster_ids"]) - 1)
    label = replay.tensor(case["in_target_labels"])[:, 0].masked_fill(replay.tensor(case["in_ignore"])[:, 0], 255)
    results: Case = {}
    for name, (matched, extra) in SCORED.items():
        without = name.endswith("ignore_bg")  # then pixels of the background have no label, and ids start at 0
        shown = torch.where(label == 255, 255, label - 1).where(label > 0, 255) if without else label
        rules = _Rules(matched, extra)
        metric = scores.RegionClasses(clusters, replay.classes(classes - without), rules)
        metric.see(model, {"image": shown[:, None], "label": shown}, model.found[0])
        found = metric.compute()
        results[f"out_iou_{name}"] = np.nan_to_num(found.iou / 100, nan=0.0)
        results[f"out_acc_{name}"] = np.array(found.acc / 100)
        results[f"out_empty_{name}"] = np.isnan(found.iou) | (found.counts.sum(0) == 0)
        results[f"out_miou_{name}"] = np.array(matching.mean(found.iou[~results[f"out_empty_{name}"]]) / 100)
        if not without:
            results["out_confusion"] = np.roll(found.counts, 1, 0)
    return results


class _Rules:
    """Of the configuration."""

    absent, background = "skip", 0

    def __init__(self, matching: str, extra: str) -> None:
        self.matching, self.extra = matching, extra


def lr_schedule(case: Case) -> Case:
    settings = {"warmup_from": 0.0, "drop": float(case["cfg_decay_rate"]), "decay_steps": int(case["cfg_decay_steps"])}
    warmup, steps = int(case["cfg_warmup_steps"]), case["in_steps"].tolist()
    return {"out_factor": np.array([optim.schedule_factor("exponential", t, 1, warmup, **settings) for t in steps])}


# Whole steps.


def training(case: Case) -> Case:
    """Whole steps of the released model with each decoder, and what it makes of other pictures after them."""
    results: Case = {}
    for run in ("mlp", "transformer"):
        results |= _trained(case, run)
    return results


def _trained(case: Case, run: str) -> Case:
    images = replay.pictures(case["in_images"])
    batches = [replay.batch(part, None) for part in images]
    given = replay.given(case, f"{replay.INITIAL}{run}.")
    names = {_ours(name, PARTS): name for name in given if not name.endswith(WITHOUT)}
    starts = {f"{replay.INITIAL}{ours}": given[name].numpy() for ours, name in names.items()}
    renamed = {name: value for name, value in case.items() if not name.startswith(replay.INITIAL)} | starts
    width = len(case[f"{replay.VIT}pos_embed"][0, 0])
    renamed |= {f"{replay.VIT}norm.{part}": np.full(width, value, np.float32) for part, value in NORM.items()}
    renamed["cfg_heads"] = case["cfg_vit_heads"]
    theirs = {ours: f"{run}.{name}" for ours, name in names.items()}
    noise, found = replay.tensor(case["in_noise"]), []
    group = method.Dinosaur.group

    def watched(self: Any, features: Any, noise: Tensor) -> Any:
        found.append(group(self, features, noise))
        return found[-1]

    def step_noise(seed: int, step: int, *sizes: int) -> Tensor:
        return noise[step]

    def picture_noise(*args: Any) -> Tensor:
        return replay.tensor(case["in_val_noise"])

    draws = patch.multiple(method, step_noise=step_noise, picture_noise=picture_noise)
    with tempfile.TemporaryDirectory() as name, draws, patch.object(method.Dinosaur, "group", watched):
        folder = Path(name)
        model = replay.method(renamed, _words(case, run, images.shape[-1]), folder, 2)
        steps = replay.train(model, replay.Recorded(batches, len(batches)), folder, len(batches))
        seen = found[: len(batches)]
        found.clear()
        val = replay.batch(replay.pictures(case["in_val_images"]), None)
        steps.trainer.validate(model, DataLoader([val], batch_size=None), verbose=False)
    results = {
        f"out_loss_{run}": steps.logged["loss"],
        f"out_grad_norm_{run}": np.array([_norm(row, theirs) for row in steps.gradients]),
        f"out_slots_{run}": np.stack([_array(one.slots) for one in seen]),
        f"out_attention_{run}": np.stack([_array(one.attention) for one in seen]),
        f"out_masks_{run}": np.stack([_array(one.masks) for one in seen]),
        f"out_val_masks_{run}": _array(found[0].masks),
        "out_val_features": _array(found[0].tokens),
    }
    chosen = [int(step) - 1 for step in case["cfg_out_after_steps"]]
    for part in (steps.first_gradients(), steps.after(chosen)):
        for name, value in part.items():
            prefix, own = name.split("__")
            if own in theirs:
                results[f"{prefix}__{theirs[own]}"] = value
    return results


def _norm(gradients: dict[str, Tensor], names: dict[str, str]) -> float:
    return float(torch.stack([value.norm() for name, value in gradients.items() if name in names]).norm())


def _words(case: Case, run: str, side: int) -> list[str]:
    settings = {
        "data.train_size": side,
        "data.eval_size": side,
        "method.slots": int(case["cfg_slots"]),
        "method.slot_dim": int(case["cfg_slot_dim"]),
        "method.iterations": int(case["cfg_iterations"]),
        "method.eps": float(case["cfg_slot_eps"]),
        "method.decoder.kind": run,
        "method.decoder.mlp.hidden": case["cfg_mlp_hidden"].tolist(),
        "method.decoder.mlp.shares": "said",
        "method.decoder.transformer.layers": int(case["cfg_decoder_layers"]),
        "method.decoder.transformer.heads": int(case["cfg_decoder_heads"]),
        "optim.slots.lr": float(case["cfg_lr_peak"]),
        "optim.slots.warmup": int(case["cfg_warmup_steps"]),
        "optim.slots.drop": float(case["cfg_decay_rate"]),
        "optim.slots.decay_steps": int(case["cfg_decay_steps"]),
        "optim.slots.clip_norm": float(case["cfg_gradient_clip"]),
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return ["method=dinosaur", "method.num_clusters=2", "method.compare=false", "backbone.cache_features=false", *words]
