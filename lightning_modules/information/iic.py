"""IIC (Ji et al., ICCV 2019): classes of pixels that tell most about those of near pixels of a changed copy.

A network and two heads, trained together: head A gives more classes than are wanted, head B as many. Passes over the
pictures with head A and with head B take turns, under one optimiser. What head B says are the method's own classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import chance, distributed
from common.errors import ConfigError
from common.spec import IGNORE, Affine, Geometric, Photometric, ViewSpec
from datamodules.base import affine
from evaluation import readout
from lightning_modules.base import Loss, UnsupervisedSegmenter
from losses.information import Information, mutual_information
from models.backbone import Features
from models.scratch.net10a import InformationHead

HEADS = ("head_a", "head_b")


class IIC(UnsupervisedSegmenter):
    """Codes = the network's features, of length 1; own classes = the probabilities of head B.

    Of several sub-heads, the one is read whose loss was least over the last pass of head B: no label is looked at.
    """

    title = "IIC"
    trains_backbone = True
    exports = "the trained network"

    def build(self) -> None:
        settings = self.cfg.method
        self.uses_labels = settings.mask == "labels"
        if self.uses_labels and not self.meta.has_labels:
            raise ConfigError("method.mask=labels: the data has none; set method.mask=none")
        self.code_dim = self.backbone.dim
        counts = {"head_a": settings.over_clusters or 3 * settings.num_clusters, "head_b": settings.num_clusters}
        for name, count in counts.items():
            setattr(self, name, InformationHead(self.code_dim, count, settings.sub_heads, settings.head_padding))
        self.register_buffer("sub_losses", torch.zeros(settings.sub_heads))

    @property
    def views(self) -> dict[str, ViewSpec]:
        """The copy: recoloured, mirrored by a coin, turned and sheared where asked for."""
        own = self.cfg.method.augment
        colour = {name: own[name] for name in ("brightness", "contrast", "saturation", "hue", "gray_p", "blur_p")}
        moved = Affine(own.rotation, own.shear, tuple(own.scale))
        still = not own.rotation and not own.shear and tuple(own.scale) == (1, 1)
        geometric = Geometric(sides=tuple(own.sides), flip_p=own.flip_p)
        return {"copy": ViewSpec(Photometric(**colour), geometric, None if still else moved)}

    def param_groups(self) -> list[dict[str, Any]]:
        trained = [value for value in self.backbone.parameters() if value.requires_grad]
        return [{"name": "network", "params": [*trained, *self.head_a.parameters(), *self.head_b.parameters()]}]

    def embed(self, features: Features) -> Tensor:
        return F.normalize(features.concat(), dim=1)

    def scores(self, features: Features) -> Tensor:
        """Probabilities [B,K,h,w] of head B's chosen sub-head, with the ring of `head_padding`."""
        return self.head_b(features.concat())[self.chosen]

    def log_probs(self, codes: Tensor, scores: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """As of every method, but own scores are probabilities already."""
        found = super().log_probs(codes, scores, size)
        if "own" in scores:
            tiny = torch.finfo(torch.float32).tiny
            found["own"] = readout.upsample(scores["own"], size).clamp_min(tiny).log()
        return found

    @property
    def chosen(self) -> int:
        """The sub-head that is read."""
        return int(self.sub_losses.argmin())

    # ------------------------------------------------------------------ one step

    @property
    def pass_steps(self) -> int:
        """Steps of a pass with one head."""
        return self.cfg.method.pass_steps or self.epoch_steps

    def trained_head(self, step: int) -> str:
        """The head whose turn it is."""
        return HEADS[(step // self.pass_steps + self.cfg.method.head_b_first) % 2]

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """The mean over sub-heads of `losses.information.mutual_information` between the pictures and their copies."""
        settings, name = self.cfg.method, self.trained_head(self.global_step)
        head, size = getattr(self, name), tuple(views["image"].shape[-2:])
        first = head(features.concat(), size)
        second = head(self.features(views["copy"]).concat(), size)
        mask = views["valid"] & (views["label"] != IGNORE) if self.uses_labels else views["valid"]
        back = to_first(views)
        found = [
            mutual_information(
                first[number],
                second[number],
                settings.half_side,
                settings.balance[-1 if name == "head_b" else 0],
                settings.collapsed,
                mask,
                back,
                settings.align_corners,
                self._sparse_shift(number),
                self.reach,
            )
            for number in range(settings.sub_heads)
        ]
        losses = torch.stack([one.loss for one in found])
        if name == "head_b":
            self._remember(losses)
        idle = self.head_a if name == "head_b" else self.head_b
        total = losses.mean() + sum(value.sum() * 0 for value in idle.parameters())  # so that no rank waits for it
        may_see_nothing = (
            self.uses_labels or self.cfg.data.train_crop == "keep"
        )  # else the host need not ask the device
        skip = ~torch.stack([one.seen for one in found]).all() if may_see_nothing else False
        return Loss(total, self._logged(name, found), skip)

    def _logged(self, name: str, found: list[Information]) -> dict[str, Tensor | float]:
        plain = torch.stack([one.plain for one in found]).detach()
        logged: dict[str, Tensor | float] = {"information": -plain.mean(), "head_b": float(name == "head_b")}
        if len(found) > 1:
            logged |= {f"sub_head_{n}": one.loss.detach() for n, one in enumerate(found)}
            logged |= {f"sub_head_{n}_information": -plain[n] for n in range(len(found))}
        return logged

    @torch.no_grad()
    def _remember(self, losses: Tensor) -> None:
        """Adds to the losses of head B's pass, which begin anew with it."""
        if self.global_step % self.pass_steps == 0:
            self.sub_losses.zero_()
        self.sub_losses += distributed.mean(losses)

    def _sparse_shift(self, sub_head: int) -> tuple[int, int]:
        """One more shift (x, y), px, of a step's copies: magnitudes between two numbers, signs by a coin."""
        low, high = self.cfg.method.sparse_shift
        if not high:
            return 0, 0
        draw = chance.numpy_generator(self.cfg.seed, "iic.sparse_shift", self.global_step, sub_head)
        x, y = draw.integers(low, high, size=2, endpoint=True) * draw.choice([-1, 1], size=2)
        return int(x), int(y)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """The idle head stands still, or, as released, goes on by Adam's momentum once it has been trained."""
        trained = self.global_step >= self.pass_steps
        if self.cfg.method.idle_head == "moves" and trained:
            return
        idle: nn.Module = getattr(self, HEADS[1 - HEADS.index(self.trained_head(self.global_step))])
        for parameter in idle.parameters():
            parameter.grad = None


def to_first(views: dict[str, Any]) -> Tensor:
    """Where in its copy each pixel of a picture is found: maps [B,2,3], see `datamodules.base.affine`."""
    taken = affine.of_replay(views["copy.params"])
    if "copy.affine" in views:
        taken = affine.combined(taken, views["copy.affine"])
    return affine.inverse(taken)
