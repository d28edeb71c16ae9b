"""Region maps: files of a folder, the cache and its fingerprint, and the geometry that they go through."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ConfigError, DataError
from common.spec import Geometric, RegionSpec, ViewSpec
from datamodules.base import regions, transforms, views
from datamodules.base.dataset import Collate, PictureDataset
from datamodules.base.transforms import Geometry
from datamodules.files.reading import UnreadableError


class Places:
    """Pictures whose colours tell the place: red is the row, green the column, so a map can be checked anywhere."""

    sizes = ((40, 60), (60, 40), (50, 50))

    def __len__(self) -> int:
        return len(self.sizes)

    def id(self, index: int) -> str:
        return f"tree/p{index}.jpg"

    def fingerprint(self) -> str:
        return "places"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.mgrid[: self.sizes[index][0], : self.sizes[index][1]]
        image = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
        return image, (rows % 7).astype(np.uint8)


def codes(image: np.ndarray) -> np.ndarray:
    """row * 1000 + column of every pixel, as its colour says."""
    return image[..., 0].astype(np.int32) * 1000 + image[..., 1]


def by_colour(image: np.ndarray, spec: RegionSpec) -> np.ndarray:
    return codes(image)


def plan(folder, **spec) -> regions.RegionPlan:
    return regions.RegionPlan("places-train", Places(), RegionSpec(**spec), by_colour, folder)


@pytest.mark.parametrize("crop", ["random", "center", "five", "none"])
@pytest.mark.parametrize("labels", [True, False])
def test_regions_go_through_the_geometry_of_the_picture(crop, labels, tmp_path):
    """Nearest for both, so that every pixel's region still names the place that its colour names; mirrored too."""
    size = (24, 24) if crop == "none" else 24
    geometry = Geometry(size, crop, "nearest", flip_p=0.5)
    files = regions.provide(plan(tmp_path))
    data = PictureDataset(Places(), geometry, labels, 0, "train", flip=True, cache=1.0, regions=files)
    mirrored = 0
    for number in range(3):  # later passes read what was kept
        for index in range(len(data)):
            item = data[number, index]
            assert item.error is None
            assert item.regions.dtype == np.int32
            assert np.array_equal(item.regions, codes(item.image))
            assert (item.label is not None) == labels
            if labels:
                assert np.array_equal(item.label, item.image[..., 0] % 7)
            mirrored += item.image[0, 0, 1] > item.image[0, -1, 1]
    assert 0 < mirrored < 3 * len(data)
    assert data.kept_maps


def test_padding_of_a_batch_is_outside(tmp_path):
    files = regions.provide(plan(tmp_path))
    data = PictureDataset(Places(), Geometry(24, "keep", "nearest"), False, 0, "train", regions=files)
    batch = Collate(16)([data[0], data[1]])
    assert batch["regions"].dtype == torch.int64
    assert batch["regions"].shape == batch["valid"].shape == (2, 48, 48)
    assert torch.equal(batch["regions"] == -1, ~batch["valid"])


