"""Hidden Positives: what follows from the configuration."""

import pytest
import torch

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


def test_the_head_alone_drops_out_while_its_pool_is_filled():
    """Kept features and new ones reach the momentum head as they are: it has its own two draws, its codes a third."""
    words = ["method=hidden_positives", "backbone.weights=none", "method.num_clusters=3", "method.pool.size=6"]
    model = HiddenPositives(config.compose(words), ClassMeta())
    seen = []
    model.momentum_head.copy.register_forward_hook(lambda module, given, codes: seen.append((*given, codes)))
    rows = torch.randn(6, model.backbone.dim)
    codes = model._pool_codes(20)(rows)
    features, masks, whole = seen[0]
    assert torch.equal(features, rows)
    assert all(0 < float((mask == 0).float().mean()) < 0.3 for mask in masks)
    assert not torch.equal(masks[0], masks[1])
    dropped = codes == 0
    assert 0 < float(dropped.float().mean()) < 0.3
    torch.testing.assert_close(codes[~dropped], whole[~dropped] / 0.9)
