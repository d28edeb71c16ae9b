"""Folders of real files: layouts, mixtures, splits, training roots, and the exact words of every error."""

import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from common.errors import ConfigError, DataError
from datamodules.base.module import load_datamodule
from datamodules.facts import available
from datamodules.files.opening import ENDINGS
from datamodules.folder import FolderDataModule, pictures_below
from datamodules.own import label_look
from tests.datamodules.pictures import config, labelled_folder, module, noise, refused, save, write_classes


def ids(source) -> list[str]:
    return [source.id(i) for i in range(len(source))]


def test_it_is_found_by_name():
    assert "folder" in available()
    assert load_datamodule("folder") is FolderDataModule
    with pytest.raises(ConfigError, match="data=foldr: there is no data set of this name; did you mean folder"):
        load_datamodule("foldr")


def test_the_full_layout(tmp_path):
    root = labelled_folder(tmp_path)
    save(root / "images" / "train" / "drive1" / "deep.PNG", noise(seed=50))
    save(root / "labels" / "train" / "drive1" / "deep.png", np.zeros((24, 32), np.uint8))
    save(root / "images" / "test" / "t.png", noise())
    save(root / "images_unlabelled" / "train" / "u.png", noise())
    (root / "images" / "train" / "._hidden.png").write_bytes(b"x")
    found = module(root)
    assert found.meta.names == ("class0", "class1", "class2")
    assert len(set(found.meta.palette)) == 3
    assert ids(found.source("train")) == ["drive1/deep", *(f"train{i}" for i in range(6))]
    assert ids(found.source("val")) == ["val0", "val1"]
    image, label = found.source("val").read(1)
    np.testing.assert_array_equal(image, noise(seed=1))
    assert label[0, 0] == 255
    batch = next(iter(found.val_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["label"].dtype == torch.int64
    assert batch["size"].tolist() == [[24, 32]] * 2


def test_eight_pictures_of_eight_kinds(tmp_path):
    """The pictures of a real folder: every one arrives, at its own size, as RGB."""
    folder = tmp_path / "photos"
    grey = noise(seed=2)[..., 0]
    save(folder / "a.JPG", noise(40, 30))
    save(folder / "b.png", noise(seed=1))
    save(folder / "c" / "d" / "c.tif", (noise(seed=2)[..., 0].astype(np.uint16) * 257))
    save(folder / "d.webp", noise(seed=3))
    save(folder / "e.bmp", grey)
    save(folder / "f.png", np.dstack([noise(seed=4), grey]))
    Image.fromarray(noise(seed=5)).quantize(9).save(folder / "g.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "h.jpeg", noise(30, 50), exif=exif)
    (folder / "notes.txt").write_text("not a picture")
    found = module(folder, batch_size=7, train_size=12)
    assert len(found.source("train")) == 7
    assert len(found.source("val")) == 1
    assert not found.meta.has_labels
    assert sorted(ids(found.source("train")) + ids(found.source("val"))) == ["a", "b", "c/d/c", "d", "e", "f", "g", "h"]
    seen = pictures_below(folder)
    assert [seen.read(i)[0].shape for i in range(8)] == [(40, 30, 3), *[(24, 32, 3)] * 6, (50, 30, 3)]
    np.testing.assert_array_equal(seen.read(2)[0][..., 0], grey)
    batch = next(iter(found.train_dataloader()))
    assert batch["image"].shape == (7, 3, 12, 12)
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1
    assert "label" not in batch
    assert batch["broken"] == []


def test_without_val_a_fixed_tenth_is_held_out(tmp_path):
    for i in range(40):
        save(tmp_path / "images" / f"p{i}.png", noise(8, 8, seed=i))
    first, second = module(tmp_path), module(tmp_path, batch_size=2)
    val, train = ids(first.source("val")), ids(first.source("train"))
    assert len(val) == 4
    assert not set(val) & set(train)
    assert sorted(val + train) == sorted(f"p{i}" for i in range(40))
    assert ids(second.source("val")) == val
    other_seed = FolderDataModule(config(seed=99, root=str(tmp_path)))
    assert ids(other_seed.source("val")) == val
    save(tmp_path / "images" / "train" / "x.png", noise())
    save(tmp_path / "images" / "train" / "y.png", noise())
    (tmp_path / "images" / "val").mkdir()
    split = module(tmp_path, batch_size=1)
    assert len(split.source("train")) == len(split.source("val")) == 1


def test_labels_without_split_folders(tmp_path):
    for i in range(3):
        save(tmp_path / "images" / f"p{i}.jpg", noise(8, 8, seed=i))
        save(tmp_path / "labels" / f"p{i}.png", np.full((8, 8), i % 2, np.uint8))
    write_classes(tmp_path, ["a", "b"])
    found = module(tmp_path, batch_size=1)
    assert found.source("train").read(0)[1] is not None
    assert found.meta.names == ("a", "b")


def test_partly_labelled_pictures_are_all_ignore(tmp_path):
    root = labelled_folder(tmp_path, train=4)
    (root / "labels" / "train" / "train1.png").unlink()
    (root / "labels" / "val" / "val0.png").unlink()
    found = module(root)
    labels = {
        name: label
        for batch in found.loader("train", "eval")
        for name, label in zip(batch["id"], batch["label"], strict=True)
    }
    assert (labels["train1"] == 255).all()
    assert (labels["train2"] != 255).any()
    assert (next(iter(found.val_dataloader()))["label"][0] == 255).all()


def test_names_without_labels_are_refused(tmp_path):
    root = labelled_folder(tmp_path)
    shutil.rmtree(root / "labels")
    assert refused(root) == (
        f"{root}/classes.json: names 3 classes, but no picture has a label; looked for png, tif or bmp files in a "
        f"folder labels, masks, annotations or SegmentationClass in {root}, beside that of the pictures; put the "
        "labels there under the names of their pictures, name their folder in data.labels, or set data.labels=none to "
        "train without them"
    )
    found = module(root, labels="none")
    assert found.meta.names == ()
    assert "label" not in next(iter(found.val_dataloader()))


def test_train_roots_replace_the_root(tmp_path):
    root = labelled_folder(tmp_path / "root")
    more = labelled_folder(tmp_path / "more", train=3, val=5)
    for i in range(4):
        save(tmp_path / "flat" / f"f{i}.png", noise(seed=80 + i))
    roots = [str(tmp_path / name) for name in ("more", "flat")]
    found = module(root, train_roots=roots)
    assert ids(found.source("train")) == [f"more/train{i}" for i in range(3)] + [f"flat/f{i}" for i in range(4)]
    assert ids(found.source("val")) == ["val0", "val1"]
    with_root = module(root, train_roots=[str(root), *roots])
    assert len(with_root.source("train")) == 6 + 3 + 4
    alone = module(root, train_roots=[str(more)])
    assert ids(alone.source("train")) == ["train0", "train1", "train2"]
    assert alone.source("train").read(0)[1] is not None


def fitted_on(found, roots):
    """A data set whose k-means is fitted on `roots`."""
    OmegaConf.set_readonly(found.cfg, False)
    found.cfg.evaluation.kmeans.roots = roots
    return found


def test_kmeans_is_fitted_on_the_pictures_of_the_data_that_is_evaluated(tmp_path):
    root = labelled_folder(tmp_path / "root")
    for i in range(4):
        save(tmp_path / "flat" / f"f{i}.png", noise(seed=80 + i))
    roots = [str(tmp_path / "flat")]
    own = module(root, train_roots=roots)
    assert ids(own.clustered_source()) == [f"train{i}" for i in range(6)]
    assert own.clustered_count() == 6
    assert own.clustered_source().read(0)[1] is None  # never with a label
    assert module(root).clustered_source() == "train"
    fitted_on(own, ["trained"])
    assert own.clustered_source() == "train"
    assert own.clustered_count() == 4
    other = fitted_on(module(root), roots)
    assert ids(other.clustered_source()) == [f"f{i}" for i in range(4)]
    other = fitted_on(module(root), [str(tmp_path / "none")])
    with pytest.raises(DataError, match=r"evaluation\.kmeans\.roots=.*none: "):
        other.clustered_source()
    with pytest.raises(ConfigError, match=r"=\['own', 'x'\]: own and trained stand alone; name folders only"):
        fitted_on(module(root), ["own", "x"]).clustered_source()
    same = str(root / "images" / "val")
    with pytest.raises(DataError, match=r"holds no pictures to train on besides those .*; add pictures, or name other"):
        fitted_on(module(root), [same]).clustered_source()
    val = tmp_path / "only"
    save(val / "images" / "val" / "p.png", noise())
    assert module(val, train_roots=roots).clustered_source() == "train"  # it has none of its own


def test_train_roots_never_take_what_is_evaluated(tmp_path):
    for i in range(20):
        save(tmp_path / "a" / f"p{i}.png", noise(8, 8, seed=i))
    found = module(tmp_path / "a", train_roots=[str(tmp_path / "a")])
    assert len(found.source("train")) == 18
    above = module(tmp_path / "a", train_roots=[str(tmp_path)])
    assert len(above.source("train")) == 18
    val = tmp_path / "only"
    save(val / "images" / "val" / "p.png", noise())
    assert refused(val) == (
        f"data.root={val}: holds no pictures to train on (images/train is missing or empty); add pictures, or name "
        "folders to train on in data.train_roots"
    )
    assert len(module(val, train_roots=[str(tmp_path / "a")]).source("train")) == 20


def test_labelled_training_roots_must_mean_the_same_classes(tmp_path):
    root, more = labelled_folder(tmp_path / "root"), labelled_folder(tmp_path / "more")
    write_classes(more, ["sky", "road", "car"])
    assert refused(root, train_roots=[str(more)]) == (
        f"{more}/classes.json: its names differ from those of {root}/classes.json, so label values would mean "
        "different classes; give both the same classes.json, or set data.labels=none to train on the pictures alone"
    )


def test_two_files_of_one_stem_keep_their_endings(tmp_path):
    save(tmp_path / "a.png", noise())
    save(tmp_path / "a.jpg", noise())
    save(tmp_path / "b.jpg", noise())
    assert ids(pictures_below(tmp_path)) == ["a.jpg", "a.png", "b"]


def test_links_in_a_circle_end(tmp_path):
    save(tmp_path / "pics" / "a.png", noise())
    (tmp_path / "pics" / "again").symlink_to(tmp_path / "pics")
    assert ids(pictures_below(tmp_path / "pics")) == ["a"]


# ---- errors, to the letter ----

LOOKED = f"looked for files ending in {', '.join(ENDINGS)}, in small or capital letters"


def test_no_root(tmp_path):
    cfg = config()
    with pytest.raises(ConfigError) as error:
        FolderDataModule(cfg).setup()
    assert str(error.value) == "data.root: data=folder needs a folder of pictures; set data.root=<folder>"
    assert refused(tmp_path / "none") == f"data.root={tmp_path}/none: there is no such folder"


def test_no_pictures(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert refused(tmp_path) == f"data.root: no pictures found in {tmp_path} (any depth); {LOOKED}"
    (tmp_path / "images" / "train").mkdir(parents=True)
    assert refused(tmp_path) == f"data.root: no pictures found in {tmp_path} (images/train); {LOOKED}"
    with pytest.raises(DataError) as error:
        pictures_below(tmp_path, "input")
    assert str(error.value) == f"input: no pictures found in {tmp_path} (any depth); {LOOKED}"


def test_one_picture_is_too_few_to_split(tmp_path):
    save(tmp_path / "a.png", noise())
    assert refused(tmp_path) == (
        f"data.root={tmp_path}: holds no pictures to train on besides those it is evaluated on; add pictures, or name "
        "folders to train on in data.train_roots"
    )


def test_labels_without_names(tmp_path):
    root = labelled_folder(tmp_path)
    for content in (None, "[]"):
        (root / "classes.json").unlink() if content is None else (root / "classes.json").write_text(content)
        assert refused(root) == (
            f"{root}/classes.json: absent or empty, but there are labels in {root}/labels; write the class names in id "
            'order into it, such as ["sky", "road"], or set data.labels=none to train on the pictures alone'
        )


def test_labels_that_belong_to_no_picture(tmp_path):
    root = labelled_folder(tmp_path, train=2)
    for i in range(2):
        (root / "labels" / "train" / f"train{i}.png").rename(root / "labels" / "train" / f"train{i}_gt.png")
    assert refused(root) == (
        f"{root}/labels/train: holds 2 labels, but none is named after a picture of {root}/images/train; the label of "
        f"{root}/images/train/train0.png would be {root}/labels/train/train0.png; data.label_suffix=_gt pairs 2 of them"
    )


def test_labels_beside_no_images_folder(tmp_path):
    save(tmp_path / "labels" / "a.png", noise())
    assert refused(tmp_path) == (
        f"data.root={tmp_path}: holds a folder labels but no folder images; put the pictures into images, or into "
        "images/train and images/val, or name their folder in data.images"
    )


def test_a_label_of_another_size_is_found_at_the_start(tmp_path):
    root = labelled_folder(tmp_path)
    save(root / "labels" / "val" / "val1.png", np.zeros((24, 30), np.uint8))
    assert refused(root) == (
        f"{root}/labels/val/val1.png: the label is 30x24 pixels (width x height) but its picture "
        f"{root}/images/val/val1.png is 32x24; save the label at the picture's own size"
    )


def test_a_label_value_outside_the_classes_stops_with_one_line(tmp_path):
    root = labelled_folder(tmp_path)
    save(root / "labels" / "train" / "train3.png", np.full((24, 32), 7, np.uint8))
    assert refused(root) == (
        f"{root}/labels/train/train3.png: the label holds the value 7 (all labels looked at: 0, 1, 2, 7, 255), but "
        "with 3 names in classes.json a value must be 0..2, or 255 for pixels to ignore; name the values in "
        "data.label_values, such as data.label_values='{0: 0, 7: 1}', or mend the labels or classes.json"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_was_not_looked_at_stops_when_it_is_read(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(label_look, "LOOKED_AT", 0)
    root = labelled_folder(tmp_path)
    save(root / "labels" / "train" / "train3.png", np.full((24, 32), 7, np.uint8))
    found = module(root, workers=workers)
    with pytest.raises(DataError) as error:
        list(found.loader("train", "train"))
    assert str(error.value) == (
        f"{root}/labels/train/train3.png: the label holds the value 7, but with 3 names in classes.json a value must "
        "be 0..2, or 255 for pixels to ignore; name the values in data.label_values, such as "
        "data.label_values='{0: 0, 7: 1}', or mend the labels or classes.json"
    )


# ---- broken files ----


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_pictures_are_named_counted_and_skipped(tmp_path, workers, caplog):
    root = labelled_folder(tmp_path, train=8, val=4)
    cut(root / "images" / "train" / "train2.png")
    cut(root / "labels" / "train" / "train5.png")
    cut(root / "images" / "val" / "val1.png")
    found = module(root, batch_size=4, workers=workers)
    train = list(found.train_dataloader())
    assert [len(batch["id"]) for batch in train] == [4, 4]
    messages = [message for batch in train for message in batch["broken"]]
    for name in ("images/train/train2", "labels/train/train5"):
        assert sum(m.startswith(f"{root}/{name}.png: this file cannot be read as a picture (") for m in messages) >= 1
    assert not {"train2", "train5"} & {name for batch in train for name in batch["id"]}
    assert len(found.broken["train"].files) == 2
    val = [name for batch in found.val_dataloader() for name in batch["id"]]
    assert val == ["val0", "val2", "val3"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    list(found.train_dataloader())
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 3


def test_an_evaluation_batch_of_broken_pictures_only_is_not_given_out(tmp_path):
    root = labelled_folder(tmp_path, val=4)
    cut(root / "images" / "val" / "val0.png")
    cut(root / "images" / "val" / "val1.png")
    assert [batch["id"] for batch in module(root).val_dataloader()] == [["val2", "val3"]]


def test_too_many_broken_pictures_stop_the_run_later(tmp_path):
    root = labelled_folder(tmp_path, train=8)
    for i in (1, 4, 6):
        cut(root / "images" / "train" / f"train{i}.png")
    found = module(root, batch_size=4)
    with pytest.raises(DataError) as error:
        list(found.loader("train", "eval"))
    text = str(error.value)
    assert text.startswith(
        "3 of the 8 pictures of 'train' cannot be read, more than data.max_broken=0.01 allows; mend or remove them, or "
        f"raise data.max_broken: {root}/images/train/train1.png: this file cannot be read as a picture ("
    )
    assert all(f"train{i}.png" in text for i in (1, 4, 6))
    generous = module(root, batch_size=4, max_broken=0.5)
    assert len(list(generous.train_dataloader())) == 2


def test_too_many_broken_pictures_stop_the_run_at_the_start(tmp_path):
    root = labelled_folder(tmp_path, train=8)
    for i in range(3):
        (root / "images" / "train" / f"train{i}.png").write_bytes(b"")
    assert refused(root).startswith(
        "3 of the 8 pictures of 'train' cannot be read, more than data.max_broken=0.01 allows"
    )


def test_when_nothing_can_be_read(tmp_path):
    root = labelled_folder(tmp_path, train=2)
    for i in range(2):
        cut(root / "images" / "train" / f"train{i}.png")
    with pytest.raises(DataError, match="20 other pictures in its place cannot be read either"):
        list(module(root, batch_size=2).train_dataloader())
