"""Crops that are drawn anew until all views of a picture show its object, and pictures that may not be shown."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.spec import Cover, Geometric, Meeting, Photometric, ViewSpec
from datamodules.base import covering, views
from tests.datamodules.pictures import Stripes, StripesModule, config
from tests.support.ranks import on_two_ranks

CROP = Geometric(scale=(0.05, 0.3))


def batch(count: int = 12) -> dict[str, torch.Tensor]:
    """Pictures with a small object, none, or nothing else."""
    pseudo = torch.zeros(count, 32, 32, dtype=torch.int64)
    pseudo[: count - 2, 4:12, 20:30] = 1
    pseudo[-1] = 1
    pseudo[0, 20:, :9] = 255
    image = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"image": image, "pseudo": pseudo, "valid": torch.ones(count, 32, 32, dtype=torch.bool)}


def specs(**cover) -> dict[str, ViewSpec]:
    return {name: ViewSpec(geometric=CROP, cover=Cover(**cover)) for name in ("query", "key")}


def share(made, name: str) -> torch.Tensor:
    return (made[f"{name}.pseudo"] == 1).float().mean((1, 2))


def test_both_crops_show_the_object_or_the_whole_picture():
    made = views.make_views(batch(), specs(share=(0.1, 0.9), tries=100), 0, 3)
    for name in ("query", "key"):
        assert ((share(made, name)[:-2] >= 0.1) & (share(made, name)[:-2] <= 0.9)).all()
        assert (made[f"{name}.params"].boxes[:-2, 2] < 32).all()
        assert torch.equal(made[f"{name}.params"].boxes[-2:], torch.tensor([[0.0, 0, 32, 32]] * 2))  # nothing will do
    plain = {name: dataclasses.replace(spec, cover=None) for name, spec in specs().items()}
    free = views.make_views(batch(), plain, 0, 3)
    assert any((share(free, name)[:-2] < 0.1).any() for name in ("query", "key"))
    fits = (
        covering.shows(batch()["pseudo"] == 1, free[f"{n}.params"], Cover(share=(0.1, 0.9))) for n in ("query", "key")
    )
    first = torch.stack(list(fits)).all(0)
    assert first.any()
    for name in ("query", "key"):  # a first draw that does is that of a view without a cover; a pair goes together
        same = (made[f"{name}.params"].boxes == free[f"{name}.params"].boxes).all(1)
        assert torch.equal(same, first)


def test_fewer_tries_end_in_more_whole_pictures():
    def whole(tries):
        made = views.make_views(batch(), specs(share=(0.1, 0.9), tries=tries), 0, 3)
        return int((made["query.params"].boxes[:, 2] == 32).sum())

    assert whole(1) > whole(4) >= whole(100) == 2


def _parts(rank: int) -> dict[str, torch.Tensor]:
    own = {name: value.chunk(2)[rank] for name, value in batch().items()}
    made = views.make_views(own, specs(share=(0.1, 0.9)), 0, 5)
    return {name: made[name] for name in ("query", "key.pseudo")}


@pytest.mark.ddp
def test_two_ranks_see_the_crops_of_one():
    whole = views.make_views(batch(), specs(share=(0.1, 0.9)), 0, 5)
    parts = on_two_ranks(_parts)
    for name in ("query", "key.pseudo"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_refusals():
    with pytest.raises(ConfigError, match="view 'query': its cover wants the map 'pseudo', which the batch does not"):
        views.make_views({"image": torch.zeros(1, 3, 8, 8)}, specs(), 0, 0)
    for wrong in ({"of_epoch": True}, {"geometric": None, "photometric": Photometric()}):
        spec = {"query": dataclasses.replace(specs()["query"], **wrong)}
        with pytest.raises(ConfigError, match="view 'query': a cover is of crops of `image`"):
            views.make_views(batch(), spec, 0, 0, views.Epoch(0, 12))


def test_another_picture_takes_the_place_of_one_that_may_not_be_shown():
    data = type("Made", (StripesModule,), {"train": Stripes(11)})(config())
    data.setup()
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, training=True, num_devices=1)
    plain = [int(i) for _, b in zip(range(6), data.train_dataloader(), strict=False) for i in b["index"]]
    data.usable = np.isin(np.arange(11), [2, 5])
    runs = [
        [int(i) for _, b in zip(range(6), data.train_dataloader(), strict=False) for i in b["index"]] for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert set(runs[0]) == {2, 5}
    assert all(new == old for new, old in zip(runs[0], plain, strict=True) if old in (2, 5))


def meeting(tries: int = 100, share: float = 0.04, **more) -> dict[str, ViewSpec]:
    rule = Meeting(("large",), share=share, tries=tries, **more)
    return {"large": ViewSpec(geometric=CROP), "small": ViewSpec(geometric=CROP, meets=rule)}


def apart(made) -> torch.Tensor:
    rule = Meeting(("large",), share=0.04)
    return ~covering.meets(made["small.params"], [made["large.params"]], rule)


def test_a_view_is_drawn_until_it_meets_another():
    free = views.make_views(batch(), {name: ViewSpec(geometric=CROP) for name in ("large", "small")}, 0, 3)
    made = views.make_views(batch(), meeting(), 0, 3)
    assert apart(free).any()
    assert not apart(free).all()
    assert not apart(made).any()
    assert torch.equal(made["large.params"].boxes, free["large.params"].boxes)  # it alone is drawn anew
    kept = (made["small.params"].boxes == free["small.params"].boxes).all(1)
    assert torch.equal(kept, ~apart(free))


def test_a_view_that_meets_nothing_is_whole_or_stays():
    whole = views.make_views(batch(), meeting(tries=1), 0, 3)
    free = views.make_views(batch(), meeting(tries=1, whole=False), 0, 3)
    rows = apart(free)
    assert (whole["small.params"].boxes[rows] == torch.tensor([0.0, 0, 32, 32])).all()
    assert torch.equal(whole["small.params"].boxes[~rows], free["small.params"].boxes[~rows])
    half = views.make_views(batch(), meeting(share=0.5, of_own=True), 0, 3)  # of its own area, which is 0.3 at most
    assert not (half["small.params"].boxes[:, 2] == 32).any()


def _meeting_parts(rank: int) -> dict[str, torch.Tensor]:
    own = {name: value.chunk(2)[rank] for name, value in batch().items()}
    return {"small": views.make_views(own, meeting(), 0, 5)["small"]}


@pytest.mark.ddp
def test_two_ranks_see_the_meeting_crops_of_one():
    whole = views.make_views(batch(), meeting(), 0, 5)
    assert torch.equal(torch.cat([part["small"] for part in on_two_ranks(_meeting_parts)]), whole["small"])


def test_meetings_are_refused():
    rule = Meeting(("later",))
    for specs_, line in (
        ({"a": ViewSpec(geometric=CROP, meets=rule)}, "view 'a': 'later', which it has to meet, must be a view that"),
        ({"later": ViewSpec(), "a": ViewSpec(geometric=CROP, meets=rule)}, "view 'later': a meeting is of crops of"),
        (
            {"later": ViewSpec(geometric=CROP, cover=Cover()), "a": ViewSpec(geometric=CROP, meets=rule)},
            "view 'later': a view that others have to meet, or that has to meet others, has no cover",
        ),
    ):
        with pytest.raises(ConfigError, match=line):
            views.make_views(batch(), specs_, 0, 0)
