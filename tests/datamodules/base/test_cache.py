"""data.cache: the same tensors to the bit, nothing decoded twice, nothing cut or stale read, no disk filled."""

import itertools
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

import config as configuration
from common.errors import ConfigError, DataError
from common.files import cache_folder, size_text
from datamodules.base import cache, dataset
from datamodules.base.decoded import DecodedStore, DecodedWriter
from datamodules.base.module import load_datamodule
from datamodules.base.transforms import Geometry
from datamodules.folder import FolderDataModule
from tests.datamodules import trees
from tests.datamodules.pictures import StripesModule, config, labelled_folder, noise, save
from tests.support.ranks import on_two_ranks

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def own_memory(monkeypatch, tmp_path_factory):
    """Each test has a memory folder of its own, and none stays behind."""
    monkeypatch.setattr(cache, "_memory", {})
    yield
    cache._remove_memory_folder(os.getpid())


def folder_config(root, tmp_path, mode, **data):
    cfg = config(root=str(root), cache=mode, **data)
    return OmegaConf.create(OmegaConf.to_container(cfg) | {"cache": {"dir": str(tmp_path / "cache")}})


def made(root, tmp_path, mode, **data) -> FolderDataModule:
    found = FolderDataModule(folder_config(root, tmp_path, mode, **data))
    found.setup()
    return found


def everything(loader) -> dict:
    batches = list(loader)
    parts = {key: [batch[key] for batch in batches] for key in batches[0]}
    for key, part in parts.items():  # with "keep" the batches have sizes of their own
        alike = torch.is_tensor(part[0]) and len({tensor.shape[1:] for tensor in part}) == 1
        parts[key] = torch.cat(part) if alike else list(itertools.chain(*part))
    return parts


def same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if torch.is_tensor(value):
            assert value.dtype == second[key].dtype
            assert torch.equal(value, second[key]), key
        else:
            assert len(value) == len(second[key])
            for one, other in zip(value, second[key], strict=True):
                assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def files(tmp_path) -> list:
    return sorted((tmp_path / "cache" / "decoded").glob("*")) if (tmp_path / "cache").exists() else []


@pytest.fixture
def odd(tmp_path):
    """A labelled folder with pictures of several sizes, and one without a label."""
    root = labelled_folder(tmp_path / "data", train=9, val=3)
    save(root / "images" / "train" / "wide.png", noise(20, 70, seed=5))
    save(root / "images" / "train" / "tall.PNG", noise(71, 33, seed=6))
    return root


# ---- the same tensors, decoded once ----


@pytest.mark.parametrize("mode", ["disk", "ram"])
@pytest.mark.parametrize("crop", ["random", "center", "five", "none", "keep"])
def test_the_same_to_the_bit(odd, tmp_path, mode, crop):
    data = {"train_crop": crop, "eval_crop": "none" if crop == "none" else "center"}
    plain, kept = made(odd, tmp_path, "none", **data), made(odd, tmp_path, mode, **data)
    for loader in ("train_dataloader", "val_dataloader"):
        before, after = getattr(plain, loader)(), getattr(kept, loader)()
        for _ in range(2):
            same(everything(before), everything(after))


@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_nothing_is_decoded_after_the_first_time(odd, tmp_path, mode, monkeypatch):
    found = made(odd, tmp_path, mode)
    train, val = found.train_dataloader(), found.val_dataloader()
    reads = []
    monkeypatch.setattr(type(found.source("train")), "read", lambda self, index: reads.append(index))
    for _ in range(2):
        assert len(everything(train)["id"]) == 8
        assert len(everything(val)["id"]) == 3
    assert len(everything(found.loader("train", "train", "shuffled"))["id"]) == 11
    later = made(odd, tmp_path, mode)
    assert len(everything(later.train_dataloader())["id"]) == 8
    assert reads == []


def test_workers_see_the_same_and_the_store_travels(odd, tmp_path):
    plain = everything(made(odd, tmp_path, "none").train_dataloader())
    same(plain, everything(made(odd, tmp_path, "disk", workers=2).train_dataloader()))
    found = made(odd, tmp_path, "disk")
    store = found.train_dataloader().dataset.store
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy[3][0], store[3][0])
    assert len(pickle.dumps(store)) < 1000


