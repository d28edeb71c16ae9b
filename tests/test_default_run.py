"""The default run: what Hidden Positives adds to k-means on the scenes, three seeds, recorded bands."""

import pytest

from tests.support.scores import score

BAND = (24.5, 28.0)
"""val/cluster/miou of Hidden Positives with the bundled backbone, mean of seeds 0, 1, 2 (docs/results.md)."""
OF_KMEANS = (22.0, 23.6)
"""val/kmeans/miou of the baseline on the same backbone."""
MARGIN_OF_CORE = 7.0
"""Points of mIoU that it must lose without its contrastive term."""


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_hidden_positives_on_scenes(tmp_path):
    """In its band, above k-means on the same features, and below the band without its core term."""
    ours = score(tmp_path, "hidden_positives", "val/cluster/miou")
    baseline = score(tmp_path, "kmeans_baseline", "val/kmeans/miou", "trainer.max_steps=1")
    off = ["method.positives.agnostic=false", "method.positives.specific=false"]
    assert BAND[0] <= ours <= BAND[1]
    assert OF_KMEANS[0] <= baseline <= OF_KMEANS[1]
    assert ours > baseline + 2
    assert ours >= score(tmp_path, "hidden_positives", "val/cluster/miou", *off) + MARGIN_OF_CORE
