"""A sweep file of W&B (configs/sweep/*.yaml): read, checked, and its trials listed (grid) or drawn (random).

Keys and distributions are those of W&B's sweep configuration, so that one file serves its server and `launch.sweep`.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import config
from common.errors import ConfigError, did_you_mean, one_of
from common.formats import trees
from config import shown

KEYS = (
    "program", "command", "method", "metric", "parameters", "run_cap", "early_terminate",
    "name", "description", "project", "entity",
)  # fmt: skip
METHODS = ("grid", "random", "bayes")
ARGUMENTS = "${args_no_hyphens}"
"""W&B puts the trial's key=value words here."""

DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"),
    "q_normal": ("mu", "sigma"),
    "log_normal": ("mu", "sigma"),
}
"""Distributions that are drawn here, with the keys they need; those with q take `q`, categorical `probabilities`."""

HEADLINE = {"name": "headline", "goal": "maximize"}
"""The metric of a file that names none: the score that the method is known by (`Sweep.following` puts it in)."""

DEFAULTS = {"mu": 0.0, "sigma": 1.0, "q": 1.0}

LARGEST = 10**15
"""Numbers beyond it are slips, and no floats keep their last digits."""
SPREADS, MOST_EXPONENT = 40, 700
"""No draw of a normal distribution lies further from its mean, in sigmas; and e to more is beyond what floats hold."""
MOST_TRIALS = 100_000


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    path: Path
    tree: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """The words of `run.py train` that all trials share, without the choice of a logger."""
        command = self.tree["command"]
        fixed = command[command.index("train") + 1 : command.index(ARGUMENTS)]
        return [word for word in fixed if not word.startswith("logger=")]

    @property
    def target(self) -> str:
        return self.tree["metric"]["name"]

    @property
    def maximized(self) -> bool:
        return self.tree["metric"]["goal"] == "maximize"

    def following(self, target: str) -> "Sweep":
        """The same with another score as its target."""
        return Sweep(self.path, {**self.tree, "metric": {**self.tree["metric"], "name": target}})

    def command(self, words: list[str]) -> list[str]:
        """W&B's command with more words in front of the trial's own."""
        place = self.tree["command"].index(ARGUMENTS)
        return [*self.tree["command"][:place], *words, *self.tree["command"][place:]]

    def trials(self, number: int | None) -> list[dict[str, Any]]:
        """The values of each trial: the grid in its order, or `number` (default `run_cap`) draws.

        Draw i is the same whatever the number is, so a sweep can be prolonged. Raises ConfigError without a number.
        """
        parameters = self.tree["parameters"]
        if self.tree["method"] == "grid":
            options = [spec["values"] if "values" in spec else [spec["value"]] for spec in parameters.values()]
            grid = [dict(zip(parameters, values, strict=True)) for values in itertools.product(*options)]
            return grid[: self.tree.get("run_cap") if number is None else number]
        from common.chance import numpy_generator  # imports torch, and a wrong word shall end without

        return [
            {
                key: draw(spec, numpy_generator(0, f"sweep.{key}", index))
                for key, spec in parameters.items()
            }
            for index in range(self.number(number))
        ]  # fmt: skip

    def number(self, asked: int | None) -> int:
        """How many trials are drawn: `asked`, or `run_cap`. Raises ConfigError without both."""
        number = self.tree.get("run_cap") if asked is None else asked
        if number is None:
            raise ConfigError(f"{self.path}: run_cap: is needed with method: {self.tree['method']}; or say TRIALS=…")
        return number

    def ends(self) -> list[dict[str, Any]]:
        """Values that show whether a range is right before anything is drawn from it: its ends, every listed value."""
        options = []
        for spec in self.tree["parameters"].values():
            listed = spec.get("values") or ([spec["value"]] if "value" in spec else [])
            ends = [spec[key] if isinstance(spec[key], int) and spec["distribution"] == "int_uniform"
                    else rounded(spec, spec[key]) for key in ("min", "max") if key in spec]  # fmt: skip
            options.append(listed or ends or [spec.get("mu", DEFAULTS["mu"])])
        size = max(map(len, options))
        return [
            dict(zip(self.tree["parameters"], (own[min(place, len(own) - 1)] for own in options), strict=True))
            for place in range(size)
        ]


def read_keys(path: Path, model: str, empty: bool = False) -> dict[str, Any]:
    """The mapping of a yaml file; `model` names a good one. Raises ConfigError (without `empty`, also for no keys)."""
    try:
        tree = trees.yaml_of(path)
    except trees.TreeError as error:
        raise ConfigError(f"{path}: is no yaml that can be read ({error}); compare it with {model}") from None
    if empty and tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no keys; compare it with {model}")
    return tree


