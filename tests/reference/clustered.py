"""What `picie.training` and `mdc.training` share: a narrow ResNet, pictures and draws of every pass, names of weights.

The released loops cluster before every epoch; here the real method does, with the pictures that a case recorded for
each pass in place of the ones that its DataModule would show.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import config
from datamodules.base.transforms import Replay, cell_boxes, replay, take
from engine import setup
from engine.fitting import OwnFit
from lightning_modules.clustered.rounds import ClusterRounds
from retrieval import kmeans
from retrieval.minibatch import Clusters
from tests.reference import training

Case = dict[str, np.ndarray]


class NarrowResNet(ResNet):
    """torchvision's ResNet with any number of channels, in the stem as well, where timm's has 64."""

    def __init__(self, block: Any, layers: Sequence[int], width: int, **settings: Any) -> None:
        super().__init__(block, layers, channels=[width * 2**stage for stage in range(4)], **settings)
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(BasicBlock(width, width) for _ in range(layers[0])))
        self.feature_info[0]["num_chs"] = width


@register_model
def narrow_resnet(pretrained: bool = False, **settings: Any) -> nn.Module:
    return build_model_with_cfg(NarrowResNet, "narrow_resnet", pretrained, block=BasicBlock, **settings)


def words(case: Case) -> list[str]:
    """Words of a configuration with the network, the k-means and the optimiser of a case."""
    blocks, (mean, std) = case["cfg_blocks"].tolist(), (case[f"cfg_{name}"].tolist() for name in ("mean", "std"))
    found = [
        "data=folder",
        "trainer=cpu",
        "trainer.progress=none",
        "backbone=resnet18",
        "backbone.timm=narrow_resnet",
        "backbone.weights=none",
        f"backbone.create={{width: {int(case['cfg_width'])}, layers: {blocks}}}",
        f"backbone.mean={mean}",
        f"backbone.std={std}",
        f"method.num_clusters={int(case['cfg_classes'])}",
        f"method.dim={int(case['cfg_channels'])}",
        f"method.kmeans.batch_size={int(case['cfg_batch_cluster'])}",
        f"method.kmeans.first={int(case['cfg_init_batches'])}",
        f"method.kmeans.group={int(case['cfg_update_batches'])}",
        f"method.kmeans.iterations={int(case['cfg_kmeans_iterations'])}",
        "method.head_start=random",
        "method.kmeans.init=random",
        "method.kmeans.points=100000000",
        "method.kmeans.pictures=null",
        "method.kmeans.counted=null",
    ]
    groups = ["backbone", "head", *(["classifier"] if "in_classifier_weight" in case else [])]
    for group in groups:
        found += [f"optim.{group}.{key}={float(case[f'cfg_{key}'])}" for key in ("lr", "weight_decay")]
    return found


def theirs(name: str, levels: int) -> str:
    """The authors' name of a weight of ours: their decoder counts from the coarsest level on."""
    if name.startswith("head.laterals."):
        number, kind = name.removeprefix("head.laterals.").split(".")
        return f"decoder.layer{levels - int(number)}.{kind}"
    return name.replace("backbone.net.", "backbone.", 1)


def network(model: ClusterRounds, state: dict[str, Tensor], running: bool = False) -> dict[str, Tensor]:
    """The network's part of a state dict under the authors' names; `running`: its running statistics alone."""
    levels = len(model.backbone.channels)
    own = {name: value for name, value in state.items() if name.startswith(("backbone.net.", "head."))}
    found = {theirs(name, levels): value for name, value in own.items() if not name.endswith("num_batches_tracked")}
    return {name: value for name, value in found.items() if not running or ".running_" in name}


def build(case: Case, more: Sequence[str]) -> ClusterRounds:
    setup.begin()
    count = int(case["cfg_classes"])
    model = setup.build_model(config.compose([more[0], *words(case), *more[1:]]), training.classes(count))
    start, levels = training.given(case, training.INITIAL), len(model.backbone.channels)
    own = {name: start[theirs(name, levels)] for name in network_names(model)}
    model.load_state_dict(own, strict=False)
    if len(own) != len(start):
        raise ValueError(f"{len(start)} initial weights for {len(own)} of the network")
    return model


def network_names(model: ClusterRounds) -> list[str]:
    kept = (name for name in model.state_dict() if name.startswith(("backbone.net.", "head.")))
    return [name for name in kept if not name.endswith("num_batches_tracked")]


