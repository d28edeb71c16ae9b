"""The folder of one run: its name, whether it goes on, and the history in metrics.csv."""

import csv
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

import config
from common.errors import ConfigError
from common.files import clear_when_full, copy_whole, remove_unfinished, whole, write_text
from common.formats import trees
from common.formats.sums import checksum
from common.formats.tables import read_rows
from engine import checkpoints
from engine.records.identity import SAME_RUN
from engine.records.run_lock import LOCK_FILE, hold
from engine.records.run_names import expect_plain, resumed_from, run_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and what is there already."""

    path: Path
    state: str
    """new | resume | finished"""
    checkpoint: Path | None = None
    """Where training goes on from."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Checkpoints of it that cannot be read, and why."""
    emptied: bool = False
    """What is there is deleted before the run begins (`run.overwrite`)."""

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / checkpoints.LAST

    @property
    def previous(self) -> Path:
        return self.path / "checkpoints" / checkpoints.PREVIOUS

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / checkpoints.BEST

    @property
    def stands_in(self) -> bool:
        """True where another checkpoint takes the place of a `last.ckpt` that is damaged or missing."""
        return self.state == "resume" and self.checkpoint != self.last

    def mend(self) -> None:
        """Put damaged checkpoints aside (as `<name>.damaged`), and what the run goes on from into `last.ckpt`."""
        for path in self.damaged:
            path.replace(path.with_name(f"{path.name}.damaged"))
        if self.stands_in:
            copy_whole(self.checkpoint, self.last)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @rank_zero_only
    def create(self, cfg: DictConfig) -> None:
        """Make the folder, store the configuration, and point `latest` at it.

        A kill at any moment leaves a folder that the same command goes on with. Raises ConfigError where another
        process trains in it.
        """
        hold(self.path)
        if self.emptied and (self.path.is_symlink() or self.path.is_mount()):
            empty(self.path)
        elif self.emptied and self.path.is_dir():
            aside = self.path.with_name(f".{self.path.name}-{os.getpid()}")
            self.path.replace(aside)
            shutil.rmtree(aside)
            hold(self.path)
        if not (self.path / "config.yaml").is_file():
            config.save(cfg, self.path / "config.yaml")  # first of all: it says that this is a run folder
        if JOB_VARIABLE in os.environ:
            write_text(self.path / JOB_FILE, os.environ[JOB_VARIABLE])
        (self.path / "checkpoints").mkdir(exist_ok=True)
        (self.path / "panels").mkdir(exist_ok=True)
        for folder in (self.path, self.path / "checkpoints"):
            remove_unfinished(folder)
        self.metrics.unlink(missing_ok=True)  # of an earlier run under this name: this one is not finished
        config.save(cfg, self.path / "config.yaml")
        latest = self.path.parent / "latest"
        if latest.is_symlink() or not latest.exists():
            temporary = self.path.parent / f".latest-{os.getpid()}"
            temporary.symlink_to(self.path.name, target_is_directory=True)
            temporary.replace(latest)


def empty(path: Path) -> None:
    """Delete what is in a run folder that has to stay where it is, on another disk: a link, or a mount.

    config.yaml, which says that it is a run folder, is written over later: a kill before that leaves a run folder.
    """
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name != "metrics.json"):  # the mark of a finished run
        if entry.name in ("config.yaml", LOCK_FILE):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


JOB_VARIABLE, JOB_FILE = "SLURM_JOB_ID", ".job"


def requeued(path: Path) -> bool:
    """True where SLURM starts the job again that began this run."""
    job = path / JOB_FILE
    again = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    return again and job.is_file() and job.read_text() == os.environ.get(JOB_VARIABLE)


