"""Files of a run that a disk or an editor has spoilt: one line, and where there is a way the run goes on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from engine import checkpoints, setup
from engine.records.run_folder import History, RunFolder, open_run
from tests.conftest import small_words
from tests.engine.test_lossless import METHOD, cfg_of, copied, expect_same, run_small, stopped

__all__ = ["copied", "stopped"]
pytestmark = pytest.mark.train


def end_record(path: Path) -> None:
    """A byte behind the zip's table of contents: Python's reader reads the archive all the same, torch's does not."""
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    assert checkpoints.damage(path) is None
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return harm


HARMS = {
    "end record": end_record,
    "no labelfree": rewritten(lambda c: c.pop("labelfree")),
    "no config": rewritten(lambda c: c["labelfree"].pop("config")),
    "config no mapping": rewritten(lambda c: c["labelfree"].update(config=[1])),
    "no method": rewritten(lambda c: c["labelfree"]["config"].pop("method")),
    "no format": rewritten(lambda c: c["labelfree"].pop("format")),
    "no classes": rewritten(lambda c: c["labelfree"].pop("classes")),
    "no state_dict": rewritten(lambda c: c.pop("state_dict")),
    "state_dict of text": rewritten(lambda c: c["state_dict"].update(x="y")),
    "no step": rewritten(lambda c: c.pop("global_step")),
    "step of text": rewritten(lambda c: c.update(global_step="6")),
}
OF_TRAINING = {
    "no optimiser": rewritten(lambda c: c.pop("optimizer_states")),
    "no loops": rewritten(lambda c: c.pop("loops")),
    "no callbacks": rewritten(lambda c: c.pop("callbacks")),
}


@pytest.mark.parametrize("harm", [*HARMS, *OF_TRAINING])
def test_a_run_goes_on_from_the_checkpoint_before(harm, copied, caplog):
    last = copied / "checkpoints" / "last.ckpt"
    (HARMS | OF_TRAINING)[harm](last)
    folder = open_run(cfg_of(copied))
    assert (folder.state, folder.checkpoint, list(folder.damaged)) == ("resume", folder.previous, [last])
    (line,) = [line for line in caplog.messages if "is damaged" in line]
    assert line.endswith("and skipped; going on from previous.ckpt, step 4")


def lines(capfd, *words: str) -> list[str]:
    """What a command that is refused says, without what it does before that."""
    assert run.main(list(words)) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith("error:")]


UNFIT = {
    "missing": lambda c: c["state_dict"].pop("cluster_probe.clusters"),
    "further": lambda c: c["state_dict"].update(further=torch.zeros(2)),
    "other shape": lambda c: c["state_dict"].update({"cluster_probe.clusters": torch.zeros(3, 5)}),
}


@pytest.mark.parametrize("harm", [*HARMS, *UNFIT])
def test_other_commands_say_what_is_wrong(harm, copied, capfd, tmp_path):
    last = copied / "checkpoints" / "last.ckpt"
    (HARMS | {name: rewritten(change) for name, change in UNFIT.items()})[harm](last)
    (line,) = lines(capfd, "eval", f"ckpt={last}", "trainer.progress=none")
    assert line.startswith("error: ckpt: the weights do not fit" if harm in UNFIT else f"error: ckpt={last}: ")


OPTIMISER = {
    "no children": lambda c: c["optimizer_states"][0].clear(),
    "of other weights": lambda c: [
        entry.update(exp_avg=torch.zeros(3))
        for child in c["optimizer_states"][0]["children"] for entry in child["state"].values()
    ],
}  # fmt: skip


@pytest.mark.parametrize("harm", [*OF_TRAINING, *UNFIT, *OPTIMISER])
def test_a_training_says_what_it_cannot_go_on_from(harm, copied, capfd, tmp_path):
    other = tmp_path / "other.ckpt"
    shutil.copyfile(copied / "checkpoints" / "last.ckpt", other)
    known = OF_TRAINING | {name: rewritten(change) for name, change in (UNFIT | OPTIMISER).items()}
    known[harm](other)
    words = small_words(METHOD, f"run.dir={tmp_path}", "run.name=new", f"run.resume={other}")
    (line,) = lines(capfd, "train", *words)
    assert line.startswith("error: run.resume")
    assert str(other) in line


def test_a_checkpoint_whose_settings_have_another_type(copied, capfd):
    last = copied / "checkpoints" / "last.ckpt"
    rewritten(lambda c: c["labelfree"]["config"]["trainer"].update(max_steps="many"))(last)
    (line,) = lines(capfd, "eval", f"ckpt={last}")
    assert line == "error: the checkpoint's trainer.max_steps=many: expected a whole number, got a text"
    rewritten(lambda c: c["labelfree"]["config"].update(trainer=3))(last)
    setup.read_checkpoint(last)


