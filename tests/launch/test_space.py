"""Sweep files: those of the project are sound for W&B and for us, wrong ones end in one line, draws keep ranges."""

import math

import numpy as np
import pytest
import yaml

import config
from common.errors import ConfigError
from launch import space
from tests.support.pages import blocks

FILES = config.names("sweep")
GOOD = {
    "program": "run.py",
    "command": [
        "${env}",
        "${interpreter}",
        "${program}",
        "train",
        "method=stego",
        "logger=wandb",
        "${args_no_hyphens}",
    ],
    "method": "random",
    "run_cap": 3,
    "metric": {"name": "val/cluster/miou", "goal": "maximize"},
    "parameters": {"optim.head.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
}


def agent_command(tree: dict, values: dict, monkeypatch) -> list[str]:
    """The command that W&B's own agent starts for a trial with these values."""
    from wandb import wandb_agent

    started = []
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda command, **_: started.append(command) or _Process())
    agent = wandb_agent.Agent(api=None, queue=None, sweep_id="s1")
    agent._sweep_command = list(tree["command"])
    args = {key: {"value": value} for key, value in values.items()}
    agent._command_run({"type": "run", "run_id": "r1", "program": tree["program"], "args": args})
    return started[0]


class _Process:
    last_sigterm_time = None


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_project_run_here_and_as_wandb_forms_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    sweep = space.read(space.find(name))
    trials = sweep.trials(3 if sweep.tree["method"] != "grid" else None)
    for values in trials:
        cfg = config.compose([*sweep.words, *(space.word(key, value) for key, value in values.items())])
        command = agent_command(sweep.tree, values, monkeypatch)
        assert command[:5] == ["/usr/bin/env", "python", "run.py", "train", sweep.words[0]]
        by_agent = config.compose(command[4:])
        assert by_agent.logger == "wandb"
        flat, agents = config.flatten(config.plain(cfg)), config.flatten(config.plain(by_agent))
        assert {key for key in flat if flat[key] != agents[key]} == {"logger"}
        for key, value in values.items():
            assert flat[key] == value, key
    assert len({tuple(values.items()) for values in trials}) == len(trials)


def test_every_swept_method_has_a_target_of_labels_and_one_without():
    for method in ("hidden_positives", "stego"):
        sweeps = {kind: space.read(space.find(method + kind)) for kind in ("", "_label_free", "_grid")}
        assert sweeps[""].target == "val/cluster/miou"
        assert "LABELS" in sweeps[""].path.read_text().splitlines()[0]
        assert sweeps["_label_free"].target == "val/cluster/entropy"
        assert [sweeps[kind].tree["method"] for kind in sweeps] == ["bayes", "bayes", "grid"]
        assert sweeps[""].tree["parameters"] == sweeps["_label_free"].tree["parameters"]


def test_wandb_finds_nothing_wrong():
    """The schema of W&B itself: the package `sweeps`, which `wandb` no longer brings along."""
    sweeps = pytest.importorskip(
        "sweeps", reason="pip install sweeps (it wants numpy < 2, so an environment of its own)"
    )
    for name in FILES:
        assert sweeps.schema_violations_from_proposed_config(yaml.safe_load(space.find(name).read_text())) == [], name


def changed(**keys):
    return {**GOOD, **keys}


