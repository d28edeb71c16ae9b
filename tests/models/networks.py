"""Small random backbones for the tests of this folder."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from models.backbone import Backbone

PRESETS = Path(__file__).parents[2] / "configs" / "backbone"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
REGISTERS = "vit_small_patch14_reg4_dinov2"
CREATE_OF = {
    "vit_tiny_patch16_224": SMALL,
    "vit_small_patch16_224.dino": SMALL | {"qk_norm": True},
    REGISTERS: SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_patch16_dinov3_qkvb": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "eva02_base_patch14_224": SMALL,
    "vit_medium_patch16_rope_reg1_gap_256": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "vit_pe_core_tiny_patch16_384": SMALL,
}
TRANSFORMERS = sorted(CREATE_OF)


def make_cfg(**changes) -> DictConfig:
    cfg = OmegaConf.load(PRESETS / "tiny.yaml")
    base = {"create": SMALL, "weights": "none", "pos_interp": "timm", "levels": None}
    for key, value in (base | changes).items():
        cfg[key] = value
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def make_cnn(**changes) -> DictConfig:
    options = {"timm": "resnet18", "create": {"layers": [1, 1, 1, 1]}, "level_norm": False}
    return make_cfg(**(options | changes))


def shake(net: nn.Module) -> None:
    """Random values everywhere, so that no bias is zero and no norm the identity."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def make_transformer(name: str, **changes) -> Backbone:
    norm = {"level_norm": False} if name.startswith("eva02") or "_gap_" in name else {}
    model = Backbone(make_cfg(timm=name, create=CREATE_OF[name], **(norm | changes)))
    shake(model.net)
    return model


def refusal(error: type[Exception], cfg, **options) -> str:
    with pytest.raises(error) as caught:
        Backbone(cfg, **options)
    return str(caught.value)
