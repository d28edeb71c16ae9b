"""Views: records to label maps, by hand-made cases."""

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base.dataset import Collate, PictureDataset
from datamodules.base.transforms import Geometry
from engine.stages.panels import cell, painted
from pseudo_labels.cache import Place, Record, Records, summary, write_shard
from pseudo_labels.views import Certain, Painted, Saliency, Segments, Soft, Strongest, confident, enlarged, paint


def records(folder, *found: dict, drop: str = "") -> Records:
    made = [Record(i, f"p{i}", (4, 4), (2, 2), fields=fields) for i, fields in enumerate(found)]
    made[-1].drop = drop
    place = Place(folder, "step", {})
    write_shard(place.shard(0), made)
    place.finish(summary(place, len(made), len(made), None))
    return Records(place)


def test_segments_take_the_cluster_of_their_region_shifted_by_one(tmp_path):
    maps = [np.array([[0, 1], [2, 3]], np.int16), np.array([[0, 0], [4, 4]], np.int16), np.zeros((2, 2), np.int16)]
    names = [np.array([1, 2], np.int16), np.array([4], np.int16), np.zeros(0, np.int16)]
    found = records(tmp_path, *({"segments": m, "names": n} for m, n in zip(maps, names, strict=True)))
    view = Segments(found, np.array([0, 5, -1]))
    assert view.read(0, (2, 2)).tolist() == [[0, 1], [6, 0]]  # cluster 0 is not the background; 3 was not clustered
    assert view.read(1, (2, 2)).tolist() == [[0, 0], [255, 255]]
    assert view.read(2, (2, 2)).tolist() == [[0, 0], [0, 0]]
    assert view.read(0, (4, 4)).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [6, 6, 0, 0], [6, 6, 0, 0]]


def test_without_background_ids_are_clusters(tmp_path):
    maps = {"segments": np.array([[0, 1], [2, 2]], np.int16), "names": np.array([0, 1, 2], np.int16)}
    assert Segments(records(tmp_path, maps), np.array([3, 0, 1]), background=False).read(0, (2, 2)).tolist() == [
        [3, 0],
        [1, 1],
    ]


def test_a_dropped_picture_has_no_label(tmp_path):
    fields = {"segments": np.zeros((2, 2), np.int16), "names": np.zeros(0, np.int16)}
    view = Segments(records(tmp_path, fields, fields, drop="not_core"), np.zeros(0))
    assert (view.read(0, (3, 3)) == 0).all()
    assert (view.read(1, (3, 3)) == 255).all()


MASKS = np.array([[[1, 1], [0, 0]], [[0, 1], [0, 1]], [[0, 0], [1, 1]]], bool)
"""The second overlaps both others."""


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        ("skip", [[3, 3], [9, 9]]),
        ("free_pixels", [[3, 3], [9, 6]]),
        ("overwrite", [[3, 6], [9, 9]]),
        ("released", [[3, 3], [0, 0]]),
    ],
)
def test_masks_are_painted_by_falling_score(tmp_path, overlap, expected):
    fields = {"masks": MASKS, "scores": np.array([0.9, 0.8, 0.7], np.float32), "classes": np.array([2, 5, 8], np.int16)}
    assert Painted(records(tmp_path, fields), overlap=overlap).read(0, (2, 2)).tolist() == expected


def test_masks_of_several_sizes_and_a_dropped_picture(tmp_path):
    wide = np.ones((1, 2, 3), bool)
    found = records(tmp_path, {"masks": MASKS[:2]}, {"masks": wide}, {"masks": wide}, {"masks": wide}, drop="failed")
    view = Painted(found, np.array([0, 1, 4, 2]), overlap="free_pixels")
    assert [view.read(i, (2, 3)).max() for i in range(4)] == [2, 5, 3, 255]


def test_free_pixels_and_classes_of_a_table(tmp_path):
    fields = {"masks": MASKS[:2], "scores": np.array([0.1, 0.2], np.float32)}
    found = records(tmp_path, fields, fields)
    view = Painted(found, np.array([0, 1, -1, 3]), overlap="free_pixels")
    assert view.read(0, (2, 2)).tolist() == [[1, 2], [0, 2]]
    assert view.read(1, (2, 2)).tolist() == [[0, 4], [0, 4]]
    with pytest.raises(ConfigError, match=r"^overlap=all: not one of skip, free_pixels, overwrite, released$"):
        Painted(found, overlap="all")


def test_released_masks_look_at_the_first_rows_alone():
    low = np.zeros((3, 4, 2), bool)
    low[0, 2:], low[1, 3:], low[2, 0] = True, True, True
    assert paint(low, [0, 1, 2], "released").tolist() == [[3, 3], [0, 0], [1, 1], [2, 2]]
    assert paint(low[[2, 0]], [0, 1], "released").tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert paint(low[[1, 0]], [-1, 1], "skip").tolist() == [[0, 0], [0, 0], [2, 2], [2, 2]]


