"""What a run is called, and the checkpoint that it goes on from where one is named. Imports no torch."""

import os
import secrets
import time
from pathlib import Path

from omegaconf import DictConfig

from common.errors import CheckpointError, ConfigError
from common.files import no_file
from engine.records.identity import mark

NAME_VARIABLE = "LABELFREE_RUN_NAME"
"""Carries a name made from the time to the processes that Lightning starts for further devices."""


def run_name(cfg: DictConfig) -> str:
    """`run.name`, or one made from method, data, backbone and time (W&B's run id in a sweep, else a SLURM job's id)."""
    if cfg.run.name is not None:
        return cfg.run.name
    if NAME_VARIABLE not in os.environ:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"  # two may start within one second
        if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
            stamp = os.environ["WANDB_RUN_ID"]
        elif "SLURM_JOB_ID" in os.environ:  # a requeued job finds its folder again, a second run in it gets its own
            stamp = f"{os.environ['SLURM_JOB_ID']}-{mark(cfg)}-{cfg.seed}"
        os.environ[NAME_VARIABLE] = f"{cfg.method.name}-{cfg.data.name}-{cfg.backbone.name}-{stamp}"
    return os.environ[NAME_VARIABLE]


def expect_plain(cfg: DictConfig) -> None:
    """Raises ConfigError for a `run.name` that is no name of a folder."""
    name = cfg.run.name
    if name is not None and (not name or "/" in name or name.startswith(".") or name == "latest"):
        raise ConfigError(f"run.name={name}: expected a plain folder name; the parent folder is run.dir")


def resumed_from(cfg: DictConfig) -> Path | None:
    """The checkpoint that `run.resume` names; None where it is auto or never. Raises CheckpointError for no file."""
    if cfg.run.resume in ("auto", "never"):
        return None
    path = Path(cfg.run.resume)
    if not path.is_file():
        raise CheckpointError(
            f"run.resume={cfg.run.resume}: {no_file(path)}; expected auto, never or a checkpoint file"
        )
    return path
