"""What W&B gets: rows by training step (a killed run that goes on neither repeats one nor leaves one out), pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from common.files import write_text
from common.spec import IGNORE, ClassMeta
from evaluation import headline
from reporting.panels import Row, as_ids, as_picture

UNMATCHED_ID = IGNORE - 1
"""In a mask: clusters without a class. W&B keeps masks in 8 bits."""


class StepLogger(WandbLogger):
    """A WandbLogger whose x-axis is the training step, as in metrics.csv: one row a step, each handed over once.

    `RunKeeper` hands over the rows of metrics.csv, in place of Lightning, whose steps differ in the closing evaluation.
    A row is held back until one of a later step comes, or `close`. The file `handed` remembers the last step that W&B
    has: a resumed run leaves out what is up to there, and gives all rows of metrics.csv before it adds its own, so that
    none between there and its checkpoint is missing. The x-axis is given with every row: an offline run starts a file
    of its own after each resume.
    """

    def __init__(self, handed: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._file = handed
        self._handed = int(handed.read_text()) if handed.is_file() else 0
        self._step = self._handed
        self._row: dict[str, Any] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Without a step (pictures): part of the row that is open. What Lightning logs by itself is left out."""
        if step is None:
            self._row |= metrics

    @rank_zero_only
    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Values of a training step; cells of a csv file are taken, and empty ones left out."""
        if step <= self._handed:
            return
        if step > self._step:
            self.close()
        self._step = step
        self._row |= {key: float(value) for key, value in values.items() if value not in ("", None)}

    @rank_zero_only
    def close(self) -> None:
        """Hand over the row that is held back."""
        if not self._row:
            return
        self.experiment.log({**self._row, "trainer/global_step": self._step}, step=self._step, commit=True)
        self._row, self._handed = {}, self._step
        write_text(self._file, f"{self._handed}\n")

    @rank_zero_only
    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """What the run leads with in W&B's table: the headline score, and its key in metrics.json."""
        key = headline.key_of(metrics)
        if key is not None:
            self.experiment.summary.update({"headline": metrics[key], "headline_key": key})

    @rank_zero_only
    def finish(self) -> None:
        """Hand over what is held back and end the run, so that the next training of this process has one of its own."""
        self.close()
        self.experiment.finish()


def masked_pictures(rows: Sequence[Row], meta: ClassMeta, mappings: Mapping[str, np.ndarray]) -> list[wandb.Image]:
    """Pictures of a panel with truth and predictions as masks, which W&B's page switches on and off.

    mappings: column -> [K] class of each cluster, -1 without one; a column without it holds classes, or clusters where
    `meta` has none. A map of more than 254 ids is left out.
    """
    names = dict(enumerate(meta.names)) | {UNMATCHED_ID: "no class", IGNORE: "no label"}
    found = []
    for row in rows:
        masks: dict[str, Any] = {}
        if row.truth is not None and meta.num_classes <= UNMATCHED_ID:
            masks["truth"] = {"mask_data": as_ids(row.truth).astype(np.uint8), "class_labels": names}
        for column, ids in row.maps.items():
            ids, labels = as_ids(ids), names
            if not meta.has_labels:
                labels = {number: f"cluster {number}" for number in range(int(ids.max()) + 1)}
            elif column in mappings:
                classes = np.asarray(mappings[column])[ids]
                ids = np.where(classes < 0, UNMATCHED_ID, classes)
            if ids.max() <= UNMATCHED_ID:
                masks[column] = {"mask_data": ids.astype(np.uint8), "class_labels": labels}
        found.append(wandb.Image(as_picture(row.image), caption=row.title, masks=masks))
    return found
