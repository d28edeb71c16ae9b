"""Hidden Positives: what follows from the configuration."""

import pytest

import config
from common.spec import ClassMeta
from lightning_modules.hidden_positives import HiddenPositives


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], 256),  # 8 pictures of 16 x 16 patches
        (["data.batch_size=9"], 512),  # 288, the next power of two
        (["data.train_size=[64,128]"], 128),
        (["data.batch_size=1"], 128),  # never fewer
        (["data.train_size=132"], 512),  # a patch that is cut counts
        (["method.pool.size=77"], 77),
    ],
    ids=str,
)
def test_pools_grow_with_the_patches_of_a_step(words, size):
    cfg = config.compose(["method=hidden_positives", "backbone.weights=none", "method.num_clusters=3", *words])
    model = HiddenPositives(cfg, ClassMeta())
    assert model.pool_size == size
    assert model.pool.agnostic.shape == (size, model.backbone.dim)
