"""A few validation pictures, seen as `predict` sees them, for panels."""

from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from datamodules.base.dataset import Collate
from datamodules.base.transforms import Geometry
from lightning_modules.base import UnsupervisedSegmenter
from reporting import panels


class PanelKeeper(Callback):
    """Keeps pictures, truth and predictions of a few fixed validation pictures of an evaluation outside training.

    They are read again as a whole (`Geometry.whole`): scores may be of the central part alone (`data.eval_crop`).
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: dict[int, dict[str, Any]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter) -> None:
        """After the scores are computed, which these pictures must not enter; on one process, nothing is gathered."""
        self.kept = {}
        if trainer.state.fn == "fit" or not trainer.is_global_zero:
            return
        data = trainer.datamodule
        pictures = data.dataset("val", Geometry.whole(pl_module.cfg), "panels")
        collate = Collate(pl_module.pad_multiple)
        with computed_anew(pl_module):
            for index in places(len(pictures), self.count):
                item = pictures[index]
                if item.image is None:  # cannot be read; the evaluation has said so
                    continue
                batch = trainer.strategy.batch_to_device(collate([item]))
                with trainer.precision_plugin.val_step_context():
                    maps = pl_module.validation_step(batch, 0)
                self.kept[index] = unpadded(batch, maps)


def places(length: int, count: int) -> list[int]:
    """`count` of `length` pictures, evenly spaced."""
    step = max(1, length // max(1, count))
    return list(range(length)[step // 2 :: step])[:count]


def unpadded(batch: dict[str, Any], maps: dict[str, Tensor]) -> dict[str, Any]:
    """Id, picture uint8 [H,W,3], label and maps [H,W] of a batch of one, without its padding."""
    valid = batch["valid"][0]
    rows, columns = int(valid.any(1).sum()), int(valid.any(0).sum())
    return {
        "id": batch["id"][0],
        "image": panels.as_picture(batch["image"][0, :, :rows, :columns]),
        "label": batch["label"][0, :rows, :columns].cpu().numpy() if "label" in batch else None,
        "maps": {probe: values[0, :rows, :columns].cpu().numpy() for probe, values in maps.items()},
    }


@contextmanager
def computed_anew(model: UnsupervisedSegmenter) -> Any:
    """Features that are kept for the evaluation (`backbone.cache_features`) are of other crops: none is used."""
    kept, model.kept_features = model.kept_features, {}
    try:
        yield
    finally:
        model.kept_features = kept
