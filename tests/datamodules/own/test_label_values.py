"""What people's labels hold: masks of 0 and 255, ids that begin at 1, colours, palettes, nothing at all."""

import numpy as np
import pytest
from PIL import Image

import config as configuration
from common.errors import ConfigError, DataError
from datamodules.files import reading
from datamodules.own.label_values import LabelValues, suggestion
from tests.datamodules.pictures import module, noise, refused, save, write_classes


def folder(root, labels, names=("background", "object"), val=2, ending="png", **options):
    """Pictures with these labels, the last `val` of them for validation."""
    for i, label in enumerate(labels):
        split = "train" if i < len(labels) - val else "val"
        save(root / "images" / split / f"p{i}.jpg", noise(seed=i))
        if label is not None:
            save(root / "labels" / split / f"p{i}.{ending}", label, **options)
    write_classes(root, list(names))
    return root


def mask(low: int, high: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    label = np.full((24, 32), low, dtype)
    label[4:12, 6 : 20 + seed] = high
    return label


def said(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


def ids(found, split="train", index=0) -> list[int]:
    return np.unique(found.source(split).read(index)[1]).tolist()


@pytest.mark.parametrize("low", [0, 1])
def test_masks_of_two_values_one_of_them_255(tmp_path, low, caplog):
    root = folder(tmp_path, [mask(low, 255)] * 6)
    assert refused(root) == (
        f"{root}/labels/train/p0.png: this label, as all that were looked at, holds nothing but {low} and 255, and 255 "
        f"means pixels to ignore; where it is a class here, set data.label_values='{{{low}: 0, 255: 1}}'; where it is "
        f"not, say so: data.label_values='{{{low}: {low}, 255: 255}}'"
    )
    found = module(root, label_values={low: 0, 255: 1})
    assert ids(found) == ids(found, "val") == [0, 1]
    assert said(caplog) == []
    found = module(root, label_values={low: low, 255: 255})
    assert ids(found) == [low, 255]
    only = ("background", "object")[low]
    assert said(caplog)[-1] == f"'val': all labelled pixels are of one class, {only}: no accuracy or mIoU can be given"


def test_with_one_name_both_classes_have_to_be_named(tmp_path):
    root = folder(tmp_path, [mask(0, 255)] * 6, names=["object"])
    assert (
        """set data.label_values='{0: 0, 255: 1}' and name both classes in classes.json, as ["background", "object"];"""
        in refused(root)
    )


def test_one_picture_of_one_class_is_no_such_set(tmp_path):
    assert ids(module(folder(tmp_path, [mask(0, 255)] * 5 + [mask(0, 1)]))) == [0, 255]


@pytest.mark.parametrize(
    ("values", "names", "mapping"),
    [
        ((1, 2), "ab", {1: 0, 2: 1}),
        ((10, 20, 30), "abc", {10: 0, 20: 1, 30: 2}),
        ((0, 1, 2), "ab", {1: 0, 2: 1, 0: 255}),
        ((0, 128, 255), "ab", {0: 0, 128: 1, 255: 255}),
        ((0, 127, 255), "abc", {0: 0, 127: 1, 255: 2}),
    ],
)
def test_ids_that_begin_at_one_or_leave_gaps(tmp_path, values, names, mapping):
    labels = [mask(values[i % len(values)], values[(i + 1) % len(values)]) for i in range(6)]
    root = folder(tmp_path, labels, names=list(names))
    message = refused(root)
    text = "{" + ", ".join(f"{value}: {target}" for value, target in mapping.items()) + "}"
    assert f"; name the values in data.label_values, as data.label_values='{text}', or mend the labels" in message
    found = module(root, label_values=mapping)
    assert set(ids(found)) == {mapping[value] for value in np.unique(labels[0]).tolist()}


def test_a_value_that_the_mapping_leaves_out(tmp_path):
    root = folder(tmp_path, [mask(1, 2)] * 5 + [mask(2, 9)])
    assert refused(root, label_values={1: 0, 2: 1}) == (
        f"{root}/labels/val/p5.png: the label holds the value 9, which data.label_values={{1: 0, 2: 1}} does not name; "
        "add it there, 9: 255 to ignore such pixels"
    )


def test_negative_and_large_values(tmp_path):
    label = mask(-9999, 40000, np.int32)
    root = folder(tmp_path, [label] * 6, ending="tif")
    assert ids(module(root, label_values={-9999: 255, 40000: 1})) == [1, 255]


def test_mappings_from_the_command_line_and_from_yaml():
    for text, expected in (("{0: 0, 255: 1}", {0: 0, 255: 1}), ("{-1: 255, '7': 0}", {-1: 255, 7: 0})):
        cfg = configuration.compose(["data=folder", "data.root=/pics", f"data.label_values={text}"])
        assert LabelValues(cfg.data.label_values, ("a", "b")).table == expected
        again = configuration.restore(configuration.plain(cfg))
        assert LabelValues(again.data.label_values, ("a", "b")).table == expected
    replaced = configuration.restore(configuration.plain(again), ["data.label_values={1: 0, 2: 1}"])
    assert LabelValues(replaced.data.label_values, ("a", "b")).table == {1: 0, 2: 1}
    single = configuration.compose(["data=folder", "data.root=/pics", "data.label_values.255=1"])
    assert LabelValues(single.data.label_values, ("a", "b")).table == {255: 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, 1], "data.label_values=[0, 1]: expected values and their class ids, as in data.label_values='{0: 0, "
         "255: 1}'"),
        ({0: 0, "sky": 1}, "data.label_values: sky: 1 is no whole number and its class id (0 or more, 255 for pixels "
         "to ignore), as in {0: 0, 255: 1}"),
        ({0: 0.5}, "data.label_values: 0: 0.5 is no whole number and its class id (0 or more, 255 for pixels to "
         "ignore), as in {0: 0, 255: 1}"),
        ({0: 0, 9: 2}, "data.label_values={0: 0, 9: 2}: 9 becomes class 2, but classes.json names 2; a class id must "
         "be 0..1, or 255 for pixels to ignore"),
    ],
)  # fmt: skip
def test_mappings_that_are_none(given, message):
    with pytest.raises(ConfigError) as error:
        LabelValues(given, ("a", "b"))
    assert str(error.value) == message