@pytest.mark.parametrize("name", ["cocostuff27", "potsdam3", "pascal_voc", "kitti"])
def test_published_sets_are_cached_too(name, tmp_path):
    trees.TREES[name](tmp_path / "data")
    words = [f"data={name}", f"data.root={tmp_path}/data", f"cache.dir={tmp_path}/cache", "data.batch_size=2"]
    words += ["data.workers=0", "data.train_size=16", "data.eval_size=16", "data.eval_batch_size=2"]
    plain, kept = (
        load_datamodule(name)(configuration.compose([*words, f"data.cache={mode}"])) for mode in ("none", "disk")
    )
    for loader in ("train_dataloader", "val_dataloader"):
        same(everything(getattr(plain, loader)()), everything(getattr(kept, loader)()))
    again = load_datamodule(name)(configuration.compose([*words, "data.cache=disk"]))
    list(again.val_dataloader())
    assert again.foreign["val"].pixels == plain.foreign["val"].pixels
    assert bool(again.foreign["val"].pixels) == (name in ("cocostuff27", "potsdam3"))


def test_scenes_and_pictures_without_labels(tmp_path):
    words = ["data=scenes", "data.train_count=4", "data.val_count=2", "data.train_size=32", "data.eval_size=32"]
    words += ["data.batch_size=2", "data.workers=0", f"cache.dir={tmp_path}/cache"]
    plain, kept = (
        load_datamodule("scenes")(configuration.compose([*words, f"data.cache={mode}"])) for mode in ("none", "disk")
    )
    same(everything(plain.train_dataloader()), everything(kept.train_dataloader()))
    for i in range(12):
        save(tmp_path / "flat" / f"{i}.png", noise(seed=i))
    plain, kept = made(tmp_path / "flat", tmp_path, "none"), made(tmp_path / "flat", tmp_path, "disk")
    assert "label" not in everything(kept.val_dataloader())
    same(everything(plain.train_dataloader()), everything(kept.train_dataloader()))


def test_unreadable_pictures_are_remembered(odd, tmp_path):
    path = odd / "images" / "train" / "train2.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    plain, kept = made(odd, tmp_path, "none"), made(odd, tmp_path, "disk")
    kept.train_dataloader()
    again = made(odd, tmp_path, "disk")
    same(everything(plain.loader("train", "train")), everything(again.loader("train", "train")))
    assert again._stores
    assert list(again.broken["train"].files) == list(plain.broken["train"].files) == [str(path)]


def test_int32_labels_stay_int32(tmp_path):
    image, label = noise(5, 7), np.arange(35, dtype=np.int32).reshape(5, 7) * 1000
    with DecodedWriter(tmp_path / "x", "f") as writer:
        writer.add(image, label, (50, 70))
        writer.finish({})
    found = DecodedStore(tmp_path / "x", "f")[0]
    np.testing.assert_array_equal(found[0], image)
    np.testing.assert_array_equal(found[1], label)
    assert found[1].dtype == np.int32
    assert found[2] == (50, 70)


# ---- never cut, never stale ----


def test_a_cut_or_foreign_file_is_never_read(odd, tmp_path):
    plain = everything(made(odd, tmp_path, "none").train_dataloader())
    list(made(odd, tmp_path, "disk").train_dataloader())
    (path,) = [path for path in files(tmp_path) if "-train-" in path.name]
    whole = path.read_bytes()
    zeros = b"\0" * 100
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], whole + b"x", whole[:-100] + zeros, zeros):
        path.write_bytes(content)
        same(plain, everything(made(odd, tmp_path, "disk").train_dataloader()))
        assert path.read_bytes() == whole
    assert DecodedStore.find(path, "another") is None


@pytest.mark.parametrize("change", ["picture", "label", "classes", "size", "interpolation", "list", "touch"])
def test_whatever_changes_the_pixels_makes_a_new_file(odd, tmp_path, change):
    list(made(odd, tmp_path, "disk").train_dataloader())
    data = {}
    if change == "picture":
        save(odd / "images" / "train" / "train3.png", noise(seed=90))
    elif change == "label":
        save(odd / "labels" / "train" / "train3.png", np.zeros((24, 32), np.uint8))
    elif change == "classes":
        (odd / "classes.json").write_text('["a", "b", "c", "d"]')
    elif change == "size":
        data = {"train_size": 12}
    elif change == "interpolation":
        data = {"interpolation": "nearest"}
    elif change == "list":
        (odd / "images" / "train" / "train3.png").unlink()
    else:
        os.utime(odd / "images" / "train" / "train3.png", (1, 1))
    plain = everything(made(odd, tmp_path, "none", **data).train_dataloader())
    same(plain, everything(made(odd, tmp_path, "disk", **data).train_dataloader()))
    assert len([path for path in files(tmp_path) if "-train-" in path.name]) == 2


