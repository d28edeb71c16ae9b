"""The trials of `method: bayes` without W&B's server: Optuna's TPE proposes them from the scores of those before.

The study lies in `optuna.journal` of the sweep's folder. Any number of processes may work on one sweep, on several
machines of one file system. A trial is taken under a lock and held by a claim that ends with its process, so one whose
process was killed is taken up again. Trial i is proposed by draws keyed by i: one process gives the same trials twice.
"""

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from common.chance import key
from common.errors import ConfigError
from launch import space
from launch.space import Sweep
from launch.trials import locked

JOURNAL = "optuna.journal"
BOUNDED = "uniform, int_uniform, log_uniform_values, q_uniform, q_log_uniform_values, values or value"


class HeldAlready(JournalFileOpenLock):
    """Whatever is written here is written under the lock of the sweep's folder."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Study:
    """The trials of a sweep, as many as `number`: those proposed so far, and further ones."""

    def __init__(self, sweep: Sweep, folder: Path, number: int) -> None:
        self.sweep, self.folder, self.number = sweep, folder, number
        self.ranges = distributions(sweep)
        self.claims: dict[int, TextIO] = {}
        self._study: optuna.Study | None = None

    def known(self) -> dict[int, tuple[dict[str, Any], bool]]:
        """Number -> (values, whether it failed) of the trials proposed so far."""
        if not (self.folder / JOURNAL).is_file():
            return {}
        with self.alone() as study:
            found = study.get_trials(deepcopy=False)[: self.number]
            return {
                item.number: (self.values(item.params), item.state == TrialState.FAIL)
                for item in found
                if len(item.params) == len(self.ranges)
            }

    def take(self) -> tuple[int, dict[str, Any]] | None:
        """The next trial for this process: one that no process works on any more, or a new one; None where all are
        done or in the hands of others."""
        with self.alone() as study:
            found = study.get_trials(deepcopy=False)
            for item in found[: self.number]:
                if not item.state.is_finished() and self.claim(item.number):
                    return item.number, self.proposed(study, item._trial_id, item.number)
            if len(found) >= self.number:
                return None
            self.claim(len(found))
            study.sampler = sampler(len(found))
            asked = study.ask()
            return asked.number, self.proposed(study, asked._trial_id, asked.number)

    def proposed(self, study: optuna.Study, identity: int, number: int) -> dict[str, Any]:
        """The values of a trial; what it has already stays, what a killed process had not come to is drawn."""
        study.sampler = sampler(number)
        asked = optuna.Trial(study, identity)
        return self.values({name: suggested(asked, name, limits) for name, limits in self.ranges.items()})

    def values(self, params: dict[str, Any]) -> dict[str, Any]:
        """What a training is told, from what Optuna keeps."""
        return {name: value(spec, params.get(name)) for name, spec in self.sweep.tree["parameters"].items()}

    def tell(self, number: int, score: float | None) -> None:
        """A trial of this process has ended, with a score or without one."""
        with self.alone() as study:
            if score is None or not math.isfinite(score):
                study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            else:
                study.tell(number, score, skip_if_finished=True)
            self.claims.pop(number).close()
            self.claim_file(number).unlink(missing_ok=True)

    def claim(self, number: int) -> bool:
        """Whether this process has the trial from now on; its claim ends with it, however it ends."""
        handle = self.claim_file(number).open("a")
        if not locked(handle):
            handle.close()
            return False
        self.claims[number] = handle
        return True

    def claim_file(self, number: int) -> Path:
        return self.folder / f".{number:03d}.claim"

    @contextmanager
    def alone(self) -> Iterator[optuna.Study]:
        """The study, while no other process reads or writes it. Raises ConfigError where it cannot be read."""
        path = self.folder / JOURNAL
        with (self.folder / ".optuna.lock").open("a") as handle:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                if self._study is None:
                    self._study = opened(path, self.sweep.maximized)
                self._study.get_trials(deepcopy=False)
            except (ValueError, KeyError, AttributeError, OSError) as error:
                raise ConfigError(
                    f"{path}: cannot be read ({' '.join(str(error).split())}); delete it, then the sweep begins anew"
                ) from None
            yield self._study


def opened(path: Path, maximized: bool) -> optuna.Study:
    """The study of a journal; a last line that a killed process left in the middle is dropped."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if path.is_file():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            with path.open("r+b") as handle:
                handle.truncate(text.rfind(b"\n") + 1)
    storage = JournalStorage(JournalFileBackend(str(path), HeldAlready(str(path))))
    direction = "maximize" if maximized else "minimize"
    return optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)


def sampler(number: int) -> optuna.samplers.TPESampler:
    """TPE over all parameters together, for one trial. Trials that run elsewhere count as bad ones (constant liar), so
    that processes try different places."""
    return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=key(0, "sweep.tpe", number) % 2**32)


def distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """The ranges of a sweep file as Optuna's. Raises ConfigError for one that it has no equal of."""
    found = {}
    for name, spec in sweep.tree["parameters"].items():
        kind, where = spec["distribution"], f"{sweep.path}: parameters.{name}"
        if kind.endswith("normal"):
            raise ConfigError(
                f"{where}: distribution={kind}: method: bayes without W&B's server takes {BOUNDED}; write a range with "
                "min and max, or set method: random"
            )
        if spec.get("probabilities") is not None:
            raise ConfigError(
                f"{where}: probabilities={space.shown(spec['probabilities'])}: method: bayes without W&B's server "
                "learns them itself; leave them out, or set method: random"
            )
        if kind == "categorical":
            found[name] = CategoricalDistribution(range(len(spec["values"])))
        elif kind == "int_uniform":
            found[name] = IntDistribution(spec["min"], spec["max"])
        elif kind != "constant":
            found[name] = FloatDistribution(spec["min"], spec["max"], log="log_uniform" in kind)
    return found


def suggested(trial: optuna.Trial, name: str, limits: BaseDistribution) -> Any:
    """What Optuna keeps of a parameter; drawn where the trial has none yet."""
    if isinstance(limits, CategoricalDistribution):
        return trial.suggest_categorical(name, limits.choices)
    if isinstance(limits, IntDistribution):
        return trial.suggest_int(name, limits.low, limits.high)
    return trial.suggest_float(name, limits.low, limits.high, log=limits.log)


def value(spec: dict[str, Any], kept: Any) -> Any:
    """A parameter's value: of a list Optuna keeps the place, of a range with steps the number before it is rounded."""
    if spec["distribution"] == "constant":
        return spec["value"]
    if spec["distribution"] == "categorical":
        return spec["values"][kept]
    return kept if spec["distribution"] == "int_uniform" else space.rounded(spec, kept)
