"""MaskDistill: names by whitened k-means, the loss of hard pixels, and its rounds."""

import numpy as np
import pytest
import torch

import config
from engine import setup
from engine.stages.stage import Stage
from losses.objects.hard_pixels import hard_pixel_loss
from retrieval import kmeans, whitening
from tests.conftest import run_small, small_words


def built(*words: str):
    cfg, data = setup.build_data(config.compose(small_words("maskdistill", *words)))
    return cfg, data, setup.build_model(cfg, data.meta)


@pytest.mark.train
@pytest.mark.parametrize("whiten", [True, False])
def test_names_are_those_of_whitened_vectors(tmp_path, whiten):
    cfg, data, model = built(f"cache.dir={tmp_path}", f"method.clusters.whiten={whiten}", "method.num_clusters=5")
    setup.connect(model, data)
    results = Stage(cfg, data, model).run()
    table, rows = results["clusters"], torch.from_numpy(results["objects"].rows("features")[0])
    spread = whitening.deviations(rows) if whiten else torch.ones(rows.shape[1])
    points = whitening.scaled(rows, spread)
    fit = kmeans.fit(points, 4, spherical=False, seed=0, restarts=cfg.method.clusters.restarts)
    assert np.array_equal(table["assignment"], kmeans.assign(points, fit.centroids, spherical=False))
    assert (table["spread"] == 1).all() != whiten
    labels = table["assignment"][: len(results["objects"].read(0).fields["masks"])] + 1
    assert set(np.unique(model.first_labels(results).read(0, (48, 48)))) == {0, *labels.tolist()}


def test_the_loss_is_that_of_hard_pixels():
    _, _, model = built("method.hardest=0.1")
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 12, 6, 6, generator=draw), torch.randint(0, 12, (2, 48, 48), generator=draw)
    labels[0] = 255
    loss, known, parts = model.objective(logits, labels)
    assert torch.equal(loss, hard_pixel_loss(logits, labels, 0.1)[0])
    assert int(known) == 48 * 48
    assert float(parts["hard"]) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.train
def test_retraining_on_refined_labels(tmp_path):
    rounds = "phases=[{share: 1}, {share: 1, method.round: 2}]"
    run = run_small("maskdistill", tmp_path, "two", rounds, "method.relabel.crf=dense", f"cache.dir={tmp_path}")
    names = [folder.name for folder in (tmp_path / "pseudo" / "maskdistill-scenes").iterdir()]
    assert len([name for name in names if name.startswith("relabelled2-")]) == 1
    assert int(run.weights["taught"]) == 1
