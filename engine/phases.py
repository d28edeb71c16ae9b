"""Phases of a run (`phases` of the configuration): each goes on from the last checkpoint of the one before, with some
settings changed. Two-stage training and rounds of training are such runs.

A phase begins with the weights and banks of the one before and with a new optimiser; its schedules run from its first
step to its last. Steps are counted over the whole run, so a run goes on inside any phase as it does without phases.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from omegaconf import DictConfig

import config
from common.errors import ConfigError
from common.spec import ClassMeta
from engine import setup
from lightning_modules.base import UnsupervisedSegmenter


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `last` of a run, with its own settings."""

    cfg: DictConfig
    first: int
    last: int


def plan(cfg: DictConfig, total: int) -> list[Phase]:
    """The phases of a run of `total` steps in order; one where none are set, none that is too short for a step."""
    overlays = config.plain(cfg)["phases"] or [{"share": 1}]
    whole = sum(overlay["share"] for overlay in overlays)
    ends, done = [0], 0
    for overlay in overlays:
        done += overlay["share"]
        ends.append(int(total * done / whole))
    settings = [{key: value for key, value in overlay.items() if key != "share"} for overlay in overlays]
    found = zip(settings, pairwise(ends), strict=True)
    return [Phase(config.changed(cfg, own), first, last) for own, (first, last) in found if last > first]


def at(phases: list[Phase], step: int) -> Phase:
    """The phase that did step number `step`, counted from 1; the first one where none is done."""
    return next((phase for phase in phases if phase.first < step <= phase.last), phases[-1] if step else phases[0])


def left(phases: list[Phase], step: int) -> list[Phase]:
    """The phases that have steps to do after `step`; the last one where none has."""
    return [phase for phase in phases if phase.last > step] or phases[-1:]


def check(phases: list[Phase], model: UnsupervisedSegmenter, meta: ClassMeta) -> None:
    """Raises ConfigError or DataError where a later phase cannot begin: its settings do not fit the data, or it cannot
    take over the state of the first one, which `model` is of."""
    before = {name: value.shape for name, value in model.state_dict().items()}
    for number, phase in enumerate(phases[1:], start=1):
        with torch.random.fork_rng(devices=[]):
            cfg, data = setup.build_data(phase.cfg)
            own = setup.build_model(cfg, meta)
            setup.connect(own, data)
        after = {name: value.shape for name, value in own.state_dict().items()}
        other = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if other:
            raise ConfigError(
                f"phases: settings of phase {number + 1} change the shape of {other[0]}, and a phase goes on with the "
                "weights of the one before; leave sizes as they are"
            )
