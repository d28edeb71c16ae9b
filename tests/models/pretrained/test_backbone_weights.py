"""Backbones and their weights end to end: seeds, files, the hub's cache, licences, wrong settings, presets."""

import logging
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from common.errors import ConfigError, WeightsError
from models import backbone
from models.backbone import Backbone
from models.vit import positions
from tests.models.networks import PRESETS, REGISTERS, SMALL, make_cfg, make_cnn, refusal, shake

# ---- chance and fingerprints ----------------------------------------------------------------------------------------


def test_random_weights_come_from_the_seed(caplog):
    torch.manual_seed(1)
    stream = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first = Backbone(make_cfg(name="seeded"), seed=5)
    assert torch.equal(torch.get_rng_state(), stream)
    torch.rand(10)
    with caplog.at_level(logging.WARNING):
        again, other = Backbone(make_cfg(name="seeded"), seed=5), Backbone(make_cfg(name="seeded"), seed=6)
    for key, value in first.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[key])
    assert first.fingerprint == again.fingerprint != other.fingerprint
    said = [record.getMessage() for record in caplog.records]
    assert said.count("backbone seeded: random weights (vit_tiny_patch16_224, seed 5)") == 1
    assert first.licence == "none (random weights)"


def test_fingerprint_tells_weights_features_key_tells_settings():
    plain, levels = Backbone(make_cfg()), Backbone(make_cfg(levels=[0, 2]))
    assert plain.fingerprint == levels.fingerprint
    assert plain.features_key != levels.features_key
    assert plain.features_key != Backbone(make_cfg(pos_interp="dino")).features_key
    assert plain.fingerprint.startswith('vit_tiny_patch16_224 {"depth": 3, "embed_dim": 32')


# ---- weights, end to end --------------------------------------------------------------------------------------------


def saved_net(path: Path, name="vit_tiny_patch16_224", wrap=lambda state: state, **create) -> nn.Module:
    torch.manual_seed(3)
    net = timm.create_model(name, **create)
    shake(net)
    content = wrap(net.state_dict())
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return net


def test_wrapped_checkpoint_with_a_head(tmp_path, caplog):
    def wrap(state):
        return {"teacher": {f"module.backbone.{key}": value.half() for key, value in state.items()}, "epoch": 1}

    net = saved_net(tmp_path / "full.pth", wrap=wrap, **SMALL)
    with caplog.at_level(logging.INFO):
        model = Backbone(make_cfg(weights=str(tmp_path / "full.pth"), licence="mit", pretraining="ours"))
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, net.state_dict()[key].half().float())
    assert model.licence == "mit"
    assert caplog.records[-1].getMessage() == (
        f"backbone tiny: vit_tiny_patch16_224, weights {tmp_path / 'full.pth'} under module.backbone.; "
        "pre-training: ours; licence: mit"
    )


def test_position_embedding_of_another_size_is_resampled_by_the_rule(tmp_path):
    net = saved_net(tmp_path / "w.safetensors", **(SMALL | {"img_size": 48}))
    for rule in positions.RULES:
        model = Backbone(make_cfg(weights=str(tmp_path / "w.safetensors"), pos_interp=rule))
        expected = positions.resample(net.pos_embed, (6, 6), (4, 4), 1, rule)
        assert torch.allclose(model.net.pos_embed, expected)


def test_file_of_another_size_of_network(tmp_path):
    saved_net(tmp_path / "w.pth", **(SMALL | {"embed_dim": 64}))
    assert refusal(WeightsError, make_cfg(weights=str(tmp_path / "w.pth"))).startswith(
        f"backbone.weights={tmp_path / 'w.pth'}: not the weights of vit_tiny_patch16_224: first differing key "
        "cls_token: expected [1, 1, 32], found [1, 1, 64] ("
    )


def test_deeper_network_is_refused(tmp_path):
    saved_net(tmp_path / "w.pth", **(SMALL | {"depth": 4}))
    text = refusal(WeightsError, make_cfg(weights=str(tmp_path / "w.pth")))
    assert "first differing key blocks.3.norm1.weight: expected no such key, found [32]" in text


