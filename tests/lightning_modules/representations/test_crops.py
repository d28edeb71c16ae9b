"""Crops that meet, what two of them share, and cuts that show the same part of the picture."""

import torch

from common.spec import Geometric, Photometric, ViewSpec
from datamodules.base.views import make_views
from lightning_modules.representations.crops import crop_boxes, cut, local_names, multi_crop, shared_boxes

CROPS = {
    "global_size": 48, "global_scale": [0.25, 1.0], "local_count": 3, "local_size": 24, "local_scale": [0.05, 0.25],
}  # fmt: skip


class Settings(dict):
    __getattr__ = dict.__getitem__


def coordinates(count: int = 16, height: int = 64, width: int = 96) -> dict[str, torch.Tensor]:
    """Pictures whose colours say where they are, so that two cuts can be compared."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    image = torch.stack(torch.broadcast_tensors(x[None] / width, y[:, None] / height, torch.zeros(height, width)))
    return {"image": image.expand(count, 3, height, width).clone()}


def plain(crops: Settings, flip_p: float = 0.0) -> dict[str, ViewSpec]:
    views = multi_crop(crops, Photometric())
    turned = {name: Geometric(v.geometric.size, v.geometric.scale, flip_p=flip_p) for name, v in views.items()}
    return {name: ViewSpec(geometric=turned[name], meets=view.meets) for name, view in views.items()}


def test_views_are_large_and_small_crops_that_meet():
    views = multi_crop(Settings(CROPS, overlap=0.01), Photometric(hue=0.2))
    assert list(views) == ["global0", "global1", *local_names(3)]
    assert [view.geometric.size for view in views.values()] == [48, 48, 24, 24, 24]
    assert all(view.photometric.hue == 0.2 and view.geometric.flip_p == 0 for view in views.values())
    made = make_views(coordinates(64), plain(Settings(CROPS, overlap=0.02)), 0, 0)
    boxes, _ = crop_boxes([made[f"{name}.params"] for name in views])
    shared = shared_boxes(boxes, boxes[0, :, 2:] - boxes[0, :, :2])
    one, two = boxes[:, :, None], boxes[:, None]
    sides = torch.minimum(one[..., 2:], two[..., 2:]) - torch.maximum(one[..., :2], two[..., :2])
    area = sides.clamp(min=0).prod(-1) / (64 * 96)
    assert (area[:, 0, 1] > 0.04).all()
    assert (area[:, :2, 2:] > 0.02).all()
    free = {name: ViewSpec(geometric=view.geometric) for name, view in views.items()}
    loose, _ = crop_boxes([make_views(coordinates(64), free, 0, 0)[f"{name}.params"] for name in views])
    assert torch.equal(loose[:, 0], boxes[:, 0])  # the first is drawn as any other crop
    assert 0 < (loose != boxes).any(-1).sum() < boxes[..., 0].numel()
    assert shared.shape == (64, 5, 5, 4)


def test_cuts_of_two_views_show_the_same_part():
    for flip_p in (0.0, 0.5):
        made = make_views(coordinates(), plain(Settings(CROPS, overlap=0.02), flip_p), 3, 1)
        names = ["global0", "global1", *local_names(3)]
        boxes, mirrored = crop_boxes([made[f"{name}.params"] for name in names])
        assert bool(mirrored.any()) == (flip_p > 0)
        sizes = torch.tensor([[48.0, 48]] * 2 + [[24.0, 24]] * 3)
        shared = shared_boxes(boxes, sizes, mirrored)
        for u in range(1, 5):
            one = cut(made[names[0]], shared[:, 0, [u]], 7, mirrored[:, [0]])[:, 0]
            two = cut(made[names[u]], shared[:, u, [0]], 7, mirrored[:, [u]])[:, 0]
            gap = (one - two).abs()
            assert gap.max() < 0.03  # crops repeat their border pixels, so the outer cells differ a little
            assert gap.mean() < 0.003


def test_a_view_shares_all_of_itself_and_views_apart_give_zeros():
    boxes = torch.tensor([[[0.0, 0, 4, 4], [6, 6, 8, 8]]])
    shared = shared_boxes(boxes, torch.tensor([[8.0, 8], [5, 5]]))
    assert shared[0, 0, 0].tolist() == [0, 0, 8, 8]
    assert shared[0, 1, 1].tolist() == [0, 0, 5, 5]
    assert (shared[0, 0, 1, 2:] < shared[0, 0, 1, :2]).all()
    maps = torch.rand(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(cut(maps, shared[:, 0, [0]], 8)[0, 0], maps[0])
    apart = cut(maps, shared[:, 0, [1]], 4)
    assert not apart.any()
    apart.sum().backward()
    assert not maps.grad.any()


def test_cuts_are_float32_under_autocast():
    maps = torch.rand(2, 3, 6, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cut(maps, torch.tensor([[[0.0, 0, 6, 6]]] * 2), 3).dtype == torch.float32


def test_boxes_of_negative_extent_give_zeros_however_far_apart_the_crops_are():
    boxes = torch.tensor([[[8.0, 0.0, 4.0, 4.0], [0.0, 3.0, 4.0, -9.0], [7.0, 9.0, -3.0, -2.0], [2.1, 0.0, 2.0, 4.0]]])
    assert torch.equal(cut(torch.ones(1, 2, 4, 4), boxes, 4), torch.zeros(1, 4, 2, 4, 4))
