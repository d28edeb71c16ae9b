"""From a configuration to a DataModule, a method and a Trainer."""

import ctypes
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

import config
from common.errors import CheckpointError, ConfigError
from common.files import expect_checkpoint
from common.machine import cores, has_wandb_key
from common.precision import usable
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.base.module import load_datamodule
from engine import ahead, checkpoints, slurm
from engine.callbacks.wandb_rows import StepLogger
from engine.checkpoints import WholeCheckpointIO
from engine.records import environment
from lightning_modules import registry
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.base.evaluated import FCN
from lightning_modules.base.placed import fit_places
from lightning_modules.base.segmenter import FORMAT
from models import published
from retrieval import search

log = logging.getLogger(__name__)

PROCESSES_A_CORE = 4
"""More processes than cores are slow, but few are still of use to see that a run of several devices works."""

UNLABELLED_CLUSTERS = 27
"""K where the data has no classes and method.num_clusters is null."""

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""Numbers of glibc's mallopt parameters."""

NOISE = (
    ".*does not have many workers.*",
    ".*`self.trainer` is not attached.*",
    ".*found .* module.* in eval mode.*",
    ".*already configured with model summary.*",
    ".*is not resumable.*",
    ".*`srun` command is available on your system but is not used.*",
    ".*val_check_interval.*",
    ".*Checkpoint directory.*exists and is not empty.*",
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ".*``compute`` method of metric.*was called before.*",
    ".*Sparse CSR tensor support is in beta.*",
    ".*Couldn't infer the batch indices.*",
    ".*Total length of `AsItIs` across ranks is zero.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",
)
"""Library warnings about things that are so on purpose here."""


