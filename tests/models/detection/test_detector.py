"""The detector: pyramids, losses beside torchvision's own, and that it learns to find squares."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection import roi_heads
from torchvision.ops import box_iou

from common.errors import ConfigError
from models.detection.detector import Detector, masks_target, targets_of
from models.detection.heads import ScaledGradient
from models.detection.pyramid import Pyramid
from tests.models.detection.settings import settings


def square_ids(*boxes, side=64):
    ids = torch.zeros(side, side, dtype=torch.int64)
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        ids[top:bottom, left:right] = number
    return ids


def levels_of(ids, colours=(0, 0, 0, 0)):
    """What a backbone of stride 8 may say of pictures: the mean of each cell's objects, their colour, and noise."""
    shown = F.avg_pool2d((ids > 0).float()[:, None], 8)
    coloured = shown * torch.tensor(colours[: len(ids)])[:, None, None, None]
    noise = torch.randn(len(ids), 6, *shown.shape[2:], generator=torch.Generator().manual_seed(1))
    return [torch.cat([shown, coloured, 0.1 * noise], 1)]


def detector(**changed):
    torch.manual_seed(0)
    return Detector([8], [8], changed.pop("classes", 1), settings(**changed))


def test_one_stride_makes_four_scales_and_several_make_one_more():
    single = Pyramid([5, 3], [8, 8], 16)
    maps = single([torch.randn(2, 5, 8, 6), torch.randn(2, 3, 8, 6)])
    assert single.strides == [4, 8, 16, 32]
    assert [tuple(part.shape[1:]) for part in maps.values()] == [(16, 16, 12), (16, 8, 6), (16, 4, 3), (16, 2, 2)]
    several = Pyramid([12, 6], [16, 8], 16)
    maps = several([torch.randn(2, 12, 4, 4), torch.randn(2, 6, 8, 8)])
    assert several.strides == [8, 16, 32]
    assert [tuple(part.shape[1:]) for part in maps.values()] == [(16, 8, 8), (16, 4, 4), (16, 2, 2)]
    assert list(maps) == several.names


def test_levels_of_which_some_share_a_stride_are_refused():
    with pytest.raises(ConfigError, match=r"backbone\.levels: have 4, 8, 8 px per cell"):
        Pyramid([4, 8, 16], [4, 8, 8], 16)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"method\.detector\.kind=yolo: "):
        detector(kind="yolo")


def test_targets_are_made_of_a_map():
    ids = square_ids((4, 8, 20, 30), (40, 2, 50, 12))
    ids[60:] = 255
    found = targets_of(ids)
    assert found["boxes"].tolist() == [[4, 8, 20, 30], [40, 2, 50, 12]]
    assert found["labels"].tolist() == [1, 1]
    assert targets_of(ids, torch.tensor([3, 5]))["labels"].tolist() == [4, 6]
    assert torch.equal(found["masks"][1].bool(), ids == 2)
    none = targets_of(ids * 0)
    assert none["boxes"].shape == (0, 4)
    assert masks_target(torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(0))["boxes"].shape == (0, 4)


def test_head_losses_are_those_of_torchvision_without_drop_loss():
    model = detector(drop=None)
    ids = torch.stack([square_ids((4, 8, 24, 30)), square_ids((30, 20, 60, 50), (2, 2, 14, 14))])
    targets = [targets_of(one) for one in ids]
    maps = model.pyramid(levels_of(ids))
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(2, 60, 2, generator=generator) * 40
    proposals = list(torch.cat([corners, corners + 6 + 18 * torch.rand(2, 60, 2, generator=generator)], 2))
    shapes, heads = [(64, 64)] * 2, model.heads
    heads.fg_bg_sampler.keys = [(0, 0, 0), (0, 0, 1)]
    found = heads(maps, [part.clone() for part in proposals], shapes, targets)[1]
    boxes, matched, labels, aims = heads.select_training_samples([part.clone() for part in proposals], targets)
    logits, positions = heads.stages[0](heads.box_roi_pool(maps, boxes, shapes))
    wanted, _ = roi_heads.fastrcnn_loss(logits, positions.repeat(1, 2), labels, aims)
    assert found["class"].item() == pytest.approx(wanted.item(), rel=1e-5)
    inside = torch.cat(labels) > 0
    assert 0 < inside.sum() < len(inside)
    distance = (positions - torch.cat(list(aims)))[inside].abs().sum() / len(inside)
    assert found["box"].item() == pytest.approx(distance.item(), rel=1e-5)
    places = [part[own > 0] for part, own in zip(boxes, labels, strict=True)]
    masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, places, shapes)))
    index = [part[own > 0] for part, own in zip(matched, labels, strict=True)]
    ours = roi_heads.maskrcnn_loss(
        masks, places, [one["masks"] for one in targets], [one["labels"] for one in targets], index
    )
    assert found["mask"].item() == pytest.approx(ours.item(), rel=1e-5)