@pytest.mark.parametrize(
    ("name", "create"),
    [
        ("mobilenetv2_035", {}),
        ("resnet18", {"layers": [1, 1, 1, 1]}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    ],
)
def test_classifier_file_into_a_feature_network(tmp_path, name, create):
    net = saved_net(tmp_path / "w.pth", name, **create).eval()
    model = Backbone(make_cnn(timm=name, create=create, weights=str(tmp_path / "w.pth"), levels=[0, -1]))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = net.forward_intermediates((images - model.mean) / model.std, intermediates_only=True)
    found = model.features(images)
    for level, other in zip(found.levels, (expected[0], expected[-1]), strict=True):
        assert (level - other).norm() < 1e-3 * other.norm()
    assert not hasattr(model.net, "classifier")


def test_a_file_that_lacks_a_layer_is_refused(tmp_path):
    def wrap(state):
        return {key: value for key, value in state.items() if key != "layer2.0.bn1.running_mean"}

    saved_net(tmp_path / "w.pth", "resnet18", wrap, layers=[1, 1, 1, 1])
    text = refusal(WeightsError, make_cnn(weights=str(tmp_path / "w.pth")))
    assert "first differing key layer2.0.bn1.running_mean: expected [128], found no such key (1 keys differ" in text


def test_authors_names_of_dinov2_are_translated(tmp_path):
    def original(state):
        cls_row = torch.randn(1, 1, 32)
        state = dict(state)
        state["pos_embed"] = torch.cat([cls_row, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - cls_row
        state["register_tokens"] = state.pop("reg_token")
        return state | {"mask_token": torch.zeros(1, 32)}

    net = saved_net(tmp_path / "w.pth", REGISTERS, original, **SMALL)
    model = Backbone(make_cfg(timm=REGISTERS, weights=str(tmp_path / "w.pth")))
    for key, value in model.net.state_dict().items():
        assert torch.allclose(value, net.state_dict()[key], atol=1e-6), key


def test_selfpatch_checkpoint_without_class_token(tmp_path):
    cfg = OmegaConf.load(PRESETS / "selfpatch_vits16.yaml")
    cfg.create = dict(cfg.create) | SMALL

    def wrap(state):
        own = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("head.")}
        return {"teacher": own | {"ca_head.cls_token": torch.zeros(1, 1, 32), "p_head.mlp.0.weight": torch.zeros(2, 2)}}

    net = saved_net(tmp_path / "w.pth", cfg.timm, wrap, **cfg.create)
    cfg.weights = str(tmp_path / "w.pth")
    model = Backbone(cfg)
    assert torch.equal(model.net.pos_embed, net.pos_embed)
    assert model.net.pos_embed.shape == (1, 16, 32)
    found = model.features(torch.rand(1, 3, 40, 40), attention=True)
    assert (model.prefix, found.cls, found.attention.shape) == (0, None, (1, 2, 25, 25))
    whole = timm.create_model(cfg.timm, **SMALL)  # as HP loads it: a network with a class token, names may be missing
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        whole.load_state_dict(net.state_dict(), strict=False)
    refused = OmegaConf.merge(cfg, {"create": {"class_token": True, "global_pool": "token", "final_norm": True}})
    assert "first differing key cls_token" in refusal(WeightsError, refused)


def test_hub_weights_come_from_the_local_cache(tmp_path, monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k"
    folder = tmp_path / f"models--timm--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    net = saved_net(folder / "snapshots" / "abc" / "model.safetensors", name, **SMALL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = Backbone(make_cfg(timm=name, weights="hub"))
    assert torch.equal(model.net.blocks[2].mlp.fc2.weight, net.blocks[2].mlp.fc2.weight)
    assert model.licence == "apache-2.0"


def test_restricted_hub_weights_are_refused_before_any_download(monkeypatch):
    monkeypatch.setattr(backbone.weights, "download", lambda *args: pytest.fail("asked for the file"))
    cfg = make_cfg(timm="vit_base_patch16_224.mae", weights="hub", licence="mit")
    assert "the weights of vit_base_patch16_224.mae come under cc-by-nc-4.0" in refusal(ConfigError, cfg)


# ---- wrong settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (
            make_cfg(timm="vit_small_patch8_224.dinoo"),
            "backbone.timm=vit_small_patch8_224.dinoo: timm has no such network; "
            "did you mean vit_small_patch8_224.dino",
        ),
        (
            make_cfg(levels=[0, 3]),
            "backbone.levels=[0, 3]: expected different numbers from -3 to 2 (vit_tiny_patch16_224 has 3 blocks), "
            "or null for the last",
        ),
        (make_cfg(levels=[2, -1]), "backbone.levels=[2, -1]: expected different numbers from -3 to 2"),
        (make_cfg(levels=[]), "backbone.levels=[]: expected different numbers"),
        (make_cnn(levels=[5]), "backbone.levels=[5]: expected different numbers from -5 to 4 (resnet18 has 5 levels)"),
        (
            make_cfg(output_stride=8),
            "backbone.output_stride=8: vit_tiny_patch16_224 is a transformer and has none; set it to null",
        ),
        (make_cfg(pad_type="same"), "backbone.pad_type=same: vit_tiny_patch16_224 is a transformer and has none"),
        (make_cfg(precision="int8"), "backbone.precision=int8: not one of float32, bf16, fp16"),
        (
            make_cfg(precision="bf16", frozen=False),
            "backbone.precision=bf16: is for frozen backbones; with backbone.frozen=false set "
            "trainer.precision instead",
        ),
        (make_cfg(pos_interp="mae"), "backbone.pos_interp=mae: not one of dino, timm"),
        (
            make_cfg(timm="vit_small_patch16_dinov3", pos_interp="dino"),
            "backbone.pos_interp=dino: vit_small_patch16_dinov3 has no position embedding of DINO's kind; "
            "set backbone.pos_interp=timm",
        ),
        (make_cfg(create={"num_classes": 3}), "backbone.create.num_classes: cannot be set here"),
        (make_cfg(create={"depht": 3}), "backbone.timm=vit_tiny_patch16_224: timm cannot build it with depht=3"),
        (make_cfg(mean=[0.5]), "backbone.mean=[0.5], backbone.std=[0.5, 0.5, 0.5]: expected 3 numbers each"),
        (
            make_cfg(create=SMALL | {"final_norm": False}),
            "backbone.level_norm=true: vit_tiny_patch16_224 has no final norm; set it to false",
        ),
    ],
)
def test_wrong_settings(cfg, expected):
    assert refusal(ConfigError, cfg).startswith(expected)