def test_no_telling_no_suggestion():
    assert suggestion([0, 5, 9, 200], 2) == {}
    assert suggestion([], 2) == {}


def test_the_mapping_names_what_is_kept(tmp_path):
    root = folder(tmp_path, [mask(0, 1)] * 6)
    prints = [module(root, **data).source("train").fingerprint() for data in ({}, {"label_values": {0: 1, 1: 0}})]
    assert prints[0] != prints[1]
    for values, expected in (({}, 0), ({0: 1, 1: 0}, 1), ({}, 0)):
        found = module(root, cache="disk", label_values=values)
        found.cfg = configuration.OmegaConf.create({"cache": {"dir": str(tmp_path / "cache")}})
        batch = next(iter(found.val_dataloader()))
        assert batch["label"][0, 0, 0] == expected


# ---- classes that no label shows ----


def test_a_named_class_without_a_pixel_is_said(tmp_path, caplog):
    labels = [mask(0, 1), mask(0, 1), mask(0, 2), mask(0, 1), mask(0, 1)]
    module(folder(tmp_path, labels, names=["a", "b", "c", "d"]))
    assert said(caplog) == [
        "'train': no labelled pixel of class d in the 3 labels, which hold the values 0, 1, 2; if values mean other "
        "classes, see data.label_values",
        "'val': no labelled pixel of class c, d in the 2 labels, which hold the values 0, 1; if values mean other "
        "classes, see data.label_values",
    ]


def test_large_sets_are_looked_at_in_part_and_that_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("datamodules.own.label_look.LOOKED_AT", 3)
    root = folder(tmp_path, [mask(0, 1)] * 12, names=["a", "b", "c"])
    first = [module(root) and said(caplog) for _ in range(2)]
    assert first[0] == first[1]
    assert first[0][0].startswith("'train': no labelled pixel of class c in 3 of 10 labels looked at, which hold")


def test_validation_without_labels_and_labels_of_ignore_alone(tmp_path, caplog):
    module(folder(tmp_path / "a", [mask(0, 1)] * 4 + [None, None]))
    assert said(caplog) == [
        "no picture of 'val' has a label: nothing can be scored, and the last step counts as the best"
    ]
    module(folder(tmp_path / "b", [mask(0, 1)] * 4 + [mask(255, 255)] * 2))
    assert said(caplog) == [
        "'val': every pixel of the 2 labels is ignored (255): nothing can be scored, and the last step counts as the "
        "best"
    ]


# ---- kinds of files ----


def test_ids_in_colour_files_whose_channels_are_alike(tmp_path):
    label = mask(0, 1)
    for name, array in (("rgb.png", np.dstack([label] * 3)), ("rgba.png", np.dstack([label] * 3 + [label * 0 + 255]))):
        np.testing.assert_array_equal(reading.read_label(save(tmp_path / name, array)), label)
    np.testing.assert_array_equal(reading.read_label(save(tmp_path / "f.tif", label.astype(np.float32))), label)
    for name, array in (
        ("colours.png", np.dstack([label, label, label * 0])),
        ("half.tif", label.astype(np.float32) / 2),
        ("seen.png", np.dstack([label] * 4)),
    ):
        with pytest.raises(DataError, match="a label holds one class id per pixel"):
            reading.read_label(save(tmp_path / name, array))


def palette_png(path, label, colours):
    image = Image.fromarray(label, "P")
    image.putpalette([part for colour in colours for part in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_palettes_that_differ_are_said(tmp_path, caplog):
    red, green, black = (255, 0, 0), (0, 255, 0), (0, 0, 0)
    root = folder(tmp_path, [mask(0, 1)] * 6)
    labels = sorted((root / "labels").rglob("*.png"))
    for path in labels:
        palette_png(path, mask(0, 1), [black, red, green])
    module(root)
    assert said(caplog) == []
    palette_png(labels[3], mask(0, 1), [black, red, black])  # differs where no pixel is
    module(root)
    assert said(caplog) == []
    for path in labels[3:]:
        palette_png(path, mask(0, 1), [black, green])
    module(root)
    (line,) = said(caplog)
    assert "their palettes differ (index 1 is the colour #" in line
    assert {"#ff0000", "#00ff00"} == {word for word in line.replace(")", " ").split() if word.startswith("#")}
    assert line.count(".png") == 2


def test_an_orientation_tag_on_labelled_pictures_is_said(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    root = folder(tmp_path, [mask(0, 1)] * 6)
    for path in (root / "images" / "train").iterdir():
        save(path, noise(), exif=exif)
    module(root)
    (line,) = said(caplog)
    assert line.split("/images/train/p")[1][1:] == (
        ".jpg: this picture and 3 more of 6 labelled ones looked at are turned by an orientation tag, as viewers show "
        "them; their labels must show the turned picture, or be scored wrongly"
    )
