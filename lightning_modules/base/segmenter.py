"""UnsupervisedSegmenter: what every method shares. A method writes `build`, `embed` and `loss`, and little else.

The base owns the backbone, the probes on detached codes, the optimiser with clipping and schedules, validation,
prediction, and the rule that labels never reach a method.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import config
from common import distributed
from common.chance import library_draws
from common.errors import CheckpointError, ConfigError
from common.spec import ClassMeta, NeighbourSpec, RegionSpec, ViewSpec, channels_of
from evaluation.probes import LinearProbe
from evaluation.readouts import Readout
from lightning_modules.base.evaluated import FCN, Evaluated
from lightning_modules.base.kept import check_kept, keep_features
from lightning_modules.base.near import near_pictures
from lightning_modules.base.optim import CompositeOptimizer, clip_gradients, scheduled
from lightning_modules.base.regions import region_files
from lightning_modules.base.relations import Place, Relation, Seen
from lightning_modules.facts import OWN
from models.backbone import Backbone, Features, synchronise_norms
from models.feature_store import FeatureStore

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of what we add to a Lightning checkpoint under the key `labelfree`."""


@dataclass
class Loss:
    """What a method's `loss` returns."""

    total: Tensor
    """Scalar that is differentiated."""
    parts: dict[str, Tensor | float] = field(default_factory=dict)
    """Values to log, without graph; shown as train/<name>."""
    skip: bool | Tensor = False
    """True on any rank: no rank updates the method in this step (the probes still learn)."""
    codes: Tensor | None = None
    """Codes [B,D,h,w] of this step, where the method has computed them anyway: the probes learn on them, detached."""
    view: str = "image"
    """The view that `codes` belong to; the linear probe reads the labels of that view."""


