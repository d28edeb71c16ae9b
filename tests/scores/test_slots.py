"""DINOSAUR on the scenes: the recorded band of its groups, and what they lose where slot attention learns nothing."""

import pytest

from tests.support.scores import score

SEVERAL = (20.5, 28.0)
"""val/slots/fg_ari_several, mean of seeds 0, 1, 2, as recorded; see docs/results.md."""
LEARNED = 8.0
"""Points that it must lose where slots learn nothing. Measured: 15."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def test_slots_of_dinosaur_hold_objects(tmp_path):
    words = "data.workers=0", f"cache.dir={tmp_path}", "trainer.val_every=100000"
    ours = score(tmp_path, "dinosaur", "val/slots/fg_ari_several", *words)
    assert SEVERAL[0] <= ours <= SEVERAL[1]
    off = "optim.slots.lr=0", "trainer.max_steps=1"
    assert ours >= score(tmp_path, "dinosaur", "val/slots/fg_ari_several", *words, *off) + LEARNED
