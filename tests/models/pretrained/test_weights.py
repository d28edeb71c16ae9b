"""Weight files: wrappers and prefixes taken off, wrong files refused by their first differing key, no code run."""

import argparse
import logging
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ConfigError, WeightsError
from models.pretrained import origins, weights

NET = OrderedDict(
    [
        ("cls_token", torch.Size([1, 1, 4])),
        ("pos_embed", torch.Size([1, 10, 4])),
        ("blocks.0.attn.qkv.weight", torch.Size([12, 4])),
        ("norm.weight", torch.Size([4])),
    ]
)


def make_state(prefix: str = "", value: float | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    make = torch.randn if value is None else lambda shape: torch.full(shape, value)
    return {prefix + key: make(shape) for key, shape in NET.items()}


def fit(content, **options):
    return weights.fit(content, NET, source="backbone.weights=w.pth", network="vit", **options)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda s: s(""), ""),
        (lambda s: {"state_dict": s("module.")}, "module."),
        (lambda s: {"teacher": s("module.backbone."), "student": s("backbone.", 9.0), "epoch": 3}, "module.backbone."),
        (lambda s: {"model": {"teacher": s("")}, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}, ""),
        (lambda s: {"state_dict": s("module.encoder_k.", 9.0) | s("module.encoder_q.")}, "module.encoder_q."),
        (lambda s: s("module.momentum_encoder.", 9.0) | s("module.base_encoder."), "module.base_encoder."),
        (lambda s: s("student.backbone.", 9.0) | s("teacher.backbone."), "teacher.backbone."),
        (lambda s: {"state_dict": s("net.trunk."), "loss": torch.zeros(())}, "net.trunk."),
    ],
)
def test_wrapped_files_are_unwrapped(wrap, prefix):
    fitted = fit(wrap(lambda prefix, value=None: make_state(prefix, value)))
    assert fitted.prefix == prefix
    for key, tensor in make_state().items():
        assert torch.equal(fitted.state[key], tensor)


def test_heads_are_dropped_and_counted():
    extra = {
        "head.mlp.0.weight": 1, "projection_head.2.bias": 1, "prototypes.weight": 1, "masked_embed": 1, "fc.weight": 1,
        "decoder_blocks.0.norm.weight": 1, "ibot_head.x": 1, "conv_last.weight": 1,
    }  # fmt: skip
    fitted = fit(make_state() | {key: torch.zeros(2) for key in extra}, unused=frozenset({"conv_last.weight"}))
    assert fitted.dropped == len(extra)
    assert list(fitted.state) == list(NET)


def test_a_key_of_the_network_is_never_taken_for_a_head():
    expected = {"head.norm.weight": torch.Size([4])}
    fitted = weights.fit({"head.norm.weight": torch.ones(4)}, expected, source="s", network="n")
    assert torch.equal(fitted.state["head.norm.weight"], torch.ones(4))
    assert fitted.dropped == 0


def test_half_precision_becomes_float32_and_counters_may_be_absent():
    expected = {"bn.weight": torch.Size([4]), "bn.num_batches_tracked": torch.Size([])}
    fitted = weights.fit({"bn.weight": torch.ones(4).half()}, expected, source="s", network="n")
    assert fitted.state["bn.weight"].dtype == torch.float32
    assert fitted.state["bn.num_batches_tracked"].dtype == torch.int64


def refusal(content, **options) -> str:
    with pytest.raises(WeightsError) as error:
        fit(content, **options)
    return str(error.value)


def test_wrong_shape_names_the_first_key():
    content = make_state() | {"blocks.0.attn.qkv.weight": torch.zeros(24, 8), "norm.weight": torch.zeros(8)}
    assert refusal(content) == (
        "backbone.weights=w.pth: not the weights of vit: first differing key blocks.0.attn.qkv.weight: "
        "expected [12, 4], found [24, 8] (2 keys differ, 4 expected); choose the file of backbone.timm=vit"
    )


def test_missing_key_is_refused():
    content = make_state()
    del content["norm.weight"]
    assert "first differing key norm.weight: expected [4], found no such key (1 keys differ" in refusal(content)


def test_unexpected_key_is_refused():
    content = make_state() | {"blocks.1.attn.qkv.weight": torch.zeros(12, 4)}
    assert "first differing key blocks.1.attn.qkv.weight: expected no such key, found [12, 4]" in refusal(content)


def test_file_of_another_network_is_refused():
    assert "first differing key cls_token: expected [1, 1, 4], found no such key (5 keys differ" in refusal(
        {"layer1.conv.weight": torch.zeros(3)}
    )


def test_position_embedding_of_another_grid_is_resampled():
    content = make_state() | {"pos_embed": torch.randn(1, 1 + 25, 4)}
    assert "first differing key pos_embed" in refusal(content)
    fitted = fit(content, grid=(3, 3), prefix_rows=1, rule="dino")
    expected = weights.positions.resample(content["pos_embed"], (5, 5), (3, 3), 1, "dino")
    assert torch.equal(fitted.state["pos_embed"], expected)


def test_translation_is_taken_only_where_it_helps():
    renamed = {key.replace("norm", "ln"): value for key, value in make_state().items()}
    fitted = fit(renamed, convert=lambda state: {key.replace("ln", "norm"): value for key, value in state.items()})
    assert list(fitted.state) == list(NET)

    def broken(state):
        raise KeyError("not mine")

    assert "first differing key norm.weight" in refusal(renamed, convert=broken)
    fitted = fit(make_state(), convert=broken)  # fits already: never asked
    assert list(fitted.state) == list(NET)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors", "w.pth.tar"])
