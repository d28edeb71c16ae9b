"""What a shift of the windows changes: labels of a scene and of a mosaic of scenes, drawn at 512 px.

`python -m benchmarks.windows ckpt=<checkpoint> [overlaps=0.75,0.85] [window=128] [scene=3] [first=0] [threads=1]`

Every window of a picture goes through the network once (1 to 3 minutes a picture with `tiny` on one core); any overlap
and shift is then blended from what it gave, by the code of `predict`. Printed for each overlap: how many windows a pass
takes, the largest and the mean share of pixels whose cluster differs between two of nine shifts (whole patches, as
`predict` has them), the share that differs from blending every window there is, and mIoU (Hungarian, on the picture).
"""

import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
from common.errors import ConfigError
from datamodules.scenes.drawing import META, draw_scene
from engine import setup
from evaluation import matching, readout
from inference import naming, predicting, windows

DEFAULTS = {"ckpt": "", "overlaps": "0.75,0.85", "window": "128", "scene": "3", "first": "0", "threads": "1"}
SIZE = 512
SHIFTS = ((0, 0), (1, 2), (3, 5), (2, 7), (5, 1), (4, 4), (7, 9), (1, 0), (0, 1))
"""Rows and columns in patches, among them even and odd ones, along the axes and inclined."""


def mosaic(first: int) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen scenes of 128 px, four in a row: (picture uint8 [512,512,3], label [512,512])."""
    drawn = [draw_scene(0, "val", first + i, SIZE // 4, SIZE // 4) for i in range(16)]
    rows = [drawn[i : i + 4] for i in range(0, 16, 4)]
    return tuple(np.concatenate([np.concatenate([d[kind] for d in row], 1) for row in rows]) for kind in (0, 1))


def every_window(picture: np.ndarray, scores_of: Callable[[Tensor], Tensor], side: int, unit: int) -> Tensor:
    """Scores [rows, columns, K, h, w] of all windows of `side` px that begin at a patch."""
    image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    views = image.unfold(1, side, unit).unfold(2, side, unit).permute(1, 2, 0, 3, 4)
    return torch.stack([scores_of(row).float() for row in views])


def looked_up(table: Tensor, unit: int) -> tuple[np.ndarray, Callable[[Tensor], Tensor]]:
    """A picture whose pixels tell the patch they lie in, and a network that reads its scores of a window in `table`."""
    side = SIZE // unit
    rows = np.repeat(np.arange(side, dtype=np.uint8), unit)
    grid = np.stack(np.broadcast_arrays(rows[:, None], rows, np.uint8(0)), axis=2)
    return grid, lambda seen: torch.stack([table[y, x] for y, x in (seen[:, :2, 0, 0] * 255).round().long()])


def miou(ids: np.ndarray, label: np.ndarray) -> float:
    """Percent, over the classes that the picture shows; clusters matched one to one on the picture itself."""
    classes = len(META.names)
    sides = (max(int(ids.max()) + 1, classes), classes)
    counts = np.bincount((ids.astype(int) * classes + label).ravel(), minlength=sides[0] * sides[1]).reshape(sides)
    found = matching.score(counts, "hungarian_iou", extra="drop").iou
    return float(np.asarray(found)[counts.sum(0) > 0].mean())


def report(
    name: str, table: Tensor, label: np.ndarray, window: int, unit: int, overlaps: list[float], transformer: bool
) -> None:
    """Print a line for each overlap."""
    grid, scores_of = looked_up(table, unit)
    patches, side = (SIZE // unit,) * 2, (window // unit,) * 2

    def ids_of(overlap: float, shift: tuple[int, int]) -> np.ndarray:
        offset = (shift[0] * unit, shift[1] * unit)
        scores, padded = windows.blended(grid, scores_of, window, unit, overlap, offset, transformer)
        return readout.predict(scores, padded)[0].numpy()

    densest = ids_of(1 - unit / window, (0, 0))
    for overlap in overlaps:
        found = [ids_of(overlap, shift) for shift in SHIFTS]
        differing = [100 * (one != other).mean() for one, other in combinations(found, 2)]
        away = np.mean([100 * (one != densest).mean() for one in found])
        count = len(windows.places(patches, side, overlap))
        score = np.mean([miou(one, label) for one in found])
        print(
            f"{name:12s} overlap {overlap:.2f}: {count:4d} windows, shifts differ by {max(differing):.2f} % at most, "
            f"{np.mean(differing):.2f} % on average, {away:.2f} % from all windows; mIoU {score:.2f} "
            f"(all windows {miou(densest, label):.2f})",
            flush=True,
        )


def main(words: list[str]) -> int:
    settings = DEFAULTS | dict(word.split("=", 1) for word in words)
    if unknown := settings.keys() - DEFAULTS.keys():
        raise ConfigError(f"{min(unknown)}: not one of {', '.join(DEFAULTS)}")
    torch.set_num_threads(int(settings["threads"]))
    checkpoint = setup.read_checkpoint(Path(settings["ckpt"]))
    cfg = config.restore(checkpoint["labelfree"]["config"], [])
    model = setup.restore_model(checkpoint, cfg)
    probe, unit, window = naming.choose_probe(cfg, model), model.backbone.unit, int(settings["window"])
    overlaps = [float(part) for part in settings["overlaps"].split(",")]
    pictures = {
        f"scene {settings['scene']}": draw_scene(0, "val", int(settings["scene"]), SIZE, SIZE),
        f"mosaic {settings['first']}": mosaic(int(settings["first"])),
    }
    for name, (picture, label) in pictures.items():
        table = every_window(picture, lambda seen: predicting.read(model, seen)[1][probe], window, unit)
        report(name, table, label, window, unit, overlaps, model.backbone.transformer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