def test_what_does_not_change_them_finds_the_file_again(odd, tmp_path):
    list(made(odd, tmp_path, "disk").train_dataloader())
    list(made(odd, tmp_path, "disk", flip_p=0.1, batch_size=2, eval_size=12).train_dataloader())
    assert len([path for path in files(tmp_path) if "-train-" in path.name]) == 1


def test_a_killed_build_leaves_nothing_that_is_read_and_is_swept_up(odd, tmp_path, monkeypatch):
    """kill -9 in the middle of writing: the unfinished file is not used, and the next build removes it."""
    found = made(odd, tmp_path, "disk")

    def killed():
        real = DecodedWriter.add
        count = itertools.count()

        def add(self, *item):
            if next(count) == 5:
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *item)

        DecodedWriter.add = add
        found.train_dataloader()

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (part,) = files(tmp_path)
    assert ".decoded.part-" in part.name
    plain = everything(made(odd, tmp_path, "none").train_dataloader())
    same(plain, everything(found.train_dataloader()))
    assert [".part" in path.name for path in files(tmp_path)] == [False]


def test_the_part_of_a_living_process_stays(tmp_path):
    with DecodedWriter(tmp_path / "x", "f") as writer, DecodedWriter(tmp_path / "x", "f"):
        assert Path(writer.file.name).exists()


def test_a_wrong_label_stops_the_build_with_its_line_and_no_file(odd, tmp_path):
    save(odd / "labels" / "train" / "train3.png", np.full((24, 32), 7, np.uint8))
    with pytest.raises(DataError, match=r"the label holds the value 7 .*but with 3 names"):
        made(odd, tmp_path, "disk").train_dataloader()
    assert files(tmp_path) == []


# ---- room ----


def test_the_size_is_announced_and_right(odd, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 64_100_000_000))
    with caplog.at_level(logging.INFO):
        found = made(odd, tmp_path, "disk", train_crop="five")
        found.train_dataloader()
    (path,) = files(tmp_path)
    said = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("data.cache"))
    assert said == (
        f"data.cache=disk: decoding 55 pictures of folder 'train' once into {path}, {size_text(55 * (1024 + 64))} "
        "(64.1 GB free)"
    )
    assert 0 < path.stat().st_size - 55 * (1024 + 64) < 400
    caplog.clear()
    with caplog.at_level(logging.INFO):
        made(odd, tmp_path, "disk", train_crop="center").train_dataloader()
    assert f"{path.parent} holds {size_text(path.stat().st_size)} of other caches of this split" in caplog.text


def test_random_crops_are_measured(odd, tmp_path):
    found = made(odd, tmp_path, "disk", train_crop="random")
    plan = cache.Plan("x", "train", found.source("train"), found.train_geometry, True, "disk", tmp_path)
    needed, exact = plan.needed()
    path = found.train_dataloader().dataset.store.path
    assert exact
    assert 0 < path.stat().st_size - needed < 400


