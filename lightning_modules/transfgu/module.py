"""TransFGU (Yin et al., ECCV 2022): concepts from the class tokens of many crops, taught to a mask transformer.

Offline: sliding windows of every picture go through the backbone, their class tokens are clustered to concepts, and the
gradient of a picture's class token towards each concept says where the picture supports it. A mask transformer on
frozen features learns these maps, later half from a teacher, which is the student of before: now and then the teacher
takes the student's weights and the student starts anew. Scored as val/own/*. Code: damo-cv/TransFGU.

Here, and not as released: colours are drawn for each picture, labels of a crop are means of bilinear samples at its
pixels, the divisor of the gradient is a key, a crop without evidence is left out (`method.empty`), and the class axis
is permuted by one keyed draw for all processes. Networks without a trained class token have a pooled one, which asks
for three things of its own (`method.crops.tokens`, `method.kmeans.length`, `method.maps.power`): a window's token is
the mean of the picture's own map, tokens are clustered at one length, and what a concept has in common with the whole
picture counts as evidence.
"""

import copy
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError
from common.spec import Geometric, Photometric, ViewSpec
from datamodules.base import SegmentationDataModule
from datamodules.base.transforms import both_sides
from lightning_modules.base import Loss
from lightning_modules.base.staged import StagedSegmenter, check_stage
from lightning_modules.transfgu.crops import BACKGROUND, FOREGROUND, Crops, PooledCrops
from lightning_modules.transfgu.steps import ConceptMaps, Concepts, Places, maps_at, resolved
from losses import concepts
from models.backbone import Features
from models.class_token import token_kind, token_width
from models.mask_decoder import MaskDecoder
from pseudo_labels.cache import Records
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import Soft, Strongest, View

log = logging.getLogger(__name__)


TENTH = 0.1


