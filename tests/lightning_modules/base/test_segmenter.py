"""What a training step hands to the callbacks."""

import csv

import lightning as L
import pytest

from tests.conftest import run_small


@pytest.mark.train
def test_values_of_a_step_reach_its_row_without_lightnings_log(tmp_path, monkeypatch):
    """Which would cost the host milliseconds in every step, also where no row is written."""
    asked, plain = [], L.LightningModule.log

    def log(self, name, *args, **kwargs):
        asked.append(name)
        return plain(self, name, *args, **kwargs)

    monkeypatch.setattr(L.LightningModule, "log", log)
    run = run_small("stego", tmp_path, "x", "trainer.max_steps=2")
    assert asked
    assert not [name for name in asked if name.startswith("train/")]
    with (run.folder / "metrics.csv").open() as handle:
        rows = {int(row["step"]): row for row in csv.DictReader(handle) if row["train/loss"]}
    assert set(rows) == {1, 2}
    assert rows[1]["train/loss"] != rows[2]["train/loss"]
    assert all(row["train/cluster_probe"] and row["train/similarity_self"] for row in rows.values())
