"""Check sums of what we keep on disk: a file that gives back something else than was written is told from a whole one.

XXH3 of 64 bits: it is for accidents of disks and memory, not against people, and costs a fiftieth of reading.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common.files import write_text

SUM = "sum"


def checksum(*parts: Any) -> int:
    """Of bytes, text and arrays (their type, shape and numbers), one after the other; 0 .. 2^63 - 1."""
    found = xxhash.xxh3_64()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype.str}{part.shape}".encode())
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        found.update(part.encode() if isinstance(part, str) else part)
    return found.intdigest() >> 1  # fits into int64


def sealed(facts: Mapping[str, Any], **style: Any) -> str:
    """Facts (plain values) as json, with their sum under `sum`."""
    return json.dumps({**facts, SUM: _of_facts(facts)}, **style)


def unsealed(text: str | bytes) -> dict[str, Any]:
    """The facts of `sealed` text. Raises ValueError where it is not what was written."""
    found = json.loads(text)
    if not isinstance(found, dict) or found.pop(SUM, None) != _of_facts(found):
        raise ValueError("changed since it was written")
    return found


def _of_facts(facts: Mapping[str, Any]) -> str:
    return f"{checksum(json.dumps(json.loads(json.dumps(facts)), sort_keys=True)):016x}"


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as a json file with its own sum, whole."""
    write_text(path, sealed(facts))


def read_sealed(path: Path) -> dict[str, Any]:
    """The facts of such a file. Raises OSError, or ValueError where it is not what was written."""
    return unsealed(path.read_bytes())
