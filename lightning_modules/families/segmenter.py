"""The segmenter that learns pseudo-labels: a DeepLab head on the levels of a backbone, its views and its labels.

For methods whose stage gives label maps (`batch["augmented.pseudo"]`): Deep Spectral, COMUS, MaskDistill.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.spec import IGNORE, Affine, Geometric, Photometric, ViewSpec
from models.backbone import Backbone

COLOURS = ("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p", "blur_p")


def augmented(augment: Any) -> dict[str, ViewSpec]:
    """The view that is learnt on, by the keys `method.augment.*`: a crop of every picture in other colours, and with
    `augment.affine` turned and scaled about its centre."""
    colour = Photometric(**{name: augment[name] for name in COLOURS})
    moved = augment.get("affine")
    affine = None if moved is None else Affine(moved.rotation, 0.0, tuple(moved.scale))
    return {"augmented": ViewSpec(colour, Geometric(scale=tuple(augment.scale), flip_p=0.0), affine)}


def labels_of(views: dict[str, Any]) -> Tensor:
    """Pseudo-labels int64 [B,H,W] of the view; none (255) where it shows no picture."""
    return torch.where(views["augmented.valid"], views["augmented.pseudo"], IGNORE)


def trained_groups(head: nn.Module, backbone: Backbone) -> list[dict[str, Any]]:
    """Groups of parameters: `head`, and `backbone` where that is trained."""
    groups = [{"name": "head", "params": head.parameters()}]
    if not backbone.frozen:
        groups.append({"name": "backbone", "params": [value for value in backbone.parameters() if value.requires_grad]})
    return groups