def test_masks_are_believed_from_a_score_on_or_the_surest_alone(tmp_path):
    scores = np.array([0.5, 0.95, 0.9, 0.7])
    assert confident(scores, 0.9).tolist() == [1, 2]
    assert confident(scores, 0.99).tolist() == [1]
    assert confident(scores[:0], 0.9).tolist() == []
    fields = {"masks": MASKS, "scores": np.array([0.4, 0.2, 0.6], np.float32), "classes": np.array([2, 5, 8], np.int16)}
    assert Painted(records(tmp_path, fields), threshold=0.5).read(0, (2, 2)).tolist() == [[0, 0], [9, 9]]


def test_masks_without_a_class_have_no_label_and_alone_hide_the_picture(tmp_path):
    fields = {"masks": MASKS, "scores": np.array([0.9, 0.8, 0.7], np.float32)}
    found = records(tmp_path, fields, fields, fields)
    view = Certain(found, np.array([1, -1, -1, -1, -1, -1, -1, 3, 1]), overlap="free_pixels")
    assert view.read(0, (2, 2)).tolist() == [[2, 2], [255, 255]]
    assert (view.read(1, (2, 2)) == 255).all()
    assert view.read(2, (2, 2)).tolist() == [[255, 4], [2, 4]]


def test_saliency_and_soft_maps(tmp_path):
    soft = np.array([[[0.1, 0.9], [0.2, 0.4]], [[0.3, 0.9], [0.1, 0.4]]], np.float16)
    found = records(tmp_path, *[{"masks": MASKS[:1], "class_map": soft}] * 2)
    assert Saliency(found, {0: 4}).read(0, (2, 2)).tolist() == [[5, 5], [0, 0]]
    assert (Saliency(found, {0: 4}).read(1, (2, 2)) == 255).all()
    assert Saliency(found).read(1, (2, 2)).tolist() == [[1, 1], [0, 0]]
    assert Soft(found).read(0, (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert Soft(found, background=0.25).read(0, (2, 2)).tolist() == [[2, 1], [0, 1]]


def test_the_strongest_concepts_in_their_own_colours(tmp_path):
    soft = np.array([[[0.0, 0.0], [0.0, 0.5]], [[1.0, 0.5], [0.0, 0.0]], [[0.1, 0.1], [0.1, 0.1]]], np.float16)
    found = records(tmp_path, *[{"class_map": soft}] * 2, drop="failed")
    first, last = Strongest(found, 0), Strongest(found, 7)  # fewer concepts than ranks: the weakest
    assert first.read(0, (2, 2)).tolist() == [[255, 128], [0, 0]]
    assert last.concept(found.read(0, ["class_map"])) == 2
    assert not last.read(0, (2, 2)).any()  # the same everywhere
    shown = cell(first, 0, (2, 2))
    assert shown[0, 0].tolist() == list(default_palette(3)[1])
    assert not shown[1].any()
    assert not cell(first, 1, (2, 2)).any()


def test_concepts_of_many_places_come_before_large_ones(tmp_path):
    soft = np.array([[[0.8, 0.8], [0.8, 0.8]], [[0.9, 0.0], [0.0, 0.0]], [[0.0, 0.9], [0.9, 0.9]]], np.float16)
    record = records(tmp_path, {"class_map": soft}).read(0, ["class_map"])
    assert [Strongest(None, rank).concept(record) for rank in range(3)] == [2, 1, 0]


def test_truth_in_the_colours_of_the_data_set():
    meta = ClassMeta(("a", "b"), ((10, 20, 30), (40, 50, 60)))
    assert painted(np.array([[1, 255], [0, 9]]), meta).tolist() == [
        [[40, 50, 60], [24, 24, 28]],
        [[10, 20, 30], [24, 24, 28]],
    ]


def test_maps_of_a_part_of_the_picture():
    ids = np.array([[1, 2], [3, 4]])
    assert enlarged(ids, (4, 5), (1.0, 0.8)).tolist() == [[1, 1, 2, 2, 2]] * 2 + [[3, 3, 4, 4, 4]] * 2
    assert enlarged(ids, (2, 3), (1.0, 4 / 3)).tolist() == [[1, 1, 2], [3, 3, 4]]  # the network saw a padded column


class Places:
    """The red of a pixel is its row, the green its column."""

    def __len__(self) -> int:
        return 1

    def id(self, index: int) -> str:
        return "p"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.mgrid[:40, :60]
        return np.stack([rows, columns, 0 * rows], -1).astype(np.uint8), (rows % 7).astype(np.uint8)


class ByRow:
    def read(self, picture, size):
        return np.repeat(np.arange(size[0], dtype=np.int32)[:, None], size[1], 1)


@pytest.mark.parametrize("labels", [True, False])
def test_a_view_goes_through_the_geometry_of_its_picture(labels):
    data = PictureDataset(
        Places(), Geometry(24, "random", "nearest", flip_p=1.0), labels, 0, "t", flip=True, pseudo=ByRow()
    )
    item = data[0, 0]
    assert np.array_equal(item.pseudo, item.image[..., 0])
    batch = Collate(16)([item])
    assert (batch["pseudo"].dtype, tuple(batch["pseudo"].shape)) == (torch.int64, (1, 32, 32))
    assert torch.equal(batch["pseudo"] == 255, ~batch["valid"])
    assert ("label" in batch) == labels
