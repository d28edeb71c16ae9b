"""Files in the formats in which ResNet-50 was released by others: their presets take the network out and refuse others.

Made here with random weights and one block a stage; no released file is at hand.
"""

from collections.abc import Callable

import pytest
import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import config
from common.errors import ConfigError, WeightsError
from models.backbone import Backbone
from tests.models.networks import PRESETS, refusal, shake

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}
State = dict[str, Tensor]


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def moco(state: State) -> dict:
    """A checkpoint of the training: both encoders with their heads, and the queue."""
    head = {"fc.0.weight": torch.ones(4, 4), "fc.0.bias": torch.ones(4), "fc.2.weight": torch.ones(2, 4)}
    slow = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    whole = under("module.encoder_k.", slow | head) | under("module.encoder_q.", state | head)
    whole |= {"module.queue": torch.ones(4, 8), "module.queue_ptr": torch.zeros(1)}
    return {"epoch": 800, "arch": "resnet50", "state_dict": whole, "optimizer": {"state": {}, "param_groups": []}}


def swav(state: State) -> dict:
    """The bare state of a network that ran on several GPUs, with its projection head and prototypes."""
    head = {"projection_head.0.weight": torch.ones(4, 4), "projection_head.1.running_mean": torch.ones(4)}
    return under("module.", state | head | {"prototypes.weight": torch.ones(6, 4)})


def dino(state: State) -> dict:
    """The backbone alone."""
    return dict(state)


def dino_full(state: State) -> dict:
    """A checkpoint of the training, student and teacher with their heads."""
    head = {"head.mlp.0.weight": torch.ones(4, 4), "head.last_layer.weight_g": torch.ones(4, 1)}
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    student = under("module.backbone.", other) | under("module.", head)
    return {"student": student, "teacher": under("backbone.", state) | head, "epoch": 800}


def densecl(state: State) -> dict:
    """What its release extracts of a checkpoint: torchvision's names (assumed)."""
    return {"state_dict": dict(state), "author": "DenseCL"}


FORMATS = [
    ("moco_v2_resnet50", moco), ("swav_resnet50", swav), ("dino_resnet50", dino), ("dino_resnet50", dino_full),
    ("densecl_resnet50", densecl),
]  # fmt: skip
WORKED = {"acknowledge_licence": True, "create": SMALL}


def weights_of(network: str = "resnet50", **create) -> State:
    torch.manual_seed(3)
    net = timm.create_model(network, num_classes=0, **create)
    shake(net)
    return net.state_dict()


def preset(name: str, path, **changes) -> DictConfig:
    return OmegaConf.merge(OmegaConf.load(PRESETS / f"{name}.yaml"), WORKED, {"weights": str(path)}, changes)


@pytest.mark.parametrize(("name", "wrap"), FORMATS, ids=lambda value: getattr(value, "__name__", value))
def test_the_network_is_taken_out_of_the_released_format(tmp_path, name: str, wrap: Callable):
    state, path = weights_of(**SMALL), tmp_path / "file.pth.tar"
    torch.save(wrap(state), path)
    model = Backbone(preset(name, path, frozen=False))
    held = model.exported()
    assert held.keys() == state.keys()
    for key, value in held.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(("name", "wrap"), FORMATS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_file_is_refused_in_one_line(tmp_path, name: str, wrap: Callable):
    state, path = weights_of(**SMALL), tmp_path / "file.pth"
    for wrong, said in (
        (weights_of("resnet18", **SMALL), "first differing key layer1.0.conv1.weight: expected [8, 64, 1, 1]"),
        (weights_of(**SMALL | {"layers": [1, 1, 1, 2]}), "layer4.1.conv1.weight: expected no such key"),
        ({key: value for key, value in state.items() if key != "layer3.0.bn2.weight"}, "key layer3.0.bn2.weight"),
        ({"blocks.0.norm1.weight": torch.ones(4)}, "first differing key conv1.weight"),
    ):
        torch.save(wrap(wrong), path)
        text = refusal(WeightsError, preset(name, path))
        assert text.startswith(f"backbone.weights={path}: not the weights of resnet50.tv_in1k: ")
        assert said in text
        assert "\n" not in text


@pytest.mark.parametrize("name", sorted({name for name, _ in FORMATS}))
def test_a_preset_names_its_file_and_its_terms(name):
    cfg = config.compose([f"backbone={name}"]).backbone
    text = refusal(WeightsError, OmegaConf.merge(cfg, {"acknowledge_licence": True}))
    assert f"the weights of {name} come from a file; get {cfg.published_file} and set backbone.weights=<file>" in text
    assert "no labels" in cfg.pretraining
    if "nc" in cfg.licence:
        assert "which restricts their use" in refusal(ConfigError, OmegaConf.merge(cfg, {"weights": "any.pth"}))


def test_swav_is_normalised_as_its_release_does():
    model = Backbone(preset("swav_resnet50", "none"))
    assert model.std.flatten().tolist() == pytest.approx([0.228, 0.224, 0.225])
