"""A stage as it runs: found again, gone on with after a kill, the same on two processes, refused where it cannot be."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import config
from common.errors import ConfigError, DataError, LabelfreeError
from datamodules.base.transforms import Geometry
from datamodules.files.reading import UnreadableError
from datamodules.scenes.module import ScenesDataModule
from engine.stages.maps import MapData, mean_sides
from engine.stages.stage import pseudo
from pseudo_labels.steps import MapStep, new_record, whole_patches
from tests.conftest import small_words
from tests.pseudo_labels.stages import Classes, Dark, files, first, stage
from tests.support.processes import ROOT, ran

pytestmark = pytest.mark.train


class KillError(Exception):
    """Stands for a kill."""


def test_a_finished_stage_is_read_and_not_run(tmp_path, monkeypatch):
    work = stage(tmp_path, [Dark(), Classes()])
    results = work.run()
    assert work.places["dark"].missing(22, 4) == []
    assert first(results["dark"]).fields["segments"].shape == (4, 4)
    assert len(results["classes"]["assignment"]) == len(results["dark"].rows("features")[0])
    before = files(tmp_path)
    monkeypatch.setattr(Dark, "records", lambda *_: pytest.fail("computed again"))
    again = stage(tmp_path, [Dark(), Classes()]).run()
    assert np.array_equal(again["classes"]["centroids"], results["classes"]["centroids"])
    assert files(tmp_path) == before


def test_the_manifest_says_what_was_kept_and_dropped(tmp_path, caplog):
    caplog.set_level("INFO", logger="engine")
    records = stage(tmp_path, [Dark()]).run()["dark"]
    dropped = [record.drop for record in records.each() if not record.keep]
    assert dropped
    manifest = records.manifest
    assert manifest["kept"] == 22 - len(dropped)
    assert sum(manifest["dropped"].values()) == len(dropped)
    assert 1 <= manifest["regions"]["least"] <= manifest["regions"]["mean"] <= manifest["regions"]["most"] <= 2
    line = next(message for message in caplog.messages if "pictures kept" in message)
    assert f"{manifest['kept']} of 22 pictures kept; dropped: {len(dropped)} too_bright; " in line


@pytest.mark.parametrize(
    ("steps", "settings", "words"),
    [
        ([Dark(0.3)], {}, []),
        ([Dark()], {"shard": 8}, []),
        ([Dark()], {"batch_size": 4}, []),
        ([Dark()], {}, ["data.scenes_seed=1"]),
        ([Dark()], {}, ["trainer.precision=bf16-mixed"]),
    ],
    ids=str,
)
def test_a_changed_setting_never_reads_an_old_cache(steps, settings, words, tmp_path):
    one, two = stage(tmp_path, [Dark(), Classes()]), stage(tmp_path, [*steps, Classes()], *words, **settings)
    for name in ("dark", "classes"):  # what needs it is made anew too
        assert one.places[name].path != two.places[name].path


def test_the_version_of_a_step_is_part_of_its_name(tmp_path, monkeypatch):
    one = stage(tmp_path, [Dark()])
    monkeypatch.setattr(Dark, "version", 2)
    assert stage(tmp_path, [Dark()]).places["dark"].path != one.places["dark"].path


def test_a_killed_stage_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    stage(tmp_path / "whole", [Dark(), Classes()]).run()
    write, seen = MapData.write, []

    def dies(self, number, found):
        if number == 3:
            raise KillError
        write(self, number, found)

    with monkeypatch.context() as patch:
        patch.setattr(MapData, "write", dies)
        with pytest.raises(KillError):
            stage(tmp_path / "killed", [Dark(), Classes()]).run()
    work = stage(tmp_path / "killed", [Dark(), Classes()])
    assert work.places["dark"].missing(22, 4) == [3, 4, 5]
    (work.places["dark"].path / "shards" / "0000004.safetensors.part-dead").write_bytes(b"half")
    records = Dark.records

    def watched(self, batch):
        seen.extend(batch["index"].tolist())
        return records(self, batch)

    monkeypatch.setattr(Dark, "records", watched)
    work.run()
    assert seen == list(range(12, 22))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_disk_too_small_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=60_000))
    monkeypatch.setattr(Dark, "records", lambda *_: pytest.fail("began"))
    work = stage(tmp_path, [Dark()])
    with pytest.raises(ConfigError) as caught:
        work.run()
    assert str(caught.value) == (
        f"cache.dir={work.root}: the records of 22 pictures (step dark) need about 90.1 kB, but it has 60.0 kB free; "
        "set cache.dir to a larger disk"
    )


class Own(Dark):
    def geometry(self):
        return Geometry(1, "native")

    def record_bytes(self):
        return round(self.sides[0] * self.sides[1])


def test_the_disk_is_asked_for_the_sizes_of_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    with pytest.raises(ConfigError, match=r"22 pictures \(step dark\) need about 50\.7 kB"):  # of 48 x 48 px
        stage(tmp_path, [Own()]).run()


def test_sides_have_the_mean_area_of_pictures_that_can_be_read():
    class Few(list):
        def size(self, index):
            if self[index] is None:
                raise UnreadableError("x.png", "cut")
            return self[index]

    assert mean_sides(Few([(10, 40), None, (30, 20)])) == (20, 25)
    assert mean_sides(Few([None])) is None
    assert mean_sides([1, 2]) is None


def test_a_picture_that_cannot_be_read_is_a_record_too(tmp_path, monkeypatch):
    build = ScenesDataModule.build_source

    def broken(self, split):
        source = build(self, split)
        read = source.read

        def cut(index):
            if index in (4, 5, 6, 7):
                raise UnreadableError(f"{index}.png", "cut")
            return read(index)

        source.read = cut
        return source

    monkeypatch.setattr(ScenesDataModule, "build_source", broken)
    records = stage(tmp_path, [Dark()], "data.max_broken=0.5").run()["dark"]
    assert records.manifest["dropped"]["unreadable"] == 4  # a whole shard of them
    assert [records.read(i).drop for i in range(4, 8)] == ["unreadable"] * 4


class Chosen(Dark):
    name = "chosen"

    def pictures(self, count):
        return [1, 2, 9]

    def settings(self):
        return super().settings() | {"pictures": [1, 2, 9]}

    def announce(self, count):
        return f"{count} pictures to look at"


def test_a_step_may_choose_its_pictures(tmp_path, caplog):
    caplog.set_level("INFO", logger="engine")
    records = stage(tmp_path, [Chosen()]).run()["chosen"]
    assert [i for i in range(22) if records.read(i).drop != "not_chosen"] == [1, 2, 9]
    assert "pseudo-labels: chosen: 3 pictures to look at" in caplog.messages


def test_missing_shards_without_a_chosen_picture_are_written(tmp_path):
    work = stage(tmp_path, [Chosen()])
    work.run()
    before = files(tmp_path)
    place = work.places["chosen"]
    for path in (place.shard(1), place.shard(4), place.path / "manifest.json"):
        path.unlink()
    stage(tmp_path, [Chosen()]).run()
    assert files(tmp_path) == before


class Slopes(MapStep):
    """Needs a gradient, and pictures of their own sizes."""

    name, gradients = "slopes", True

    def settings(self):
        return {}

    def geometry(self):
        return Geometry(20, "native")

    def record_bytes(self):
        return 10_000

    def records(self, batch):
        images = whole_patches(batch, 10).requires_grad_()
        slope = torch.autograd.grad(images.square().sum(), images)[0]
        assert torch.equal(slope, 2 * images.detach())
        return [new_record(batch, 0, images, (4, 4), class_map=slope[0].mean(0, keepdim=True).half())]


def test_gradients_and_pictures_of_their_own_size(tmp_path):
    record = stage(tmp_path, [Slopes()]).run()["slopes"].read(0)
    assert record.fields["class_map"].shape == (1, 40, 40)  # 48 px cut to whole tens
    assert record.extent == (40 / 48, 40 / 48)


def test_a_step_that_needs_what_comes_later_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step 'classes' needs 'dark', which does not stand before it"):
        stage(tmp_path, [Classes(), Dark()])


REFUSED = {
    (0, 4): "method.stage.batch_size=0: must be at least 1",
    (3, 4): (
        "method.stage.shard=4: must be a multiple of method.stage.batch_size=3, so that no batch lies in two files"
    ),
}


@pytest.mark.parametrize("sizes", REFUSED)
def test_sizes_that_do_not_fit_are_refused(sizes, tmp_path):
    with pytest.raises(ConfigError) as caught:
        stage(tmp_path, [Dark()], batch_size=sizes[0], shard=sizes[1])
    assert str(caught.value) == REFUSED[sizes]


def test_a_method_without_a_stage_says_so():
    with pytest.raises(ConfigError) as caught:
        pseudo(config.compose(small_words("kmeans_baseline")))
    assert str(caught.value) == (
        "method=kmeans_baseline: has no offline stage; use `run.py train method=kmeans_baseline`"
    )


class Failing(Dark):
    def records(self, batch):
        raise LabelfreeError("nothing can come of this")


def test_an_error_of_a_step_is_the_users_line(tmp_path):
    with pytest.raises(LabelfreeError, match=r"^nothing can come of this$"):
        stage(tmp_path, [Failing()]).run()
    assert not list(tmp_path.rglob("manifest.json"))


TWO = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.pseudo_labels.stages import Classes, Dark, stage
from engine import setup
import common.errors

class Uneven(Dark):
    def records(self, batch):
        from common import distributed
        if {fails} and distributed.rank() == 1:
            raise common.errors.DataError("rank 1 fails")
        return super().records(batch)

Uneven.__name__ = "Dark"
words = ["trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2"]
setup.begin()
try:
    stage(Path({folder!r}), [Uneven(), Classes()], *words).run()
except common.errors.LabelfreeError as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(2)
"""


