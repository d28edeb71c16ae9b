"""The planes of places in a backbone's features (`backbone.debias=rasa`), fitted to training pictures before a run."""

import logging
from typing import Any

import torch

from common import chance, distributed
from evaluation.readout import valid_patches
from lightning_modules.base.asked import Asked
from models.debias import removal
from models.debias.places import Rasa

log = logging.getLogger(__name__)

PICTURES, POINTS = 256, 16384
"""Training pictures that are looked at, at most, and patches of them for each level."""


@torch.no_grad()
def fit_places(method: Asked, data: Any) -> None:
    """Where the backbone takes out planes that are not fitted yet: fit them, in every process to the same. `data`: the
    DataModule. Pictures are those of training, one crop each without chance; which of their patches is keyed."""
    backbone = method.backbone
    if not isinstance(backbone.debias, Rasa) or backbone.debias.fitted:
        return
    seed = method.cfg.seed
    batches = data.loader("train", geometry=data.fixed_geometry, order="shuffled", limit=PICTURES, purpose="places")
    share = max(1, POINTS // min(PICTURES, len(batches.dataset)))
    patches, places = ([[] for _ in backbone.channels] for _ in range(2))
    device = next(backbone.parameters()).device
    for batch in batches:
        levels = backbone.features(batch["image"].to(device)).levels
        for number, level in enumerate(levels):
            own = removal.coordinates(*level.shape[2:]).to(device)
            inside = valid_patches(batch["valid"].to(device), level.shape[2:]).flatten(1)
            for index, rows, valid in zip(batch["index"].tolist(), level.flatten(2).mT, inside, strict=True):
                order = torch.randperm(int(valid.sum()), generator=chance.generator(seed, "places", index))[:share]
                patches[number].append(rows[valid][order.to(device)])
                places[number].append(own[valid][order.to(device)])
    every = distributed.objects([[torch.cat(part).cpu() for part in found] for found in (patches, places)])
    rows, own = (
        [torch.cat(parts).to(device) for parts in zip(*found, strict=True)] for found in zip(*every, strict=True)
    )
    told = [removal.told(part, where) for part, where in zip(rows, own, strict=True)]
    backbone.debias.fit(rows, own)
    left = backbone.debias([part.mT[None, :, :, None] for part in rows], list)
    after = [removal.told(part[0, :, :, 0].mT, where) for part, where in zip(left, own, strict=True)]
    log.info(
        "backbone.debias=rasa: %d directions of each level are taken out; a linear map told rows and columns with R2 "
        "%s before, %s after",
        2 * backbone.debias.rounds,
        ", ".join(f"{value:.2f}" for value in told),
        ", ".join(f"{value:.2f}" for value in after),
    )
