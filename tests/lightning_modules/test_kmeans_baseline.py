"""The baseline's own features: dense SIFT on a regular grid."""

import pytest
import torch
from kornia.feature import SIFTDescriptor

import config
from common.errors import ConfigError
from datamodules.base.views import GRAY
from engine import setup
from lightning_modules.kmeans_baseline import dense_sift
from tests.conftest import run_small, small_words


@pytest.mark.parametrize(("step", "side"), [(8, 12), (10, 12), (5, 9), (16, 8)])
def test_a_descriptor_is_that_of_the_square_around_the_centre_of_its_cell(step, side):
    images = torch.rand(2, 4, 60, 83, generator=torch.Generator().manual_seed(0))
    found = dense_sift(images, step, side)
    assert found.shape == (2, 128, -(-60 // step), -(-83 // step))
    row, column = 2, 3
    top, left = (int((place + 0.5) * step - side / 2) for place in (row, column))
    grey = (images[1, :3] * torch.tensor(GRAY)[:, None, None]).sum(0)
    square = grey[None, None, top : top + side, left : left + side]
    alone = SIFTDescriptor(side, rootsift=False)(square)[0].detach()
    assert torch.allclose(found[1, :, row, column], alone, atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.ones(()), atol=1e-5)


def test_squares_beyond_the_picture_repeat_its_border_and_flat_ones_are_zero():
    images = torch.rand(1, 3, 21, 17, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(images, (8, 8, 8, 8), mode="replicate")
    assert torch.allclose(dense_sift(images, 8, 12), dense_sift(wide, 8, 12)[..., 1:4, 1:4], atol=1e-6)
    assert not dense_sift(torch.full((1, 3, 21, 17), 0.3), 8, 12).any()


def test_brighter_and_softer_pictures_have_the_same_descriptors():
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(dense_sift(images, 8, 12), dense_sift(0.4 * images + 0.2, 8, 12), atol=1e-4)


@pytest.mark.train
def test_sift_is_clustered_on_the_grid_of_the_backbone_and_is_no_state(tmp_path):
    run = run_small("kmeans_baseline", tmp_path, "sift", "method.features=sift", "trainer.max_steps=1")
    assert run.weights["kmeans_probe.centroids"].shape[1] == 128
    assert not [name for name in run.weights if "sift" in name]
    assert run.metrics["val/kmeans/miou"] > 0


def test_the_grid_of_sift_is_a_setting(tmp_path):
    cfg, data = setup.build_data(
        config.compose(small_words("kmeans_baseline", "method.features=sift", "method.sift.step=10"))
    )
    model = setup.build_model(cfg, data.meta)
    assert model.embed(model.features(torch.rand(1, 3, 48, 48))).shape == (1, 128, 5, 5)
    with pytest.raises(ConfigError, match=r"method\.sift\.side=4: must be at least 8"):
        config.compose(small_words("kmeans_baseline", "method.sift.side=4"))


def test_features_that_no_backbone_makes_have_no_places_to_take_out():
    words = small_words("kmeans_baseline", "method.features=colour", "backbone.debias=blank")
    cfg, data = setup.build_data(config.compose(words))
    with pytest.raises(ConfigError) as error:
        setup.build_model(cfg, data.meta)
    assert str(error.value) == (
        "backbone.debias=blank: nothing is taken out of method.features=colour, which the backbone does not make; set "
        "backbone.debias=none"
    )
