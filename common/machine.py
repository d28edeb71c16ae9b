"""What the machine has: cores, installed packages, a key of W&B. Imports no torch."""

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "lightning",
    "timm",
    "torchmetrics",
    "kornia",
    "faiss-gpu",
    "faiss-cpu",
    "omegaconf",
    "wandb",
    "numpy",
    "scipy",
    "scikit-image",
)
"""What numbers depend on."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Installed versions of Python and of PACKAGES, as their metadata says; those that are missing are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def has_wandb_key() -> bool:
    """True where W&B would not have to ask: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")
