"""Pictures are opened in one place, by decoders that start no other program."""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

import run
from datamodules.files import opening, reading
from datamodules.files.reading import UnreadableError
from tests.datamodules.pictures import noise, save

ROOT = Path(opening.__file__).parents[2]
OPENING = {"open", "imread", "read_image", "decode_image"}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


@pytest.fixture
def trace(tmp_path, monkeypatch) -> Path:
    """A file that a Ghostscript in PATH makes when something starts it."""
    folder, found = tmp_path / "programs", tmp_path / "started"
    folder.mkdir()
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {found}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return found


def test_the_trace_is_left_where_pillow_opens_a_file_by_itself(tmp_path, trace):
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    with pytest.raises(OSError), Image.open(tmp_path / "a.png") as image:
        image.load()
    assert trace.exists()


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_no_reader_starts_a_program(tmp_path, trace, ending):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(POSTSCRIPT)
    for reader in (reading.read_picture, reading.read_label, reading.read_first_channel, reading.header_size):
        with pytest.raises(UnreadableError, match="not a kind of picture that is known"):
            reader(path)
    assert not trace.exists()


@pytest.mark.train
def test_no_command_starts_a_program(small_run, tmp_path, trace):
    checkpoint = f"ckpt={small_run('kmeans_baseline').folder / 'checkpoints' / 'last.ckpt'}"
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(POSTSCRIPT)
    save(pictures / "b.png", noise(48, 64))
    assert run.main(["predict", checkpoint, f"input={pictures}", f"output={out}"]) == 0
    assert run.main(["explain", checkpoint, f"image={pictures / 'a.png'}", "point=5,5", f"output={out}"]) == 2
    assert not trace.exists()


def test_nothing_else_in_the_project_opens_a_picture():
    found = []
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name == "datamodules/files/opening.py" or name.split("/")[0] in ("tests", "runs") or name.startswith("."):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in OPENING
                and ast.unparse(node.value) not in ("webbrowser",)
            ):
                opener = ast.unparse(node.value).split(".")[-1]
                if node.attr != "open" or opener == "Image":
                    found.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("PIL", "imageio", "cv2"):
                found += [f"{name}:{node.lineno}" for alias in node.names if alias.name in OPENING]
    assert found == []


@pytest.mark.parametrize("kind", sorted(opening.KINDS))
def test_every_declared_kind_is_read(tmp_path, kind):
    wanted = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(kind)
    if wanted and not features.check(wanted):
        pytest.skip(f"this Pillow has no {wanted}")
    picture = np.full((24, 32, 3), (200, 30, 90), np.uint8)
    for ending in opening.KINDS[kind]:
        path = tmp_path / f"a{ending.upper()}"
        drawn = Image.fromarray(picture).convert({".pbm": "1", ".pgm": "L"}.get(ending, "RGB"))
        drawn.save(path)
        assert reading.is_picture(path.name)
        assert reading.header_size(path) == (24, 32)
        got = reading.read_picture(path)
        assert np.abs(got.astype(int) - np.asarray(drawn.convert("RGB"))).max() <= 12


def test_kinds_that_need_others_are_not_declared():
    assert not {"EPS", "WMF", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG"} & set(opening.FORMATS)
    Image.init()
    assert set(opening.FORMATS) <= set(Image.OPEN)


def test_pipes_and_folders_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name, kind in {"pipe": "a pipe", "folder": "a folder", "link": "a device"}.items():
        with pytest.raises(UnreadableError, match=f"{kind}, not a plain file"):
            reading.read_picture(tmp_path / f"{name}.png")
