"""People's own trees: names of folders in use, names that are not, labels that would be trained on, labels unpaired."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from tests.datamodules.pictures import module, noise, refused, save, write_classes


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def counts(found) -> tuple[int, int, int, int]:
    """Pictures and labels of training, pictures and labels of validation."""
    parts = [found.source(split) for split in ("train", "val")]
    return tuple(number for part in parts for number in (len(part), len(part.labelled())))


def mask(seed: int = 0) -> np.ndarray:
    label = np.zeros((24, 32), np.uint8)
    label[4 : 12 + seed, 6:20] = 1
    return label


def tree(root, images: str, labels: str, ending: str = "png", suffix: str = "", names: bool = True):
    """Four training and two validation pictures below these folders; `{}` stands for the split."""
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            save(root / images.format(split) / f"p{i}.jpg", noise(seed=i))
            save(root / labels.format(split) / f"p{i}{suffix}.{ending}", mask(i))
    if names:
        write_classes(root, ["background", "object"])
    return root


KNOWN = [
    ("images/{}", "labels/{}"),
    ("{}/images", "{}/masks"),
    ("Images/{}", "Masks/{}"),
    ("JPEGImages/{}", "SegmentationClass/{}"),
    ("imgs/{}", "masks/{}"),
    ("{}/image", "{}/label"),
    ("images/{}", "{}/labels"),
    ("{}", "{}/masks"),
    ("{}", "annotations/{}"),
]


@pytest.mark.parametrize(("images", "labels"), KNOWN)
def test_folders_by_the_names_in_use(tmp_path, images, labels):
    found = module(tree(tmp_path, images, labels))
    assert counts(found) == (4, 4, 2, 2)
    np.testing.assert_array_equal(found.source("train").read(1)[1], mask(1))


@pytest.mark.parametrize("ending", ["tif", "tiff", "bmp", "PNG"])
def test_labels_in_every_kind_that_keeps_values(tmp_path, ending):
    found = module(tree(tmp_path, "images/{}", "labels/{}", ending))
    assert counts(found) == (4, 4, 2, 2)
    np.testing.assert_array_equal(found.source("val").read(1)[1], mask(1))


def test_without_splits_and_beside_the_pictures_themselves(tmp_path):
    for root, images in ((tmp_path / "a", "JPEGImages"), (tmp_path / "b", ".")):
        for i in range(20):
            save(root / images / f"p{i}.jpg", noise(seed=i))
            save(root / "masks" / f"p{i}.png", mask())
        write_classes(root, ["background", "object"])
        assert counts(module(root)) == (18, 18, 2, 2)


def test_other_split_names(tmp_path):
    root = tree(tmp_path, "{}/images", "{}/masks")
    (root / "train").rename(root / "Training")
    (root / "val").rename(root / "valid")
    assert counts(module(root)) == (4, 4, 2, 2)


def test_labels_of_both_splits_in_one_folder(tmp_path):
    for split in ("train", "val"):
        for i in range(2):
            save(tmp_path / "images" / split / f"{split}{i}.jpg", noise(seed=i))
            save(tmp_path / "masks" / f"{split}{i}.png", mask())
    write_classes(tmp_path, ["background", "object"])
    assert counts(module(tmp_path)) == (2, 2, 2, 2)


def test_two_folders_that_could_both_be_meant(tmp_path):
    root = tree(tmp_path, "images/{}", "labels/{}")
    tree(tmp_path, "images/{}", "masks/{}")
    assert refused(root) == (
        f"data.root={root}: labels/train and masks/train could both hold the labels; name one of them, as "
        "data.labels=labels"
    )
    assert counts(module(root, labels="masks")) == (4, 4, 2, 2)
    (root / "masks").rename(root / "truth")
    assert counts(module(root)) == (4, 4, 2, 2)


UNKNOWN = [
    ("photos/{}", "truth/{}", "photos", "truth"),
    ("{}/photos", "{}/truth", "photos", "truth"),
    ("set/images/{}", "set/masks/{}", "set/images", "set/masks"),
]


@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
@pytest.mark.parametrize(("images", "labels", "image_key", "label_key"), UNKNOWN)
def test_an_unknown_layout_ends_with_the_keys_that_read_it(tmp_path, images, labels, image_key, label_key, ending):
    root = tree(tmp_path, images, labels, ending)
    message = refused(root)
    assert f"; set data.images={image_key} and data.labels={label_key}, or take the labels away" in message
    assert message.startswith(f"data.root={root}: the files of ")
    if ending == "jpg":
        assert "has lost its ids" in refused(root, images=image_key, labels=label_key)
    else:
        assert counts(module(root, images=image_key, labels=label_key)) == (4, 4, 2, 2)
    (root / "classes.json").unlink()
    alone = module(root, images=image_key, labels="none")
    assert counts(alone) == (4, 0, 2, 0)


@pytest.mark.parametrize("suffix", ["_mask", "_labelIds", "-gt", ""])
def test_labels_beside_their_pictures(tmp_path, suffix):
    for i in range(20):
        save(tmp_path / f"p{i}.jpg", noise(seed=i))
        if i % 5 == 0:
            save(tmp_path / f"p{i}{suffix}.png", mask())
    message = refused(tmp_path)
    keys = f", or set data.images=. data.labels=. data.label_suffix={suffix}" if suffix else ""
    assert message == (
        f"data.root={tmp_path}: {tmp_path}/p0{suffix}.png looks like the label of {tmp_path}/p0.jpg, and would be "
        f"taken as a picture; move the labels into a folder labels beside images{keys}"
    )
    if suffix:
        write_classes(tmp_path, ["background", "object"])
        found = module(tmp_path, images=".", labels=".", label_suffix=suffix)
        assert sum(counts(found)[::2]) == 20
        assert sum(counts(found)[1::2]) == 4


@pytest.mark.parametrize(("place", "key"), [("images/{}", "images"), ("{}", "."), ("{}/images", "images")])
def test_labels_beside_the_pictures_of_a_split(tmp_path, place, key):
    root = tree(tmp_path, place, place, suffix="_mask")
    assert refused(root).endswith(f", or set data.images={key} data.labels={key} data.label_suffix=_mask")
    assert counts(module(root, images=key, labels=key, label_suffix="_mask")) == (4, 4, 2, 2)


def test_labels_in_an_unknown_folder_beside_images_are_found_for_the_line(tmp_path):
    root = tree(tmp_path, "images/{}", "truth/{}", suffix="_gt")
    message = refused(root)
    assert "SegmentationClass in" in message
    assert " (6 files of truth are named after pictures: data.labels=truth); put the labels there" in message
    assert counts(module(root, labels="truth", label_suffix="_gt")) == (4, 4, 2, 2)


def test_labels_beside_images_under_a_name_that_is_not_known_are_said_without_classes_too(tmp_path):
    tree(tmp_path, "images/{}", "truth/{}", names=False)
    assert refused(tmp_path) == (
        f"data.root={tmp_path}: the files of truth look like the labels of those in images/train, and would not be "
        f"read; set data.labels=truth and write the class names into {tmp_path}/classes.json, or set data.labels=none"
    )
    assert counts(module(tmp_path, labels="none")) == (4, 0, 2, 0)
    write_classes(tmp_path, ["background", "object"])
    assert counts(module(tmp_path, labels="truth")) == (4, 4, 2, 2)


def test_a_folder_of_other_pictures_beside_images_is_none_of_labels(tmp_path):
    for i in range(4):
        save(tmp_path / "images" / f"p{i}.jpg", noise(seed=i))
        save(tmp_path / "thermal" / f"p{i}.png", noise(seed=9 + i))
    assert counts(module(tmp_path))[1::2] == (0, 0)


def test_pictures_of_several_cameras_are_pictures_and_said(tmp_path, caplog):
    for camera in ("left", "right"):
        for i in range(10):
            save(tmp_path / camera / f"{i:04}.jpg", noise(seed=i))
    assert counts(module(tmp_path)) == (18, 0, 2, 0)
    assert said(caplog) == [
        f"{tmp_path}: the folders left and right share the names of 10 files, and all are taken as pictures; where one "
        "holds labels, set data.images=<folder of the pictures> and data.labels=<folder of the labels>"
    ]


def test_folders_of_pictures_called_as_labels_are(tmp_path):
    for i in range(10):
        save(tmp_path / "masks" / f"m{i}.jpg", noise(seed=i))
        save(tmp_path / "hats" / f"h{i}.jpg", noise(seed=i))
    assert counts(module(tmp_path)) == (18, 0, 2, 0)


def test_keys_that_name_no_folder(tmp_path):
    root = tree(tmp_path, "images/{}", "labels/{}")
    assert refused(root, images="photos") == (
        f"data.images=photos: there is no folder {root}/photos, nor one of this name in {root}/train or {root}/val; "
        "name a folder below data.root, or . for all of it"
    )
    assert refused(root, labels="truth") == (
        f"data.labels=truth: there is no folder {root}/truth, nor one of this name in {root}/train or {root}/val; name "
        "a folder below data.root, or none to train without labels"
    )
    assert refused(root, labels="images") == (
        "data.labels=images: is the folder of the pictures; set data.label_suffix to what the names of the labels end "
        "in, such as _mask"
    )


def test_keys_of_the_root_do_not_bind_other_training_roots(tmp_path):
    root = tree(tmp_path / "a", "photos/{}", "truth/{}")
    for i in range(3):
        save(tmp_path / "b" / f"q{i}.jpg", noise(seed=i))
    found = module(root, images="photos", labels="truth", train_roots=[str(root), str(tmp_path / "b")])
    assert counts(found) == (7, 4, 2, 2)


def test_names_without_labels_in_another_training_root_are_said(tmp_path, caplog):
    root = tree(tmp_path / "a", "images/{}", "labels/{}")
    other = tree(tmp_path / "b", "images/{}", "truth/{}")
    found = module(root, train_roots=[str(other)])
    assert counts(found) == (4, 0, 2, 2)
    assert said(caplog)[0].startswith(f"{other}/classes.json: names 2 classes, but no picture has a label; looked for")


# ---- pairs ----


def test_accents_pair_however_they_are_written(tmp_path):
    root = tree(tmp_path, "images/{}", "labels/{}")
    for split in ("train", "val"):
        for kind, folder, form in (("jpg", "images", "NFC"), ("png", "labels", "NFD")):
            name = unicodedata.normalize(form, f"\u00e90.{kind}")
            (root / folder / split / f"p0.{kind}").rename(root / folder / split / name)
    assert counts(module(root)) == (4, 4, 2, 2)


def test_what_does_not_pair_is_counted_and_named(tmp_path, caplog):
    root = tree(tmp_path, "images/{}", "labels/{}")
    labels = root / "labels" / "train"
    (labels / "p0.png").rename(labels / "p0_mask.png")
    for i in range(4):
        save(labels / f"other{i}.png", mask())
    assert counts(module(root)) == (4, 3, 2, 2)
    assert said(caplog) == [
        f"{labels}: 5 of 8 labels belong to no picture of {root}/images/train and are not used: other0.png, "
        "other1.png, other2.png and 2 more; 1 would fit without _mask at the end of their names",
        f"{root}/images/train: 1 of 4 pictures have no label in {labels}, so nothing is scored on them: p0.jpg",
    ]


@pytest.mark.parametrize("suffix", ["_mask", "_gtFine_labelIds"])
def test_suffixes(tmp_path, suffix):
    root = tree(tmp_path, "images/{}", "labels/{}", suffix=suffix)
    save(root / "labels" / "train" / "p0_color.png", noise())
    message = refused(root)
    assert message.endswith(f"{root}/labels/train/p0.png; data.label_suffix={suffix} pairs 4 of them")
    assert counts(module(root, label_suffix=suffix)) == (4, 4, 2, 2)
    for split in ("train", "val"):
        for path in list((root / "images" / split).iterdir()):
            path.rename(path.with_name(f"{path.stem}_leftImg8bit.jpg"))
    assert counts(module(root, label_suffix=suffix, image_suffix="_leftImg8bit")) == (4, 4, 2, 2)


def test_two_labels_of_one_picture(tmp_path):
    root = tree(tmp_path, "images/{}", "labels/{}")
    save(root / "labels" / "val" / "p0.tif", mask())
    assert refused(root) == (
        f"{root}/labels/val/p0.png: a second label, {root}/labels/val/p0.tif, belongs to the same picture; keep one"
    )


def test_labels_that_lost_their_ids_are_refused(tmp_path):
    root = tree(tmp_path, "images/{}", "labels/{}", "jpg")
    assert refused(root) == (
        f"{root}/labels/train/p0.jpg: a label in .jpg has lost its ids: this kind of file blurs values at every "
        "border; write the labels anew as png, tif or bmp, from where they were drawn, or set data.labels=none"
    )


def test_names_of_classes_without_a_label_say_what_was_found(tmp_path):
    root = tree(tmp_path, "images/{}", "labels/{}")
    for path in (root / "labels").rglob("*.png"):
        path.rename(path.with_suffix(".npy"))
    assert refused(root) == (
        f"{root}/classes.json: names 2 classes, but no picture has a label; looked for png, tif or bmp files in "
        f"{root}/labels, which holds 6 of .npy; put the labels there under the names of their pictures, name "
        "their folder in data.labels, or set data.labels=none to train without them"
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    root = tree(tmp_path, "images/{}", "labels/{}")
    (root / "classes.json").write_bytes(json.dumps(["a", "b"]).encode(encoding))
    assert module(root).meta.names == ("a", "b")


def test_masks_of_an_object_each_are_no_pictures(tmp_path):
    """A folder a picture, with a file for each object: their names are not those of the pictures."""
    for i in range(4):
        save(tmp_path / f"id{i}" / "images" / f"id{i}.png", noise(seed=i))
        for part in range(3):
            save(tmp_path / f"id{i}" / "masks" / f"part{part}.png", 255 * mask(part))
    assert refused(tmp_path).startswith(
        f"data.root={tmp_path}: the files of id0/masks look like the labels of those in id0/images and would be taken "
        "as pictures"
    )


def test_few_grey_levels_alone_are_no_labels(tmp_path):
    """Pictures of few values, where all are alike."""
    for folder in ("a", "b"):
        for i in range(6):
            save(tmp_path / folder / f"{i}.png", 255 * mask(i))
    assert counts(module(tmp_path)) == (11, 0, 1, 0)
    assert Image.open(tmp_path / "a" / "0.png").mode == "L"
