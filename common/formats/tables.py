"""Reading back what a run wrote: json objects and csv tables, of which a disk or an editor may have spoilt a part."""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError

log = logging.getLogger(__name__)


def read_object(path: Path, needed: Mapping[str, type | tuple[type, ...]], remedy: str) -> dict[str, Any]:
    """A json object with these keys of these types.

    Raises ConfigError, one line that ends with `remedy`, where the file is something else.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no object")
        for key, kind in needed.items():
            if key not in found:
                raise ValueError(f"it has no `{key}`")
            if not isinstance(found[key], kind):
                raise ValueError(f"its `{key}` is {json.dumps(found[key])[:40]}")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: is not what a run writes ({reason}); {remedy}") from None
    return found


def read_rows(
    path: Path, texts: Sequence[str] = (), whole: Sequence[str] = (), numbers: Sequence[str] = ()
) -> list[dict[str, str]]:
    """The rows of a csv table of numbers; those that cannot be read are dropped, with one warning.

    texts: columns of any text, which may not be there. whole: columns of whole numbers from 0 on, and numbers: those of
    numbers or nothing; a table without one of these has no rows that can be read. A last line without an
    end, as a full disk leaves it, is dropped without a word.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as handle:
        lines = [line for line in handle if line.endswith("\n")]
    columns, *cells = [next(csv.reader([line.replace("\0", "\ufffd")]), []) for line in lines] or [[]]
    rows = [dict(zip(columns, row, strict=True)) for row in cells if len(row) == len(columns)]
    needed = {*whole, *numbers}
    sound = [row for row in rows if needed <= row.keys() and all(_fits(row[name], name, texts, whole) for name in row)]
    if len(sound) < len(cells):
        log.warning("%s: %d of %d rows cannot be read; they are left out", path, len(cells) - len(sound), len(cells))
    return sound


def _fits(cell: str, name: str, texts: Sequence[str], whole: Sequence[str]) -> bool:
    if name in whole:
        return cell.isascii() and cell.isdecimal()
    if name in texts or not cell:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True