class TransFGU(StagedSegmenter):
    """Codes = unit patch vectors of the mask transformer; scores = its masks."""

    title = "TransFGU"
    wants_features = False

    def build(self) -> None:
        settings = self.cfg.method
        check_stage(settings.stage)
        check_training(settings)
        self.refuse_padding()
        if settings.stage.size is None:
            raise ConfigError("method.stage.size=null: windows need pictures of one size; set it in px, or [H,W]")
        self.backbone.check_size(both_sides(settings.stage.size), "method.stage.size")
        self.backbone.check_size(self.view_size, "method.augment.size")
        self.token = token_kind(self.backbone, settings.maps.token)
        if self.token == "pooled" and settings.maps.token == "auto":
            log.info(
                "%s has no trained class token that can be differentiated: its mean feature serves", self.backbone.name
            )
        self.windows = resolved(settings.crops.tokens, self.token, "encoded", "pooled")
        if self.windows == "encoded":
            self.backbone.check_size(settings.crops.size, "method.crops.size")
        elif self.token == "class":
            raise ConfigError(
                "method.crops.tokens=pooled: a class token belongs to a whole pass, not to a window of it; use "
                "method.crops.tokens=encoded, or method.maps.token=pooled"
            )
        self.banks = self._banks()
        count = sum(self.banks.values())
        self.register_buffer("concepts", torch.zeros(count, token_width(self.backbone, self.token)))
        self.code_dim = settings.decoder.dim
        self.decoder = MaskDecoder(self.backbone.dim, settings.num_clusters, **settings.decoder)
        self.teacher = copy.deepcopy(self.decoder).requires_grad_(False)
        self.initial = copy.deepcopy(self.decoder).requires_grad_(False)
        self.register_buffer("since_restart", torch.zeros((), dtype=torch.int64))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))
        self.maps: Records | None = None
        self.kept: tuple[weakref.ref, tuple[Tensor, Tensor, Tensor]] | None = None

    def _banks(self) -> dict[int, int]:
        """Concepts of each kind of crops."""
        settings = self.cfg.method
        count = settings.num_clusters - int(settings.background)
        if count < 2:
            beside = " beside the background" if settings.background else ""
            raise ConfigError(f"method.num_clusters={settings.num_clusters}: must be at least 2{beside}")
        things = settings.things
        if things is None:
            things = len(self.meta.things) if settings.num_clusters == self.meta.num_classes else 0
        mode = settings.banks
        if mode == "auto":
            mode = "foreground" if settings.background else "split" if 0 < things < count else "all"
        self.bank_mode = mode
        if mode != "split":
            return {FOREGROUND: count}
        if settings.background:
            raise ConfigError(
                "method.banks=split: makes concepts of the background; set method.background=false, or "
                "method.banks=foreground"
            )
        if not 0 < things < count:
            raise ConfigError(
                f"method.things={things}: with method.banks=split it must be 1 to {count - 1}, fewer than "
                f"method.num_clusters={count}"
            )
        return {FOREGROUND: things, BACKGROUND: count - things}

    def train(self, mode: bool = True) -> "TransFGU":
        """As usual, but the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    # ------------------------------------------------------------------ the stage

    def steps(self, data: SegmentationDataModule) -> list[Step]:
        crops = PooledCrops if self.windows == "pooled" else Crops
        return [
            crops(self.backbone, self.cfg, self.bank_mode, self.token),
            Concepts(self.cfg, self.banks, self.token),
            ConceptMaps(self.backbone, self.cfg, len(self.concepts), self.token),
        ]

    def staged(self, results: Results, data: SegmentationDataModule) -> None:
        self.concepts.copy_(torch.from_numpy(results["concepts"]["centroids"]))
        self.maps = results["maps"]
        data.pseudo = Places(self.maps)

    def shown(self, results: Results) -> dict[str, View]:
        maps = results["maps"]
        strongest = {f"concept map {rank + 1}": Strongest(maps, rank) for rank in range(min(3, len(self.concepts)))}
        return strongest | {"pseudo-labels": Soft(maps)}

    # ------------------------------------------------------------------ networks

    @property
    def view_size(self) -> tuple[int, int]:
        """H and W, px, of what the student sees: as set, else half of the training picture."""
        size = self.cfg.method.augment.size
        if size is not None:
            return both_sides(size)
        return tuple(side // 2 for side in both_sides(self.cfg.data.train_size))

    @property
    def views(self) -> dict[str, ViewSpec]:
        """A crop of every picture in other colours, of the picture's own aspect."""
        augment = self.cfg.method.augment
        names = ("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p", "blur_p", "blur_kernel")
        colour = Photometric(**{name: augment[name] for name in names}, blur_sigma=tuple(augment.blur_sigma))
        height, width = both_sides(self.cfg.data.train_size)
        shape = {"size": self.view_size, "ratio": (width / height, width / height), "flip_p": augment.flip_p}
        low, high = augment.sides
        if augment.draw == "area":
            crop = Geometric(scale=(low**2, high**2), **shape)
        else:
            crop = Geometric(sides=(low, high), side_step=TENTH if augment.draw == "tenths" else None, **shape)
        return {"augmented": ViewSpec(colour, crop)}

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"name": "decoder", "params": [value for value in self.decoder.parameters() if value.dim() > 1]},
            {"name": "decoder_1d", "params": [value for value in self.decoder.parameters() if value.dim() <= 1]},
        ]

    def _decoded(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """What the student makes of features; kept for the next question about the same ones."""
        if self.kept is not None and self.kept[0]() is features and not torch.is_grad_enabled():
            return self.kept[1]
        found = self.decoder(rows_of(features))
        self.kept = None if torch.is_grad_enabled() else (weakref.ref(features), found)
        return found

    def embed(self, features: Features) -> Tensor:
        return self._decoded(features)[0].mT.unflatten(2, size_of(features))

    def scores(self, features: Features) -> Tensor:
        """Masks of the student, [B,K,h,w]."""
        return self._decoded(features)[2].mT.unflatten(2, size_of(features))

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """The losses of `losses/concepts.py`. No step is taken where the loss of the whole batch is not above 0."""
        settings, world = self.cfg.method, distributed.world_size()
        features = self.features(views["augmented"])
        size = size_of(features)
        patches, classes, masks = self.decoder(rows_of(features))
        logits = masks.mT.unflatten(2, size)
        maps = self._maps(views, size)
        taught = bool(self.restarts > 0)
        teacher = self._taught(features).mT.unflatten(2, size) if taught else None
        soft, flat, evidence = concepts.soft_labels(maps, teacher, background=settings.background)
        alpha = concepts.negative_weight(int(self.since_restart)) if taught else 0.0
        permutation = self._permutation().to(logits.device) if taught else None
        used = ~flat if settings.empty == "ignore" else torch.ones_like(flat)
        used = used[:, None, None].expand(-1, *size)
        counts = distributed.total(torch.stack([used.sum(), evidence.sum()]).float())
        cross = (concepts.bootstrapped(logits, soft, permutation, alpha) * used).sum() / counts[0] * world
        if settings.background:
            unsure = concepts.thing_uncertainty(logits, evidence, counts[1] / world)
        else:
            unsure = (concepts.uncertainty(logits) * used).sum() / counts[0] * world
        apart = concepts.embedding_diversity(classes).mean()
        weights = settings.weights
        total = weights.cross_entropy * cross + weights.uncertainty * unsure + weights.diversity * apart
        skip = ~(distributed.total(total) > 0)  # NaN too, where nothing of the batch has evidence
        parts = {"cross_entropy": cross, "uncertainty": unsure, "diversity": apart, "without_evidence": flat.float()}
        parts = {name: value.detach().mean().nan_to_num() for name, value in parts.items()}
        parts |= {"skipped": skip.float(), "negative_weight": alpha, "since_restart": float(self.since_restart)}
        total = torch.where(skip, (logits * 0).sum(), total)
        return Loss(total, parts, skip=skip, codes=patches.mT.unflatten(2, size), view="augmented")

    @torch.no_grad()
    def _taught(self, features: Features) -> Tensor:
        return self.teacher.eval()(rows_of(features))[2]

    def _maps(self, views: dict[str, Any], size: tuple[int, int]) -> Tensor:
        """Concept maps of the batch, cut like the view: float32 [B,K',h,w]; 0 where the stage has none."""
        device, found = views["augmented"].device, []
        for index, places in zip(views["index"].tolist(), views["augmented.pseudo"], strict=True):
            record = self.maps.read(index, ["class_map"])
            if record.keep:
                maps = torch.from_numpy(record.fields["class_map"]).to(device)
                found.append(maps_at(maps, places, size))
            else:
                found.append(torch.zeros(len(self.concepts), *size, device=device))
        return torch.stack(found)

    def _permutation(self) -> Tensor:
        draw = chance.generator(self.cfg.seed, "transfgu.negatives", self.global_step)
        return torch.randperm(self.cfg.method.num_clusters, generator=draw)

    # ------------------------------------------------------------------ teacher and student

    @property
    def epoch_steps(self) -> int:
        """As set, else that of `repeat` passes."""
        settings = self.cfg.method.restarts
        return settings.epoch or settings.repeat * super().epoch_steps

    def on_epoch(self, loader: Callable[..., Any]) -> None:
        """Restarts: at the start of some epochs the student teaches and a new one begins."""
        settings = self.cfg.method.restarts
        epoch = self.global_step // self.epoch_steps
        interval = settings.intervals[min(epoch // 10, len(settings.intervals) - 1)]
        if epoch < settings.start or epoch % interval:
            self.since_restart += 1
            return
        self.restart()

    def restart(self) -> None:
        """Teacher <- student, student <- the weights it had at the start of the run."""
        self.teacher.load_state_dict(self.decoder.state_dict())
        self.decoder.load_state_dict(self.initial.state_dict())
        self.since_restart.zero_()
        self.restarts += 1
        if self.cfg.method.restarts.reset_optimizer:
            for child in self.optimizers().optimizer.children:
                for value in self.decoder.parameters():
                    child.state.pop(value, None)


def rows_of(features: Features) -> Tensor:
    """Patch tokens [B,h*w,C], all levels side by side."""
    return features.concat().flatten(2).mT


def size_of(features: Features) -> tuple[int, int]:
    """h and w of `rows_of`."""
    return tuple(max((level.shape[-2:] for level in features.levels), key=lambda hw: hw[0] * hw[1]))


def check_training(settings: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    restarts = settings.restarts
    if restarts.epoch is not None and restarts.repeat != 1:
        raise ConfigError(
            f"method.restarts.repeat={restarts.repeat}: counts passes over the pictures, but method.restarts.epoch="
            f"{restarts.epoch} counts steps; set method.restarts.epoch=null"
        )
