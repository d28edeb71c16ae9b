"""How a replayed array is held against a saved one: the rules of tolerances.json, whose `_doc` explains each.

`judge_array` returns a Verdict: whether the rule holds, and one number for the table (the largest absolute difference,
or the share of entries that disagree) beside how far it lies from its bound.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

RESULT_PREFIXES = ("out_", "after__", "mid_")
_DEFAULT_KEY = {"f": "float", "c": "float", "i": "int", "u": "int", "b": "bool"}
_TINY = 1e-300


@dataclass(frozen=True)
class Verdict:
    """`excess` is the error over its bound: above 1 means the rule is broken, and the largest names the worst array."""

    ok: bool
    error: float
    excess: float
    text: str = ""


def is_result(name: str) -> bool:
    """True for the arrays that a replay must return."""
    return name.startswith(RESULT_PREFIXES)


def optional_results(table: Mapping, kind: str) -> list[str]:
    """Names and globs of the results that a replay of this kind may leave out."""
    return [entry["array"] for entry in table["kinds"].get(kind, {}).get("optional", [])]


def rule_for(table: Mapping, kind: str, case_id: str, name: str, dtype: np.dtype, variant: str | None = None) -> Any:
    """The rule of one array; first hit wins: variant, case, kind (exact name before glob), default of its type."""
    entry = table["kinds"].get(kind, {})
    sources = (
        entry.get("variants", {}).get(variant, {}) if variant else {},
        entry.get("cases", {}).get(case_id, {}),
        entry.get("arrays", {}),
    )
    for rules in sources:
        if name in rules:
            return rules[name]
        for pattern, rule in rules.items():
            if fnmatch.fnmatchcase(name, pattern):
                return rule
    return table["default"][_DEFAULT_KEY[dtype.kind]]


def is_skipped(rule: Any) -> bool:
    """True where the saved value is not a target."""
    return isinstance(rule, dict) and "skip" in rule


def judge_array(rule: Any, got: np.ndarray, ref: np.ndarray, saved: Mapping[str, np.ndarray]) -> Verdict:
    """Hold `got` against `ref`. `saved` is the whole case, for rules that look at other arrays."""
    if is_skipped(rule):
        return Verdict(True, 0.0, 0.0, "skipped")
    options = rule if isinstance(rule, dict) else {}
    got, ref = np.asarray(got), np.asarray(ref)
    if got.size == 1 and ref.size == 1:
        got = got.reshape(ref.shape)
    if options.get("nan_skip"):
        ref = _without_missing_tail(got, ref)
    if options.get("as_set"):
        return _same_set(options, got, ref, saved)
    if got.shape != ref.shape:
        return Verdict(False, math.inf, math.inf, f"shape {got.shape}, saved {ref.shape}")
    if rule == "exact":
        differing = int((got != ref).sum())
        return _bounded(float(differing), 0.0, f"{differing} of {ref.size} differ" if differing else "")
    got, ref = got.astype(np.float64), ref.astype(np.float64)
    if options.get("partition"):
        return _share(_agreement(got, ref), options.get("share_equal", 1.0))
    unknown = np.isnan(ref)
    if not options.get("nan_skip") and not np.array_equal(np.isnan(got), unknown):
        return Verdict(False, math.inf, math.inf, "NaN at other places")
    got, ref = np.where(unknown, 0.0, got), np.where(unknown, 0.0, ref)
    if (np.isfinite(ref) & ~np.isfinite(got)).any():
        return Verdict(False, math.inf, math.inf, "not finite")
    if options.get("up_to_sign"):
        return _up_to_sign(options, got, ref, saved)
    return _values(options, got, ref)


def _bounded(error: float, bound: float, text: str = "") -> Verdict:
    excess = error / bound if bound > 0 else (math.inf if error > 0 else 0.0)
    return Verdict(error <= bound, error, excess, text)


def _share(equal: float, share_equal: float) -> Verdict:
    """The error is the share that differs; the share that agrees is what the rule bounds."""
    differing, allowed = 1.0 - equal, 1.0 - share_equal
    excess = differing / allowed if allowed > 0 else (math.inf if differing > 0 else 0.0)
    return Verdict(equal >= share_equal, differing, excess)


def _without_missing_tail(got: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Drop the last rows of `ref` that the replay left out, where they are NaN throughout."""
    if got.ndim and got.shape[1:] == ref.shape[1:] and len(got) < len(ref) and np.isnan(ref[len(got) :]).all():
        return ref[: len(got)]
    return ref


def _same_set(options: Mapping, got: np.ndarray, ref: np.ndarray, saved: Mapping[str, np.ndarray]) -> Verdict:
    count = min(len(ref), int(saved[options["first"]])) if "first" in options else len(ref)
    if len(got) < count:
        return Verdict(False, math.inf, math.inf, f"{len(got)} entries, {count} needed")
    return _bounded(float(len(set(got[:count].tolist()) ^ set(ref[:count].tolist()))), 0.0)