class Pictures(training.Recorded):
    """The pictures of a case, by epoch. `views[name]` are float pictures [E,N,3,H,W] as the network gets them, but for
    the crop of `view1`."""

    def __init__(self, case: Case, views: dict[str, Tensor]) -> None:
        self.case, self.recoloured = case, views
        self.epochs, self.train_items = case["in_order"].shape
        steps = len(case["in_batches"]) // self.epochs
        rows = [torch.from_numpy(row[row >= 0]) for row in case["in_batches"]]
        super().__init__([{"epoch": n // steps, "index": own} for n, own in enumerate(rows)], steps)
        self.eval_geometry = None

    def geometry(self, epoch: int) -> Replay:
        """Of all pictures in an epoch."""
        drawn = [self.case[f"in_{name}"][epoch] for name in ("scale", "crop")]
        shares = torch.from_numpy(np.column_stack(drawn))
        frame, size = (tuple([side] * 2) for side in (self.recoloured["view1"].shape[-1], int(self.case["cfg_res"])))
        flip = torch.from_numpy(self.case["in_flip"][epoch] < self.case["cfg_flip_chance"])
        return Replay(cell_boxes(shares, frame).float(), flip, frame, size, shares=shares)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self.seen(batch["epoch"], batch["index"]) if "epoch" in batch else batch

    def seen(self, epoch: int, rows: Tensor) -> dict[str, Any]:
        """A batch of these pictures."""
        params = take(self.geometry(epoch), rows, torch.device("cpu"))
        made = {name: pictures[epoch][rows] for name, pictures in self.recoloured.items()}
        made["view1"] = replay(made["view1"], params)
        return training.batch(made["view1"], None, **made, **{"view1.params": params, "index": rows})

    def shown(self, step: int, wanted: Sequence[str], batch_size: int, purpose: str, *args: Any) -> Iterator[dict]:
        epoch = step // self.steps_per_epoch
        for rows in torch.from_numpy(self.case["in_order"][epoch]).split(batch_size):
            yield self.seen(epoch, rows)

    def source(self, split: str) -> Tensor:
        return torch.from_numpy(self.case["in_plain_order"])

    def in_step(self, split: str, geometry: Any, keys: Any, batch_size: int, purpose: str) -> Iterator[dict]:
        pictures = training.pictures(self.case["in_plain"])
        for rows in self.source(split).split(batch_size):
            yield training.batch(pictures[rows], None)


class Followed:
    """A method of a case, trained through all of its epochs; what the case asks for, under its names."""

    def __init__(self, case: Case, model: ClusterRounds, data: Pictures) -> None:
        self.case, self.model, self.data = case, model, data
        self.fits: list[Clusters] = []
        self.states: list[dict[str, Tensor]] = []
        self.gradients: dict[str, Tensor] = {}
        fitted = model._fitted

        def recorded(*args: Any) -> list[Clusters]:
            found = fitted(*args)
            self.fits += found
            return found

        model._fitted = recorded

    def train(self, *patches: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            starts = iter(
                [*self.case["in_first_points"].reshape(-1, int(self.case["cfg_classes"])), self.case["in_fresh_points"]]
            )
            stack.enter_context(
                patch.object(kmeans, "initial_centroids", lambda points, *_: points[torch.from_numpy(next(starts))])
            )
            for own in patches:
                stack.enter_context(own)
            self.steps = training.train(self.model, self.data, Path(folder), len(self.data.batches), self.watch)
            self.results = self.collected()

    def watch(self, model: ClusterRounds) -> dict[str, Tensor]:
        self.states.append(training.copied(dict(model.state_dict())))
        if not self.gradients:
            found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
            self.gradients = training.copied(found)
        return {}

    def scores(self, probe: str) -> list[float]:
        images = training.pictures(self.case["in_val_images"])
        found = training.scores(self.model, self.steps, images, self.case["in_val_labels"])[probe]
        return [found.acc, found.miou]

    def collected(self) -> Case:
        """All results that both methods have; labels and scores of an epoch come from the state that it left."""
        model, views, epochs = self.model, len(self.model.clustered), self.data.epochs
        everything, classes = torch.arange(self.data.train_items), int(self.case["cfg_classes"])
        labels, weights, clustered, scores = [], [], [], []
        for epoch in range(epochs):
            state = self.states[(epoch + 1) * self.data.steps_per_epoch - 1]
            model.load_state_dict(state)
            batch = self.data.seen(epoch, everything)
            labels.append(torch.stack([model.labels_of(batch, view)[0] for view in range(views)]))
            counted = bool(model.counts0.sum())  # not where nothing is weighted
            counts = (
                model.counts0
                if counted
                else torch.stack([own.flatten().bincount(minlength=classes) for own in labels[-1]])
            )
            weights.append(counts / counts.sum(1, keepdim=True))
            frozen = {
                name.removeprefix("labeller."): value for name, value in state.items() if name.startswith("labeller.")
            }
            clustered.append(network(model, frozen, running=True))
            scores.append([self.scores(name) for name in model.classifier_names])
        self.steps.trainer.callbacks.append(OwnFit())
        fresh_scores = self.scores("own")
        *rounds, fresh = self.fits
        shape = (epochs, views)

        def by_epoch(values: list[Tensor]) -> np.ndarray:
            return torch.stack(values).unflatten(0, shape).numpy()

        results = {
            "out_first_centroids": by_epoch([own.fitted for own in rounds]),
            "out_centroids": by_epoch([own.centroids for own in rounds]),
            "out_kmeans_loss": by_epoch([torch.tensor(own.distance) for own in rounds]),
            "out_labels": torch.stack(labels).numpy(),
            "out_weight": torch.stack(weights).numpy(),
            "out_scores": np.array(scores),
            "out_fresh_first_centroids": fresh.fitted.numpy(),
            "out_fresh_centroids": fresh.centroids.numpy(),
            "out_fresh_kmeans_loss": np.array(fresh.distance),
            "out_fresh_scores": np.array(fresh_scores),
        }
        results |= named("out_grad0", network(model, self.gradients))
        results |= named("out_after", training.stacked([network(model, state) for state in self.states]))
        results |= named("out_clustered", training.stacked(clustered))
        return results | named("out_fresh", network(model, dict(model.state_dict()), running=True))


def named(prefix: str, values: dict[str, Any]) -> Case:
    return {
        f"{prefix}__{name}": np.array(value.detach() if isinstance(value, Tensor) else value)
        for name, value in values.items()
    }
