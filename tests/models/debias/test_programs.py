"""`export` of a model whose features are without places: the program takes them out too, at any size."""

import pytest
import torch

from inference import exporting
from tests.conftest import run_small

pytestmark = pytest.mark.train


@pytest.mark.parametrize("kind", ["blank", "rasa"])
def test_a_program_takes_places_out_too(kind, tmp_path):
    """`export` itself holds the program against the model at another size."""
    words = [f"backbone.debias={kind}", "trainer.max_steps=1", "evaluation.panels=0", "evaluation.kmeans.pictures=4"]
    last = run_small("kmeans_baseline", tmp_path, kind, *words).folder / "checkpoints" / "last.ckpt"
    facts = exporting.export(last, tmp_path / "one.pt2", [])
    assert f"debias={kind}:auto" in facts["backbone"]
    picture = torch.rand(1, 3, 72, 56, generator=torch.Generator().manual_seed(0))
    found = torch.export.load(tmp_path / "one.pt2").module()(picture)
    plain = run_small("kmeans_baseline", tmp_path, "plain", *words[1:]).folder / "checkpoints" / "last.ckpt"
    exporting.export(plain, tmp_path / "two.pt2", [])
    assert not torch.allclose(torch.export.load(tmp_path / "two.pt2").module()(picture), found, atol=1e-2)
