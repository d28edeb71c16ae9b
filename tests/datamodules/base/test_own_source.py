"""A data set of one's own whose code, files or yaml have a fault: one line each, and what it is about."""

import signal

import numpy as np
import pytest
import yaml

import config
import run
from common import ending
from common.errors import ConfigError, DataError, Stopped
from datamodules.base.dataset import read_pair
from datamodules.files.reading import UnreadableError
from lightning_modules.base import UnsupervisedSegmenter

PICTURE = np.zeros((4, 6, 3), np.uint8)


class Own:
    """Gives, or raises, what it is told."""

    def __init__(self, found: object) -> None:
        self.found = found

    def id(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> object:
        if isinstance(self.found, BaseException):
            raise self.found
        return self.found


def test_a_file_that_the_system_refuses_is_one_that_cannot_be_read():
    with pytest.raises(UnreadableError, match=r"^/data/a\.jpg: .*Input/output error"):
        read_pair(Own(OSError(5, "Input/output error", "/data/a.jpg")), 0, True)
    with pytest.raises(UnreadableError, match=r"picture 3: .*network is gone"):
        read_pair(Own(OSError("network is gone")), 3, True)


def test_a_signal_to_stop_is_no_fault_of_its_code():
    with pytest.raises(Stopped):
        read_pair(Own(Stopped(signal.SIGTERM, 3, saved=False)), 0, True)


@pytest.mark.parametrize("error", [KeyError("mask"), ValueError("bad"), IndexError("list index out of range")])
def test_a_fault_of_its_code_is_named_with_its_line(error):
    with pytest.raises(DataError) as caught:
        read_pair(Own(error), 2, True)
    assert str(caught.value).startswith(f"Own.read(2): {type(error).__name__}: {error} (test_own_source.py, line ")
    assert not isinstance(caught.value, UnreadableError)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (PICTURE, "gave no pair"),
        (None, "gave no pair"),
        ((PICTURE / 255.0, None), r"gave a picture float64 \[4, 6, 3\]"),
        ((PICTURE[..., 0], None), r"gave a picture uint8 \[4, 6\]"),
        ((PICTURE, np.zeros((6, 4), np.uint8)), r"gave a label uint8 \[6, 4\] for a picture \[4, 6, 3\]"),
        ((PICTURE, np.zeros((4, 6))), r"gave a label float64"),
    ],
)
def test_what_is_no_picture_with_its_label_is_refused(found, said):
    with pytest.raises(DataError, match=said):
        read_pair(Own(found), 0, True)


def test_a_yaml_without_a_key_that_all_have(monkeypatch, tmp_path):
    own = yaml.safe_load((config.CONFIGS / "data" / "folder.yaml").read_text())
    own["name"] = "own"
    (tmp_path / "data").mkdir()
    for key in config.CONFIGS.iterdir():
        if key.name != "data":
            (tmp_path / key.name).symlink_to(key)
    for path in (config.CONFIGS / "data").iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    del own["root"]
    (tmp_path / "data" / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(ConfigError) as caught:
        config.compose(["data=own"])
    assert str(caught.value) == (
        "data.root: configs/data/own.yaml lacks this key; copy it from configs/data/folder.yaml"
    )


def test_a_method_without_settings_of_its_parameters():
    cfg = config.compose(["method=stego"])
    made = type("Made", (), {"cfg": cfg})()
    settings = UnsupervisedSegmenter._settings
    assert settings(made, "head")["lr"] == cfg.optim.head.lr
    with pytest.raises(ConfigError) as caught:
        settings(made, "decoder")
    assert str(caught.value).startswith(
        "optim.decoder: configs/method/stego.yaml has no settings for this group of parameters, which stego trains; "
    )


def test_a_reader_that_is_killed_is_one_line(monkeypatch, capsys):
    def lost(words: list[str]) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setitem(run.COMMANDS, "train", lost)
    assert run.main(["train"]) == 2
    assert capsys.readouterr().err == f"error: {ending.LOST_READER}\n"