def read(path: Path) -> Sweep:
    """The sweep of a file. Raises ConfigError with one line for whatever W&B or we could not run."""
    tree = read_keys(path, "configs/sweep/hidden_positives.yaml")
    for key in tree:
        if key not in KEYS:
            raise ConfigError(f"{path}: {shown(key)}: no such key; {did_you_mean(str(key), KEYS)}")
    tree = {"metric": HEADLINE, **tree}
    for key in ("command", "method", "metric", "parameters"):
        if not tree.get(key):
            raise ConfigError(f"{path}: {key}: is needed; compare it with configs/sweep/hidden_positives.yaml")
    one_of(f"{path}: method", tree["method"], METHODS)
    metric = tree["metric"]
    if (
        not isinstance(metric, dict)
        or not isinstance(metric.get("name"), str)
        or metric.get("goal") not in ("maximize", "minimize")
    ):
        raise ConfigError(f"{path}: metric={shown(metric)}: expected {{name: val/…, goal: maximize}} or minimize")
    command = tree["command"]
    if not isinstance(command, list) or "train" not in command or ARGUMENTS not in command[command.index("train") :]:
        raise ConfigError(f"{path}: command: must hold train and, after it, {ARGUMENTS} (key=value words, no dashes)")
    for word in command:
        if not isinstance(word, str) or not word.isprintable():
            raise ConfigError(f"{path}: command: {word!a}: expected texts; put a number in quotes")
    cap = tree.get("run_cap")
    if cap is not None and (type(cap) is not int or not 1 <= cap <= MOST_TRIALS):
        raise ConfigError(f"{path}: run_cap={cap}: expected a whole number from 1 to {MOST_TRIALS}")
    if not isinstance(tree["parameters"], dict):
        raise ConfigError(f"{path}: parameters={shown(tree['parameters'])}: expected a mapping of keys to their values")
    for key, spec in tree["parameters"].items():
        tree["parameters"][key] = checked(f"{path}: parameters.{key}", spec, tree["method"])
    if tree["method"] == "grid":
        size = math.prod(len(spec.get("values", [0])) for spec in tree["parameters"].values())
        if size > MOST_TRIALS:
            raise ConfigError(f"{path}: parameters: a grid of {size} trials; {MOST_TRIALS} are the most, or draw some")
    return Sweep(path, tree)


