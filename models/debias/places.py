"""`backbone.debias`: a backbone's maps without what tells where a patch lies."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError, one_of
from common.precision import exact
from models.debias import removal

KINDS = ("none", "blank", "rasa")
ROUNDS = 9
"""Planes of `rasa` where their number is not given (Franca: up to 9)."""


def debias_of(cfg: Any, channels: list[int]) -> "Debias | None":
    """What the keys of a backbone ask for, None for nothing. channels: C of each level. Raises ConfigError for values
    that do not go together."""
    kind, components = cfg.get("debias", "none"), cfg.get("debias_components")
    one_of("backbone.debias", kind, KINDS)
    if kind == "none":
        if components is not None:
            raise ConfigError(
                f"backbone.debias_components={components}: nothing is taken out with backbone.debias=none; set blank "
                "or rasa, or backbone.debias_components=null"
            )
        return None
    if not cfg.frozen:
        raise ConfigError(
            f"backbone.debias={kind}: what is taken out belongs to a frozen network; set backbone.frozen=true, or "
            "backbone.debias=none"
        )
    if components is not None and components >= min(channels):
        raise ConfigError(
            f"backbone.debias_components={components}: the smallest level has {min(channels)} channels, and nothing "
            f"would be left; use far fewer (blank: {max(1, min(channels) // removal.SHARE)} at most by itself)"
        )
    if kind == "blank":
        return Blank(kind, components)
    if components is not None and components % 2:
        raise ConfigError(
            f"backbone.debias_components={components}: rasa takes out planes, two directions each; use an even number"
        )
    return Rasa(kind, components, channels)


class Debias(nn.Module):
    """Maps of all levels -> the same at unit length without some directions.

    Attributes:
        name: the settings, as a part of the backbone's fingerprint.
        values: what else the result hangs on, as a part of keys of caches.
    """

    values = ""

    def __init__(self, kind: str, components: int | None) -> None:
        super().__init__()
        self.kind, self.components = kind, components
        self.name = f"debias={kind}:{'auto' if components is None else components}"

    def forward(self, levels: list[Tensor], black: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Levels [B,C,h,w]; `black` gives those of one black picture of the same size."""
        raise NotImplementedError

    def refuse_keys(self) -> None:
        """For attention keys, which have places of their own. Raises ConfigError."""
        raise ConfigError(
            f"backbone.debias={self.kind}: places are taken out of the maps of backbone.levels alone, and this method "
            "reads attention keys; let it read levels, or set backbone.debias=none"
        )


class Blank(Debias):
    """A basis for each size of picture, computed when it is first seen and kept beside the network."""

    def __init__(self, kind: str, components: int | None) -> None:
        super().__init__(kind, components)
        self.bases: dict[tuple, list[Tensor]] = {}

    def forward(self, levels: list[Tensor], black: Callable[[], list[Tensor]]) -> list[Tensor]:
        key = tuple(level.shape[2:] for level in levels), levels[0].device
        if torch.compiler.is_exporting():  # sizes are symbols there, so a program computes the basis anew
            bases = self._bases(black())
        else:
            if key not in self.bases:
                self._expect_patches(levels)
                self.bases[key] = self._bases(black())
            bases = self.bases[key]
        return [removal.without(level, basis) for level, basis in zip(levels, bases, strict=True)]

    def _bases(self, levels: list[Tensor]) -> list[Tensor]:
        return [removal.blank_basis(level[0], self.components) for level in levels]

    def _expect_patches(self, levels: list[Tensor]) -> None:
        least = min(level.shape[2] * level.shape[3] for level in levels)
        if (self.components or 0) >= least:
            raise ConfigError(
                f"backbone.debias_components={self.components}: pictures of this size have {least} patches, so a black "
                "one has fewer directions; lower it, or use larger pictures"
            )


class Rasa(Debias):
    """Planes for each level, fitted once to training pictures (`fit`); buffers, so they are in checkpoints.
    Zeros before that, which take nothing out."""

    fitted: Tensor

    def __init__(self, kind: str, components: int | None, channels: list[int]) -> None:
        super().__init__(kind, components)
        self.rounds = ROUNDS if components is None else components // 2
        self.rounds = min(self.rounds, (min(channels) - 1) // 2)
        for number, width in enumerate(channels):
            self.register_buffer(f"planes_{number}", torch.zeros(self.rounds, 2, width))
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def planes(self) -> list[Tensor]:
        """[L,2,C] of each level."""
        return [value for name, value in self.named_buffers() if name.startswith("planes_")]

    @property
    def values(self) -> str:
        digest = hashlib.sha256()
        for part in self.planes:
            digest.update(part.cpu().numpy().tobytes())
        return f" planes {digest.hexdigest()[:16]}"

    def forward(self, levels: list[Tensor], black: Callable[[], list[Tensor]]) -> list[Tensor]:
        found = []
        for level, planes in zip(levels, self.planes, strict=True):
            with exact(level.device):
                unit = nn.functional.normalize(level.float(), dim=1).movedim(1, -1)
                found.append(nn.functional.normalize(removal.without_planes(unit, planes).movedim(-1, 1), dim=1))
        return found

    @torch.no_grad()
    def fit(self, patches: list[Tensor], places: list[Tensor]) -> None:
        """patches [R,C] and `coordinates` [R,2] of each level, those of training pictures."""
        for planes, rows, own in zip(self.planes, patches, places, strict=True):
            planes.copy_(removal.fitted_planes(nn.functional.normalize(rows.float(), dim=1), own, self.rounds))
        self.fitted.fill_(True)