def open_run(cfg: DictConfig) -> RunFolder:
    """Decide what becomes of the run folder; `RunFolder.create` makes it once all else is known to fit.

    Raises ConfigError where a folder of that name holds another run, CheckpointError where `run.resume` names no file.
    """
    name = run_name(cfg)
    path = Path(cfg.run.dir) / name
    expect_plain(cfg)
    explicit = resumed_from(cfg)
    if path.is_symlink() and not path.is_dir():
        raise ConfigError(
            f"run.name={name}: {path} is a link to {os.readlink(path)}, where there is no folder; make it, or remove "
            "the link"
        )
    stored = path / "config.yaml"
    again = requeued(path)
    emptied = cfg.run.overwrite and not again
    if explicit is not None and cfg.run.overwrite and path.resolve() in explicit.resolve().parents:
        raise ConfigError(f"run.overwrite=true: would delete {explicit}, which run.resume names; use another run.name")
    content = [entry for entry in path.iterdir() if not entry.name.startswith(".")] if path.is_dir() else []
    if content and not stored.is_file():
        raise ConfigError(f"run.name={name}: {path} exists and is no run folder; choose another name or run.dir")
    state, checkpoint = "new", explicit
    names = (f"checkpoints/{name}" for name in (checkpoints.LAST, checkpoints.PREVIOUS, checkpoints.BEST))
    begun = any((path / name).is_file() for name in ("metrics.json", *names))
    damaged: dict[Path, str] = {}
    if explicit is not None and begun and not (emptied or again) and path.resolve() not in explicit.resolve().parents:
        raise ConfigError(
            f"run.name={name}: {path} holds a run already, and run.resume names a checkpoint of another one; choose "
            "another name, or run.overwrite=true to empty it"
        )
    if stored.is_file() and begun and not emptied and (explicit is None or again):
        if cfg.run.resume == "never" and rank_zero_only.rank == 0:
            raise ConfigError(
                f"run.name={name}: {path} already holds a run; choose another name, run.resume=auto to go on, "
                "or run.overwrite=true to empty it"
            )
        before = config.with_defaults(read_yaml(stored))
        difference = config.first_difference(before, config.plain(cfg), ignore=SAME_RUN)
        if difference is not None:
            raise ConfigError(
                f"run.name={name}: {path} holds a run with another configuration, first difference {difference}; "
                "choose another name, or run.overwrite=true to empty it"
            )
        if (path / "metrics.json").is_file():
            state = "finished"
        else:
            found = checkpoints.newest(path / "checkpoints")
            checkpoint, damaged = found.path or explicit, found.damaged
            state = "new" if found.path is None else "resume"
            if rank_zero_only.rank == 0:
                report_damage(found)
    return RunFolder(path, state, checkpoint, damaged, emptied)


def read_yaml(path: Path) -> dict[str, Any]:
    """The stored configuration of a run; raises ConfigError where it is not one. Tags that would call code are not."""
    try:
        content = trees.yaml_of(path)
    except trees.TreeError as error:
        content = error
    unnamed = isinstance(content, dict) and checkpoints.unnamed_group(content)
    if unnamed:
        raise ConfigError(f"{path}: is not the configuration of a run (no {unnamed}); give the run another run.name")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is not the configuration of a run ({content}); give the run another run.name")
    return content


def report_damage(found: checkpoints.Found) -> None:
    """One line for every checkpoint that was skipped: what is wrong with it, and what the run does."""
    then = "no whole one is left: training starts at step 0"
    if found.path is not None:
        then = f"going on from {found.path.name}, step {found.step}"
    for path, reason in found.damaged.items():
        log.warning("%s is damaged (%s) and skipped; %s", path, reason, then)


class History:
    """metrics.csv: a row per logged step, columns as they come up. Rows after the step of a resume are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = ["step"]
        self.sum = 0
        """Of all rows, whatever their order."""

    def restore(self, step: int, closing: bool = False) -> None:
        """Keep what is on disk up to `step` (0: start anew); `closing`: without the scores of that step itself, because
        no training is left and the closing evaluation comes again."""
        if step and self.path.is_file():
            self.rows = [row for row in read_rows(self.path, whole=["step"]) if int(row["step"]) <= step]
            if closing:
                self.rows = [row for row in self.rows if int(row["step"]) < step or not scored(row)]
        self.columns = list(dict.fromkeys(["step", *(key for row in self.rows for key in row)]))
        self.sum = sum(map(_sum, self.rows)) % LARGEST_SUM
        self._write()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Append a row; the file is written anew only when a column is new."""
        row = {"step": step, **{key: _cell(value) for key, value in values.items()}}
        self.rows.append(row)
        self.sum = (self.sum + _sum(row)) % LARGEST_SUM
        fresh = [key for key in row if key not in self.columns]
        if fresh:
            self.columns += fresh
            self._write()
            return
        with clear_when_full(self.path), self.path.open("a", newline="") as handle:
            csv.DictWriter(handle, self.columns).writerow(row)

    def _write(self) -> None:
        with whole(self.path) as temporary, temporary.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def scored(row: dict[str, Any]) -> bool:
    """True of the row of a validation."""
    return any(value for key, value in row.items() if key.startswith("val/"))


LARGEST_SUM = 1 << 63


def _sum(row: dict[str, Any]) -> int:
    return checksum("\n".join(sorted(f"{key}={value}" for key, value in row.items() if value not in (None, ""))))


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
