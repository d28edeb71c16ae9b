"""The FCN probe: a small convolutional head, trained with labels on the codes of the finished network.

It sees neighbouring patches, so it says what a decoder could make of the codes, where the linear probe says what single
codes hold. The head is that of mmsegmentation's FCNHead with two convolutions, no norm, and the input beside their
result; Leopart (CVPR 2022) and the work that follows its protocol report it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import chance, distributed
from common.spec import ClassMeta
from evaluation import readout
from evaluation.metrics import SegmentationScore
from evaluation.readouts import LabelledReadout


class FCNProbe(nn.Module):
    """3x3 convolution, 3x3 convolution, both with ReLU; a third with ReLU on them and the codes; dropout of channels;
    1x1 to C logits. Codes are enlarged to `size` x `size` before (bilinear, align_corners False; None: as they are)."""

    def __init__(self, dim: int, classes: int, channels: int, size: int | None, dropout: float, seed: int = 0) -> None:
        super().__init__()
        self.size, self.dropout, self.seed = size, dropout, seed
        with chance.library_draws(seed, "fcn_probe"):
            self.first = nn.Conv2d(dim, channels, 3, padding=1)
            self.second = nn.Conv2d(channels, channels, 3, padding=1)
            self.both = nn.Conv2d(dim + channels, channels, 3, padding=1)
            self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, codes: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits of codes [B,D,h,w]: [B,C,S,S], float32; `kept` [B,channels]: what channels are multiplied by."""
        maps = codes.float() if self.size is None else readout.upsample(codes, (self.size, self.size))
        with torch.autocast(codes.device.type, enabled=False):
            found = F.relu(self.second(F.relu(self.first(maps))))
            found = F.relu(self.both(torch.cat([maps, found], dim=1)))
            return self.classifier(found if kept is None else found * kept[:, :, None, None])

    def drawn(self, step: int, batch: int, count: int) -> Tensor | None:
        """What dropout multiplies the channels of this rank's `count` pictures of a global batch by, [count,channels];
        keyed by the step, the same for the same picture on one process and on several. None without dropout."""
        if not self.dropout:
            return None
        draws = torch.rand(
            batch, self.classifier.in_channels, generator=chance.generator(self.seed, "fcn_probe.dropout", step)
        )
        first = distributed.rank() * (batch // distributed.world_size())
        return (draws[first : first + count] >= self.dropout).float() / (1 - self.dropout)

    def targets(self, label: Tensor, codes: Tensor) -> Tensor:
        """Labels [B,H,W] at the logits' grid, by nearest neighbour as torch has it: pixel floor(i H / S)."""
        grid = tuple(codes.shape[-2:]) if self.size is None else (self.size, self.size)
        rows, columns = (
            torch.arange(new, device=label.device) * old // new for new, old in zip(grid, label.shape[1:], strict=True)
        )
        return label[:, rows[:, None], columns]

    def gradients(self, codes: Tensor, label: Tensor, kept: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Cross-entropy, the mean over the labelled places of the global batch, and its gradients on this rank, times
        the number of ranks, so that their mean is that of one process. Works through the pictures in blocks.
        A collective.

        codes [B,D,h,w], label int64 [B,H,W], places outside 0..C-1 are ignored.
        """
        target = self.targets(label, codes)
        target = torch.where((target >= 0) & (target < self.classifier.out_channels), target, -1)
        places = distributed.total((target >= 0).sum()).clamp(min=1)
        parameters = list(self.parameters())
        found = [torch.zeros_like(parameter) for parameter in parameters]
        total = torch.zeros((), device=codes.device)
        scale = distributed.world_size() / places
        for rows in self.blocks(codes, tuple(target.shape[-2:])):
            logits = self(codes[rows], None if kept is None else kept[rows].to(codes.device))
            loss = F.cross_entropy(logits, target[rows], ignore_index=-1, reduction="sum") * scale
            for own, gradient in zip(found, torch.autograd.grad(loss, parameters), strict=True):
                own += gradient
            total += loss.detach()
        return total, found

    def blocks(self, codes: Tensor, grid: tuple[int, int]) -> list[slice]:
        """Runs of pictures whose widest maps stay within `readout.BLOCK` elements, one picture at least."""
        width = (self.both.in_channels + 3 * self.classifier.in_channels) * grid[0] * grid[1]
        step = max(1, readout.BLOCK // width)
        return [slice(first, first + step) for first in range(0, len(codes), step)]

    @torch.no_grad()
    def predict(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """Classes of codes [B,D,h,w] at label resolution: int64 [B,H,W]; logits are enlarged, not ids."""
        grid = tuple(codes.shape[-2:]) if self.size is None else (self.size, self.size)
        return torch.cat([readout.predict(self(codes[rows]), size) for rows in self.blocks(codes, grid)])


class FCNReadout(LabelledReadout):
    """`evaluation.fcn.*` at work; ready once its probe is trained (`engine/fitting.py`), which checkpoints keep."""

    name = "fcn"

    def __init__(self, cfg: Any, meta: ClassMeta) -> None:
        super().__init__()
        self.settings, self.classes, self.seed = cfg.evaluation.fcn, meta.num_classes, int(cfg.seed)
        own = cfg.evaluation
        policy = {"extra": own.extra, "absent": own.absent, "background": own.background}
        self.score = SegmentationScore(self.classes, self.classes, matching="identity", **policy)
        self.probe: FCNProbe | None = None

    @property
    def ready(self) -> bool:
        return self.probe is not None

    def new_probe(self, dim: int) -> FCNProbe:
        """An untrained probe for codes of D numbers."""
        own = self.settings
        return FCNProbe(dim, self.classes, own.channels, own.size, own.dropout, self.seed)

    def take(self, probe: FCNProbe) -> None:
        """Read out with this probe from now on."""
        self.probe = probe.requires_grad_(False)

    def classes_of(self, batch: Mapping[str, Any], codes: Tensor) -> Tensor:
        return self.probe.predict(codes, tuple(batch["image"].shape[-2:]))

    def protocol(self) -> str:
        own = self.settings
        grid = "the codes' own grid" if own.size is None else f"{own.size} x {own.size}"
        return (
            f"labels of training pictures, {own.channels} channels on {grid}, dropout {own.dropout:g}, {own.epochs} "
            f"epochs, {own.optimizer}, lr {own.lr:g} {own.schedule}, weight decay {own.weight_decay:g}"
        )


def configured(cfg: Any, meta: ClassMeta) -> list[FCNReadout]:
    """The read-out of `evaluation.fcn.*`, where it is asked for and there are labels (its fit says so otherwise)."""
    return [FCNReadout(cfg, meta)] if cfg.evaluation.fcn.epochs and meta.has_labels else []
