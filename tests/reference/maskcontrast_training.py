"""`maskcontrast.training`: steps of MaskContrast by the real module, on a dilated ResNet of any width.

The pictures, masks, initial weights, queue and what dropout keeps are those of the case; names are turned into ours.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

import config
from engine import setup
from lightning_modules.objects import maskcontrast
from lightning_modules.objects.maskcontrast import MaskContrast
from losses.objects import mask_contrast as losses
from tests.reference import training

Case = dict[str, np.ndarray]
OURS = (
    ("backbone.", "backbone.net."), ("decoder.0.", "head.pyramid."), ("decoder.1.", "head.merge.0."),
    ("decoder.2.", "head.merge.1."), ("head.", "head.classifier."), ("classification_head.", "head.object."),
)  # fmt: skip
"""Beginnings of the authors' names, and ours in their place."""
PARTS = {"": ("backbone.", "head."), "key.": ("key_backbone.", "key_head.")}
FIRST = 4
"""Rows of the logits that a case keeps of every step."""


class DilatedResNet(ResNet):
    """torchvision's ResNet of bottlenecks with any number of channels in every stage and in the stem."""

    def __init__(self, block: Any, layers: Sequence[int], stem: int, **settings: Any) -> None:
        super().__init__(block, layers, **settings)
        planes = settings["channels"][0]
        width = planes * block.expansion
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        shortcut = nn.Sequential(nn.Conv2d(stem, width, 1, bias=False), nn.BatchNorm2d(width))
        rest = (block(width, planes) for _ in range(layers[0] - 1))
        self.layer1 = nn.Sequential(block(stem, planes, downsample=shortcut), *rest)
        self.feature_info[0]["num_chs"] = stem


@register_model
def dilated_resnet(pretrained: bool = False, **settings: Any) -> nn.Module:
    return build_model_with_cfg(DilatedResNet, "dilated_resnet", pretrained, block=Bottleneck, **settings)


class Kept(nn.Module):
    """Dropout whose draws are recorded: bool [T,B,C,h,w], one step a call in training."""

    def __init__(self, keep: Tensor, p: float) -> None:
        super().__init__()
        self.waiting, self.p = list(keep), p

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.waiting.pop(0) / (1 - self.p)


def words(case: Case) -> list[str]:
    """Words of a configuration with the network, the loss and the optimiser of a case."""
    if int(case["cfg_expansion"]) != Bottleneck.expansion:
        raise ValueError("blocks of another expansion than 4")
    mean, std = (case[f"in_{name}"].astype(float).tolist() for name in ("mean", "std"))
    create = {
        "stem": int(case["cfg_stem"]),
        "layers": case["cfg_blocks"].tolist(),
        "channels": case["cfg_planes"].tolist(),
    }
    inside = ", ".join(f"{key}: {value}" for key, value in create.items())
    frozen = "[conv1, bn1, layer1, layer2]" if case["cfg_freeze_layers"] else "[]"
    found = [
        "method=maskcontrast",
        "data=folder",
        f"data.batch_size={case['in_query_images'].shape[1]}",
        "trainer=cpu",
        "trainer.progress=none",
        "backbone=resnet18",
        "backbone.timm=dilated_resnet",
        "backbone.weights=none",
        "backbone.frozen=false",
        "backbone.output_stride=8",
        f"backbone.create={{{inside}}}",
        f"backbone.mean={mean}",
        f"backbone.std={std}",
        "method.num_clusters=3",
        f"method.dim={case['in_queue'].shape[0]}",
        f"method.head.hidden={int(case['cfg_decoder_width'])}",
        f"method.head.rates={case['cfg_aspp_rates'].tolist()}",
        "method.head.norm=batch",
        f"method.head.dropout={float(case['cfg_dropout_p'])}",
        f"method.freeze={frozen}",
        f"method.queue.size={case['in_queue'].shape[1]}",
        "method.queue.empty=keep",
        f"method.temperature={float(case['cfg_temperature'])}",
        f"method.momentum={float(case['cfg_key_momentum'])}",
        f"method.weights.contrast={float(case['cfg_contrastive_weight'])}",
        f"method.weights.salience={float(case['cfg_saliency_weight'])}",
        "method.schedule_by=epoch",
    ]
    for group in ("head", "backbone"):
        values = {"optimizer": "sgd", "schedule": "poly", "lr": float(case["cfg_lr_start"])}
        values |= {"power": float(case["cfg_lr_power"]), "momentum": float(case["cfg_sgd_momentum"])}
        values |= {"weight_decay": float(case["cfg_weight_decay"])}
        found += [f"optim.{group}.{key}={value}" for key, value in values.items()]
    return found


