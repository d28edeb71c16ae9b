"""What makes two configurations the same run."""

import hashlib

from omegaconf import DictConfig

import config

SAME_RUN = ("run.", "wandb.", "logger", "trainer.progress", "trainer.threads", "data.workers", "data.cache", "cache.")
"""Keys that may differ between the parts of one run."""


def mark(cfg: DictConfig) -> str:
    """What tells this configuration from others, but for its seed and what may differ between the parts of a run."""
    different = {key: value for key, value in config.flatten(cfg).items() if not key.startswith((*SAME_RUN, "seed"))}
    return hashlib.sha256(repr(different).encode()).hexdigest()[:6]