def keep_freed_memory() -> None:
    """Let the C allocator of Linux reuse freed blocks instead of giving every large tensor fresh pages.

    Zeroing fresh pages takes up to half of the time of a step on a CPU; results do not change.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from C libraries other than glibc
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def begin() -> None:
    """Once at the start of a command: allocator, and no library messages that tell a user nothing."""
    keep_freed_memory()
    for pattern in NOISE:
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


def build_data(cfg: DictConfig) -> tuple[DictConfig, SegmentationDataModule]:
    """The DataModule, set up, and the configuration with what only the data could tell (method.num_clusters,
    data.value_range, sizes of a method that go by the pictures)."""
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.accelerator=gpu: no CUDA device is visible; use trainer.accelerator=auto, or see `run.py doctor`"
        )
    expect_room(cfg.trainer)
    slurm.environment(cfg.trainer.num_nodes, cfg.trainer.devices)  # a wrong shape of the job ends before reading data
    published.expect_here(cfg.backbone)  # and so do weights that are missing
    data = load_datamodule(cfg.data.name)(cfg)
    data.setup()
    check_background(cfg.evaluation, data.meta)
    found = data.settled()
    if cfg.method.get("init_from") is not None and not cfg.method.base:
        found |= inherited(cfg)
    if cfg.method.num_clusters is None and "method.num_clusters" not in found:
        found["method.num_clusters"] = data.meta.num_classes or UNLABELLED_CLUSTERS
    if found:
        cfg = config.changed(cfg, found)
    sizes = registry.method_class(cfg.method.name).settled(cfg, data)
    return (config.changed(cfg, sizes) if sizes else cfg), data


def inherited(cfg: DictConfig) -> dict[str, Any]:
    """What `method.init_from` tells of the method that is begun with: its settings, and with them K.

    Raises ConfigError for another K, CheckpointError for a file that is no checkpoint of ours.
    """
    own = stored_start(cfg)["labelfree"]["config"]
    base = config.with_defaults(own)["method"]
    if cfg.method.num_clusters not in (None, base["num_clusters"]):
        raise ConfigError(
            f"method.num_clusters={cfg.method.num_clusters}: the clusters of method.init_from are "
            f"{base['num_clusters']}, and they are the first prototypes; leave it out"
        )
    return {"method.base": base, "method.num_clusters": base["num_clusters"]}


def stored_start(cfg: DictConfig) -> dict[str, Any]:
    """The checkpoint that `method.init_from` names. Raises CheckpointError."""
    return read_checkpoint(Path(cfg.method.init_from), "method.init_from")


def expect_room(trainer: DictConfig) -> None:
    """Raises ConfigError for more threads, or more processes on CPUs, than the cores of this machine can serve."""
    ahead.expect_threads(trainer)
    count = cores()
    on_gpus = trainer.accelerator != "cpu" and torch.cuda.is_available()
    if not on_gpus and trainer.devices != "auto" and trainer.devices > PROCESSES_A_CORE * count:
        raise ConfigError(
            f"trainer.devices={trainer.devices}: without GPUs each is a process on the CPU, and this machine has "
            f"{count} cores; set {count} at most"
        )


def check_background(evaluation: DictConfig, meta: ClassMeta) -> None:
    """Raises ConfigError where extra clusters shall become a class that the data does not have."""
    if meta.has_labels and evaluation.extra == "background" and evaluation.background >= meta.num_classes:
        raise ConfigError(
            f"evaluation.background={evaluation.background}: expected a class id from 0 to {meta.num_classes - 1}, "
            "which clusters beyond the classes become"
        )


def build_model(cfg: DictConfig, meta: ClassMeta, linear_probe: bool = True) -> UnsupervisedSegmenter:
    """The method of the configuration for data with these classes."""
    search.configure(cfg.search.backend)
    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)
    torch.set_float32_matmul_precision(cfg.trainer.matmul)
    return registry.method_class(cfg.method.name)(cfg, meta, linear_probe)


def connect(model: UnsupervisedSegmenter, data: SegmentationDataModule) -> None:
    """Tell the data what the method wants to see, and the method how long the run is."""
    data.views = model.views
    data.pad_multiple = model.pad_multiple
    data.instances = model.wants_instances
    cfg = model.cfg
    for key in ("train_size", "eval_size"):
        model.backbone.check_size(cfg.data[key], f"data.{key}")
    fit_places(model, data)
    model.total_steps = total_steps(cfg, data)


def total_steps(cfg: DictConfig, data: SegmentationDataModule) -> int:
    """Steps of the run. Raises DataError where there are fewer pictures than a batch."""
    steps_per_epoch = data.steps_per_epoch  # fewer pictures than a batch end here, before a folder is made
    return cfg.trainer.max_steps or cfg.trainer.max_epochs * steps_per_epoch


def build_trainer(
    cfg: DictConfig, total_steps: int, callbacks: list[Callback], loggers: list[Any], root: Path
) -> L.Trainer:
    """The Trainer of a run; every key of `trainer.*` ends here."""
    settings = cfg.trainer
    accelerator = settings.accelerator
    if accelerator == "auto":  # CUDA or CPU: other devices lack float64, which the scores are summed in
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator == "gpu" and settings.devices != "auto" and settings.devices > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices={settings.devices}: this machine has {torch.cuda.device_count()} GPUs; use that or auto"
        )
    environment = slurm.environment(settings.num_nodes, settings.devices)
    if settings.num_nodes > 1 and rank_zero_only.rank == 0:
        log.info(
            "waiting for %d nodes: the same command has to run on each of them (MASTER_ADDR=%s, MASTER_PORT=%s, "
            "NODE_RANK 0 to %d)",
            settings.num_nodes, os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "not set"),
            settings.num_nodes - 1,
        )  # fmt: skip
    precision = usable(settings.precision, accelerator)
    if precision != settings.precision and rank_zero_only.rank == 0:
        log.warning(
            "trainer.precision=%s: float16 training is for GPUs, there is none of it on a CPU; %s is used",
            settings.precision, precision,
        )  # fmt: skip
    return L.Trainer(
        accelerator=accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision=precision,
        max_steps=total_steps,
        max_epochs=-1,
        val_check_interval=settings.val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=loggers or False,
        log_every_n_steps=settings.log_every,
        callbacks=callbacks,
        plugins=[WholeCheckpointIO(), *([environment] if environment else [])],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # engine/callbacks/screen.py has one of its own
        default_root_dir=root,
    )


def wandb_logger(cfg: DictConfig, folder: Path) -> StepLogger:
    """W&B; offline where no key is known, so that nothing asks and nothing hangs. A resumed run keeps its id."""
    os.environ.setdefault("WANDB_SILENT", "true")
    offline = os.environ.get("WANDB_MODE") in (None, "offline") and not has_wandb_key()
    if offline:
        os.environ["WANDB_MODE"] = "offline"
        log.info("W&B: no key found, logging offline into %s (upload later with `wandb sync`)", folder / "wandb")
    stored = folder / "wandb_id"
    logger = StepLogger(
        folder / "wandb_step",
        name=folder.name,
        save_dir=folder,
        project=cfg.wandb.project,
        entity=cfg.wandb.entity,
        tags=list(cfg.wandb.tags),
        id=stored.read_text().strip() if stored.is_file() else None,
        resume="allow",
        offline=offline,
        config=config.plain(cfg) | {"code_version": environment.git_commit() or "no checkout"},
    )
    if rank_zero_only.rank == 0:
        stored.write_text(logger.experiment.id)
    return logger


def read_checkpoint(path: Path, key: str = "ckpt") -> dict[str, Any]:
    """A checkpoint of ours, on the CPU; nothing of it is executed. Raises CheckpointError with one line
    that names the word `key`."""
    expect_checkpoint(path, key)
    broken = checkpoints.damage(path)
    if broken is not None:
        raise CheckpointError(
            f"{key}={path}: cannot be read as a checkpoint ({broken}); use another one of its run, or train it anew"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for cut and foreign files
        raise CheckpointError(
            f"{key}={path}: cannot be read as a checkpoint ({str(error).splitlines()[0][:120]})"
        ) from None
    lacks = checkpoints.lacking(checkpoint)
    if lacks is not None:
        raise CheckpointError(f"{key}={path}: is not a Labelfree checkpoint ({lacks})")
    if checkpoint["labelfree"]["format"] != FORMAT:
        raise CheckpointError(f"{key}={path}: format {checkpoint['labelfree']['format']}, this version reads {FORMAT}")
    return checkpoint


def stored_meta(checkpoint: dict[str, Any]) -> ClassMeta:
    """The classes that a checkpoint was trained with."""
    facts = checkpoint["labelfree"]
    return ClassMeta(tuple(facts["classes"]), tuple(tuple(colour) for colour in facts["palette"]))


def device(cfg: DictConfig) -> torch.device:
    """Where commands without a Trainer compute: the first GPU, unless `trainer.accelerator=cpu`."""
    return torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")


def restore_model(
    checkpoint: dict[str, Any],
    cfg: DictConfig,
    meta: ClassMeta | None = None,
    linear_probe: bool = True,
    refit: bool = False,
) -> UnsupervisedSegmenter:
    """The trained method, in evaluation mode, on the CPU.

    `meta`: classes of the data it is evaluated on. `linear_probe`: False where it was trained without any. `refit`: the
    k-means probe is one that waits to be fitted, whatever that of the checkpoint is.
    """
    model = build_model(cfg, stored_meta(checkpoint) if meta is None else meta, linear_probe)
    if refit:
        own = {name: value for name, value in model.state_dict().items() if name.startswith("kmeans_probe.")}
        kept = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("kmeans_probe.")}
        checkpoint = {**checkpoint, "state_dict": kept | own}
    expect_fit(checkpoint, model, "ckpt")
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    model.restored_step = int(checkpoint["global_step"])
    return model.eval()


def expect_fit(checkpoint: dict[str, Any], model: UnsupervisedSegmenter, key: str) -> None:
    """Raises CheckpointError, naming the word `key`, where the weights of a checkpoint are not those of the method."""
    late = (
        "posthoc_probe.",
        FCN,
        *(("backbone.",) if model.backbone.frozen else ()),
    )  # made, or put in, when it is loaded
    found, own = (
        {name: list(value.shape) for name, value in state.items() if not name.startswith(late)}
        for state in (checkpoint["state_dict"], model.state_dict())
    )
    wrong = next((name for name in {**own, **found} if own.get(name) != found.get(name)), None)
    if wrong is not None:
        there = f"is of shape {found[wrong]}" if wrong in found else "is missing"
        wanted = f"of shape {own[wrong]}" if wrong in own else "unknown"
        raise CheckpointError(
            f"{key}: the weights do not fit method={model.cfg.method.name}: {wrong} {there} in the checkpoint, and "
            f"{wanted} to the method; use another checkpoint of the run, or train it anew"
        )