def checked(where: str, spec: Any, method: str) -> dict[str, Any]:
    """One parameter, with its distribution named. Raises ConfigError."""
    if not isinstance(spec, dict):
        raise ConfigError(
            f"{where}={shown(spec)}: expected a mapping such as {{values: [1, 2]}} or {{min: 0.1, max: 1.0}}"
        )
    if "parameters" in spec:
        raise ConfigError(f"{where}: nested parameters hide the key; write its dotted name, as in optim.head.lr")
    kind = spec.get("distribution") or guessed(spec)
    one_of(f"{where}: distribution", kind, DISTRIBUTIONS)
    if method == "grid" and kind not in ("constant", "categorical"):
        raise ConfigError(f"{where}: a grid needs values, not distribution={kind}; or set method: random")
    spec = {**spec, "distribution": kind}
    extra = {"categorical": ("probabilities",)}.get(kind, ("q",) if kind.startswith("q_") else ())
    for key in spec:
        if key not in ("distribution", *DISTRIBUTIONS[kind], *extra):
            raise ConfigError(f"{where}: {key}: is no key of {kind}; it takes {', '.join(DISTRIBUTIONS[kind] + extra)}")
    for key in DISTRIBUTIONS[kind]:
        if key not in spec and key not in DEFAULTS:
            raise ConfigError(f"{where}: {key}: is needed by {kind}")
    if "values" in spec and (not isinstance(spec["values"], list) or not spec["values"]):
        raise ConfigError(f"{where}: values={shown(spec['values'])}: expected a list such as [1, 2]")
    for value in spec.get("values", [spec.get("value", 0)]):
        if value is None:
            raise ConfigError(f"{where}: null: W&B hands it over as None, which is no value here; leave it out")
        if any(not isinstance(entry, str | int | float) for entry in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{where}: {shown(value)}: expected numbers, texts, true or false, or lists of them")
    for key in ("min", "max", "mu", "sigma", "q"):
        if key in spec and (isinstance(spec[key], bool) or not isinstance(spec[key], int | float)):
            raise ConfigError(
                f"{where}: {key}={shown(spec[key])}: expected a number (yaml reads 1e-4 as a text; write 1.0e-4)"
            )
        if key in spec and not abs(spec[key]) <= LARGEST:
            raise ConfigError(f"{where}: {key}={spec[key]:g}: expected a number from {-LARGEST:g} to {LARGEST:g}")
    for key in ("q", "sigma"):
        if spec.get(key, 1) <= 0:
            raise ConfigError(f"{where}: {key}={spec[key]}: must be above 0")
    if kind == "int_uniform" and any(not isinstance(spec[key], int) for key in ("min", "max")):
        raise ConfigError(f"{where}: min={spec['min']}, max={spec['max']}: expected whole numbers for int_uniform")
    if "min" in spec and not spec["min"] < spec["max"]:
        raise ConfigError(f"{where}: min={spec['min']}: must be below max={spec['max']}")
    if "log_uniform" in kind and spec["min"] <= 0:
        raise ConfigError(f"{where}: min={spec['min']}: must be above 0 for {kind}")
    ends = [spec[key] for key in ("min", "max") if key in spec]
    if kind.endswith("normal"):
        mean, wide = spec.get("mu", DEFAULTS["mu"]), SPREADS * spec.get("sigma", DEFAULTS["sigma"])
        ends = [mean - wide, mean + wide]
        if kind == "log_normal" and ends[1] > MOST_EXPONENT:
            raise ConfigError(f"{where}: mu={mean}, sigma={wide / SPREADS:g}: e to such powers is no number any more")
    if kind.startswith("q_") and max(map(abs, ends)) / spec.get("q", DEFAULTS["q"]) > LARGEST:
        raise ConfigError(f"{where}: q={spec['q']}: is too small for these values")
    probabilities = spec.get("probabilities")
    if probabilities is not None:
        given = probabilities if isinstance(probabilities, list) else []
        sound = all(type(share) in (int, float) and 0 <= share <= 1 for share in given)
        if not sound or len(given) != len(spec["values"]) or not math.isclose(sum(given), 1.0):
            raise ConfigError(
                f"{where}: probabilities={shown(probabilities)}: expected one a value, each from 0 to 1, with a sum "
                "of 1"
            )
    return spec


def guessed(spec: dict[str, Any]) -> str:
    """The distribution that W&B takes where none is named."""
    if "values" in spec:
        return "categorical"
    if "value" in spec:
        return "constant"
    return "int_uniform" if all(isinstance(spec.get(key), int) for key in ("min", "max")) else "uniform"


def draw(spec: dict[str, Any], rng: np.random.Generator) -> Any:
    """One value of a checked parameter."""
    spec = {**DEFAULTS, **spec}
    kind = spec["distribution"]
    if kind == "constant":
        return spec["value"]
    if kind == "categorical":
        return spec["values"][rng.choice(len(spec["values"]), p=spec.get("probabilities"))]
    if kind == "int_uniform":
        return int(rng.integers(spec["min"], spec["max"], endpoint=True))
    if kind.endswith("normal"):
        value = float(rng.normal(spec["mu"], spec["sigma"]))
        value = math.exp(value) if kind == "log_normal" else value
    elif "log_uniform" in kind:
        value = math.exp(rng.uniform(math.log(spec["min"]), math.log(spec["max"])))
    else:
        value = float(rng.uniform(spec["min"], spec["max"]))
    return rounded(spec, value)


def rounded(spec: dict[str, Any], value: float) -> float:
    """A number as a trial has it: with `q` the nearest step, as W&B rounds it, else six digits: readable in tables and
    names, and more than a setting needs."""
    if spec["distribution"].startswith("q_"):
        step = spec.get("q", DEFAULTS["q"])
        return round(value / step) * step
    return float(f"{value:.6g}")


def word(key: str, value: Any) -> str:
    """A trial's value as W&B's agent writes it, Python's own text; read back by `config.parse_value`."""
    return f"{key}={value}"


def find(name: str) -> Path:
    """The file of a sweep: a path, or the name of one in configs/sweep. Raises ConfigError."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    known = config.names("sweep")
    if name not in known:
        hint = did_you_mean(name, known)
        if name in config.names("method"):  # that no file sweeps: `make sweep METHOD=segsort`
            hint = f"configs/sweep/ has {', '.join(known)}; name one, or write {name}.yaml after stego_grid.yaml"
        raise ConfigError(f"sweep={name}: no such sweep; {hint}")
    return config.CONFIGS / "sweep" / f"{name}.yaml"
