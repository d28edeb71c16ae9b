"""EAGLE on the scenes: its recorded band, and what it loses where its head learns nothing."""

import pytest

from tests.support.scores import score

EAGLE = (22.5, 26.5)
"""val/kmeans/miou, mean of seeds 0, 1, 2, as recorded; see docs/results.md."""
LEARNED = 1.5
"""Points of mIoU that it must lose with a head that stays random."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def test_eagle_learns_codes_whose_clusters_are_classes(tmp_path):
    ours = score(tmp_path, "eagle", "val/kmeans/miou")
    assert EAGLE[0] <= ours <= EAGLE[1]
    assert ours >= score(tmp_path, "eagle", "val/kmeans/miou", "optim.head.lr=0", "trainer.max_steps=1") + LEARNED