class UnsupervisedSegmenter(Evaluated):
    """Base of all methods.

    Class facts: `uses_labels` (supervised variants only, shown in every table), `trains` (False: no method loss, the
    probes still learn), `wants_attention` (ask the backbone for the attention logits of its last block),
    `wants_features` (False: `loss` gets no features of `image`, because it looks at views alone and returns codes of
    one), `trains_backbone` (the backbone changes, by gradient or as a momentum copy; the run then exports it; None:
    as backbone.frozen says), `exports` (what its weights are, for the card of the export), `headline` (the probe that
    the method's score is read from: `own` where it has classes of its own, else `cluster`, unless it names another),
    `title` (its name in papers), `stands_on` (the method whose codes it begins with, shown in every table),
    `region_key` (the key of the folder of region files that are there). `export` sets `in_program` before it traces the
    method, which then must not look at the values of pictures.
    """

    title = ""
    stands_on: str | None = None
    headline = "cluster"
    uses_labels = False
    trains = True
    wants_attention = False
    wants_features = True
    trains_backbone: bool | None = False
    exports = "the weights"
    region_key = "method.regions.root"
    in_program = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(name in vars(cls) for name in OWN) and "headline" not in vars(cls):
            cls.headline = "own"

    def __init__(self, cfg: DictConfig, meta: ClassMeta, linear_probe: bool = True) -> None:
        super().__init__()
        self.cfg = cfg
        self.meta = meta
        self.strict_loading = True
        self.reach = distributed.Reach(local=cfg.trainer.contrast == "local")
        self.backbone = Backbone(cfg.backbone, cfg.seed)
        self._check_channels()
        self._check_frozen()
        with library_draws(cfg.seed, "init"):
            self.build()
        self.has_prototypes = type(self).prototypes is not UnsupervisedSegmenter.prototypes
        self.classifies = type(self).classify is not UnsupervisedSegmenter.classify
        scores = type(self).scores is not UnsupervisedSegmenter.scores
        self.has_own_scores = scores or self.has_prototypes or self.classifies
        self.build_evaluation(linear_probe)
        self.first_step, self.total_steps = 0, cfg.trainer.max_steps or 1  # of the run, or of its phase
        self.restored_step: int | None = None
        """Of a model that was made from a checkpoint, outside training: the checkpoint's step."""
        self.neighbour_table: str | None = None
        self.kept_features: dict[str, FeatureStore] = {}

    def _check_channels(self) -> None:
        found, taken = channels_of(self.cfg.data), self.backbone.in_channels
        if found != taken:
            raise ConfigError(
                f"data.channels={found}: backbone={self.backbone.name} takes pictures of {taken} channels; set "
                f"backbone.create.in_chans={found}, with a network and weights of that many (backbone=net10a), or "
                f"another data set"
            )

    def _check_frozen(self) -> None:
        name = self.cfg.method.name
        if self.trains_backbone is None:
            self.trains_backbone = not self.backbone.frozen
        if not self.backbone.frozen and not self.trains_backbone:
            raise ConfigError(
                f"backbone.frozen=false: method={name} does not train the backbone; set backbone.frozen=true"
            )
        if self.backbone.frozen and self.trains_backbone:
            raise ConfigError(f"backbone.frozen=true: method={name} trains the backbone; set backbone.frozen=false")
        if self.cfg.backbone.cache_features:
            check_kept(self)

    def refuse_padding(self) -> None:
        """For the `build` of a method whose loss takes every patch. Raises ConfigError where batches are padded."""
        if self.cfg.data.train_crop == "keep":
            raise ConfigError("data.train_crop=keep: padding would become patches of the loss; use random or center")

    # ------------------------------------------------------------------ what a method writes

    code_dim: int
    """D of the codes; `build` sets it."""

    @classmethod
    def settled(cls, cfg: DictConfig, data: Any) -> dict[str, Any]:
        """Values of `method.*` keys that are null and go by the pictures of `data`, a DataModule that is set up; called
        before anything is built. They are in the saved configuration."""
        return {}

    def build(self) -> None:
        """Make heads and banks from `self.cfg.method`, and set `self.code_dim`."""
        raise TypeError(f"{type(self).__name__} has to define build()")

    def embed(self, features: Features) -> Tensor:
        """Frozen or trained features -> codes [B,D,h,w] that every probe reads."""
        raise TypeError(f"{type(self).__name__} has to define embed()")

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """The method's objective on one batch. `views` is the batch without any label; `features` are those of
        `image`, None where `wants_features` is False."""
        raise TypeError(f"{type(self).__name__} has to define loss(), or declare trains = False")

    @property
    def views(self) -> dict[str, ViewSpec]:
        """Views that the batch must carry beside `image`, by name."""
        return {}

    @property
    def neighbours(self) -> NeighbourSpec | None:
        """Where set, a batch carries a near training picture of each picture as `neighbour`."""
        return None

    @property
    def region_maps(self) -> RegionSpec | None:
        """Where set, a training batch carries contour regions as `regions`, and so do all its views."""
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """`{name, params}` of each group; its settings are `optim.<name>.*`."""
        return []

    def scores(self, features: Features) -> Tensor:
        """A method's own classifier: [B,K,h,w]; scored as val/own/* where a method defines it."""
        raise TypeError(f"{type(self).__name__} has no classifier of its own")

    def prototypes(self) -> Tensor:
        """In place of `scores`, where a method's own classes are centroids among its codes: these, [K,D].

        The nearest by cosine is a patch's class. They are read as the cluster probe is: of the codes that are averaged
        with those of the mirrored picture, and in the dense CRF by `sharpness` times the cosine.
        """
        raise TypeError(f"{type(self).__name__} has no classes of its own")

    def classify(self, codes: Tensor) -> Tensor:
        """In place of `scores`, where a method's own classes are logits of its codes alone: [B,D,h,w] -> [B,K,h,w].

        They are those of the codes that are averaged with those of the mirrored picture.
        """
        raise TypeError(f"{type(self).__name__} has no classes of its own")

    def take_start(self, checkpoint: dict[str, Any]) -> None:
        """For a method with the keys `init_from` and `base`: before a new run, what it takes over of the checkpoint
        that `init_from` names. `base` holds the settings of the method that is in it; both are there when `build` runs.
        """
        raise TypeError(f"{type(self).__name__} begins with no trained method")

    @property
    def readouts(self) -> list[Readout]:
        """Further evaluations, beside those that the configuration names; see evaluation/readouts.py."""
        return []

    def relations(self, pictures: Sequence[Seen], place: Place) -> list[Relation]:
        """For `explain`: the patches of these pictures that the method holds together with the one at `place` of the
        first. Called without gradient, in evaluation mode and without a Trainer."""
        return []

    def prepare(self, loader: Callable[..., Any]) -> None:
        """Once before the first step of a new run (not after a resume); `loader` is `unlabelled_loader`."""

    @property
    def epoch_steps(self) -> int:
        """Steps from one `on_epoch` to the next: a pass over the training pictures."""
        return max(1, self.trainer.datamodule.steps_per_epoch)

    def on_epoch(self, loader: Callable[..., Any]) -> None:
        """Before the first step, and after every `epoch_steps`."""

    def after_step(self) -> None:
        """After the optimiser's step: banks and momentum copies."""

    @property
    def own_fitted(self) -> bool:
        """False: `fit_own` has to be called before the closing evaluation, or that of a checkpoint from before it."""
        return True

    def fit_own(self) -> None:
        """Fit the classes of the method's own that a run ends with; `offline_state` has to name what it changes."""

    # ------------------------------------------------------------------ training

    def features(self, images: Tensor) -> Features:
        """Backbone features of pictures [B,3,H,W] in 0..1; no graph where the backbone is frozen."""
        return self.backbone.features(images, grad=not self.backbone.frozen, attention=self.wants_attention)

    @property
    def features_key(self) -> str:
        """What all that `features` gives depends on, beside the pictures; names files of kept features."""
        return self.backbone.features_key

    def features_of(self, batch: dict[str, Any], view: str = "image") -> Features:
        """Features of the pictures of a batch, or of those of its view `neighbour`: read from the file of
        `backbone.cache_features` where there is one for this split, else computed."""
        store = self.kept_features.get("train" if self.training else "val")
        if store is None:
            return self.features(batch[view])
        indices = batch["index" if view == "image" else f"{view}.index"]
        return store.features(indices, self.device, lambda rows: self.features(batch[view][rows]))

    @torch.no_grad()
    def frozen_features(self, split: str, batch: dict[str, Any]) -> Features:
        """Backbone features of a batch of `unlabelled_loader(split, ...)`: kept ones where the split has them."""

        def computed(rows: Any = slice(None)) -> Features:
            return self.backbone.features(batch["image"][rows].to(self.device))

        store = self.kept_features.get(split)
        return computed() if store is None else store.features(batch["index"], self.device, computed)

    def configure_model(self) -> None:
        """Batch norms that are trained see the whole global batch where there are several GPUs."""
        if self.trainer.world_size == 1 or self.trainer.state.fn != "fit":
            return
        if self.trainer.strategy.root_device.type == "cuda":
            synchronise_norms(self)
        elif any(isinstance(part, _BatchNorm) and part.training for part in self.modules()):
            log.warning(
                "batch norms are not synchronised between processes on CPUs: each sees its own part of the batch, so "
                "this run is not equal to that of one process (method.head.norm, backbone.freeze_norms)"
            )

    def on_fit_start(self) -> None:
        """Before the training loader is made: kept features, contour regions and the table of near pictures, where they
        are wanted."""
        if self.cfg.backbone.cache_features:
            self.kept_features = keep_features(self, self.trainer.datamodule)
        if self.region_maps is not None:
            data = self.trainer.datamodule
            data.regions = region_files(self, data, self.region_maps)
        if self.neighbours is not None:
            self.neighbour_table, table = near_pictures(self, self.trainer.datamodule, self.neighbours)
            self.trainer.datamodule.neighbours = table.numpy()[:, : self.neighbours.drawn]

    def on_train_start(self) -> None:
        self.kmeans_probe.fitted.fill_(False)  # centroids of a run that is prolonged belong to its old codes
        if self.global_step == 0:  # a resumed run has its step back by now
            self.prepare(self.unlabelled_loader)

    def unlabelled_loader(self, *args: Any, **kwargs: Any) -> "Unlabelled":
        """`SegmentationDataModule.loader` for the method: its batches hold no label (unless `uses_labels`)."""
        loader = self.trainer.datamodule.loader(*args, **kwargs)
        return loader if self.uses_labels else Unlabelled(loader)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        views, label = split_labels(batch)
        features = self.features_of(batch) if self.wants_features else None
        if self.trains:
            loss = self.loss(batch if self.uses_labels else views, features)
            codes = self._codes(features) if loss.codes is None else loss.codes.detach()
        else:
            loss, codes = Loss(features.map.new_zeros(())), self._codes(features)
        skip = self._skipped_anywhere(loss.skip)
        self.optimizers().optimizer.skip_method = skip
        parts = {"cluster_probe": self.cluster_probe.loss(codes)}
        if self.linear_probe is not None and label is not None:
            prefix = "" if loss.view == "image" else f"{loss.view}."
            labels = batch[f"{prefix}label"], batch[f"{prefix}valid"]
            parts["linear_probe"] = self.linear_probe.loss(codes, *labels)
        total = sum(parts.values()) + (loss.total * 0 if skip else loss.total)
        logged = {"loss": loss.total, **loss.parts, **parts} if self.trains else parts
        self._keep_logged(self._over_ranks({f"train/{name}": value for name, value in logged.items()}))
        return total

    def _keep_logged(self, values: dict[str, Tensor | float]) -> None:
        """Put values of this step where callbacks look for what `log` was given: `log` itself takes the host half a
        millisecond for each of them, in every step, and puts them nowhere else here (RunKeeper writes the rows)."""
        found = {name: torch.as_tensor(value).detach().clone() for name, value in values.items()}
        kept = self.trainer.callback_metrics
        for name in [name for name in kept if name.startswith("train/") and name not in found]:
            del kept[name]  # what an earlier part of the run had to say is not said of this step
        kept.update({name: value if value.is_floating_point() else value.float() for name, value in found.items()})

    def _over_ranks(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the ranks, in one collective: what one process with the whole batch would log."""
        if not distributed.active():
            return values
        own = [torch.as_tensor(value, dtype=torch.float32, device=self.device).detach() for value in values.values()]
        return dict(zip(values, distributed.mean(torch.stack(own)), strict=True))

    @torch.no_grad()
    def _codes(self, features: Features) -> Tensor:
        return self.embed(features).detach()

    def _skipped_anywhere(self, skip: bool | Tensor) -> bool:
        if not self.trains or (skip is False and not distributed.active()):
            return False
        return distributed.anywhere(skip, self.device)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self.global_step % self.epoch_steps == 0:
            self.on_epoch(self.unlabelled_loader)
        for group in self.optimizers().optimizer.param_groups:
            group |= scheduled(group, self.global_step - self.first_step, self.total_steps - self.first_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_step()  # here, so that a checkpoint of this step has it

    def configure_optimizers(self) -> CompositeOptimizer:
        groups = [{**group, "owner": "method"} for group in self._method_groups()]
        groups.append({"name": "cluster_probe", "params": self.cluster_probe.parameters(), "owner": "probe"})
        if self.linear_probe is not None:
            groups.append({"name": "linear_probe", "params": self.linear_probe.parameters(), "owner": "probe"})
        return CompositeOptimizer([{**self._settings(group["name"]), **group} for group in groups])

    def _settings(self, group: str) -> dict[str, Any]:
        """`optim.<group>`. Raises ConfigError where the method's yaml lacks it, or a key that every group has."""
        found = config.plain(self.cfg.optim)
        missing = [key for key in found["cluster_probe"] if key not in found.get(group, {})]
        if missing:
            key, name = f"optim.{group}" + (f".{missing[0]}" if group in found else ""), self.cfg.method.name
            raise ConfigError(
                f"{key}: configs/method/{name}.yaml has no settings for this group of parameters, which {name} trains; "
                "write them under `optim:`, as configs/method/stego.yaml does for its head"
            )
        return found[group]

    def _method_groups(self) -> list[dict[str, Any]]:
        return [{**group, "params": list(group["params"])} for group in (self.param_groups() if self.trains else [])]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        for group in optimizer.param_groups:
            clip_gradients(group)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A frozen backbone is made again from the config; the fingerprint proves that it is the same.
        own = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("backbone.")}
        kept = {f"backbone.{key}": value for key, value in self.backbone.state_to_save().items()}
        checkpoint["state_dict"] = own | kept
        checkpoint["labelfree"] = {
            "format": FORMAT,
            "config": config.plain(self.cfg),
            "classes": list(self.meta.names),
            "palette": [list(colour) for colour in self.meta.palette],
            "backbone": self.backbone.fingerprint,
            "neighbours": self.neighbour_table,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.neighbour_table = checkpoint["labelfree"].get("neighbours")
        found, own = checkpoint["labelfree"]["backbone"], self.backbone.fingerprint
        if self.backbone.frozen and found != own:
            raise CheckpointError(
                f"backbone.weights: the checkpoint was trained on {found}, the configured backbone is {own}; "
                "point backbone.weights at the file it was trained with"
            )
        posthoc = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("posthoc_probe.")}
        training = self._trainer is not None and self._trainer.state.fn == "fit"
        if posthoc and (training or not self.cfg.evaluation.posthoc.epochs):  # codes will change, or it is switched off
            for name in posthoc:
                del checkpoint["state_dict"][name]
        elif posthoc:
            classes, dim = posthoc["posthoc_probe.classifier.weight"].shape[:2]
            self.set_posthoc(LinearProbe(dim, classes))
        self._load_head(checkpoint["state_dict"], training)
        if training and self.first_step and checkpoint["global_step"] == self.first_step:
            checkpoint["optimizer_states"] = []  # a phase begins with a new optimiser
        if self.backbone.frozen:  # but what is fitted to pictures is the checkpoint's
            own = {f"backbone.{key}": value for key, value in self.backbone.state_dict().items()}
            checkpoint["state_dict"] = own | checkpoint["state_dict"]

    def _load_head(self, state: dict[str, Tensor], training: bool) -> None:
        """Make the FCN probe that a checkpoint holds, or leave it out: codes will change, it is not asked for, or it is
        one of other settings and will be fitted anew."""
        found = {name.removeprefix(FCN): value.shape for name, value in state.items() if name.startswith(FCN)}
        item = self.further["fcn"] if found and not training and "fcn" in self.further else None
        if item is not None:
            probe = item.new_probe(self.code_dim)
            if found == {name: value.shape for name, value in probe.state_dict().items()}:
                item.take(probe)
                return
        for name in found:
            del state[FCN + name]


class Unlabelled:
    """A loader whose batches hold no label."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (split_labels(batch)[0] for batch in self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def split_labels(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """A batch -> (the same without `label`, every `<view>.label` and instances, the label map or None)."""
    hidden = ("label", "instances")
    views = {key: v for key, v in batch.items() if key.split(".")[0] not in hidden and not key.endswith(".label")}
    return views, batch.get("label")
