"""Sweep and site files that people write, with values that no trial and no job can be made of: one line each."""

import math

import pytest
import yaml

from common.errors import ConfigError
from launch import space, submit
from tests.common.formats.test_trees import BOMB
from tests.launch.test_space import GOOD

KEY = "parameters.optim.head.lr"


def line(path) -> str:
    with pytest.raises(ConfigError) as caught:
        space.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"min": 0, "max": 3, "q": 0, "distribution": "q_uniform"}, "q=0: must be above 0"),
        ({"min": 0, "max": 3, "q": -1, "distribution": "q_uniform"}, "q=-1: must be above 0"),
        ({"min": 0.0, "max": 3.0, "q": 1e-300, "distribution": "q_uniform"}, "q=1e-300: is too small for these values"),
        ({"mu": 0, "sigma": -1, "distribution": "normal"}, "sigma=-1: must be above 0"),
        ({"mu": 1000, "sigma": 1, "distribution": "log_normal"},
         "mu=1000, sigma=1: e to such powers is no number any more"),
        ({"min": 0.0, "max": math.inf}, "max=inf: expected a number from -1e+15 to 1e+15"),
        ({"min": math.nan, "max": 1.0}, "min=nan: expected a number from -1e+15 to 1e+15"),
        ({"min": 0, "max": 10**30}, "max=1e+30: expected a number from -1e+15 to 1e+15"),
        ({"min": 0.5, "max": 3, "distribution": "int_uniform"},
         "min=0.5, max=3: expected whole numbers for int_uniform"),
        ({"min": [1], "max": 3}, "min=[1]: expected a number (yaml reads 1e-4 as a text; write 1.0e-4)"),
        ({"values": [1, 2], "probabilities": "half"},
         "probabilities=half: expected one a value, each from 0 to 1, with a sum of 1"),
        ({"values": [1, 2], "probabilities": 0.5},
         "probabilities=0.5: expected one a value, each from 0 to 1, with a sum of 1"),
        ({"values": [1, 2], "probabilities": [2, -1]},
         "probabilities=[2, -1]: expected one a value, each from 0 to 1, with a sum of 1"),
        ({"values": [1, 2], "probabilities": ["a", "b"]},
         "probabilities=[a, b]: expected one a value, each from 0 to 1, with a sum of 1"),
        ({"values": [{"a": 1}]}, "{'a': 1}: expected numbers, texts, true or false, or lists of them"),
        ({"value": {"a": 1}}, "{'a': 1}: expected numbers, texts, true or false, or lists of them"),
    ],
)  # fmt: skip
def test_a_parameter_that_nothing_is_drawn_from(spec, said, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "method": "random", "parameters": {"optim.head.lr": spec}}))
    assert line(path) == f"{KEY}: {said}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"command": ["train", 3, space.ARGUMENTS]}, "command: 3: expected texts; put a number in quotes"),
        ({"command": ["train", "a\nb", space.ARGUMENTS]}, "command: 'a\\nb': expected texts; put a number in quotes"),
        ({"metric": {"name": 3, "goal": "maximize"}},
         "metric={'name': 3, 'goal': 'maximize'}: expected {name: val/…, goal: maximize} or minimize"),
        ({"run_cap": 10**12}, "run_cap=1000000000000: expected a whole number from 1 to 100000"),
        ({"parameters": {f"k{i}": {"values": list(range(100))} for i in range(6)}, "method": "grid"},
         "parameters: a grid of 1000000000000 trials; 100000 are the most, or draw some"),
        ({"parameters": 3}, "parameters=3: expected a mapping of keys to their values"),
        ({3: 1}, "3: no such key; known: "),
    ],
)  # fmt: skip
def test_a_file_that_no_sweep_is_made_of(change, said, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}, sort_keys=False))
    assert line(path).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 5000, "is no yaml that can be read (nested too deeply); compare it with "),
        (BOMB.encode(), "is no yaml that can be read (aliases make more than 1000000 values of it); compare it with "),
        (b"a: \xe9", "is no yaml that can be read (not text in UTF-8); compare it with "),
        (b"a: [1", "is no yaml that can be read (line 1); compare it with "),
    ],
)
def test_a_text_that_is_no_yaml(content, said, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    assert line(path) == f"{said}configs/sweep/hidden_positives.yaml"
    with pytest.raises(ConfigError) as caught:
        submit.read_site(path)
    assert str(caught.value) == f"{path}: {said}launch/site.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu_option: --gres=gpu:{kind}:{gpus}",
         "gpu_option=--gres=gpu:{kind}:{gpus}: {gpus} is the only part in braces that is known"),
        ("gpu_option: --gres=gpu:{gpus:>9}",
         "gpu_option=--gres=gpu:{gpus:>9}: must hold {gpus}, as in --gres=gpu:{gpus}"),
        ("cpus_per_task: 1000000000000", "cpus_per_task=1000000000000: must be at most 1000000"),
        ("setup: [{a: 1}]", "setup=[{'a': 1}]: expected a list of texts, as in setup: [module load cuda]"),
        ("extra: [null]", "extra=[null]: expected a list of texts, as in setup: [module load cuda]"),
        ('partition: "a\\nb"', "partition='a\\nb': must not hold control characters; write it on one line"),
    ],
)  # fmt: skip
def test_a_site_that_no_job_is_made_of(text, said, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        submit.read_site(path)
    assert str(caught.value) == f"{path}: {said}"
