"""The backbone that a run has trained, as a weight file for every other method, with a card beside it."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save as to_safetensors

from common import about
from common.files import whole, write_text
from datamodules.base import SegmentationDataModule
from lightning_modules.base import UnsupervisedSegmenter

log = logging.getLogger(__name__)

SHOWN = ("val/kmeans/miou", "val/cluster/miou", "val/linear/miou", "val/kmeans/entropy", "val/cluster/entropy")


def export_backbone(
    folder: Path, cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter, metrics: dict[str, Any]
) -> Path:
    """Write `backbone.safetensors` and `backbone.md` into a run folder; returns the file.

    The weights are those of the last step, which no label has chosen, under timm's names, float32 or (`method.half`)
    float16.
    """
    path = folder / "backbone.safetensors"
    kind = torch.float16 if cfg.method.get("half") else torch.float32
    weights = {
        key: value.to(kind if value.is_floating_point() else value.dtype).cpu().contiguous()
        for key, value in model.backbone.exported().items()
    }
    with whole(path) as temporary:
        temporary.write_bytes(to_safetensors(weights, metadata={"format": "pt", "made_by": "labelfree"}))
    write_text(folder / "backbone.md", card(cfg, data, model, metrics))
    log.info("the backbone is in %s; use it with backbone=%s backbone.weights=%s", path, cfg.backbone.name, path)
    return path


def card(cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter, metrics: dict[str, Any]) -> str:
    """What a user of the weights has to know, as markdown: network, training, scores, licence."""
    parameters = sum(value.numel() for value in model.backbone.exported().values() if value.dtype != torch.int64)
    pictures = len(data.source("train"))
    seen = cfg.data.batch_size * model.total_steps
    scores = [f"| `{key}` | {metrics[key]:.1f} |" for key in SHOWN if metrics.get(key) is not None]
    start = {"none": "random weights", "hub": "the published weights of this network"}.get(
        cfg.backbone.weights, "the weight file that the run's config.yaml names"
    )
    licence = cfg.method.get("licence") or "yours to state (method.licence); mind the terms of the training pictures"
    lines = [
        f"# {cfg.backbone.name}, trained with {cfg.method.name}",
        "",
        f"- Network: timm `{cfg.backbone.timm}`, {parameters / 1e6:.2f} million parameters, read at levels "
        f"{model.backbone.order} on patches of {model.backbone.stride} px.",
        f"- Trained on: `{cfg.data.name}`, {pictures} pictures without labels, {model.total_steps} steps of "
        f"{cfg.data.batch_size} ({seen / pictures:.1f} passes), from {start}, seed {cfg.seed}.",
        f"- Weights: {model.exports} at the last step, {'float16' if cfg.method.get('half') else 'float32'}; "
        "no label has chosen them.",
        f"- Pictures are normalised with mean {list(map(float, model.backbone.mean.flatten()))} and standard "
        f"deviation {list(map(float, model.backbone.std.flatten()))}.",
        f"- Licence of the weights: {licence}.",
        f"- Made with {about.signature()}.",
        "",
        f"Scores on `{cfg.data.name}` ({metrics['protocol/list']}, {metrics['protocol/resolution']} px):",
        "",
        "| score | percent |",
        "|---|---|",
        *scores,
        "",
        f"Use: `backbone={cfg.backbone.name} backbone.weights=<folder>/backbone.safetensors`; settings: config.yaml.",
    ]
    return "\n".join(lines) + "\n"