def test_a_disk_that_cannot_take_it_is_left_alone(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 3000))
    for mode, remedy in (
        ("disk", "cache.dir to a larger disk, or data.cache=none"),
        ("ram", "data.cache=disk or none"),
    ):
        found = made(odd, tmp_path, mode, train_crop="center")
        with pytest.raises(ConfigError) as error:
            found.train_dataloader()
        folder = tmp_path / "cache" / "decoded" if mode == "disk" else cache.memory_folder()
        assert str(error.value) == (
            f"data.cache={mode}: the 11 decoded pictures of 'train' need 12.0 kB, but {folder} has 3.0 kB free; set "
            f"{remedy}"
        )
        assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(odd, tmp_path, monkeypatch):
    def full(self, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DecodedWriter, "_write", full)
    with pytest.raises(DataError, match=r"\.decoded cannot be written \(No space left on device\); it is gone again; "):
        made(odd, tmp_path, "disk").train_dataloader()
    assert files(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made(odd, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError) as error:
        made(odd, tmp_path, "disk").train_dataloader()
    assert str(error.value) == (
        f"cache.dir={tmp_path}/cache/decoded: cannot be made (Not a directory); name a folder that can be written to"
    )


def test_a_source_that_cannot_tell_its_pictures(tmp_path):
    found = StripesModule(config(cache="disk"))
    with pytest.raises(ConfigError) as error:
        found.train_dataloader()
    assert str(error.value) == (
        "data.cache=disk: data=folder cannot tell when its pictures change (its source has no fingerprint()), so a "
        "cache could go stale; set data.cache=none"
    )


def test_the_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(configuration.compose([])) == tmp_path / "labelfree"
    assert str(cache_folder(configuration.compose(["cache.dir=/x/y"]))) == "/x/y"
    assert cache_folder(config()) == tmp_path / "labelfree"
    assert [size_text(count) for count in (912, 3_400_000, 73.5e9, 2e12)] == ["912 B", "3.4 MB", "73.5 GB", "2.0 TB"]


# ---- memory ----


def test_memory_is_given_back(odd, tmp_path):
    def use(queue):
        found = made(odd, tmp_path, "ram")
        found.train_dataloader()
        queue.put(str(cache.memory_folder()))
        queue.close()
        queue.join_thread()
        cache._remove_memory_folder(os.getpid())

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=use, args=(queue,))
    process.start()
    folder = cache.Path(queue.get(timeout=30))
    process.join()
    assert not folder.exists()
    assert not folder.with_suffix(".lock").exists()
    assert files(tmp_path) == []


def test_leftovers_of_killed_processes_go_and_those_in_use_stay():
    mine = cache.memory_folder()
    mine.mkdir()
    dead = mine.with_name(f"labelfree-{os.getuid()}-000000dead")
    dead.mkdir()
    dead.with_suffix(".lock").touch()
    cache._new_memory_folder()
    assert mine.exists()
    assert not dead.exists()
    assert not dead.with_suffix(".lock").exists()


# ---- several processes ----


def _as_rank(rank, root, tmp_path, mode):
    cache.TURN = 0.0  # every picture is a turn of its own
    writes = []
    real = DecodedWriter.finish
    DecodedWriter.finish = lambda self, foreign: (writes.append(self.path.name), real(self, foreign))
    found = made(root, tmp_path, mode)
    found.trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, num_devices=2)
    train = next(iter(found.train_dataloader()))
    result = {"image": train["image"].numpy(), "val": everything(found.val_dataloader())["id"], "writes": writes}
    save(root / "labels" / "train" / "train0.png", np.full((24, 32), 9, np.uint8))
    dist.barrier()
    try:
        made(root, tmp_path, mode).train_dataloader()
    except DataError as error:
        result["error"] = str(error)
    dist.barrier()
    cache._remove_memory_folder(os.getpid())
    return result


@pytest.mark.ddp
@pytest.mark.parametrize("mode", ["disk", "ram"])
def test_one_of_two_processes_writes_and_both_read(odd, tmp_path, mode):
    one = next(iter(made(odd, tmp_path, "none").train_dataloader()))
    ranks = on_two_ranks(_as_rank, odd, tmp_path, mode, start="fork")
    joined = np.concatenate([ranks[rank]["image"] for rank in range(2)])
    np.testing.assert_array_equal(joined, one["image"].numpy())
    assert [ranks[rank]["val"] for rank in range(2)] == [["val0", "val2"], ["val1"]]
    assert len(ranks[0]["writes"]) == 2
    assert ranks[1]["writes"] == []
    for rank in range(2):
        assert re.search("the label holds the value 9 .*but with 3 names in classes.json", ranks[rank]["error"])


def test_center_crops_are_kept_without_what_is_never_seen():
    image, label = noise(20, 60), np.zeros((20, 60), np.uint8)
    for crop in ("center", "five"):
        geometry = Geometry(size=8, crop=crop)
        kept, ids = geometry.resize(image, label, 0)
        assert kept.shape == (8, 8, 3)
        assert kept.base is None or kept.base.nbytes == kept.nbytes
        assert geometry.kept_size(20, 60) == (8, 8)
        assert geometry.finish(kept, ids, np.random.default_rng(0))[0].shape == (8, 8, 3)
    assert Geometry(size=8, crop="random").kept_size(20, 60) == (8, 24)
    assert dataset.read_pair(SimpleNamespace(read=lambda i: (image, None)), 0, True)[1].min() == 255
