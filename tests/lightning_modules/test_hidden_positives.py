"""Hidden Positives: what follows from the configuration."""

import pytest
import torch

import config
from common.spec import ClassMeta
from lightning_modules import hidden_positives
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


@pytest.mark.parametrize(
    ("lam", "words", "passes"),
    [
        (0.0, [], 0),
        (0.5, [], 1),
        (0.0, ["method.positives.agnostic=false"], 1),
        (0.5, ["method.positives.specific=false"], 0),
    ],
    ids=str,
)
def test_the_momentum_head_runs_where_its_positives_count(lam, words, passes, monkeypatch):
    small = ["method=hidden_positives", "backbone.weights=none", "method.num_clusters=3", "method.pool.size=6"]
    model = HiddenPositives(config.compose([*small, *words]), ClassMeta())
    monkeypatch.setattr(hidden_positives, "lambda_schedule", lambda *_: lam)
    rows = torch.rand(6, model.backbone.dim, generator=torch.Generator().manual_seed(0))
    model.pool.fill_agnostic(rows)
    model.pool.kept.enqueue(rows)
    model.pool.refill(model.momentum_head)
    seen = []
    model.momentum_head.copy.register_forward_hook(lambda *_: seen.append(model.momentum_head.copy.linear.bias.clone()))
    started = model.momentum_head.copy.linear.bias.clone()
    with torch.no_grad():
        model.head.linear.bias.add_(1.0)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    loss = model.loss({"augmented": pictures}, model.features(pictures))
    assert loss.total.isfinite()
    assert len(seen) == passes
    assert all(torch.equal(bias, started) for bias in seen)  # the copy's codes are those of before it follows
    assert not torch.equal(model.momentum_head.copy.linear.bias, started)
