"""Views whose draws belong to an epoch, passes that show them, and crops of whole cells."""

from types import SimpleNamespace

import pytest
import torch

from common import chance
from common.spec import Geometric, Photometric, ViewSpec
from datamodules.base import views
from datamodules.base.transforms import draw_geometry, replay, take
from tests.datamodules.pictures import Stripes, StripesModule, config
from tests.support.ranks import on_two_ranks

CROP = Geometric(size=8, sides=(0.5, 1.0), whole_cells=True)
SPECS = {
    "colour": ViewSpec(photometric=Photometric(separate=True, jitter_p=0.8, gray_p=0.0), of_epoch=True),
    "view": ViewSpec(geometric=CROP, source="colour", of_epoch=True),
    "other": ViewSpec(photometric=Photometric(), of_epoch=True),
}


def module(step: int = 0, count: int = 11) -> StripesModule:
    found = type("Made", (StripesModule,), {"train": Stripes(count)})(config(train_crop="random", flip_p=0.5))
    found.setup()
    found.views = SPECS
    found.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=step, training=True, num_devices=1)
    return found


def by_picture(batches, name: str) -> dict[int, torch.Tensor]:
    return {int(i): picture for batch in batches for i, picture in zip(batch["index"], batch[name], strict=True)}


@pytest.mark.parametrize("step", [0, 3])
def test_a_pass_shows_what_the_training_of_its_epoch_shows(step):
    """Two steps of four pictures make an epoch of the eleven: whatever the order, crops and colours are the same."""
    data = module(step)
    trained = {}
    for batch, at in zip(data.train_dataloader(), (step, step + 1), strict=False):
        data.trainer.global_step = at
        trained |= by_picture([data.on_after_batch_transfer(batch, 0)], "view") if at // 2 == step // 2 else {}
    shown = list(data.shown(step, ["view"], 3, "x", torch.device("cpu")))
    assert [len(batch["index"]) for batch in shown] == [3, 3, 3, 2]
    assert "other" not in shown[0]
    assert not [key for key in shown[0] if "label" in key]
    found = by_picture(shown, "view")
    assert sorted(found) == list(range(11))
    assert trained
    for index, picture in trained.items():
        assert torch.equal(found[index], picture), index
    later = by_picture(data.shown(step + 2, ["view"], 3, "x", torch.device("cpu")), "view")
    assert not torch.equal(later[0], found[0])


def test_a_pass_of_some_pictures_is_the_beginning_of_the_whole_and_keyed_by_its_purpose():
    data = module()
    orders = {
        (purpose, most): [
            int(i) for batch in data.shown(0, ["view"], 4, purpose, torch.device("cpu"), most) for i in batch["index"]
        ]
        for purpose, most in (("x", None), ("x", 5), ("y", None))
    }
    assert orders["x", 5] == orders["x", None][:5]
    assert orders["y", None] != orders["x", None]


def test_steps_that_share_draws_may_be_fewer_than_an_epoch():
    data = module()
    data.view_steps = 1
    assert [data.epoch_of(step).number for step in range(4)] == [0, 1, 2, 3]
    data.view_steps = None
    assert [data.epoch_of(step).number for step in range(4)] == [0, 0, 1, 1]


def _as_rank(rank: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in module().shown(0, ["view"], 5, "x", torch.device("cpu"))]


@pytest.mark.ddp
def test_ranks_share_every_batch_of_a_pass():
    """Eleven pictures in batches of five: the last, of one picture, is left out with two ranks."""
    first, second = on_two_ranks(_as_rank, start="fork")
    whole = [batch["index"].tolist() for batch in module().shown(0, ["view"], 5, "x", torch.device("cpu"))]
    assert [one + two for one, two in zip(first, second, strict=True)] == whole[:2]
    assert len(whole) == 3


def test_each_change_of_colour_happens_by_itself_and_in_order():
    spec = Photometric(separate=True, jitter_p=0.5)
    drawn = views.draw_colour(spec, 4000, chance.numpy_generator(0, "x"))
    happened = drawn.order >= 0
    assert torch.from_numpy(happened).float().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.05)
    assert abs(float((happened[:, 0] & happened[:, 1]).mean()) - 0.25) < 0.05
    assert all((row == -1) or (row == place) for place in range(4) for row in drawn.order[:50, place])
    image = torch.rand(1, 3, 4, 4)
    never = Photometric(separate=True, jitter_p=0.0, gray_p=0, blur_p=0)
    none = views.draw_colour(never, 1, chance.numpy_generator(0, "x"))
    assert torch.equal(views.recolour(image, never, none), image)


def test_a_crop_of_whole_cells_is_that_of_the_slice_on_every_grid():
    draws = draw_geometry(CROP, 5, (32, 32), chance.numpy_generator(0, "x"))
    params = take(draws, torch.tensor([3, 1]), torch.device("cpu"))
    for side, size in ((32, (8, 8)), (10, (10, 10))):
        maps = torch.rand(2, 3, side, side)
        found = replay(maps, params, size=size)
        for number, (share, top, left) in enumerate(params.shares.tolist()):
            own = int(share * side)
            y, x = round((side - own) * top), round((side - own) * left)
            part = maps[number : number + 1, :, y : y + own, x : x + own]
            expected = torch.nn.functional.interpolate(part, size=size, mode="bilinear", align_corners=False)
            expected = expected.flip(-1) if params.flip[number] else expected
            assert torch.allclose(found[number], expected[0], atol=1e-5)


def test_the_gradient_of_a_crop_stays_inside_it():
    params = take(draw_geometry(CROP, 3, (16, 16), chance.numpy_generator(1, "x")), slice(0, 3), torch.device("cpu"))
    maps = torch.rand(3, 2, 16, 16, requires_grad=True)
    replay(maps, params, size=(16, 16)).sum().backward()
    top, left, height, width = params.boxes[0].int().tolist()
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert not maps.grad[0][:, outside].any()
    assert torch.allclose(maps.grad.sum(), torch.tensor(3.0 * 2 * 256), rtol=1e-4)
