"""Pictures: what stands at which pixel, in which colour."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.palette import default_palette
from common.spec import ClassMeta
from evaluation import matching
from reporting import panels

META = ClassMeta(("sky", "road", "tree"), ((10, 20, 200), (90, 90, 90), (20, 160, 30)))


def halves(left, right, height=6, width=8):
    ids = torch.full((height, width), left)
    ids[:, width // 2 :] = right
    return ids


def colours_of(path) -> set[tuple[int, int, int]]:
    return {colour for _, colour in Image.open(path).convert("RGB").getcolors(1 << 24)}


def test_clusters_take_the_colour_of_their_class(tmp_path):
    row = panels.Row(torch.zeros(3, 6, 8), {"cluster": halves(3, 1), "linear": halves(0, 0)}, halves(1, 255), "first")
    mapping = np.array([0, -1, 1, 2])
    panels.save(tmp_path / "panel.png", [row], META, {"cluster": mapping}, cell=80)
    picture = np.array(Image.open(tmp_path / "panel.png"))
    assert picture.shape[1] == 4 * (80 + panels.GAP) + panels.GAP
    top = panels.GAP + 28 + 5
    columns = [panels.GAP + i * (80 + panels.GAP) for i in range(4)]
    assert picture[top, columns[0] + 40].tolist() == [0, 0, 0]
    assert picture[top, columns[1] + 5].tolist() == list(META.palette[1])  # truth
    assert picture[top, columns[1] + 75].tolist() == list(panels.VOID)  # 255: not labelled
    assert picture[top, columns[2] + 5].tolist() == list(META.palette[2])  # cluster 3 -> tree
    assert picture[top, columns[2] + 75].tolist() == panels.greyish(4)[1].tolist()  # cluster 1 is unmatched
    assert picture[top, columns[3] + 5].tolist() == list(META.palette[0])  # class ids as they are


def test_errors_are_red_confidence_has_a_scale_and_both_are_in_the_legend(tmp_path):
    truth, ids = halves(1, 255), halves(3, 3)
    truth[3:, :4], ids[:, 0] = 2, 1  # cluster 3 is a tree: wrong on the road above; cluster 1 is no class
    image = np.full((6, 8, 3), 100, dtype=np.uint8)
    drawn = panels.errors(image, ids, truth, np.array([0, -1, 1, 2]))
    assert drawn.shape == (6, 8, 3)
    assert drawn[3, 1].tolist() == [170] * 3  # right: the picture in light grey
    red = (0.2 * 170 + 0.8 * np.array(panels.WRONG)).round().tolist()
    assert drawn[0, 1].tolist() == drawn[3, 0].tolist() == red
    assert (drawn[:, 4:] < 60).all()  # not labelled
    shades = panels.confidence(torch.linspace(-0.5, 1, 48).reshape(6, 8))
    low, _, high = panels.CONFIDENCE_MARKS.values()
    assert shades[0, 0].tolist() == list(low)
    assert shades[5, 7].tolist() == list(high)
    row = panels.Row(image, {"confidence": shades, "errors": drawn}, truth)
    marks = panels.CONFIDENCE_MARKS | {"wrong": panels.WRONG}
    panels.save(tmp_path / "panel.png", [row], META, cell=80, marks=marks)
    assert Image.open(tmp_path / "panel.png").width == 4 * (80 + panels.GAP) + panels.GAP
    found = colours_of(tmp_path / "panel.png")
    assert {*marks.values(), tuple(int(part) for part in red), *META.palette} <= found


def test_panel_without_labels_shows_clusters_in_fixed_colours(tmp_path):
    image = np.full((6, 8, 3), 7, dtype=np.uint8)
    rows = [panels.Row(image, {"cluster": halves(0, 4)}, None, f"{i}") for i in range(2)]
    panels.save(tmp_path / "panel.png", rows, ClassMeta(), {"cluster": None}, cell=64)
    assert Image.open(tmp_path / "panel.png").width == 2 * (64 + panels.GAP) + panels.GAP  # no column for the truth
    palette = default_palette(5)
    assert {palette[0], palette[4], (7, 7, 7)} <= colours_of(tmp_path / "panel.png")
    assert palette[2] not in colours_of(tmp_path / "panel.png")


def test_without_labels_each_probe_has_a_legend_of_its_own_below_its_column(tmp_path):
    """Ids of two probes have nothing to do with each other: 3 stands below `cluster` alone, 1 below `kmeans`."""
    image = np.full((6, 8, 3), 7, dtype=np.uint8)
    maps = {"cluster": halves(0, 3), "kmeans": halves(1, 1), "confidence": image}
    panels.save(tmp_path / "panel.png", [panels.Row(image, maps)], ClassMeta(), {}, cell=120, marks={"mark": (1, 2, 3)})
    picture = np.array(Image.open(tmp_path / "panel.png"))
    below = picture[panels.GAP + 28 + 90 + panels.GAP :]
    columns = [slice(panels.GAP + i * 130, (i + 1) * 130) for i in range(4)]
    palette = default_palette(4)

    def shown(colour, column) -> bool:
        return bool((below[:, columns[column]] == colour).all(-1).any())

    found = [[column for column in range(4) if shown(palette[i], column)] for i in range(4)]
    assert found == [[1], [2], [], [1]]
    rows = np.nonzero((below == (1, 2, 3)).all(-1).any(1))[0]
    assert rows.min() > np.nonzero((below == palette[3]).all(-1).any(1))[0].max()  # marks of all columns come last
    assert rows.max() + 5 < len(below)


def test_a_strip_names_what_is_in_each_picture_below_it(tmp_path):
    image = np.full((6, 8, 3), 7, dtype=np.uint8)
    strips = [tuple(((i, 0, 9), f"class {i}, its share") for i in range(1, count)) for count in (6, 2)]
    rows = [panels.Row(image, {"segments": image}, None, "name", strip) for strip in strips]
    panels.save(tmp_path / "panel.png", rows, ClassMeta(), cell=120)
    picture = np.array(Image.open(tmp_path / "panel.png"))
    top = panels.GAP + 28  # first picture; 90 px high
    places = {i: np.nonzero((picture == (i, 0, 9)).all(-1).any(1))[0] for i in range(1, 6)}
    images = np.nonzero((picture == 7).all(-1).any(1))[0]
    second = images[images > top + 90].min()
    assert all(top + 90 < places[i].min() for i in range(1, 6))
    assert all(places[i].max() < second for i in range(2, 6))
    assert places[1].max() > second + 90  # in both
    assert len({places[i].min() for i in range(1, 6)}) > 1  # they are wrapped
    assert places[1].max() < len(picture) - 5


def test_rows_may_differ_in_size_and_columns(tmp_path):
    rows = [
        panels.Row(torch.rand(3, 5, 30), {"cluster": torch.zeros(5, 30)}, torch.zeros(5, 30)),
        panels.Row(torch.rand(3, 30, 5), {"linear": torch.ones(30, 5)}, None, "no truth"),
    ]
    panels.save(tmp_path / "panel.png", rows, META, cell=60, title="a title")
    height = Image.open(tmp_path / "panel.png").height
    assert height > 10 + 360 + 20  # both rows with their own height


def test_all_ignored_truth_and_long_class_lists(tmp_path):
    meta = ClassMeta(tuple(f"class {i}" for i in range(60)))
    row = panels.Row(torch.rand(3, 4, 4), {"cluster": halves(2, 59, 4, 4)}, torch.full((4, 4), 255))
    panels.save(tmp_path / "panel.png", [row], meta, {"cluster": np.arange(60)}, cell=100)
    palette = default_palette(60)
    found = colours_of(tmp_path / "panel.png")
    assert {palette[2], palette[59]} <= found
    assert palette[3] not in found  # a long legend names only what occurs


def test_index_png_holds_the_ids(tmp_path):
    ids = torch.arange(256).reshape(16, 16)
    panels.index_png(tmp_path / "ids.png", ids, default_palette(256))
    image = Image.open(tmp_path / "ids.png")
    assert image.mode == "P"
    assert np.array_equal(np.array(image), ids.numpy())
    assert tuple(np.array(image.convert("RGB"))[0, 3]) == default_palette(4)[3]
    panels.index_png(tmp_path / "large.png", ids + 500)
    assert np.array_equal(np.array(Image.open(tmp_path / "large.png")), ids.numpy() + 500)
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.65535 for a png, got -1\.\.254"):
        panels.index_png(tmp_path / "bad.png", ids - 1)


def test_overlay_mixes_colours_and_draws_outlines():
    picture = np.full((4, 6, 3), 100, dtype=np.uint8)
    ids = halves(0, 1, 4, 6)
    mixed = panels.overlay(picture, ids, [(200, 0, 0), (0, 200, 0)], alpha=0.5)
    assert mixed[0, 0].tolist() == [150, 50, 50]
    assert mixed[0, 5].tolist() == [50, 150, 50]
    assert mixed[0, 3].tolist() == [15, 185, 15]  # the border between the two, nearly opaque
    assert panels.overlay(picture, halves(0, 9, 4, 6), [(200, 0, 0)], 0.5)[0, 5].tolist() == [100, 100, 100]


def test_legend_holds_every_colour(tmp_path):
    panels.legend_png(tmp_path / "legend.png", META.names, META.palette)
    assert set(META.palette) <= colours_of(tmp_path / "legend.png")


@pytest.mark.parametrize("extra", ["drop", "merge"])
def test_confusion_figure_of_more_clusters_than_classes(tmp_path, extra):
    counts = np.array([[50, 2, 1], [3, 40, 0], [0, 0, 0], [9, 9, 1]])
    panels.confusion(tmp_path / "confusion.png", matching.score(counts, extra=extra), META)
    image = np.array(Image.open(tmp_path / "confusion.png").convert("RGB"))
    assert image.shape[0] > 300
    assert (image.std((0, 1)) > 10).all()


def test_confusion_figure_is_ordered_by_class_frequency(tmp_path, monkeypatch):
    counts = np.array([[5, 2, 0], [3, 40, 9], [0, 0, 20]])  # 8, 42 and 29 pixels
    scores = matching.score(counts)
    assert panels.confusion_order(scores) == [1, 2, 0]
    drawn = {}
    original = panels.Figure.add_subplot

    def watched(figure, *args, **kwargs):
        axes = original(figure, *args, **kwargs)
        drawn.setdefault("axes", axes)  # the colour bar comes second
        return axes

    monkeypatch.setattr(panels.Figure, "add_subplot", watched)
    panels.confusion(tmp_path / "confusion.png", scores, META)
    shown = drawn["axes"].images[0].get_array()
    assert [text.get_text() for text in drawn["axes"].get_yticklabels()] == ["road", "tree", "sky"]
    assert [text.get_text() for text in drawn["axes"].get_xticklabels()] == ["road", "tree", "sky"]
    assert np.allclose(np.diag(shown), [100 * 40 / 42, 100 * 20 / 29, 100 * 5 / 8])
    assert np.isclose(shown[1, 0], 100 * 9 / 29)  # trees that are taken for road


def test_palette():
    long = default_palette(300)
    assert long[:40] == default_palette(40)
    assert len(set(long)) == 300
    near = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(long[:27]) for b in long[:i]]
    assert min(near) >= 40
    assert all(max(colour) - min(colour) > 25 for colour in long)  # no greys
    assert default_palette(0) == ()