@pytest.mark.parametrize(
    "geometric",
    [Geometric(size=20, scale=(0.3, 0.6)), Geometric(size=28, zoom=(0.4, 1.3)), Geometric(zoom=(0.5, 0.9), flip_p=1.0)],
)
def test_regions_go_through_the_geometry_of_a_view(geometric):
    """Every cell of the view's region map names the place that its position maps back to, or -1 beyond the picture."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    ids = (rows * 1000 + columns).expand(6, 32, 32)
    batch = {"image": torch.rand(6, 3, 32, 32), "valid": torch.ones(6, 32, 32, dtype=torch.bool), "regions": ids}
    views.make_views(batch, {"view": ViewSpec(geometric=geometric)}, seed=0, step=0)
    found, params = batch["view.regions"], batch["view.params"]
    y, x = transforms._positions(params, (1.0, 1.0), params.size)
    inside = ((y >= 0) & (y < 32))[:, :, None] & ((x >= 0) & (x < 32))[:, None, :]
    expected = y.floor().long()[:, :, None] * 1000 + x.floor().long()[:, None, :]
    assert torch.equal(found, expected.where(inside, -1))
    assert torch.equal(found == -1, ~batch["view.valid"])
    assert (geometric.zoom is not None) == bool((found == -1).any())
    if geometric.zoom == (0.4, 1.3):  # some windows lie inside the picture, others reach beyond it
        beyond = (found == -1).flatten(1).any(1)
        assert beyond.any()
        assert not beyond.all()


def test_a_zoomed_window_is_the_scaled_picture():
    """At factor 1 the window is a crop to the pixel; at 1/2 the picture fills the upper left quarter."""
    draw = np.random.default_rng(0)
    same = transforms.draw_geometry(Geometric(size=20, zoom=(1.0, 1.0), flip_p=0), 4, (32, 32), draw)
    assert torch.allclose(same.boxes[:, 2:], torch.full((4, 2), 20.0))
    assert (same.boxes[:, :2] >= 0).all()
    assert (same.boxes[:, :2] <= 12).all()
    half = transforms.draw_geometry(Geometric(size=32, zoom=(0.5, 0.5), flip_p=0), 4, (32, 32), draw)
    assert torch.equal(half.boxes, torch.tensor([0.0, 0.0, 64.0, 64.0]).expand(4, 4))


def test_regions_are_computed_once(tmp_path, monkeypatch):
    first = regions.provide(plan(tmp_path))
    assert [first.read(i, size).shape for i, size in enumerate(Places.sizes)] == list(Places.sizes)
    times = [file.stat().st_mtime_ns for file in tmp_path.glob("*/*/*.png")]
    monkeypatch.setattr(Places, "read", lambda *_: pytest.fail("read a picture again"))
    again = regions.provide(plan(tmp_path))
    assert again.files == first.files
    assert [file.stat().st_mtime_ns for file in tmp_path.glob("*/*/*.png")] == times


def test_a_build_that_was_killed_goes_on(tmp_path):
    """Only what is missing is computed; the folder counts as finished at the end alone."""
    made = plan(tmp_path)
    for number, _ in enumerate(regions._build(made, made.path, range(3))):
        if number == 1:
            break
    assert not (made.path / regions.FINISHED).exists()
    assert len(list(made.path.glob("*/*.png"))) == 2
    seen = []
    counting = dataclasses.replace(made, segment=lambda image, spec: seen.append(1) or by_colour(image, spec))
    regions.provide(counting)
    assert len(seen) == 1
    assert (made.path / regions.FINISHED).exists()


def test_the_fingerprint_changes_with_settings_and_pictures(tmp_path, monkeypatch):
    found = {plan(tmp_path).fingerprint, plan(tmp_path, most=7).fingerprint, plan(tmp_path, source="slic").fingerprint}
    found.add(dataclasses.replace(plan(tmp_path), name="others-train").fingerprint)
    with monkeypatch.context() as patch:
        patch.setattr(Places, "fingerprint", lambda _: "touched")
        found.add(plan(tmp_path).fingerprint)
    with monkeypatch.context() as patch:
        patch.setattr(Places, "id", lambda _, index: f"q{index}")
        found.add(plan(tmp_path).fingerprint)
    assert len(found) == 6
    assert plan(tmp_path).fingerprint in found


def test_a_picture_that_cannot_be_read_has_no_regions(tmp_path, monkeypatch):
    read = Places.read

    def broken(self, index):
        if index == 1:
            raise UnreadableError("p1", "cut")
        return read(self, index)

    monkeypatch.setattr(Places, "read", broken)
    files = regions.provide(plan(tmp_path))
    assert len(list(tmp_path.glob("*/*/*.png"))) == 2
    data = PictureDataset(Places(), Geometry(24), False, 0, "train", replace_broken=True, regions=files)
    item = data[0, 1]
    assert item.index != 1
    assert [file for file, _ in item.broken] == ["p1"]


@pytest.fixture
def folder(tmp_path):
    for index, size in enumerate(Places.sizes):
        path = tmp_path / "tree" / f"p{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((np.arange(size[0] * size[1]) % 300).reshape(size).astype(np.uint16)).save(path)
    return tmp_path


def test_files_of_a_folder_are_found_by_the_names_of_the_pictures(folder):
    files = regions.given(Places(), folder)
    assert np.array_equal(files.read(0, (40, 60)), np.arange(2400).reshape(40, 60) % 300)
    with pytest.raises(DataError) as caught:
        files.read(1, (40, 60))
    assert str(caught.value) == (
        f"{folder}/tree/p1.png: this region map is 60 x 40 pixels and its picture 40 x 60; make it again from the "
        "picture as it is"
    )


def test_missing_and_coloured_region_files_end_in_one_line(folder):
    Image.new("RGB", (60, 40), (1, 2, 3)).save(folder / "tree" / "p0.png")
    with pytest.raises(DataError) as caught:
        regions.given(Places(), folder).read(0, (40, 60))
    assert str(caught.value) == (
        f"{folder}/tree/p0.png: a region file holds one region id per pixel, but this is a picture of mode RGB; save "
        "the ids as a grey or palette png of 8 or 16 bit"
    )
    (folder / "tree" / "p2.png").unlink()
    with pytest.raises(DataError) as caught:
        regions.given(Places(), folder)
    assert str(caught.value) == (
        f"method.regions.root={folder}: picture 'tree/p2.jpg' has no region file; expected {folder}/tree/p2.png, a "
        "grey png of region ids as large as the picture"
    )
    with pytest.raises(DataError, match=r"none: there is no such folder"):
        regions.given(Places(), folder / "none")


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        regions.provide(plan(tmp_path / "file"))
    assert str(caught.value) == (
        f"cache.dir={tmp_path}/file: region files cannot be written (Not a directory); name a folder on a "
        "disk with room"
    )
