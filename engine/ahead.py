"""Settings of a run that are refused before torch is imported: what no picture and no network is needed for.

`run.py` asks here as soon as its words are read, and so do the functions that a run begins with.
"""

from collections.abc import Mapping

from omegaconf import DictConfig

from common.errors import ConfigError
from common.machine import cores
from datamodules.facts import expect_root
from engine.records.run_names import expect_plain, resumed_from
from lightning_modules.facts import facts
from models.published import expect_named


def expect_training(cfg: DictConfig) -> None:
    """Raises LabelfreeError for what `run.py train` cannot be started with."""
    if cfg.evaluation.resolutions:
        raise ConfigError(
            f"evaluation.resolutions={list(cfg.evaluation.resolutions)}: training evaluates at data.eval_size alone; "
            "leave it out, and give it to `run.py eval ckpt=…` afterwards"
        )
    expect_plain(cfg)
    resumed_from(cfg)
    expect_inputs(cfg)


def expect_stage(cfg: DictConfig) -> None:
    """Raises LabelfreeError for what `run.py pseudo` cannot be started with."""
    if not facts(cfg.method.name).staged:
        raise ConfigError(
            f"method={cfg.method.name}: has no offline stage; use `run.py train method={cfg.method.name}`"
        )
    expect_inputs(cfg)


def expect_inputs(cfg: DictConfig) -> None:
    """Raises LabelfreeError for pictures and weights that are named and not there, and for too many threads."""
    expect_threads(cfg.trainer)
    expect_root(cfg.data.name, cfg.data)
    expect_named(cfg.backbone)


def expect_threads(trainer: DictConfig) -> None:
    """Raises ConfigError for more threads than the cores that this process may use."""
    if trainer.threads is not None and trainer.threads > cores():
        raise ConfigError(
            f"trainer.threads={trainer.threads}: this machine has {cores()} cores for this process; set {cores()} at "
            "most, or null"
        )


def expect_evaluation(words: Mapping[str, str]) -> None:
    """Raises ConfigError for words that `run.py eval` does not take."""
    if "logger" in words:
        raise ConfigError(f"logger={words['logger']}: eval writes its scores into the run folder only")
