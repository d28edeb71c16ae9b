"""The noisy foreground of pictures, from the backbone that is evaluated."""

from typing import Any

import torch
from torch import Tensor

from common.precision import real
from grouping import spectral
from grouping.attention_masks import attention_foreground
from models.backbone import Features

KINDS = ("auto", "attention", "spectral")
"""`auto`: attention of the class token where the backbone has a trained one, else the spectral foreground."""


def kind_for(wanted: str, backbone: Any) -> str:
    """`attention` or `spectral`, by the word of `evaluation.cbfe.masks`."""
    if wanted != "auto":
        return wanted
    return "attention" if backbone.has_attention and backbone.class_token else "spectral"


@torch.no_grad()
def noisy_foreground(backbone: Any, images: Tensor, kind: str, mass: float) -> Tensor:
    """Foreground of pictures [B,3,H,W] in 0..1: bool [B,h,w].

    attention: see `attention_foreground`, of the last block, heads averaged. spectral: where the second eigenvector of
    cosines around their mean over the picture is above its mean, or below it, whichever has less of the border.
    """
    if kind == "attention":
        return by_attention(backbone.features(images, attention=True), mass)
    maps = spectral.centred(real(backbone.features(images).map))
    size = tuple(maps.shape[-2:])
    _, vectors = spectral.second_vectors(spectral.feature_affinity(maps.flatten(2).mT), size)
    # The mean, for in a picture that falls apart one side's entries are 0 up to rounding.
    found = (vectors > vectors.mean(1, keepdim=True)).unflatten(1, size)
    turned = spectral.border_share(found) > spectral.border_share(~found)
    return torch.where(turned[:, None, None], ~found, found)


def by_attention(features: Features, mass: float) -> Tensor:
    """The same from features with attention logits."""
    heads = features.attention[:, :, 0].float().softmax(-1)[:, :, features.prefix :]
    return attention_foreground(heads.mean(1).unflatten(1, tuple(features.map.shape[-2:])), mass)
