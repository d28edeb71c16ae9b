"""Methods with prototypes of their own, on the scenes: recorded bands, and what each loses without its core."""

import pytest

from tests.support.scores import score

SMOOSEG = (20.0, 26.0)
"""val/own/miou of SmooSeg, mean of seeds 0, 1, 2, as recorded; see docs/results.md."""
SMOOTHNESS = 10.0
"""Points of mIoU that it must lose where no energy trains its projector. Measured: 19.6."""
CAUSE = (20.5, 26.0)
"""The same of CAUSE."""
CONTRAST = 1.0
"""Points that it must lose where its head learns nothing. Measured: 2.3."""
PRIMAPS = (20.5, 28.0)
"""The same of PriMaPs-EM."""
FITTED = 6.0
"""Points that it must lose where its prototypes stay the principal directions that they begin as. Measured: 12."""
AUTOREGRESSIVE = (7.5, 11.5)
"""The same of the autoregressive method, from random weights."""
INFORMATION = 4.0
"""Points that it must lose where nothing is learned. Measured: 6.9 (seed 0)."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def test_smoothness_makes_the_labels_of_smooseg(tmp_path):
    ours = score(tmp_path, "smooseg", "val/own/miou")
    assert SMOOSEG[0] <= ours <= SMOOSEG[1]
    assert ours >= score(tmp_path, "smooseg", "val/own/miou", "optim.head.lr=0") + SMOOTHNESS


def test_the_contrast_makes_the_classes_of_cause(tmp_path):
    ours = score(tmp_path, "cause", "val/own/miou")
    assert CAUSE[0] <= ours <= CAUSE[1]
    assert ours >= score(tmp_path, "cause", "val/own/miou", "optim.head.lr=0") + CONTRAST


def test_the_fit_makes_the_classes_of_primaps(tmp_path):
    ours = score(tmp_path, "primaps", "val/own/miou", f"cache.dir={tmp_path}")
    assert PRIMAPS[0] <= ours <= PRIMAPS[1]
    unfitted = "optim.prototypes.lr=0", "trainer.max_steps=2", "method.start.steps=1", f"cache.dir={tmp_path}"
    assert ours >= score(tmp_path, "primaps", "val/own/miou", *unfitted) + FITTED


def test_information_between_orders_makes_classes_out_of_random_weights(tmp_path):
    ours = score(tmp_path, "autoregressive", "val/own/miou")
    off = score(tmp_path, "autoregressive", "val/own/miou", "optim.network.lr=0", "trainer.max_steps=1")
    assert AUTOREGRESSIVE[0] <= ours <= AUTOREGRESSIVE[1]
    assert ours >= off + INFORMATION
