"""PiCIE: equivariance, heads and switches of its loss. Whole epochs of the release: tests/reference."""

import pytest
import torch
import torch.nn.functional as F

from common import chance
from common.errors import ConfigError
from datamodules.base.transforms import draw_geometry, replay, take
from datamodules.base.views import Epoch, make_views
from losses import clusters
from tests.lightning_modules.clustered.test_rounds import model_of


def views_of(model, count: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = {"image": torch.rand(count, 3, 48, 48, generator=draw), "index": torch.arange(count)}
    return make_views(made, model.views, seed=0, step=0, epoch=Epoch(0, count))


@pytest.fixture
def model():
    found = model_of("picie")
    found.centroids0.copy_(0.3 * torch.randn(2, 6, found.code_dim, generator=torch.Generator().manual_seed(1)))
    found.counts0.copy_(torch.tensor([[4, 8, 2, 1, 1, 0], [1, 1, 1, 1, 1, 1]]))
    return found


def test_the_crop_of_the_picture_is_that_of_the_other_views_features(model):
    views = views_of(model)
    maps = torch.rand(3, 4, 6, 6)
    expected = replay(maps, views["view1.params"], size=(6, 6))
    assert torch.equal(model.aligned(maps, views, "view2"), expected)
    assert torch.equal(model.aligned(maps, views, "view1"), maps)
    plain = draw_geometry(
        model.views["view1"].geometric, 3, (48, 48), chance.numpy_generator(0, "view.view1.geometry", 0)
    )
    assert torch.equal(take(plain, slice(0, 3), maps.device).boxes, views["view1.params"].boxes)


def test_without_whole_cells_both_views_take_exactly_the_same_place():
    model = model_of("picie", "method.augment.whole_cells=false")
    views = views_of(model)
    position = torch.linspace(0, 1, 48).expand(3, 1, 48, 48)
    coarse = F.avg_pool2d(position, 8)  # a ramp, the same on every grid
    cropped, other = (replay(maps, views["view1.params"], size=(6, 6)) for maps in (position, coarse))
    inside = (other > coarse.min() + 0.01) & (other < coarse.max() - 0.01)
    assert torch.allclose(cropped[inside], other[inside], atol=1e-2)


def test_the_loss_is_that_of_its_parts(model):
    model.train()
    views = views_of(model)
    found = model.loss(views, None)
    codes = [model.codes_of(views, name) for name in ("view1", "view2")]
    labels = [model.labels_of(views, view)[0] for view in range(2)]
    total = torch.zeros(())
    for own in codes:
        for view, other in enumerate(labels):
            logits = torch.einsum("bdhw,kd->bkhw", own, model.centroids0[view])
            total += F.cross_entropy(logits, other, model.counts0[view] / model.counts0[view].sum()) / 4
    assert torch.allclose(found.total, total, atol=1e-5)
    assert found.view == "view1"
    found.total.backward()
    assert all(own.weight.grad.abs().sum() > 0 for own in model.head.laterals)


def test_two_heads_are_balanced():
    model = model_of("picie", "method.heads=[6,20]").train()
    for head, size in enumerate((6, 20)):
        getattr(model, f"centroids{head}").copy_(torch.randn(2, size, model.code_dim))
        getattr(model, f"counts{head}").fill_(5)
    views = views_of(model)
    found = model.loss(views, None)
    first, second = ((found.parts[f"within{end}"] + found.parts[f"across{end}"]) / 2 for end in ("", "_20"))
    mix = clusters.head_weights([6, 20])
    assert torch.allclose(found.total, mix[0] * first + mix[1] * second, atol=1e-5)
    assert model.classify(torch.rand(1, model.code_dim, 2, 2)).shape[1] == 6


@pytest.mark.parametrize("words", ["method.mse=true", "method.weights=none", "method.weights=inverse"])
def test_every_switch_changes_the_loss(model, words):
    other = model_of("picie", words)
    other.load_state_dict(model.state_dict())
    views = views_of(model)
    one, two = (own.train().loss(views, None).total for own in (model, other))
    assert torch.isfinite(two)
    assert not torch.allclose(one, two, rtol=1e-4)


def test_the_first_head_must_be_the_one_that_is_read_out():
    with pytest.raises(ConfigError) as caught:
        model_of("picie", "method.heads=[20,100]")
    assert str(caught.value) == (
        "method.heads=[20, 100]: the first head is read out, so it must have method.num_clusters=6 clusters; set "
        "method.heads=[6, 100]"
    )
