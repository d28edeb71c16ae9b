"""Checkpoint files: written whole with the one before kept beside, and told from damaged ones before they are read."""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

import config
from common.errors import Stopped
from common.files import keep_as, whole
from common.formats.archives import unfolds

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
"""Files of a run: the newest state, the one before it (until the run is finished), and the best by its scores."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary neighbour first: a kill leaves the old checkpoint or the new one, never half of one.

    What `last.ckpt` was before stays as `previous.ckpt`, for a disk that gives back something else than was written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises DiskFullError, the files as they were, where there is no room."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            with temporary.open("wb") as handle:
                write(checkpoint, handle)
            if path.name == LAST and path.is_file():
                keep_as(path, path.with_name(PREVIOUS))


def write(checkpoint: dict[str, Any], handle: Any) -> None:
    """`torch.save`, which ends by what ended it: a full disk, Ctrl-C or a signal, and no error about positions in an
    archive that could not be finished because of it."""
    try:
        torch.save(checkpoint, handle)
    except RuntimeError as error:
        cause = error.__context__
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        if isinstance(cause, OSError | KeyboardInterrupt | Stopped):
            raise cause from None
        raise


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, in words; None where it is as it was written.

    `torch.save` writes a zip archive with a check sum of every part. `torch.load` notices a cut file and no changed
    byte, so the sums are compared here; nothing is unpickled.
    """
    try:
        if path.stat().st_size == 0:
            return "empty"
        if folded := unfolds(path):
            return folded
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):  # the kinds that damaged archives raise
        return "cut off, or no checkpoint"
    except OSError as error:
        return error.strerror or "unreadable"
    return None if broken is None else "changed since it was written"


STATE = {"state_dict": dict, "global_step": int, "labelfree": dict}
"""What every checkpoint of ours holds."""
FACTS = {"format": int, "config": dict, "classes": list, "palette": list, "backbone": str}
"""What `labelfree` holds."""
TRAINING = {"epoch": int, "loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
"""What a training goes on from, beside it."""


FOREIGN = "no checkpoint of a run"


def unnamed_group(tree: dict[str, Any]) -> str | None:
    """The first group of a stored configuration that does not say what it is of; None where all do."""
    named = (isinstance(tree.get(group), dict) and isinstance(tree[group].get("name"), str) for group in config.GROUPS)
    return next((group for group, known in zip(config.GROUPS, named, strict=True) if not known), None)


def lacking(content: Any, training: bool = False) -> str | None:
    """What a checkpoint lacks that every one has, in words; None: nothing. training: one that training goes on from."""
    if not isinstance(content, dict) or "labelfree" not in content:
        return "it has no `labelfree` entry"
    for tree, parts in ((content, STATE | (TRAINING if training else {})), (content["labelfree"], FACTS)):
        for name, kind in parts.items():
            if not isinstance(tree, dict) or not isinstance(tree.get(name), kind):
                return f"its `{name}` is missing, or no {kind.__name__}"
    unnamed = unnamed_group(content["labelfree"]["config"])
    if unnamed:
        return f"its `config` names no {unnamed}"
    if not all(isinstance(value, torch.Tensor) for value in content["state_dict"].values()):
        return "its `state_dict` holds something else than tensors"
    return None


def opened(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors still on the disk; nothing of it is executed. Raises what torch raises."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def trouble(path: Path) -> str | None:
    """Why a run cannot go on from a checkpoint of its own, in words; None where it can.

    torch's own reader is asked too: it refuses archives that Python's reads.
    """
    broken = damage(path)
    if broken is not None:
        return broken
    try:
        return lacking(opened(path), training=True)
    except pickle.UnpicklingError:  # whole, but with objects that we never write
        return FOREIGN
    except Exception:  # torch raises several kinds for damaged files
        return "cut off, or no checkpoint"


@dataclass(frozen=True)
class Found:
    """The checkpoint of a run to go on from."""

    path: Path | None
    """None: no whole one is there."""
    step: int | None
    """Steps it has behind it; None where the newest file was whole, so that nothing had to be compared."""
    damaged: dict[Path, str]
    """Files that were skipped, and why."""


def newest(folder: Path) -> Found:
    """The newest whole checkpoint of a folder: `last.ckpt`, else the one with most steps of the others."""
    last = folder / LAST
    found = {last: trouble(last)} if last.is_file() else {}
    if found.get(last, "missing") in (None, FOREIGN):  # a foreign one is no accident: it is refused, not passed over
        return Found(last, None, {})
    steps: dict[Path, int] = {}
    for path in (folder / PREVIOUS, folder / BEST):
        if path.is_file():
            found[path] = trouble(path)
            if found[path] is None:
                steps[path] = opened(path)["global_step"]
    damaged = {path: reason for path, reason in found.items() if reason is not None}
    path = max(steps, key=steps.get, default=None)
    return Found(path, steps.get(path), damaged)
