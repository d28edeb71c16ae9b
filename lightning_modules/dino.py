"""DINO (Caron et al., ICCV 2021) makes a backbone: self-distillation without labels, with the dense term of iBOT.

A student sees crops of a picture, large and small, and predicts what a teacher, its slow copy, makes of the large ones.
Two terms for patches go through the same head, both as options: `dense` hides patches of the large crops from the
student, which predicts the teacher's output at them (iBOT); `place` lets it predict, for each patch of a large crop,
the teacher's output at the same place of the other one, under other colours (ours; in the manner of Leopart). The
teacher is the result: it is the backbone that probes read, checkpoints keep and the run exports.
"""

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from common import chance, distributed
from common.errors import ConfigError
from common.spec import Geometric, Photometric, ViewSpec
from datamodules.base.transforms import Replay, both_sides, meeting
from evaluation.collapse import CollapseWatch
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.base.optim import cosine
from losses import self_distillation as distil
from models.backbone import Backbone, Features
from models.dino_head import DinoHead
from models.momentum import Momentum, follow
from models.vit.masking import block_masks

MOST_ENLARGED = 4
"""How many times larger than a training picture's shorter side a crop may be made."""
LOOK_EVERY = 10
"""Steps between two looks for collapse (each waits for the device)."""


class Dino(UnsupervisedSegmenter):
    """Codes = the teacher's features at `backbone.levels`. The student, its head and the mask token are trained."""

    title = "DINO"
    trains_backbone = True
    exports = "the momentum teacher"
    wants_features = False

    def build(self) -> None:
        settings = self.cfg.method
        self.dense, self.place = settings.dense.weight > 0, settings.place.weight > 0
        check_settings(settings, self.backbone)
        check_crops(settings.crops, self.cfg.data.train_size)
        self.refuse_padding()
        self.code_dim = self.backbone.dim
        self.student = self._student()
        self.backbone.requires_grad_(False)
        width = self.backbone.channels[-1]
        self.head = DinoHead(width, **settings.head)
        self.teacher_head = Momentum(self.head)
        self.register_buffer("centre", torch.zeros(settings.head.out_dim))
        if self.dense:
            self.mask_token = nn.Parameter(torch.zeros(width))
        if self.dense or self.place:
            self.register_buffer("patch_centre", torch.zeros(settings.head.out_dim))
        self.watch = CollapseWatch(grace=max(50, (self.cfg.trainer.max_steps or 0) // 20))

    def _student(self) -> Backbone:
        """The backbone once more, with the teacher's weights, and drop path where the network has it."""
        tree = OmegaConf.create(OmegaConf.to_container(self.cfg.backbone))
        if self.cfg.method.drop_path > 0:
            OmegaConf.update(tree, "create.drop_path_rate", self.cfg.method.drop_path, force_add=True)
        student = Backbone(tree, self.cfg.seed)
        student.load_state_dict(self.backbone.state_dict())
        return student

    def train(self, mode: bool = True) -> "Dino":
        """As usual, but the teacher is in training mode only inside `loss` (batch norms see batches there)."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def views(self) -> dict[str, ViewSpec]:
        """Two large crops and `local_count` small ones, coloured as in the release."""
        crops, augment = self.cfg.method.crops, self.cfg.method.augment
        jitter = {name: augment[name] for name in ("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p")}

        def view(kind: str, blur: float, solarize: float) -> ViewSpec:
            size, scale = crops[f"{kind}_size"], tuple(crops[f"{kind}_scale"])
            colour = Photometric(**jitter, blur_p=blur, blur_kernel=augment.blur_kernel, solarize_p=solarize)
            return ViewSpec(photometric=colour, geometric=Geometric(size=size, scale=scale))

        first, second, small = augment.blur_p
        found = {"global0": view("global", first, 0.0), "global1": view("global", second, augment.solarize_p)}
        return found | {f"local{number}": view("local", small, 0.0) for number in range(crops.local_count)}

    def param_groups(self) -> list[dict[str, Any]]:
        """Biases and norms (vectors) are not decayed."""
        token = [self.mask_token] if self.dense else []
        trained = [p for p in (*self.student.parameters(), *self.head.parameters(), *token) if p.requires_grad]
        return [
            {"name": "student", "params": [p for p in trained if p.dim() > 1]},
            {
                "name": "student",
                "params": [p for p in trained if p.dim() <= 1],
                "weight_decay": 0.0,
                "weight_decay_end": None,
            },
        ]

    def embed(self, features: Features) -> Tensor:
        return features.concat()

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """H(teacher, student) over crops, plus `dense.weight` times that over masked patches of the large crops."""
        settings, step = self.cfg.method, self.global_step
        large = torch.cat([views["global0"], views["global1"]])
        small = [views[f"local{number}"] for number in range(settings.crops.local_count)]
        count = len(views["global0"])
        mask = self._mask(len(large), tuple(large.shape[-2:])) if self.dense else None
        teacher = self._teacher(large)
        student = self.student.features(large, grad=True, hidden=(mask, self.mask_token) if self.dense else None)
        rows = [summary(student)]
        if small:
            rows.append(summary(self.student.features(torch.cat(small), grad=True)))
        logits = self.head(torch.cat(rows)).unflatten(0, (-1, count))

        rows = summary(teacher)
        temperature = self._temperature(step)
        targets = self._targets(self.teacher_head(rows), "centre", temperature)
        parts = {
            "pictures": distil.multi_crop_loss(logits, targets.unflatten(0, (2, -1)), settings.temperature.student)
        }
        total = settings.picture_weight * parts["pictures"]
        if self.dense:
            parts["patches"] = self._hidden_loss(student, teacher, mask, temperature)
            total = total + settings.dense.weight * parts["patches"]
        if self.place:
            geometry = views["global0.params"], views["global1.params"]
            parts["places"] = self._place_loss(student, teacher, geometry, temperature)
            total = total + settings.place.weight * parts["places"]
        parts |= self._health(step, rows, targets)
        codes = self.embed(Features([level[:count] for level in teacher.levels]))
        logged = {name: value.detach() for name, value in parts.items()}
        return Loss(total, logged, codes=codes, view="global0")

    def _teacher(self, large: Tensor) -> Features:
        self.backbone.train()
        features = self.backbone.features(large)
        self.backbone.eval()
        return features

    def _hidden_loss(self, student: Features, teacher: Features, mask: Tensor, temperature: float) -> Tensor:
        return self._patch_loss(student, cells(teacher.map)[mask], mask, temperature)

    def _place_loss(
        self, student: Features, teacher: Features, geometry: tuple[Replay, Replay], temperature: float
    ) -> Tensor:
        grid = tuple(student.map.shape[-2:])
        maps = teacher.map.chunk(2)
        sampled, inside = [], []
        for number, own in enumerate(geometry):
            places, meets = meeting(own, geometry[1 - number], grid)
            sampled.append(F.grid_sample(maps[1 - number], places, "bilinear", "border", align_corners=False))
            inside.append(meets)
        mask = torch.cat(inside)
        return self._patch_loss(student, cells(torch.cat(sampled))[mask], mask, temperature)

    def _patch_loss(self, student: Features, teacher_rows: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """The student at the true cells of mask [2B,h,w] against the teacher's features [n,C] that belong there."""
        logits = self.teacher_head(teacher_rows)
        if self.cfg.method.patch_centring == "picture":
            logits = distil.centred_within(logits, mask.flatten(1).sum(1))
        targets = self._targets(logits, "patch_centre", temperature)
        predicted = self.head(cells(student.map)[mask])
        return distil.masked_patch_loss(predicted, targets, mask, self.cfg.method.temperature.student)

    def _targets(self, logits: Tensor, centre: str, temperature: float) -> Tensor:
        """Targets of teacher logits [n,K]; the centre moves after it was used, as in the release."""
        settings = self.cfg.method
        if settings.centring == "sinkhorn":
            return distil.sinkhorn_targets(logits, temperature)
        held = getattr(self, centre)
        targets = distil.centred_targets(logits, held, temperature)
        held.copy_(distil.moved_centre(held, logits, settings.centre_momentum))
        return targets

    def _mask(self, count: int, size: tuple[int, int]) -> Tensor:
        """Masks bool [2B,h,w] of this rank's large crops, out of one draw for the global batch."""
        dense, grid = self.cfg.method.dense, tuple(side // self.backbone.stride for side in size)
        world, rank, half = distributed.world_size(), distributed.rank(), count // 2
        draw = chance.numpy_generator(self.cfg.seed, "dino.mask", self.global_step)
        masks = block_masks(draw, count * world, grid, dense.mask_p, tuple(dense.mask_share))
        own = masks.reshape(2, half * world, *grid)[:, rank * half : (rank + 1) * half]
        return torch.from_numpy(own.reshape(count, *grid)).to(self.device)

    def _temperature(self, step: int) -> float:
        """The teacher's temperature: linear from `teacher_start` to `teacher` over `warmup` steps."""
        settings = self.cfg.method.temperature
        share = min(1.0, step / settings.warmup) if settings.warmup else 1.0
        return settings.teacher_start + (settings.teacher - settings.teacher_start) * share

    def _health(self, step: int, rows: Tensor, targets: Tensor) -> dict[str, Tensor]:
        entropy, usage = distil.entropies(targets)
        values = {"entropy": entropy, "usage": usage, "spread": distil.spread(rows)}
        if step % LOOK_EVERY == 0:
            self.watch.look(step, {name: float(value) for name, value in values.items()})
        return {f"teacher_{name}": value for name, value in values.items()}

    # ------------------------------------------------------------------ around the optimiser's step

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        epoch = self.global_step // self.trainer.datamodule.steps_per_epoch
        if epoch < self.cfg.method.freeze_last_epochs:
            for parameter in self.head.last_layer():
                parameter.grad = None

    def after_step(self) -> None:
        m = cosine(self.cfg.method.momentum, 1.0, self.global_step, self.total_steps)
        follow(self.backbone, self.student, m)
        self.teacher_head.update(m)


def cells(maps: Tensor) -> Tensor:
    """Maps [B,C,h,w] -> [B,h,w,C], to be indexed by masks [B,h,w]."""
    return maps.permute(0, 2, 3, 1)


def summary(features: Features) -> Tensor:
    """One vector a picture [B,C]: the class token, or the mean of the last map where there is none."""
    return features.map.mean((2, 3)) if features.cls is None else features.cls


def check_settings(settings: Any, backbone: Backbone) -> None:
    """Raises ConfigError for values that do not go with each other or the backbone; its yaml says what each may be."""
    for kind in ("global", "local"):
        backbone.check_size(settings.crops[f"{kind}_size"], f"method.crops.{kind}_size")
    if settings.dense.weight > 0 and not backbone.transformer:
        raise ConfigError(
            f"method.dense.weight={settings.dense.weight:g}: masked patches need a transformer, and {backbone.network} "
            "is none; set method.dense.weight=0"
        )


def check_crops(crops: Any, train_size: Any) -> None:
    """Raises ConfigError for crops that are so much larger than the training pictures that they would be a blur."""
    shorter = min(both_sides(train_size))
    for kind in ("global", "local"):
        size = crops[f"{kind}_size"]
        if size > MOST_ENLARGED * shorter:
            raise ConfigError(
                f"method.crops.{kind}_size={size}: training pictures are {shorter} px (data.train_size), and a crop of "
                f"them would be enlarged more than {MOST_ENLARGED} times; set {MOST_ENLARGED * shorter} at most"
            )