def _agreement(got: np.ndarray, ref: np.ndarray) -> float:
    """Share of equal entries after the best one-to-one renaming of the ids in `got`."""
    names_got, ids_got = np.unique(got.ravel(), return_inverse=True)
    names_ref, ids_ref = np.unique(ref.ravel(), return_inverse=True)
    counts = np.bincount(ids_got * len(names_ref) + ids_ref, minlength=len(names_got) * len(names_ref))
    counts = counts.reshape(len(names_got), len(names_ref))
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / ref.size)


def _bound(options: Mapping, ref: np.ndarray) -> np.ndarray:
    magnitude = np.abs(ref)
    largest = magnitude.max() if ref.size else 0.0
    return options.get("atol", 0.0) + options.get("rtol", 0.0) * magnitude + options.get("atol_of_max", 0.0) * largest


def _elementwise(difference: np.ndarray, bound: np.ndarray) -> Verdict:
    if not difference.size:
        return Verdict(True, 0.0, 0.0)
    ratio = np.where(difference > 0, difference / np.maximum(bound, _TINY), 0.0)
    return Verdict(bool((difference <= bound).all()), float(difference.max()), float(ratio.max()))


def _values(options: Mapping, got: np.ndarray, ref: np.ndarray) -> Verdict:
    with np.errstate(invalid="ignore"):
        difference = np.where(got == ref, 0.0, np.abs(got - ref))  # equal infinities are equal
    mean = float(difference.mean()) if ref.size else 0.0
    average = _bounded(mean, options["mean_abs"]) if "mean_abs" in options else None
    if "argmax_axis" in options:
        axis = options["argmax_axis"]
        main = _share(float((got.argmax(axis) == ref.argmax(axis)).mean()), options["share_equal"])
    elif "share_equal" in options:
        main = _share(float((difference <= _bound(options, ref)).mean()) if ref.size else 1.0, options["share_equal"])
    elif average is not None:
        return average
    else:
        return _elementwise(difference, _bound(options, ref))
    if average is None:
        return main
    worse = max(main, average, key=lambda verdict: (not verdict.ok, verdict.excess))
    return Verdict(main.ok and average.ok, worse.error, worse.excess)


def _up_to_sign(options: Mapping, got: np.ndarray, ref: np.ndarray, saved: Mapping[str, np.ndarray]) -> Verdict:
    """One vector an index of `axis`; each may be negated."""
    axis = options["axis"]
    vectors = [np.moveaxis(array, axis, 0).reshape(ref.shape[axis], -1) for array in (got, ref)]
    got, ref = vectors
    if "min_abs_cosine" not in options:
        negated = ((got + ref) ** 2).sum(1) < ((got - ref) ** 2).sum(1)
        got = np.where(negated[:, None], -got, got)
        return _elementwise(np.abs(got - ref), _bound({k: options.get(k, 0.0) for k in ("atol", "rtol")}, ref))
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(ref, axis=1)
    cosine = np.abs((got * ref).sum(1)) / np.maximum(lengths, _TINY)
    error, bound = 1.0 - cosine, np.full(len(cosine), 1.0 - options["min_abs_cosine"])
    ok = cosine > options["min_abs_cosine"]
    if "min_gap" in options:
        loose = _not_identified(options["min_gap"], saved)
        if loose.any():  # a turned basis is as good: such vectors need only solve the problem
            residual = _residual(options["min_gap"], got, saved)
            limit = options["min_gap"]["residual"]["max"]
            error, bound = np.where(loose, residual, error), np.where(loose, limit, bound)
            ok = np.where(loose, residual < limit, ok)
    worst = int(np.argmax(error / np.maximum(bound, _TINY)))
    return Verdict(bool(ok.all()), float(error[worst]), float(error[worst] / max(bound[worst], _TINY)))


def _not_identified(gap: Mapping, saved: Mapping[str, np.ndarray]) -> np.ndarray:
    """True where an eigenvalue lies too close to another, or is the largest, whose neighbour was not saved."""
    values = np.asarray(saved[gap["values"]], np.float64)
    distance = np.abs(values[:, None] - values[None]) + np.diag(np.full(len(values), np.inf))
    loose = distance.min(1) <= gap["gap"]
    loose[np.abs(values).argmax()] = True
    return loose


def _residual(gap: Mapping, vectors: np.ndarray, saved: Mapping[str, np.ndarray]) -> np.ndarray:
    """max |(D - W) v - l D v| of each vector; without the D on the right where the Laplacian is not normalised."""
    names = gap["residual"]
    affinity, degree = (np.asarray(saved[names[key]], np.float64) for key in ("W", "D"))
    values = np.asarray(saved[gap["values"]], np.float64)[:, None]
    weighted = degree * vectors
    right = weighted if bool(saved[names["lapnorm"]]) else vectors
    return np.abs(weighted - vectors @ affinity.T - values * right).max(1)