# ---- presets --------------------------------------------------------------------------------------------------------

NAMES = [
    "densecl_resnet50", "dino_resnet50", "dino_vits16", "dino_vits8", "dino_vits8_300ep", "dino_vitb16", "dino_vitb8",
    "dinov2_vitb14_reg", "dinov2_vits14_reg", "dinov3_vits16", "mobilenetv2", "mobilenetv2_coral", "moco_v2_resnet50",
    "net10a", "ordered", "resnet101", "resnet18", "resnet50", "selfpatch_vits16", "swav_resnet50", "tiny",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_presets_hold_every_key_and_name_a_network(name):
    text = (PRESETS / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in text if not line.startswith("#")]
    assert keys[0] == f"name: {name}"
    assert all("#" in line for line in keys[1:] if not line.startswith(" "))
    cfg = OmegaConf.load(PRESETS / f"{name}.yaml")
    own = [key for key in ("eval_output_stride", "freeze_norms") if key in cfg]  # of convolutional networks
    assert own == ([] if cfg.timm.startswith(("vit", "deit")) else ["eval_output_stride", "freeze_norms"])
    assert [key for key in cfg if key not in own] == list(OmegaConf.load(PRESETS / "tiny.yaml"))
    assert bool(cfg.get("freeze_norms")) == (name == "mobilenetv2_coral")  # whose norms hold no statistics of pictures
    assert cfg.timm in timm.list_models() or cfg.timm in timm.list_models(pretrained=True)
    assert cfg.weights in ("hub", "bundled", "none", None)
    assert cfg.weights is not None or cfg.published_file
    if cfg.weights == "hub":
        card = timm.get_pretrained_cfg(cfg.timm)
        assert card.license == cfg.licence
        assert card.hf_hub_id


def test_the_bundled_tiny_is_complete_small_and_says_where_it_comes_from(caplog):
    backbone.origins.log_once.cache_clear()
    with caplog.at_level("INFO"):
        model = Backbone(OmegaConf.load(PRESETS / "tiny.yaml"))
    assert (backbone.origins.BUNDLED / "tiny.safetensors").stat().st_size < 4_000_000
    assert (backbone.origins.BUNDLED / "tiny.md").is_file()
    said = "pre-training: see models/pretrained/bundled/tiny.md; licence: that of this project"
    assert caplog.messages[-1].endswith(said)
    random = Backbone(make_cfg(**{**OmegaConf.load(PRESETS / "tiny.yaml"), "weights": "none"}))
    images = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(model.features(images).map, random.features(images).map, atol=0.1)


def test_tiny_is_small():
    model = Backbone(OmegaConf.load(PRESETS / "tiny.yaml"))
    assert model.stride == model.patch_multiple == 8
    assert model.dim == 2 * 160  # two blocks of it are read
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert model.has_attention
    assert model.features(torch.rand(1, 3, 128, 128)).map.shape == (1, 160, 16, 16)


def test_dinov3_needs_acknowledgement():
    text = refusal(ConfigError, OmegaConf.load(PRESETS / "dinov3_vits16.yaml"))
    expected = "backbone.acknowledge_licence=false: the weights of vit_small_patch16_dinov3.lvd1689m come under dinov3-"
    assert text.startswith(expected)


def test_presets_that_need_a_file_say_which():
    assert refusal(WeightsError, OmegaConf.load(PRESETS / "dino_vits8_300ep.yaml")) == (
        "backbone.weights=null: the weights of dino_vits8_300ep come from a file; get "
        "dino_deitsmall8_300ep_pretrain.pth of the DINO release and set backbone.weights=<file>"
    )
