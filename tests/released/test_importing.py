"""Released checkpoints become ours: same scores as the released order of operations, and one line where one differs."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import run
from common.errors import LabelfreeError
from engine import setup
from released import importing
from tests.conftest import read_json
from tests.datamodules import trees
from tests.released import released_files as files

SIZE = {"stego": 112, "hp": 224}
"""px: STEGO's position embedding is interpolated, HP's is at its own size."""


def words(origin: str, root: Path) -> list[str]:
    return [
        f"data.root={root}", f"data.eval_size={SIZE[origin]}", "data.train_size=112", "data.batch_size=2",
        "data.workers=0", "trainer.progress=none", "evaluation.kmeans.pictures=2", "evaluation.kmeans.restarts=1",
    ]  # fmt: skip


def batches(checkpoint: Path, origin: str, root: Path) -> list[dict]:
    """The validation pictures and labels as `eval` sees them."""
    cfg = config.restore(setup.read_checkpoint(checkpoint)["labelfree"]["config"], words(origin, root))
    _, data = setup.build_data(config.changed(cfg, {"trainer.accelerator": "cpu"}))
    return list(data.val_dataloader())


def expect_equal(metrics: dict, expected: dict, other: dict) -> None:
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, abs=0.03), key  # a pixel at a tie is 0.004 to 0.008
    assert any(abs(value - expected[key]) > 0.1 for key, value in other.items())  # so the comparison tells them apart


@pytest.mark.train
def test_scores_of_stego_are_those_of_the_released_order(tmp_path, capsys):
    content = files.stego(small=False)
    file, out = files.save(content, tmp_path / "potsdam_test.ckpt"), tmp_path / "imported" / "potsdam.ckpt"
    assert run.main(["import-checkpoint", "from=stego", f"file={file}", f"output={out}"]) == 0
    root = trees.potsdam(tmp_path / "tree")
    capsys.readouterr()
    assert run.main(["eval", f"ckpt={out}", *words("stego", root)]) == 0
    shown = capsys.readouterr().out
    metrics = read_json(out.parent / "eval" / "potsdam" / "metrics.json")

    state = content["state_dict"]
    parts = files.inside(state, "net."), files.inside(state, "linear_probe."), state["cluster_probe.clusters"]
    pictures = batches(out, "stego", root)
    expect_equal(metrics, *(files.scores(*parts, pictures, heads=6, flip=flip) for flip in (True, False)))

    assert metrics["protocol/flip"] is True
    assert metrics["val/cluster_crf/acc"] is not None
    assert metrics["steps"] == 4400
    assert {key: value for key, value in metrics.items() if key.startswith(("published/", "imported/"))} == {
        "published/cluster_crf/acc": 77.0,
        "published/source": "STEGO, ICLR 2022",
        "imported/from": "stego",
        "imported/file": "potsdam_test.ckpt",
    }
    line = next(line for line in shown.splitlines() if "cluster_crf" in line)
    assert line.replace("│", " ").split()[-2:] == ["77.0", "-"]
    assert "published: STEGO, ICLR 2022" in shown

    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "pictures" / "a.png")
    given = [f"input={tmp_path / 'pictures'}", f"output={tmp_path / 'maps'}", "predict.size=56", "data.workers=0"]
    assert run.main(["predict", f"ckpt={out}", *given]) == 0
    assert Image.open(tmp_path / "maps" / "index" / "a.png").size == (70, 50)


@pytest.mark.train
def test_scores_of_hp_are_those_of_the_released_order(tmp_path):
    content = files.hp(small=False)
    file, out = files.save(content, tmp_path / "ckpt.pth"), tmp_path / "hp.ckpt"
    root = trees.cityscapes(tmp_path / "tree")
    given = ["data=cityscapes27", *words("hp", root), "evaluation.crf=none"]
    assert run.main(["import-checkpoint", "from=hp", f"file={file}", f"output={out}", *given]) == 0
    assert run.main(["eval", f"ckpt={out}"]) == 0  # with no further word: all were kept
    metrics = read_json(tmp_path / "eval" / "hp" / "metrics.json")

    net, linear = content["net_model_state_dict"], content["linear_model_state_dict"]
    momentum = {key.replace("ema_model", "cluster"): value for key, value in net.items() if "cluster" not in key}
    clusters = content["cluster_model_state_dict"]["clusters"]
    pictures = batches(out, "hp", root)
    expect_equal(
        metrics, *(files.scores(part, linear, clusters, pictures, heads=6, flip=False) for part in (net, momentum))
    )
    checkpoint = setup.read_checkpoint(out)
    assert torch.equal(checkpoint["state_dict"]["momentum_head.copy.nonlinear.2.bias"], net["ema_model2.2.bias"])
    assert checkpoint["labelfree"]["imported"] == {"from": "hp", "file": "ckpt.pth", "recipe": None}  # none on ViT-S/16


def imported(tmp_path: Path, origin: str, content: dict, *given: str) -> dict:
    file, out = files.save(content, tmp_path / "file"), tmp_path / "out.ckpt"
    importing.import_checkpoint(origin, file, out, list(given))
    return setup.read_checkpoint(out)


def test_saved_settings_go_into_the_configuration(tmp_path, caplog):
    caplog.set_level("INFO")
    content = files.stego(dim=9, classes=27, extra=2, dataset_name="cityscapes", projection_type="linear")
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if "cluster2" not in key}
    checkpoint = imported(tmp_path, "stego", content, "seed=4")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):  # so the import has something to say
        torch.load(tmp_path / "file", weights_only=True)
    cfg = config.restore(checkpoint["labelfree"]["config"])
    assert [cfg.method.name, cfg.data.name, cfg.backbone.name] == ["stego", "cityscapes27", "dino_vits8_300ep"]
    assert [cfg.method.dim, cfg.method.num_clusters, cfg.method.projection] == [9, 29, "linear"]
    assert (cfg.method.terms["self"].weight, cfg.method.terms["self"].shift) == (0.67, 0.08)
    assert (cfg.method.terms.random.weight, cfg.method.terms.random.shift) == (0.5, 0.46)
    assert [cfg.seed, cfg.evaluation.flip, cfg.evaluation.crf] == [4, True, "dense"]
    assert cfg.backbone.weights == str(tmp_path / "out.backbone.safetensors")
    assert len(checkpoint["labelfree"]["classes"]) == 27
    assert setup.restore_model(checkpoint, cfg).cluster_probe.clusters.shape == (29, 9)
    said = "\n".join(caplog.messages)
    assert "holds saved objects (tests.released.released_files.Draws, collections.defaultdict, " in said
    assert "which torch.load(weights_only=True) refuses; tensors and plain values alone were read" in said
    assert "2 clusters beyond the classes: evaluation.extra=merge here" in said


def test_a_known_recipe_gives_its_settings_and_its_figure(tmp_path, caplog):
    caplog.set_level("INFO")
    checkpoint = imported(tmp_path, "hp", files.hp(dim=11, patch=8), "data=cocostuff27")
    cfg = config.restore(checkpoint["labelfree"]["config"])
    assert checkpoint["labelfree"]["imported"]["recipe"] == "hidden_positives_cocostuff27_vits8"
    assert [cfg.method.dim, cfg.method.temperature, cfg.backbone.precision] == [11, 0.8, "float32"]
    assert checkpoint["global_step"] == 700
    assert "57.2 acc / 24.6 mIoU, linear_crf 75.6 acc / 42.7 mIoU (HP, CVPR" in caplog.text
    resumed = tmp_path / "out.ckpt"
    with pytest.raises(LabelfreeError) as caught:  # before the folder of the run is made
        run.train(
            [
                "experiment=hidden_positives_cocostuff27_vits8", "data.batch_size=2", "trainer=cpu",
                f"run.resume={resumed}", f"run.dir={tmp_path / 'runs'}", "backbone.precision=float32",
                f"backbone.weights={cfg.backbone.weights}", f"data.root={trees.coco(tmp_path / 'tree')}",
            ]
        )  # fmt: skip
    assert str(caught.value) == (
        f"run.resume: {resumed} was imported; a release holds no optimiser, pool or projection to go on with, so it "
        "can be evaluated and used by predict, and training starts without it"
    )
    assert not (tmp_path / "runs").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, origin: str, content: dict, *given: str, output: str = "out.ckpt") -> str:
    file = files.save(content, tmp_path / "file")
    with pytest.raises(LabelfreeError) as caught:
        importing.import_checkpoint(origin, file, tmp_path / output, list(given))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    return str(caught.value).replace(str(tmp_path), "TMP")


def changed(origin: str, key: str, value: torch.Tensor | None) -> dict:
    """A file with one tensor replaced, added, or (None) left out."""
    content = files.stego() if origin == "stego" else files.hp()
    entry, _, name = key.partition(".")
    if value is None:
        del content[entry][name]
    else:
        content[entry][name] = value
    return content


STEGO, HP = "state_dict.", "net_model_state_dict."


@pytest.mark.parametrize(
    ("origin", "key", "value", "expected", "found"),
    [
        ("stego", STEGO + "net.model.blocks.11.mlp.fc2.bias", None, "[384]", "no such key"),
        ("stego", STEGO + "net.model.blocks.3.attn.qkv.weight", torch.ones(384, 384), "[1152, 384]", "[384, 384]"),
        ("stego", STEGO + "net.model.blocks.12.norm1.bias", torch.ones(384), "no such key", "[384]"),
        ("stego", STEGO + "net.model.pos_embed", torch.ones(1, 197, 384), "[1, 785, 384]", "[1, 197, 384]"),
        ("stego", STEGO + "net.cluster1.0.weight", None, "[D, C, 1, 1]", "no such key"),
        ("stego", STEGO + "net.cluster1.0.bias", torch.ones(13), "[12]", "[13]"),
        ("stego", STEGO + "net.cluster2.2.weight", None, "[12, 384, 1, 1]", "no such key"),
        ("stego", STEGO + "linear_probe.weight", torch.ones(3, 12), "[classes, D, 1, 1]", "[3, 12]"),
        ("stego", STEGO + "cluster_probe.clusters", torch.ones(3, 13), "[3, 12]", "[3, 13]"),
        ("stego", STEGO + "decoder.bias", torch.ones(384, dtype=torch.int64), "[384]", "torch.int64 [384]"),
        ("stego", STEGO + "teacher.weight", torch.ones(2), "no such key", "[2]"),
        ("hp", HP + "ema_model2.0.bias", None, "[384]", "no such key"),
        ("hp", HP + "cluster2.0.weight", None, "[384, 384, 1, 1]", "no such key"),
        ("hp", HP + "model.patch_embed.proj.weight", torch.ones(384, 4, 16, 16), "[C, 3, p, p]", "[384, 4, 16, 16]"),
        ("hp", "linear_model_state_dict.bias", None, "[27]", "no such key"),
        ("hp", "cluster_model_state_dict.clusters", torch.ones(27), "[K, D]", "[27]"),
        ("hp", "cluster_model_state_dict.more", torch.ones(1), "no such key", "[1]"),
    ],
)
def test_the_first_key_that_differs_is_named(tmp_path, origin, key, value, expected, found):
    assert refusal(tmp_path, origin, changed(origin, key, value), "data=cityscapes27") == (
        f"file=TMP/file: no released checkpoint of {origin}: first differing key {key}: expected {expected}, "
        f"found {found}; give the file as its authors released it"
    )


def test_what_is_no_tensor_and_what_is_not_finite_is_named(tmp_path):
    content = files.hp()
    content["linear_model_state_dict"]["bias"] = [1.0]
    assert "first differing key linear_model_state_dict.bias: expected [27], found no tensor;" in refusal(
        tmp_path, "hp", content
    )
    content = changed("hp", "linear_model_state_dict.bias", torch.full((27,), torch.nan))
    assert refusal(tmp_path, "hp", content) == (
        "file=TMP/file: linear_model_state_dict.bias: holds values that are not finite; fetch it again"
    )


def test_files_of_the_other_release_or_of_none_are_refused(tmp_path):
    assert refusal(tmp_path, "stego", files.hp()) == (
        "file=TMP/file: holds no state_dict, so it is no released checkpoint of stego; it looks like from=hp"
    )
    assert refusal(tmp_path, "hp", files.stego()) == (
        "file=TMP/file: holds no net_model_state_dict, so it is no released checkpoint of hp; it looks like from=stego"
    )
    assert refusal(tmp_path, "hp", {"x": 1}) == (
        "file=TMP/file: holds no net_model_state_dict, so it is no released checkpoint of hp"
    )
    two_lines = changed("hp", "linear_model_state_dict.a\nerror: b", torch.ones(1))
    assert refusal(tmp_path, "hp", two_lines).startswith("file=TMP/file: cannot be read as a file of torch.save (")
    assert refusal(tmp_path, "hp", torch.ones(2)).startswith("file=TMP/file: holds no net_model_state_dict")
    assert refusal(tmp_path, "steg", files.stego()) == "from=steg: no such release; did you mean stego?"


def test_networks_that_cannot_be_built_are_refused(tmp_path):
    assert refusal(tmp_path, "stego", files.stego(dino_feat_type="KK")) == (
        "file=TMP/file: its saved settings have dino_feat_type=KK, and codes of dino_feat_type=feat alone are built "
        "here; choose another checkpoint"
    )
    pyramid = files.stego(arch="feature-pyramid")  # a CNN: told by its settings before its keys
    pyramid["state_dict"] = {"net.encoder.weight": torch.ones(2)}
    assert "its saved settings have arch=feature-pyramid, and codes of arch=dino" in refusal(tmp_path, "stego", pyramid)
    assert refusal(tmp_path, "stego", files.stego(projection_type=None)) == (
        "file=TMP/file: its saved settings have projection_type=None, so its codes are the features themselves; use "
        "method=kmeans_baseline"
    )
    assert refusal(tmp_path, "hp", files.hp(channels=192)) == (
        "file=TMP/file: net_model_state_dict.model.patch_embed.proj.weight: a backbone of 192 channels and patches of "
        "16 px; there are presets of those of 384 and 768 channels (8 or 16 px)"
    )
    assert refusal(tmp_path, "stego", files.stego(extra=-1)) == (
        "file=TMP/file: state_dict.cluster_probe.clusters: 2 clusters, fewer than its 3 classes"
    )


def test_words_that_do_not_fit_are_refused(tmp_path):
    assert refusal(tmp_path, "hp", files.hp()) == (
        "data: TMP/file does not say its data set (27 classes); add data=cocostuff27 or data=cityscapes27"
    )
    assert refusal(tmp_path, "hp", files.hp(), "data=potsdam3") == (
        "data=potsdam3: has 3 classes, and the linear probe of TMP/file has 27; name the data set that it was "
        "trained on"
    )
    assert refusal(tmp_path, "stego", files.stego(dataset_name="directory")) == (
        "data: TMP/file names the data set directory (3 classes); add data=potsdam3"
    )
    assert refusal(tmp_path, "hp", files.hp(), "data=folder") == (
        "data.root: data=folder needs a folder of pictures; set data.root=<folder>"
    )
    assert refusal(tmp_path, "hp", files.hp(), "data=scenes").startswith("data=scenes: has 12 classes, and the linear")
    for word in ("method=stego", "backbone=tiny", "method.dim=7", "backbone.weights=none"):
        assert refusal(tmp_path, "hp", files.hp(), word) == (
            f"{word}: follows from the file; only data and values such as data.root can be given"
        )
    assert refusal(tmp_path, "hp", files.hp(), output="out.pth") == (
        "output=TMP/out.pth: expected a file name that ends in .ckpt, as in output=imported/hp.ckpt"
    )
    assert refusal(tmp_path, "hp", files.hp(), "data=cityscapes27", "data.rot=x").startswith(
        "data.rot: no such key; did you mean data.root?"
    )


def test_nothing_is_overwritten(tmp_path):
    file = files.save(files.hp(), tmp_path / "file")
    for name in ("out.ckpt", "out.backbone.safetensors"):
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(LabelfreeError) as caught:
            importing.import_checkpoint("hp", file, tmp_path / "out.ckpt", ["data=cityscapes27"])
        assert str(caught.value) == (
            f"output={tmp_path}/out.ckpt: {path} exists already; choose another name, or delete it first"
        )
        assert path.read_text() == "mine"
        path.unlink()


def test_the_command_asks_for_its_words(capsys):
    assert run.main(["import-checkpoint", "from=hp", "file=x"]) == 2
    assert capsys.readouterr().err == "error: output: is needed; write output=… (OUTPUT=… of make)\n"
    assert run.main(["import-checkpont"]) == 2
    assert "did you mean import-checkpoint?" in capsys.readouterr().err