def test_losses_do_not_depend_on_the_rest_of_the_batch():
    ids = torch.stack([square_ids((4, 8, 24, 30)), square_ids((30, 20, 60, 50))])
    levels, model = levels_of(ids), detector()
    keys, targets = [(0, 5, 3), (0, 5, 9)], [targets_of(one) for one in ids]
    both = model.losses(levels, (64, 64), targets, keys)
    alone = [
        model.losses([part[i : i + 1] for part in levels], (64, 64), targets[i : i + 1], keys[i : i + 1])
        for i in (0, 1)
    ]
    for name in ("class", "box", "objectness", "anchor"):  # as many boxes of each picture
        assert both[name].item() == pytest.approx((alone[0][name] + alone[1][name]).item() / 2, rel=1e-4)


def test_drop_loss_spares_boxes_without_a_label():
    ids = torch.stack([square_ids((4, 4, 24, 24))])
    spared, all_of_it = (
        detector(drop=drop).losses(levels_of(ids), (64, 64), [targets_of(ids[0])], [(0, 0, 0)])["class"]
        for drop in (0.01, None)
    )
    assert 0 < spared < all_of_it


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade"])
def test_a_picture_without_objects_trains_all_weights(kind):
    model = detector(kind=kind)
    ids = torch.stack([square_ids()])
    sum(model.losses(levels_of(ids), (64, 64), [targets_of(ids[0])], [(0, 0, 0)]).values()).backward()
    assert all(value.grad is not None for value in model.parameters())
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters())


def test_a_cascade_shares_the_gradient_of_what_it_pools():
    values = torch.randn(4, requires_grad=True)
    (ScaledGradient.apply(values, 1 / 3) * torch.tensor([3.0, 6.0, 0.0, -3.0])).sum().backward()
    assert values.grad.tolist() == pytest.approx([1, 2, 0, -1])
    names = detector(kind="cascade").losses(
        levels_of(torch.stack([square_ids((4, 4, 24, 24))])), (64, 64), [targets_of(square_ids((4, 4, 24, 24)))],
        [(0, 0, 0)],
    )  # fmt: skip
    assert {"class_1", "class_2", "class_3", "box_1", "box_2", "box_3", "mask"} < set(names)


@pytest.mark.train
@pytest.mark.parametrize("kind", ["mask_rcnn", pytest.param("cascade", marks=pytest.mark.slow)])
def test_it_learns_to_find_squares_and_to_tell_them_apart(kind):
    model = detector(kind=kind, classes=2)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        corners = torch.randint(0, 32, (4, 2), generator=generator)
        sides = torch.tensor([16, 24, 24, 32])[:, None]
        ids = torch.stack([square_ids([*c.tolist(), *(c + s).tolist()]) for c, s in zip(corners, sides, strict=True)])
        targets = [targets_of(one, torch.tensor([number % 2])) for number, one in enumerate(ids)]
        levels = levels_of(ids, (0, 1, 0, 1))
        loss = sum(model.losses(levels, (64, 64), targets, [(0, step, i) for i in range(4)]).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    boxes = [[8, 24, 24, 40], [16, 8, 48, 40]]
    ids = torch.stack([square_ids(box) for box in boxes])
    for one, box, mask, kind_of in zip(model.detect(levels_of(ids, (0, 1)), (64, 64)), boxes, ids, (0, 1), strict=True):
        assert len(one.scores) <= 10
        assert (one.scores.diff() <= 0).all()
        assert float(box_iou(one.boxes[:1], torch.tensor([box]).float())) > 0.5
        assert one.classes[0] == kind_of
        inside = one.masks[0] & (mask > 0)
        assert inside.sum() / (one.masks[0] | (mask > 0)).sum() > 0.5
