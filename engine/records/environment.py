"""environment.json: with what, where and how fast a run was made."""

import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from common import about, machine


def git_commit() -> str | None:
    """The commit of the source tree, with `+` where it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        state = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if state.stdout.strip() else "") if commit.returncode == 0 else None


def peak_memory() -> dict[str, float]:
    """Highest memory of this process in MiB: resident, and on the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    peak = {"resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if torch.cuda.is_available():
        peak["gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def describe(
    seed: int,
    device: torch.device,
    commit: str | None,
    seconds: float,
    images_per_second: float | None,
    processes: int,
) -> dict[str, Any]:
    """The content of environment.json; `commit` is what `git_commit` said when the run began.

    `processes` is the world size: devices of all nodes together.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "labelfree": about.signature(),
        "versions": machine.versions(),
        "git_commit": commit,
        "seed": seed,
        "device": f"{device.type}: {name}",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "command": sys.argv,
        "seconds": round(seconds, 1),
        "train_images_per_second": images_per_second,
        "peak_memory": peak_memory(),
    }