def test_formats_are_read(tmp_path, name):
    path = tmp_path / name
    save_file(make_state(), path) if name.endswith("safetensors") else torch.save(make_state(), path)
    assert torch.equal(weights.read(path)["norm.weight"], make_state()["norm.weight"])


class Payload:
    """Unpickling it would leave a trace on disk."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": make_state(), "extra": Payload(tmp_path / "trace")}, path)
    with pytest.raises(WeightsError) as error:
        weights.read(path)
    assert str(error.value) == (
        f"backbone.weights={path}: the file holds pickled code (posix.mkdir), which is never run; "
        "save its state dict alone, best as .safetensors"
    )
    assert not (tmp_path / "trace").exists()


def test_settings_of_a_full_dino_checkpoint_are_read(tmp_path):
    path = tmp_path / "full.pth"
    torch.save({"teacher": make_state("backbone."), "args": argparse.Namespace(lr=0.1), "epoch": 1}, path)
    assert fit(weights.read(path)).prefix == "backbone."


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no weights", lambda data: b""])
def test_damaged_files_are_refused(tmp_path, name, damage):
    path = tmp_path / name
    save_file(make_state(), path) if name.endswith("safetensors") else torch.save(make_state(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError) as error:
        weights.read(path)
    assert str(error.value) == (
        f"backbone.weights={path}: cannot be read as a .pth, .pt or .safetensors file (cut off, or of another format)"
    )


def test_a_bare_tensor_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="expected a state dict, found Tensor"):
        weights.read(tmp_path / "w.pt")


def test_locate_words_and_files(tmp_path, monkeypatch):
    assert origins.locate("hub", "tiny", None) == "hub"
    assert origins.locate("none", "tiny", None) == "none"
    (tmp_path / "w.pth").touch()
    assert origins.locate(str(tmp_path / "w.pth"), "tiny", None) == tmp_path / "w.pth"
    monkeypatch.setattr(origins, "BUNDLED", tmp_path)
    (tmp_path / "other.safetensors").touch()
    assert origins.locate("bundled", "other", None) == tmp_path / "other.safetensors"
    with pytest.raises(WeightsError) as error:
        origins.locate("bundled", "tiny", None)
    assert str(error.value) == (
        "backbone.weights=bundled: no weights of tiny come with this version (bundled: other); "
        "set backbone.weights to hub, to a file, or to none (random and seeded)"
    )
    with pytest.raises(WeightsError) as error:
        origins.locate("bundeld", "tiny", None)
    assert str(error.value) == (
        "backbone.weights=bundeld: no such file; give a .pth, .pt or .safetensors file, or bundled, hub, none"
    )
    with pytest.raises(WeightsError) as error:
        origins.locate(None, "dino_vits8_300ep", "dino_deitsmall8_300ep_pretrain.pth of the DINO release")
    assert str(error.value) == (
        "backbone.weights=null: the weights of dino_vits8_300ep come from a file; get "
        "dino_deitsmall8_300ep_pretrain.pth of the DINO release and set backbone.weights=<file>"
    )


@pytest.mark.parametrize(
    "licence", ["cc-by-nc-4.0", "CC BY-NC-SA 3.0", "dinov3-license", "fair-noncommercial-research-license"]
)
def test_restricted_licences_need_acknowledgement(licence):
    with pytest.raises(ConfigError) as error:
        origins.expect_acknowledged(("apache-2.0", licence), "net.tag", False)
    assert str(error.value) == (
        f"backbone.acknowledge_licence=false: the weights of net.tag come under {licence}, which restricts "
        "their use; read its terms, then set backbone.acknowledge_licence=true"
    )
    origins.expect_acknowledged((licence,), "net.tag", True)


@pytest.mark.parametrize("licence", ["apache-2.0", "mit", "bsd-3-clause", None, "not stated by its authors"])
def test_open_licences_pass(licence):
    origins.expect_acknowledged((licence,), "net.tag", False)


def test_failed_download_is_one_clear_line(monkeypatch, caplog):
    import huggingface_hub

    def offline(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    with caplog.at_level(logging.INFO), pytest.raises(WeightsError) as error:
        weights.download("net.tag", {"hf_hub_id": "timm/net.tag", "url": ""})
    assert caplog.messages == ["fetching timm/net.tag from huggingface.co, once; HF_HUB_OFFLINE=1 never asks for it"]
    assert str(error.value) == (
        "backbone.weights=hub: net.tag (timm/net.tag) could not be downloaded (ConnectionError); no random weights "
        "were put in its place; set backbone.weights=<file>, or download it once where there is a network and use the "
        "same HF_HOME here (HF_HUB_OFFLINE=1 saves the waiting)"
    )
    with pytest.raises(WeightsError, match=r"timm publishes no weights for net; add a tag to backbone\.timm"):
        weights.download("net", {"hf_hub_id": None, "url": ""})


def test_identity_sees_names_shapes_and_values():
    state = make_state()
    same = weights.identity(dict(reversed(state.items())))
    assert weights.identity(state) == same
    assert len(same) == 16
    assert weights.identity(state | {"norm.weight": state["norm.weight"] + 1e-7}) != same
    assert weights.identity({key.replace("norm", "ln"): value for key, value in state.items()}) != same
    assert weights.identity(state | {"pos_embed": state["pos_embed"].reshape(1, 4, 10)}) != same
    assert len(weights.identity({"count": torch.zeros((), dtype=torch.int64), "half": torch.zeros(3).half()})) == 16
