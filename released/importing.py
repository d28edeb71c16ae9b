"""`run.py import-checkpoint`: a checkpoint that the authors of a method released, as one of ours."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save as to_safetensors

import config
from common.errors import ConfigError
from common.files import whole
from common.spec import ClassMeta
from datamodules.base.module import load_datamodule
from datamodules.base.official import OfficialDataModule
from engine import setup
from engine.checkpoints import WholeCheckpointIO
from released import asked, formats
from released.formats import Released

log = logging.getLogger(__name__)

CLASSES = {"cocostuff27": 27, "cityscapes27": 27, "potsdam3": 3}
"""Data sets of the released checkpoints, and the number of their classes."""

NAMES = {
    "cocostuff27": ["data=cocostuff27"],
    "cocostuff15": ["data=cocostuff27", "data.classes=15"],
    "cocostuff3": ["data=cocostuff27", "data.classes=3"],
    "cityscapes": ["data=cityscapes27"],
    "potsdam": ["data=potsdam3"],
}
"""Data sets as the authors call them -> our words."""

PROTOCOL = {
    "stego": ["evaluation.flip=true", "evaluation.crf=dense"],
    "hidden_positives": ["evaluation.flip=false", "evaluation.crf=dense"],
}
"""The authors' final evaluation, of the recipes too."""


def import_checkpoint(origin: str, file: Path, output: Path, tokens: list[str]) -> dict[str, Any]:
    """Write `output` (a checkpoint for `eval` and `predict`) and the file's backbone beside it; returns its facts.

    `tokens`: `data=…` where the file does not say its data set, and values such as data.root, which are kept. Head,
    momentum head and probes are the file's; what no release holds (pools, projection, optimiser) is new, so training
    cannot go on from it. Nothing of the file is run (released/inert.py).

    Raises ConfigError for words that do not fit, CheckpointError naming the file and the first key that differs.
    """
    setup.begin()
    words = config.parse_words(tokens)
    backbone = asked.expect(origin, file, output, words)
    found = formats.read(origin, file)
    if found.objects:
        log.info(
            "file=%s: holds saved objects (%s), which torch.load(weights_only=True) refuses; tensors and plain values "
            "alone were read, and no code of the file was run",
            file, shortened(found.objects),
        )  # fmt: skip
    cfg, recipe = configure(origin, file, found, words, tokens, backbone)
    meta = classes_of(cfg)
    if meta.num_classes != found.classes:
        raise ConfigError(
            f"data={cfg.data.name}: has {meta.num_classes} classes, and the linear probe of {file} has "
            f"{found.classes}; name the data set that it was trained on"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole(backbone) as temporary:
        temporary.write_bytes(to_safetensors(found.weights, metadata={"format": "pt", "made_by": "labelfree"}))
    try:
        checkpoint = as_checkpoint(cfg, meta, found)
        imported = {"from": origin, "file": file.name, "recipe": recipe}
        checkpoint["labelfree"]["imported"] = imported
        WholeCheckpointIO().save_checkpoint(checkpoint, output)
    except BaseException:
        backbone.unlink(missing_ok=True)
        raise
    introduce(cfg, found, recipe, output)
    return imported


def configure(
    origin: str, file: Path, found: Released, words: dict[str, str], tokens: list[str], backbone: Path
) -> tuple[DictConfig, str | None]:
    """The configuration: that of the recipe for this method, data and backbone where there is one, with what the file
    says on top; and the name of the recipe."""
    own = data_words(origin, file, found, words)
    data = config.parse_words([*own, *tokens])
    recipe = None
    if CLASSES.get(data["data"]) == found.classes:
        wanted = {"method": found.method, "data": data["data"], "backbone": found.backbone}
        for name in config.names("experiment"):
            if wanted.items() <= config.load_group("experiment", name)["words"].items():
                recipe = name
    start = [f"experiment={recipe}"] if recipe else [f"method={found.method}", f"backbone={found.backbone}"]
    settings = [f"{key}={value}" for key, value in found.settings.items()]
    fixed = [f"backbone.weights={backbone.resolve()}", "backbone.precision=float32", "evaluation.cluster_init=normal"]
    protocol = PROTOCOL[found.method]
    return config.compose([*start, *own, *settings, *fixed, *protocol, *tokens]), recipe


def data_words(origin: str, file: Path, found: Released, words: dict[str, str]) -> list[str]:
    """Words for the data set of the file. Raises ConfigError where neither the file nor the user says it."""
    if "data" in words:
        return []
    if found.data in NAMES:
        return NAMES[found.data]
    fitting = [name for name, classes in CLASSES.items() if classes == found.classes]
    if found.data is None and len(fitting) == 1:
        return [f"data={fitting[0]}"]
    said = "does not say its data set" if found.data is None else f"names the data set {found.data}"
    choices = " or ".join(f"data={name}" for name in fitting) or "data=…"
    raise ConfigError(f"data: {file} {said} ({found.classes} classes); add {choices}")


def classes_of(cfg: DictConfig) -> ClassMeta:
    """The classes of the data set. Published ones have theirs without any file; others are read."""
    data = load_datamodule(cfg.data.name)(cfg)
    if isinstance(data, OfficialDataModule):
        return data.build_meta()
    data.setup()
    return data.meta


def as_checkpoint(cfg: DictConfig, meta: ClassMeta, found: Released) -> dict[str, Any]:
    """The content of a checkpoint of ours, with the file's tensors in the method's state."""
    model = setup.build_model(cfg, meta)
    state = model.state_dict()
    with torch.no_grad():
        for key, value in found.state.items():
            state[key].copy_(value)
    checkpoint = {"state_dict": state, "global_step": found.step, "epoch": 0}
    model.on_save_checkpoint(checkpoint)
    return checkpoint


def introduce(cfg: DictConfig, found: Released, recipe: str | None, output: Path) -> None:
    """Say what was read, what it should reach, and how to go on."""
    log.info(
        "%s on %s with %s: codes of %d, %d clusters, %d classes, step %d",
        found.method, cfg.data.name, found.backbone, cfg.method.dim, cfg.method.num_clusters, found.classes, found.step,
    )  # fmt: skip
    if cfg.method.num_clusters > found.classes:
        log.info(
            "%d clusters beyond the classes: evaluation.extra=%s here; the release leaves their pixels out "
            "(evaluation.extra=stego_compat)", cfg.method.num_clusters - found.classes, cfg.evaluation.extra,
        )  # fmt: skip
    log.info("recipe: %s", "none for these" if recipe is None else f"{recipe}, {config.figure(recipe)}")
    root = "" if cfg.data.root else " data.root=<folder>"
    log.info("written: %s and %s", output, cfg.backbone.weights)
    log.info("next: run.py eval ckpt=%s%s", output, root)


def shortened(names: tuple[str, ...]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(name if name.isprintable() else ascii(name) for name in names[:3])}{more}"
