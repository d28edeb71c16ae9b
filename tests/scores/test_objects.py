"""Methods that look for objects, on the scenes: recorded bands, and what each loses where its head learns nothing."""

import pytest

from tests.support.scores import score

EAGLE = (22.5, 26.5)
"""val/kmeans/miou, mean of seeds 0, 1, 2, as recorded; see docs/results.md."""
LEARNED = 1.5
"""Points of mIoU that it must lose with a head that stays random."""
MASKDISTILL = (11.5, 15.5)
"""val/own/miou, mean of seeds 0, 1, 2, as recorded; see docs/results.md."""
HARDEST = 5.0
"""Points that it must lose with an untrained segmenter. Measured: 6.7 (seed 0)."""
MASKCONTRAST = (4.0, 6.5)
"""The same of MaskContrast on 400 scenes."""
PROTOTYPES = 1.5
"""Points that it must lose where nothing is learned. Measured: 2.9 (seed 0)."""
UNTRAINED = ("optim.head.lr=0", "trainer.max_steps=1")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def test_eagle_learns_codes_whose_clusters_are_classes(tmp_path):
    ours = score(tmp_path, "eagle", "val/kmeans/miou")
    assert EAGLE[0] <= ours <= EAGLE[1]
    assert ours >= score(tmp_path, "eagle", "val/kmeans/miou", *UNTRAINED) + LEARNED


def test_the_segmenter_makes_more_of_the_masks_of_maskdistill(tmp_path):
    ours = score(tmp_path, "maskdistill", "val/own/miou", f"cache.dir={tmp_path}")
    assert MASKDISTILL[0] <= ours <= MASKDISTILL[1]
    assert ours >= score(tmp_path, "maskdistill", "val/own/miou", f"cache.dir={tmp_path}", *UNTRAINED) + HARDEST


def test_the_contrast_makes_the_objects_of_maskcontrast(tmp_path):
    words = f"cache.dir={tmp_path}", "data.train_count=400"
    ours = score(tmp_path, "maskcontrast", "val/own/miou", *words)
    assert MASKCONTRAST[0] <= ours <= MASKCONTRAST[1]
    assert ours >= score(tmp_path, "maskcontrast", "val/own/miou", *words, *UNTRAINED) + PROTOTYPES