def run_two(tmp_path, fails: bool):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(root=str(ROOT), folder=str(tmp_path / "two"), fails=fails))
    return ran([sys.executable, str(script)], timeout=200)


@pytest.mark.ddp
def test_two_processes_give_the_cache_of_one(tmp_path):
    stage(tmp_path / "one", [Dark(), Classes()]).run()
    done = run_two(tmp_path, fails=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.ddp
def test_an_error_of_one_process_ends_both(tmp_path):
    done = run_two(tmp_path, fails=True)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: rank 1 fails" in done.stderr
    assert "error: the offline stage: another process could not do its part; its own line says why" in done.stderr
    assert not list((tmp_path / "two").rglob("manifest.json"))


def test_missing_shards_of_a_finished_folder_are_named(tmp_path):
    work = stage(tmp_path, [Dark()])
    records = work.run()["dark"]
    work.places["dark"].shard(0).unlink()
    with pytest.raises(DataError, match="delete it, so that it is made again"):
        records.read(0)
    assert stage(tmp_path, [Dark()]).run()["dark"].read(0).index == 0  # made again


def test_a_killed_fit_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    from engine.stages.fits import FitKeeper
    from tests.pseudo_labels.test_sketch import Clusters, Detector, Masks, Net

    step = Net.training_step
    monkeypatch.setattr(  # a library's dropout is on
        Net, "training_step", lambda self, batch, i: step(self, batch | {"image": F.dropout(batch["image"], 0.3)}, i)
    )
    plain = stage(tmp_path / "whole", [Masks(), Clusters(), Detector()]).run()["detector"].state()
    end = FitKeeper.on_train_batch_end

    def dies(self, trainer, *rest):
        end(self, trainer, *rest)
        if trainer.global_step == 5:
            raise KillError

    with monkeypatch.context() as patch:
        patch.setattr(FitKeeper, "on_train_batch_end", dies)
        with pytest.raises(KillError):
            stage(tmp_path / "killed", [Masks(), Clusters(), Detector()]).run()
    work = stage(tmp_path / "killed", [Masks(), Clusters(), Detector()])
    assert (work.places["detector"].path / "last.ckpt").is_file()  # of step 3
    resumed = work.run()["detector"].state()
    assert all(torch.equal(resumed[name], value) for name, value in plain.items())
    assert not list(work.places["detector"].path.glob("*.ckpt"))
