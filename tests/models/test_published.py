"""`run.py weights`, and weights that are missing: exact lines, before any picture is read."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import config
import run
from common.errors import WeightsError
from datamodules.base import SegmentationDataModule
from models import published
from models.backbone import Backbone
from models.pretrained import origins

BUNDLED = Path(origins.BUNDLED) / "tiny.safetensors"


def settings(*words: str):
    return config.compose(["backbone=tiny", *words]).backbone


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache as the hub lays it out, whose repository holds the bundled weights; a list of what was downloaded."""
    fetched = []
    blob = tmp_path / "blobs" / published.sha256(BUNDLED)
    link = tmp_path / "snapshots" / "model.safetensors"

    def download(repo, name, revision=None):
        fetched.append((repo, name))
        for folder in (blob.parent, link.parent):
            folder.mkdir(exist_ok=True)
        shutil.copy(BUNDLED, blob)
        link.symlink_to(blob)
        return str(link)

    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(link) if link.is_symlink() else None
    )
    return fetched, blob


def hub_settings():
    words = ["backbone.weights=hub", "backbone.timm=vit_tiny_patch16_224.augreg_in21k", "backbone.licence=apache-2.0"]
    return settings(*words)


def test_weights_of_the_hub_are_described_fetched_and_held_against_their_sum(hub):
    fetched, blob = hub
    cfg = hub_settings()
    with pytest.raises(WeightsError) as error:
        list(published.report(cfg))
    assert str(error.value) == (
        "backbone.weights=hub: vit_tiny_patch16_224.augreg_in21k is not here yet; `run.py weights backbone=tiny "
        "fetch=true` fetches it where there is a network, and so does the first training"
    )
    assert fetched == []
    lines = list(published.report(cfg, fetch=True))
    assert fetched == [("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors")]
    assert "address  https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k" in lines
    assert "licence  apache-2.0" in lines
    assert lines[-1].endswith(f"3.7 MiB, sha256 {blob.name}, as published; fits the network")
    assert list(published.report(cfg, fetch=True))[-1] == lines[-1]
    assert len(fetched) == 1
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    with pytest.raises(WeightsError, match=r"is not that of the published file, .* delete it and fetch it again"):
        list(published.report(cfg))


def test_what_the_hub_states_is_said(hub, monkeypatch):
    stated = type("Stated", (), {"size": 3 * 2**20, "etag": "ab" * 32})
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: stated)
    cfg = hub_settings()
    found = published.origin(cfg)
    asked = published.ask_hub(found)
    assert f"size     3.0 MiB, sha256 {'ab' * 32}, as the hub says" in list(published.describe(found, asked))


def test_files_of_one_s_own_are_examined(tmp_path, capsys):
    assert run.main(["weights", "backbone=tiny"]) == 0
    assert "fits the network" in capsys.readouterr().out
    torch.save({"x": torch.zeros(2)}, tmp_path / "w.pth")
    assert run.main(["weights", "backbone=tiny", f"backbone.weights={tmp_path}/w.pth"]) == 2
    assert "not the weights of" in capsys.readouterr().err
    assert run.main(["weights", "fetch=yes", "backbone=tiny"]) == 2
    assert capsys.readouterr().err == "error: fetch=yes: expected true or false\n"
    assert run.main(["weights", "seed=3"]) == 2
    assert "name the backbone first, as in run.py weights backbone=dino_vits8" in capsys.readouterr().err


def test_the_sum_of_a_published_file_is_compared_where_it_is_known(tmp_path):
    shutil.copy(BUNDLED, tmp_path / "best.safetensors")
    own = [f"backbone.weights={tmp_path}/best.safetensors", "backbone.published_file=best.safetensors"]
    right = list(published.report(settings(*own, f"backbone.sha256={published.sha256(BUNDLED)}")))
    assert ", as published; fits the network" in right[-1]
    with pytest.raises(WeightsError, match="is not that of the published file"):
        list(published.report(settings(*own, "backbone.sha256=" + "0" * 64)))
    own[1] = "backbone.published_file=other.safetensors"  # a file of another name may be another one
    assert "as published" not in list(published.report(settings(*own, "backbone.sha256=" + "0" * 64)))[-1]


def test_what_is_pointed_at_is_there(capsys):
    root = Path(run.__file__).parent
    for words in ([], ["backbone=tiny"]):
        assert run.main(["weights", *words]) == 0
        pointed = re.findall(r"see (models/\S+)", capsys.readouterr().out)
        assert [(root / place).is_dir() for place in pointed] == [True]


def test_pages_say_the_numbers_of_the_bundled_network():
    """Those that its file holds; timm's network has a classifier besides."""
    found, root = published.origin(settings()), Path(run.__file__).parent
    assert found.numbers == sum(value.numel() for value in load_file(BUNDLED).values()) < found.published
    shown = found.numbers / 1e6
    assert f"network  vit_tiny_patch16_224 of timm, {shown:.1f} million numbers without its classifier" in list(
        published.describe(found, {})
    )
    for page in ("README.md", "docs/backbones.md", "configs/backbone/tiny.yaml"):
        assert f"{shown:.1f} million parameters" in (root / page).read_text(), page
    assert f"{shown:.2f} million parameters" in BUNDLED.with_suffix(".md").read_text()


def test_every_preset_has_a_line(capsys):
    assert run.main(["weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == config.names("backbone")


@pytest.mark.parametrize("command", ["train", "pseudo"])
def test_missing_weights_are_said_before_any_picture_is_read(tmp_path, monkeypatch, capsys, command):
    def read(*_):
        raise AssertionError("pictures were read")

    monkeypatch.setattr(SegmentationDataModule, "setup", read)
    method = "kmeans_baseline" if command == "train" else "normalized_cut"
    words = [command, f"method={method}", f"run.dir={tmp_path}", "trainer=cpu", f"backbone.weights={tmp_path}/no.pth"]
    assert run.main(words) == 2
    assert capsys.readouterr().err == (
        f"error: backbone.weights={tmp_path}/no.pth: no such file; give a .pth, .pt or .safetensors file, or bundled, "
        "hub, none\n"
    )


def test_a_network_takes_published_weights_from_the_cache(hub):
    cfg = hub_settings()
    published.expect_here(cfg)
    assert len(hub[0]) == 1
    assert Backbone(cfg).licence == "apache-2.0"
    assert len(hub[0]) == 1