def parameter(**spec):
    return changed(parameters={"optim.head.lr": spec})


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        (changed(methd="grid"), "methd: no such key; did you mean method?"),
        ({**GOOD, "metric": None}, "metric: is needed; compare it with configs/sweep/hidden_positives.yaml"),
        (changed(method="tpe"), "method=tpe: not one of grid, random, bayes"),
        (
            changed(metric={"name": "x", "goal": "up"}),
            "metric={'name': 'x', 'goal': 'up'}: expected {name: val/…, goal: maximize} or minimize",
        ),
        (
            changed(command=["${program}", "train", "${args}"]),
            "command: must hold train and, after it, ${args_no_hyphens} (key=value words, no dashes)",
        ),
        (changed(run_cap=0), "run_cap=0: expected a whole number from 1 to 100000"),
        (
            changed(parameters={"optim": {"parameters": {"head": {}}}}),
            "parameters.optim: nested parameters hide the key; write its dotted name, as in optim.head.lr",
        ),
        (
            parameter(distribution="beta"),
            f"parameters.optim.head.lr: distribution=beta: not one of {', '.join(space.DISTRIBUTIONS)}",
        ),
        (
            {**parameter(min=0.1, max=0.2), "method": "grid"},
            "parameters.optim.head.lr: a grid needs values, not distribution=uniform; or set method: random",
        ),
        (
            parameter(min=0.1, max=0.2, mu=1),
            "parameters.optim.head.lr: mu: is no key of uniform; it takes min, max",
        ),
        (parameter(min=0.2, max=0.1), "parameters.optim.head.lr: min=0.2: must be below max=0.1"),
        (
            parameter(min="1e-4", max=0.1),
            "parameters.optim.head.lr: min=1e-4: expected a number (yaml reads 1e-4 as a text; write 1.0e-4)",
        ),
        (
            parameter(distribution="log_uniform_values", min=0, max=1),
            "parameters.optim.head.lr: min=0: must be above 0 for log_uniform_values",
        ),
        (
            parameter(values=[1, None]),
            "parameters.optim.head.lr: null: W&B hands it over as None, which is no value here; leave it out",
        ),
        (
            parameter(values=[1, 2], probabilities=[0.5, 0.6]),
            "parameters.optim.head.lr: probabilities=[0.5, 0.6]: expected one a value, "
            "each from 0 to 1, with a sum of 1",
        ),
    ],
)
def test_a_wrong_file_ends_in_one_line(tree, line, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        space.read(path)
    assert str(caught.value) == f"{path}: {line}"


def test_names_and_numbers_that_are_missing(tmp_path):
    with pytest.raises(ConfigError) as caught:
        space.find("hidden_positive")
    assert str(caught.value).startswith("sweep=hidden_positive: no such sweep; did you mean hidden_positives")
    with pytest.raises(ConfigError) as caught:
        space.find("segsort")
    assert str(caught.value).startswith("sweep=segsort: no such sweep; configs/sweep/ has hidden_positives, ")
    assert str(caught.value).endswith("name one, or write segsort.yaml after stego_grid.yaml")
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in GOOD.items() if key != "run_cap"}))
    with pytest.raises(ConfigError) as caught:
        space.read(path).trials(None)
    assert str(caught.value) == f"{path}: run_cap: is needed with method: random; or say TRIALS=…"


def test_draws_keep_their_ranges_and_can_be_prolonged(tmp_path):
    specs = {
        "seed": {"min": 1, "max": 3},
        "a": {"min": 0.5, "max": 2.0},
        "b": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "c": {"distribution": "q_uniform", "min": 0, "max": 10, "q": 5},
        "d": {"values": ["x", "y"], "probabilities": [0.9, 0.1]},
        "e": {"distribution": "normal", "mu": 3, "sigma": 0.5},
        "f": {"value": 7},
    }
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(changed(parameters=specs)))
    sweep = space.read(path)
    trials = sweep.trials(2000)
    assert sweep.trials(None) == trials[:3]
    column = {key: [trial[key] for trial in trials] for key in specs}
    assert set(column["seed"]) == {1, 2, 3}
    assert 0.5 <= min(column["a"]) < 0.51
    assert 1.98 < max(column["a"]) <= 2.0
    assert np.mean([math.log10(value) for value in column["b"]]) == pytest.approx(-2.5, abs=0.1)
    assert set(column["c"]) == {0, 5, 10}
    assert 0.87 < column["d"].count("x") / 2000 < 0.93
    assert (np.mean(column["e"]), np.std(column["e"])) == (pytest.approx(3, abs=0.05), pytest.approx(0.5, abs=0.03))
    assert set(column["f"]) == {7}


def test_a_grid_is_every_combination_in_order(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        yaml.safe_dump(changed(method="grid", run_cap=4, parameters={"a": {"values": [1, 2]}, "b": {"values": [3, 4]}}))
    )
    pairs = [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert [tuple(trial.values()) for trial in space.read(path).trials(None)] == pairs


def test_the_sweep_of_the_page_is_one(tmp_path):
    (text,) = (block for block in blocks("yaml") if "run.py" in block and "method=segsort" in block)
    path = tmp_path / "segsort.yaml"
    path.write_text(text)
    trials = space.read(space.find(str(path))).trials(None)
    assert [trial["optim.head.lr"] for trial in trials] == [3e-4, 1e-3]
    assert "optim.head.lr" in config.flatten(config.compose(["method=segsort"]))