def ours(name: str) -> str:
    """Our name of a weight of the authors', of the query's network or, after `key.`, of the key's."""
    own = name.removeprefix("key.")
    old, new = next(pair for pair in OURS if own.startswith(pair[0]))
    return ("key_" if own != name else "") + own.replace(old, new, 1)


def build(case: Case) -> MaskContrast:
    setup.begin()
    model = setup.build_model(config.compose(words(case)), training.classes(2))
    start = training.given(case, training.INITIAL)
    given = {ours(f"key.{name}"): value for name, value in start.items() if not name.startswith("key.")}
    given |= {ours(name): value for name, value in start.items()}  # its own statistics, where the case has them
    unknown = model.load_state_dict(given, strict=False).unexpected_keys
    missing = [name for name in own_names(model) if name not in given]
    if unknown or missing:
        raise ValueError(f"weights that the method does not have: {unknown}, or that the case does not: {missing}")
    model.queue.storage.copy_(training.tensor(case["in_queue"]).T)
    for name in ("head", "key_head"):
        keep = training.tensor(case[f"in_{'key' if name.startswith('key') else 'query'}_keep"])
        getattr(model, name).pyramid.project[-1] = Kept(keep, float(case["cfg_dropout_p"]))
    return model


def own_names(model: MaskContrast) -> list[str]:
    """Weights and running statistics of both networks."""
    begins = tuple(begin for part in PARTS.values() for begin in part)
    return [name for name in model.state_dict() if name.startswith(begins) and not name.endswith("num_batches_tracked")]


def batches(case: Case) -> Iterator[dict[str, Any]]:
    for step in range(int(case["cfg_steps"])):
        views: dict[str, Any] = {}
        for name in maskcontrast.VIEWS:
            views[name] = training.pictures(case[f"in_{name}_images"][step])
            views[f"{name}.pseudo"] = training.tensor(case[f"in_{name}_masks"][step]).long()
            views[f"{name}.valid"] = torch.ones_like(views[f"{name}.pseudo"], dtype=torch.bool)
        yield training.batch(views["query"], None, **views)


class Steps:
    """What the loss was given, and both networks after each step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        self.states: list[dict[str, Tensor]] = []
        self.gradients: dict[str, Tensor] = {}

    def keep(self, name: str, value: Tensor) -> None:
        self.seen.setdefault(name, []).append(value.detach().clone())

    def contrast(self, maps: Tensor, inside: Tensor, bank: Tensor, weights: Tensor, temperature: float, **more: Any):
        picture = int(inside.flatten(1).any(1).int().argmax())
        rows = torch.cat(
            [losses.unit_pixels(one, mask) for one, mask in zip(maps[picture:], inside[picture:], strict=True)]
        )
        self.keep("out_first_logits", losses.similarities(rows[:FIRST], bank, temperature))
        self.keep("out_class_weight", weights)
        self.keep("out_pixels", inside.sum())
        return self.real(maps, inside, bank, weights, temperature, **more)

    real = staticmethod(losses.object_contrast)

    def watch(self, model: MaskContrast) -> dict[str, Tensor]:
        self.keep("out_queue", model.queue.storage.T)
        self.keep("out_queue_ptr", model.queue.pointer)
        state = model.state_dict()
        self.states.append(training.copied({name: state[name] for name in own_names(model)}))
        if not self.gradients:
            grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
            self.gradients = training.copied({name: grads[name] for name in own_names(model) if name in grads})
        return {}


def run(case: Case) -> Case:
    model, steps, count = build(case), Steps(), int(case["cfg_steps"])
    data = training.Recorded(list(batches(case)), int(case["cfg_steps_per_epoch"]))
    total = int(case["cfg_epochs"]) * int(case["cfg_steps_per_epoch"])
    with tempfile.TemporaryDirectory() as folder, patch.object(losses, "object_contrast", steps.contrast):
        logged = training.train(model, data, Path(folder), total, watch=steps.watch).logged
    results = {name: torch.stack(values).numpy() for name, values in steps.seen.items()}
    results |= {"out_contrastive": logged["contrast"], "out_saliency": logged["salience"]}
    names = {ours(name): name for name in theirs(case)}
    results |= {f"out_grad0__{names[name]}": value.numpy() for name, value in steps.gradients.items()}
    chosen = [steps.states[int(step) - 1] for step in case["cfg_out_after_steps"]]
    for name, wanted in names.items():
        values = [state[name] for state in chosen]
        last = steps.states[count - 1][name]
        results[f"out_after__{wanted}"] = (last if wanted.startswith("key.") else torch.stack(values)).numpy()
    return results


def theirs(case: Case) -> list[str]:
    """The authors' names of the weights and statistics of both networks."""
    query = [name for name in training.given(case, training.INITIAL) if not name.startswith("key.")]
    return [*query, *(f"key.{name}" for name in query)]
