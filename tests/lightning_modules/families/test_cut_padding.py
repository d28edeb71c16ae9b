"""Pictures of several sizes in a batch: a graph cut is of the picture alone, whatever it is padded to."""

import pytest
import torch

from datamodules.base.dataset import Collate, Item
from lightning_modules.base.extents import own_extents
from lightning_modules.families.graph_cuts import patch_features
from tests.lightning_modules.families.test_graph_cuts import built

SIZES = [(40, 64), (61, 35), (40, 64), (72, 56)]


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Pictures with a red square on noise."""
    draw, found = torch.Generator().manual_seed(0), []
    for number, (height, width) in enumerate(SIZES):
        image = torch.rand(height, width, 3, generator=draw) * 80
        image[8:28, 10 : 26 + number, 0] += 150
        label = torch.zeros(height, width, dtype=torch.int64)
        found.append(Item(image.byte().numpy(), label.numpy(), index=number, id=str(number), size=(height, width)))
    return found


def test_extents_are_whole_patches_of_each_size(items):
    batch = Collate(8)(items)
    found = {extent.valid: (extent.rows, extent.seen) for extent in own_extents(batch["valid"], 8)}
    assert found == {(40, 64): ((0, 2), (40, 64)), (61, 35): ((1,), (64, 40)), (72, 56): ((3,), (72, 56))}
    assert [extent.seen for extent in own_extents(batch["valid"], 1)] == [(40, 64), (61, 35), (72, 56)]


@pytest.mark.parametrize("method", ["tokencut", "deep_spectral"])
def test_objects_do_not_depend_on_the_batch(method, items):
    words = ["method.segments.mode=single", "method.background=true"] if method == "deep_spectral" else []
    model = built(method, *words)
    batch = Collate(8)(items)
    masks, boxes = model.objects_inside(batch["image"], batch["valid"])
    assert masks.shape == batch["valid"].shape
    assert not (masks & ~batch["valid"]).any()
    for row, item in enumerate(items):
        alone = Collate(8)([item])
        mask, box = model.objects_inside(alone["image"], alone["valid"])
        height, width = item.size
        assert torch.equal(masks[row, :height, :width], mask[0, :height, :width])
        assert torch.equal(boxes[row], box[0])
        assert (box[0] <= torch.tensor([width, height, width, height])).all()
        assert mask.any()


@pytest.mark.parametrize("kind", ["deep", "colour"])
def test_classes_of_regions_do_not_depend_on_the_batch(kind, items):
    model = built("normalized_cut", f"method.graph.kind={kind}", "method.regions.vectors=mean")
    with torch.no_grad():
        batch = Collate(8)(items)
        if kind == "colour":
            picks = torch.tensor([[1.0, 0.3, 0.3], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
        else:
            picks = patch_features(model.backbone, batch["image"], "levels")[0].flatten(1).T[::10]
        picks = picks[: len(model.region_centroids)]
        model.region_centroids.copy_(torch.nn.functional.normalize(picks, dim=1))
        together, classes = enlarged(model, batch), set()
        for row, item in enumerate(items):
            alone, (height, width) = Collate(8)([item]), item.size
            own = enlarged(model, alone)[0]
            assert torch.equal(together[row, :, :height, :width], own[:, :height, :width])
            classes |= set(own.argmax(0).unique().tolist())
    assert len(classes) > 1


def enlarged(model, batch) -> torch.Tensor:
    scores = model.scores(model.features_of(batch))
    return torch.nn.functional.interpolate(scores, batch["image"].shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("words", [["graph.scale=2"], ["graph.scale=3"], ["graph.kind=colour", "graph.scale=2"]])
def test_boxes_lie_around_the_object_at_any_scale(words):
    model = built(
        "deep_spectral", "method.segments.mode=single", "method.background=true", *(f"method.{word}" for word in words)
    )
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 0.3
    images[:, :, 8:32, 16:40] += 0.6
    masks, boxes = model.objects(images)
    height, width = 48 / masks.shape[1], 64 / masks.shape[2]
    assert masks.shape[1:] == (
        (6, 8) if "graph.kind=colour" in words else (6 * int(words[0][-1]), 8 * int(words[0][-1]))
    )
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        inside = mask[round(top / height) : round(bottom / height), round(left / width) : round(right / width)]
        assert inside.any(0).all() or inside.any(1).all()
        for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert side.any()  # the box is tight around a component
