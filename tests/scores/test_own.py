"""Methods with prototypes of their own, on the scenes: recorded bands, and what each loses without its core."""

import pytest

from tests.support.scores import score

SMOOSEG = (20.0, 26.0)
"""val/own/miou of SmooSeg, mean of seeds 0, 1, 2, as recorded; see docs/results.md."""
SMOOTHNESS = 10.0
"""Points of mIoU that it must lose where no energy trains its projector. Measured: 19.6."""
CAUSE = (18.5, 24.5)
"""The same of CAUSE."""
CONTRAST = 1.0
"""Points that it must lose where its head learns nothing. Measured: 2.1."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def test_smoothness_makes_the_labels_of_smooseg(tmp_path):
    ours = score(tmp_path, "smooseg", "val/own/miou")
    assert SMOOSEG[0] <= ours <= SMOOSEG[1]
    assert ours >= score(tmp_path, "smooseg", "val/own/miou", "optim.head.lr=0") + SMOOTHNESS


def test_the_contrast_makes_the_classes_of_cause(tmp_path):
    ours = score(tmp_path, "cause", "val/own/miou")
    assert CAUSE[0] <= ours <= CAUSE[1]
    assert ours >= score(tmp_path, "cause", "val/own/miou", "optim.head.lr=0") + CONTRAST
