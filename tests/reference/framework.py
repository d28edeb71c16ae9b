"""Replays saved cases through the adapters of this package and judges the results.

A case is `<method>.<function>.<n>.npz`. Its adapter is the function named <function> in `tests/reference/<method>.py`:

    def ghp_contrastive(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]

It gets the inputs and settings of the case (never the saved results) and returns results under their saved names.
A module that computes a kind by one of the variants of tolerances.json says so:
`VARIANTS = {"losses": "released_float32"}`.
"""

import fnmatch
import importlib
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.reference import rules

HERE = Path(__file__).resolve().parent
CASES = HERE / "cases"


@dataclass(frozen=True)
class Line:
    """One row of the report. `status` is ok, FAIL, missing (no adapter) or unjudged (the case holds no results)."""

    status: str
    case: str
    array: str = ""
    error: str = ""


def load_table() -> dict:
    """The project's own copy of the tolerances, whatever folder is replayed."""
    return json.loads((HERE / "tolerances.json").read_text())


def find_cases(folder: Path, glob: str = "*") -> list[Path]:
    """Case files of a folder whose name without `.npz` matches the glob, in order."""
    return [path for path in sorted(folder.glob("*.*.*.npz")) if fnmatch.fnmatchcase(path.stem, glob)]


def load_case(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def find_adapter(method: str, function: str):
    """The adapter and its declared variant, or (None, None) where the project has none."""
    if not method.isidentifier() or importlib.util.find_spec(f"tests.reference.{method}") is None:
        return None, None
    module = importlib.import_module(f"tests.reference.{method}")
    return getattr(module, function, None), getattr(module, "VARIANTS", {}).get(function)


def replay(path: Path, table: dict, dump: Path | None = None, prefix: str = "shared") -> Line:
    """Replay one case and judge it; an adapter that raises is a FAIL with its message."""
    method, function, number = path.stem.split(".", 2)
    try:
        adapter, variant = find_adapter(method, function)
        if adapter is None:
            return Line("missing", path.stem, "", f"no {function} in tests/reference/{method}.py")
        saved = load_case(path)
        inputs = {name: array for name, array in saved.items() if not rules.is_result(name)}
        results = {name: np.asarray(array) for name, array in adapter(inputs).items()}
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            np.savez(dump / path.name, **results)
    except Exception as error:  # the report goes on with the next case
        return Line("FAIL", path.stem, "", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return judge(path.stem, f"{method}.{function}", f"{prefix}.{number}", saved, results, table, variant)


def judge(name: str, kind: str, case_id: str, saved: dict, results: dict, table: dict, variant: str | None) -> Line:
    """Hold the results of a case against the saved ones; the line names the array nearest to (or beyond) its bound."""
    targets = {key: array for key, array in saved.items() if rules.is_result(key)}
    if not targets:
        return Line("unjudged", name, "", f"{len(results)} arrays")
    optional = rules.optional_results(table, kind)
    verdicts = {}
    for key, ref in targets.items():
        rule = rules.rule_for(table, kind, case_id, key, ref.dtype, variant)
        if key in results:
            verdicts[key] = rules.judge_array(rule, results[key], ref, saved)
        elif not rules.is_skipped(rule) and not any(fnmatch.fnmatchcase(key, pattern) for pattern in optional):
            verdicts[key] = rules.Verdict(False, math.inf, math.inf, "not returned")
    if not verdicts:
        return Line("FAIL", name, "", "no saved result was returned")
    worst = max(verdicts, key=lambda key: (not verdicts[key].ok, verdicts[key].excess, verdicts[key].error))
    verdict = verdicts[worst]
    status = "ok" if all(v.ok for v in verdicts.values()) else "FAIL"
    return Line(status, name, worst, verdict.text or f"{verdict.error:.2g}")


def replay_folder(folder: Path, glob: str = "*", dump: Path | None = None, prefix: str = "shared") -> Iterator[Line]:
    """Replay the cases of a folder one after the other."""
    table = load_table()
    for path in find_cases(folder, glob):
        yield replay(path, table, dump, prefix)
