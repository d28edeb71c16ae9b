"""How hard the drawn scenes are: a small supervised net, k-means on colour, k-means on the net's features, patch limit.

The three figures of `difficulty` were fixed before any method was tuned; the slow test of `test_scenes.py` holds them.
`python -m tests.datamodules.scenes.difficulty` prints them.
"""

import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from datamodules.scenes.drawing import META, draw_scene
from retrieval import kmeans

CLASSES = META.num_classes
STEPS, BATCH, RATE = 1200, 16, 4e-3
TRAIN, VAL, SIZE = 2000, 200, 128


def draw(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n,3,128,128] and labels int64 [n,128,128] of the published world (seed 0)."""
    scenes = [draw_scene(0, split, i, SIZE, SIZE) for i in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in scenes])).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.stack([label for _, label in scenes])).long()


def confusion(prediction: Tensor, label: Tensor) -> Tensor:
    """Counts [K,C] of pixels over (predicted, true)."""
    return torch.bincount((prediction * CLASSES + label).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)


def ious(counts: Tensor) -> Tensor:
    """[C] in percent."""
    hits = counts.diagonal().double()
    return 100 * hits / (counts.sum(0) + counts.sum(1) - hits).clamp(min=1)


def matched(counts: Tensor) -> Tensor:
    """The rows put into the order of the classes that Hungarian matching gives them."""
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return counts[torch.from_numpy(rows[np.argsort(columns)])]


def patches(values: Tensor) -> Tensor:
    """[n,h,w] -> [n,128,128], each value repeated over its square."""
    times = SIZE // values.shape[-1]
    return values.repeat_interleave(times, 1).repeat_interleave(times, 2)


def patch_limit(labels: Tensor) -> float:
    """mIoU of a perfect read-out at 8 x 8 patches: every patch gets the class that most of its pixels have."""
    shares = functional.avg_pool2d(functional.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float(), 8)
    return float(ious(confusion(patches(shares.argmax(1)), labels)).mean())


def clustered(maps: Tensor, labels: Tensor, spherical: bool) -> float:
    """mIoU after Hungarian matching of k-means with K = classes on every vector of `maps` [n,D,h,w]."""
    points = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    fit = kmeans.fit(points, CLASSES, spherical=spherical, restarts=3, iterations=40)
    found = kmeans.assign(points, fit.centroids, spherical).view(len(maps), *maps.shape[2:])
    return float(ious(matched(confusion(patches(found), labels))).mean())


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _double(maps: Tensor) -> Tensor:
    return functional.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)


class SmallNet(nn.Module):
    """A U-Net of 0.28 million parameters: features [n,32,64,64] and a linear classifier on them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                _conv(3, 16, 2, kernel=5),
                nn.Sequential(_conv(16, 32, 2), _conv(32, 32)),
                nn.Sequential(_conv(32, 64, 2), _conv(64, 64)),
                nn.Sequential(_conv(64, 96, 2), _conv(96, 96)),
            ]
        )
        self.whole = nn.Linear(96, 96)
        self.lift = nn.ModuleList([nn.Conv2d(96, 64, 1), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 16, 1)])
        self.up = nn.ModuleList([_conv(64, 64), _conv(32, 32), _conv(16, 32)])
        self.classifier = nn.Conv2d(32, CLASSES, 1)

    def features(self, images: Tensor) -> Tensor:
        maps, levels = images, []
        for stage in self.down:
            maps = stage(maps)
            levels.append(maps)
        maps = maps + self.whole(maps.mean((2, 3)))[:, :, None, None]
        for lift, up, level in zip(self.lift, self.up, levels[-2::-1], strict=True):
            maps = up(level + _double(lift(maps)))
        return maps


def _loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of logits at half size against all four pixels of each cell: a quarter of the work at full size."""
    scores = functional.log_softmax(logits, dim=1)
    corners = [target[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.stack([functional.nll_loss(scores, corner, weight) for corner in corners]).mean()


def trained(images: Tensor, labels: Tensor, steps: int = STEPS) -> SmallNet:
    """The net after `steps` of AdamW, one-cycle schedule, class weights frequency^-1/4, mirroring, colour gain."""
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    net = SmallNet().to(memory_format=torch.channels_last).train()
    weight = torch.bincount(labels.flatten(), minlength=CLASSES).float() ** -0.25
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.15)
    epochs = -(-steps * BATCH // len(images))
    order = torch.cat([torch.randperm(len(images), generator=draws) for _ in range(epochs)])
    for rows in order[: steps * BATCH].view(steps, BATCH):
        flip = torch.rand(BATCH, generator=draws) < 0.5
        gain = 0.8 + 0.4 * torch.rand(BATCH, 3, 1, 1, generator=draws)
        batch, target = images[rows].float() / 255 * gain - 0.5, labels[rows]
        batch = torch.where(flip[:, None, None, None], batch.flip(3), batch).to(memory_format=torch.channels_last)
        target = torch.where(flip[:, None, None], target.flip(2), target)
        optimiser.zero_grad()
        _loss(net.classifier(net.features(batch)), target, weight).backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def difficulty(steps: int = STEPS) -> dict[str, float]:
    """mIoU in percent on the 200 val scenes: `colour`, `supervised`, `features`, `patches` (limit), and by class.

    One thread: the figures then do not depend on the number of cores, and a busy machine slows the training less.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _difficulty(steps)
    finally:
        torch.set_num_threads(threads)


def _difficulty(steps: int) -> dict[str, float]:
    images, labels = draw("val", VAL)
    pictures = draw("train", TRAIN)
    begin = time.process_time()
    with torch.enable_grad():
        net = trained(*pictures, steps)
    seconds = time.process_time() - begin
    maps = torch.cat([net.features(part.float() / 255 - 0.5) for part in images.split(50)])
    found = torch.cat([_double(net.classifier(part)).argmax(1) for part in maps.split(50)])
    by_class = ious(confusion(found, labels))
    return {
        "colour": clustered(functional.avg_pool2d(images.float() / 255, 8), labels, spherical=False),
        "supervised": float(by_class.mean()),
        "features": clustered(maps, labels, spherical=True),
        "features at patches": clustered(functional.avg_pool2d(maps, 4), labels, spherical=True),
        "patches": patch_limit(labels),
        "parameters": sum(p.numel() for p in net.parameters()),
        "training, CPU seconds": seconds,
        **{name: float(value) for name, value in zip(META.names, by_class, strict=True)},
    }


if __name__ == "__main__":
    for name, value in difficulty().items():
        print(f"{name:22s} {value:10.2f}")
