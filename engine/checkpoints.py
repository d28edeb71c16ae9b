"""Checkpoint files: written whole with the one before kept beside, and told from damaged ones before they are read."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from common.archives import unfolds
from common.files import keep_as, whole

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
    """`torch.save`, whose error for a full disk is that of the file and not one about positions in an archive."""
    try:
        torch.save(checkpoint, handle)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
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
    found = {last: damage(last)} if last.is_file() else {}
    if found.get(last, "missing") is None:
        return Found(last, None, {})
    steps: dict[Path, int] = {}
    for path in (folder / PREVIOUS, folder / BEST):
        if path.is_file():
            found[path] = damage(path)
            if found[path] is None:
                try:
                    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    steps[path] = int(content["global_step"])
                except Exception:  # torch raises several kinds for foreign files
                    found[path] = "no checkpoint of a run"
    damaged = {path: reason for path, reason in found.items() if reason is not None}
    path = max(steps, key=steps.get, default=None)
    return Found(path, steps.get(path), damaged)