# ---------------------------------------------------------------- metrics


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("cell", ["three", "", "3,3", '"', "\0", "ü", "-3"])
def test_rows_that_cannot_be_read_are_dropped(cell, tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    history = History(path)
    history.restore(0)
    for step in (1, 2, 3, 4):
        history.add(step, {"a": 0.5, "b": 1.5})
    spoil(path, "\n3,", f"\n{cell},")
    resumed = History(path)
    resumed.restore(4)
    assert [row["step"] for row in resumed.rows] == ["1", "2", "4"]
    assert caplog.messages == [f"{path}: 1 of 4 rows cannot be read; they are left out"]
    caplog.clear()
    History(path).restore(4)
    assert not caplog.messages


def test_a_run_with_spoilt_rows_goes_on(copied, small_run, caplog):
    spoil(copied / "metrics.csv", "\n3,", "\nthree,")
    run_small(METHOD, copied.parent, "r")
    (line,) = [line for line in caplog.messages if "cannot be read" in line]
    assert re.fullmatch(rf"{copied / 'metrics.csv'}: 1 of \d+ rows cannot be read; they are left out", line)
    said = f"{copied / 'metrics.csv'} is not what the run had written by step 6; its rows are taken as they are"
    assert said in caplog.messages
    again = setup.read_checkpoint(copied / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in small_run(METHOD).weights.items())


def test_nothing_is_said_of_a_whole_history(copied, small_run, caplog):
    run_small(METHOD, copied.parent, "r")
    expect_same(copied, small_run(METHOD))
    assert not [line for line in caplog.messages if "metrics.csv" in line]


def a_finished_run(small_run, tmp_path) -> Path:
    return Path(shutil.copytree(small_run(METHOD).folder, tmp_path / "r"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ('{"method": ', "Expecting value: line 1 column 12 (char 11)"),
        ("[1]", "no object"),
        ("{}", "it has no `method`"),
        ("[" * 100000, "nested too deeply"),
        (None, 'its `seed` is "zero"'),
    ],
)
def test_a_spoilt_metrics_json_is_a_line(content, reason, small_run, tmp_path, capfd):
    folder = a_finished_run(small_run, tmp_path)
    path = folder / "metrics.json"
    if content is None:
        content = json.dumps(json.loads(path.read_text()) | {"seed": "zero"})
    path.write_text(content)
    words = small_words(METHOD, f"run.dir={tmp_path}", "run.name=r")
    assert lines(capfd, "train", *words) == [
        f"error: {path}: is not what a run writes ({reason}); delete it, then the same training or evaluation writes "
        "it anew"
    ]
    (line,) = lines(capfd, "compare", f"runs={folder}", f"run.dir={tmp_path}")
    assert line.startswith(f"error: {path}: is not what a run writes ({reason}); ")


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
@pytest.mark.parametrize("content", ["", "[1]", "method: 3", "{}", "\xff"])
def test_other_spoilt_files_of_a_run_are_lines(name, content, small_run, tmp_path, capfd):
    folder = a_finished_run(small_run, tmp_path)
    (folder / name).write_bytes(content.encode("latin-1"))
    (line,) = lines(capfd, "compare", f"runs={folder}", f"run.dir={tmp_path}")
    assert line.startswith(f"error: {folder / name}: is not ")


def test_spoilt_tables_of_a_finished_run_lose_rows(small_run, tmp_path, caplog):
    folder = a_finished_run(small_run, tmp_path)
    for name, old, new in (
        ("metrics.csv", "\n3,", "\nx,"),
        ("classes.csv", "\n3,", "\nx,"),
        ("clusters.csv", "\n3,", "\nx,"),
    ):
        spoil(folder / name, old, new)
    assert run.main(["compare", f"runs={folder}", f"run.dir={tmp_path}"]) == 0
    for name in ("metrics.csv", "classes.csv", "clusters.csv"):
        assert [line for line in caplog.messages if line.startswith(f"{folder / name}: 1 of ")], name


# ---------------------------------------------------------------- a run folder that is a link


def test_overwriting_a_run_folder_that_is_a_link_empties_what_it_points_at(tmp_path):
    big, link = tmp_path / "big" / "m", tmp_path / "runs" / "m"
    for folder in (big / "checkpoints", link.parent):
        folder.mkdir(parents=True)
    (big / "config.yaml").write_text("seed: 1\n")
    for name in ("metrics.json", "checkpoints/last.ckpt"):
        (big / name).write_text("old")
    (big / "elsewhere").symlink_to(tmp_path)
    link.symlink_to(big)
    cfg = run_cfg(link, "run.overwrite=true")
    open_run(cfg).create(cfg)
    assert link.is_symlink()
    assert sorted(path.name for path in big.iterdir()) == [".lock", "checkpoints", "config.yaml", "panels"]
    assert not list((big / "checkpoints").iterdir())
    assert "max_steps: 8" in (big / "config.yaml").read_text()
    assert tmp_path.is_dir()
    assert sorted(path.name for path in link.parent.iterdir()) == ["latest", "m"]


def run_cfg(folder: Path, *words: str):
    import config

    return config.compose(small_words(METHOD, f"run.dir={folder.parent}", f"run.name={folder.name}", *words))


def test_a_link_to_nowhere_is_a_line(tmp_path, capfd):
    (tmp_path / "m").symlink_to(tmp_path / "gone")
    (line,) = lines(capfd, "train", *small_words(METHOD, f"run.dir={tmp_path}", "run.name=m"))
    assert line == (
        f"error: run.name=m: {tmp_path / 'm'} is a link to {tmp_path / 'gone'}, where there is no folder; make it, or "
        "remove the link"
    )
    assert not (tmp_path / "gone").exists()


def test_ctrl_c_inside_a_checkpoint_is_ctrl_c(tmp_path):
    """torch's writer makes an error about positions of it."""

    class Interrupted:
        def __init__(self, error: BaseException) -> None:
            self.file, self.error = (tmp_path / "x").open("wb"), error

        def write(self, content: Any) -> int:
            if self.file.tell() > 100:
                raise self.error
            return self.file.write(content)

        def flush(self) -> None:
            self.file.flush()

    for error in (KeyboardInterrupt(), OSError(5, "Input/output error")):
        with pytest.raises(type(error)) as caught:
            checkpoints.write({"x": torch.zeros(1000)}, Interrupted(error))
        assert caught.value is error


def test_a_whole_run_folder_has_nothing_to_complain_about(copied):
    assert RunFolder(copied, "new").last.is_file()
    assert all(checkpoints.trouble(path) is None for path in (copied / "checkpoints").iterdir())
