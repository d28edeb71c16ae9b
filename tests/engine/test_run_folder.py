"""Names, resume rules and the history of a run."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
from common.errors import CheckpointError, ConfigError
from engine.records.run_folder import History, open_run
from engine.records.run_names import run_name
from lightning_modules.base.segmenter import FORMAT


def save_checkpoint(step: int, path: Path) -> None:
    """One that holds what every checkpoint of a training does, and nothing in it."""
    names = {"backbone": {"name": "tiny"}, "data": {"name": "scenes"}, "method": {"name": "kmeans_baseline"}}
    facts = {"format": FORMAT, "config": names, "classes": [], "palette": [], "backbone": ""}
    content = {"global_step": step, "epoch": 0, "state_dict": {}, "loops": {}, "callbacks": {}, "labelfree": facts}
    torch.save({**content, "optimizer_states": [], "lr_schedulers": []}, path)


def cfg(*words: str):
    return config.compose(words)


def test_a_name_is_made_once_a_process(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    name = run_name(cfg("method=hidden_positives"))
    assert name.startswith("hidden_positives-scenes-tiny-77-")  # and a mark of the configuration
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert run_name(cfg("method=hidden_positives")) == name  # further ranks inherit it


def test_a_trial_of_wandb_is_named_by_its_run_id(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "ab12cd34")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run_name(cfg()) == "kmeans_baseline-scenes-tiny-ab12cd34"


def test_names_that_are_no_folder_names(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_run(cfg(f"run.dir={tmp_path}", "run.name=a/b"))
    assert str(caught.value) == "run.name=a/b: expected a plain folder name; the parent folder is run.dir"


def test_states(tmp_path):
    words = [f"run.dir={tmp_path}", "run.name=x"]
    first = open_run(cfg(*words))
    assert (first.state, first.checkpoint) == ("new", None)
    assert not first.path.exists()
    first.create(cfg(*words))
    assert (tmp_path / "latest").resolve() == first.path.resolve()
    assert open_run(cfg(*words)).state == "new"  # killed before the first checkpoint
    save_checkpoint(3, first.last)
    again = open_run(cfg(*words, "trainer.progress=none"))  # how progress is shown is no other configuration
    assert (again.state, again.checkpoint) == ("resume", first.last)
    first.metrics.write_text("{}")
    assert open_run(cfg(*words)).state == "finished"
    with pytest.raises(ConfigError, match="already holds a run; choose another name"):
        open_run(cfg(*words, "run.resume=never"))
    assert open_run(cfg(*words, "run.overwrite=true")).state == "new"
    with pytest.raises(ConfigError, match=r"first difference seed \(0 -> 1\)"):
        open_run(cfg(*words, "seed=1"))


def test_resume_from_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        open_run(cfg(f"run.dir={tmp_path}", "run.name=x", f"run.resume={tmp_path}/no.ckpt"))
    assert str(caught.value) == (
        f"run.resume={tmp_path}/no.ckpt: no such file; expected auto, never or a checkpoint file"
    )


def test_overwrite_deletes_runs_only(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="exists and is no run folder"):
        open_run(cfg(f"run.dir={tmp_path}", "run.name=pictures", "run.overwrite=true"))
    mine = tmp_path / "mine" / "checkpoints"
    mine.mkdir(parents=True)
    (mine / "last.ckpt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"run\.overwrite=true: would delete .*; use another run\.name"):
        open_run(cfg(f"run.dir={tmp_path}", "run.name=mine", f"run.resume={mine}/last.ckpt", "run.overwrite=true"))
    with pytest.raises(ConfigError, match=r"^run\.name=latest: expected a plain folder name"):
        open_run(cfg(f"run.dir={tmp_path}", "run.name=latest"))


def test_a_run_that_never_began_does_not_block_its_name(tmp_path):
    open_run(cfg(f"run.dir={tmp_path}", "run.name=x", "data.batch_size=99")).create(cfg())
    assert open_run(cfg(f"run.dir={tmp_path}", "run.name=x", "data.batch_size=8")).state == "new"


def rows(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_history_grows_columns_and_drops_rows_after_a_resume(tmp_path):
    path = tmp_path / "metrics.csv"
    history = History(path)
    history.restore(0)
    history.add(1, {"a": 0.123456789})
    history.add(2, {"a": 1.0, "b": 2})
    history.add(3, {"b": 3})
    assert rows(path) == [
        {"step": "1", "a": "0.123457", "b": ""},
        {"step": "2", "a": "1", "b": "2"},
        {"step": "3", "a": "", "b": "3"},
    ]
    resumed = History(path)
    resumed.restore(2)
    resumed.add(3, {"b": 4})
    assert [row["b"] for row in rows(path)] == ["", "2", "4"]
    assert not list(tmp_path.glob(".*"))


def begun(parent, name, *words):
    """A run with a checkpoint."""
    folder = open_run(cfg(f"run.dir={parent}", f"run.name={name}", *words))
    folder.create(cfg(f"run.dir={parent}", f"run.name={name}", *words))
    save_checkpoint(3, folder.last)
    return folder


def test_a_checkpoint_of_another_run_does_not_take_the_place_of_a_run(tmp_path):
    other, mine = begun(tmp_path, "other"), begun(tmp_path, "mine", "seed=1")
    with pytest.raises(ConfigError) as caught:
        open_run(cfg(f"run.dir={tmp_path}", "run.name=mine", f"run.resume={other.last}"))
    assert str(caught.value) == (
        f"run.name=mine: {mine.path} holds a run already, and run.resume names a checkpoint of another one; choose "
        "another name, or run.overwrite=true to empty it"
    )
    assert open_run(cfg(f"run.dir={tmp_path}", "run.name=mine", f"run.resume={mine.last}")).checkpoint == mine.last


@pytest.mark.parametrize("word", ["run.overwrite=true", "run.resume={other}"])
def test_a_requeued_job_goes_on_whatever_it_began_with(word, tmp_path, monkeypatch):
    """SLURM starts the same words again: they were meant for the first start."""
    word = word.format(other=begun(tmp_path, "other").last)
    words = [f"run.dir={tmp_path}", "run.name=x", word]
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = open_run(cfg(*words))
    first.create(cfg(*words))
    save_checkpoint(5, first.last)
    if "overwrite" in word:
        assert open_run(cfg(*words)).emptied  # a second start by hand means what it says
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = open_run(cfg(*words))
    assert (again.state, again.checkpoint, again.emptied) == ("resume", first.last, False)
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # another job, as a restarted one finds a folder that is not its own
    if "overwrite" in word:
        assert open_run(cfg(*words)).emptied


def test_one_process_trains_in_a_folder(tmp_path):
    words = [f"run.dir={tmp_path}", "run.name=x"]
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "x")], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    folder = open_run(cfg(*words))
    with pytest.raises(ConfigError) as caught:
        folder.create(cfg(*words))
    assert str(caught.value) == (
        f"run.name=x: another process trains in {tmp_path / 'x'}; wait for it, stop it, or choose another name"
    )
    other.communicate("")
    folder.create(cfg(*words))
    folder.create(cfg(*words))  # this process may go on in it
    assert (folder.path / "config.yaml").is_file()


HOLDS = """
import sys
from pathlib import Path
from engine.records.run_lock import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_was_only_just_made_blocks_no_name(tmp_path):
    words = [f"run.dir={tmp_path}", "run.name=x"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".lock").touch()
    open_run(cfg(*words)).create(cfg(*words))
    emptied = open_run(cfg(*words, "run.overwrite=true"))
    (tmp_path / "x" / "panels" / "old.png").touch()
    emptied.create(cfg(*words, "run.overwrite=true"))
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [".lock", "checkpoints", "config.yaml", "panels"]
    assert not list((tmp_path / "x" / "panels").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "x"]


def test_runs_of_one_second_have_names_of_their_own(monkeypatch):
    names = set()
    for _ in range(3):
        monkeypatch.delenv("LABELFREE_RUN_NAME", raising=False)
        names.add(run_name(cfg()))
    assert len(names) == 3
