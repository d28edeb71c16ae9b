"""The field on one page: every method in three lines, and the table of costs that a script writes."""

import json
import re

import pytest
from omegaconf import OmegaConf

import config
from docs import costs
from docs.recipes import PAGE as RECIPES
from lightning_modules import registry
from lightning_modules.facts import facts

TEXT = costs.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("method", registry.names())
def test_a_method_stands_there_in_three_lines(method):
    own = "None" if method == "kmeans_baseline" else r"(\w+ )?\d{4}(, a reconstruction)?"
    year = "" if own == "None" else f", {own}"
    head = rf"\*\*\[[^\]]+\]\({method}\.md\)\*\*{year} \(\[figure\]\({method}\.png\)\)\. .+"
    entry = rf"^{head}\nNeeds: .+ Trains: .+\nTake it for: .+\n$"
    assert len(re.findall(entry, TEXT, re.M)) == 1, f"docs/methods/index.md: {method} does not stand there as others do"


def test_the_table_of_costs_has_a_row_for_every_method():
    rows = re.findall(r"^\| \[[^\]]+\]\((\w+)\.md\) \|", TEXT.partition(costs.START)[2], re.M)
    assert rows == list(registry.names()), "docs/methods/index.md: run python -m docs.costs"


def test_readme_and_index_lead_there():
    assert "(docs/methods/index.md)" in (RECIPES.parents[1] / "README.md").read_text(encoding="utf-8")
    assert "(methods/index.md)" in (RECIPES.parent / "index.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_finished_runs(tmp_path):
    run = tmp_path / "stego"
    run.mkdir()
    OmegaConf.save({"data": {"batch_size": 16}}, run / "config.yaml")
    (run / "environment.json").write_text(json.dumps({"device": "cpu: x", "threads": 1}))
    assert costs.cost(run) is None  # not finished
    (run / "metrics.json").write_text(json.dumps({"train_images_per_second": 40.0}))
    assert costs.cost(run)["seconds"] == 40
    text = costs.page(f"above\n{costs.START}old\n{costs.END}below\n", tmp_path)
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert "Measured on: cpu: x, 1 thread(s)." in text
    assert f"| [{facts('stego').title}](stego.md) | 40 | 16 |  |" in text
    assert text.count(costs.MISSING) == len(registry.names()) - 1
    assert costs.page(text, tmp_path) == text


@pytest.mark.parametrize("method", registry.names())
def test_the_words_of_a_run_are_settings_of_its_method(method, tmp_path):
    cfg = config.compose(costs.words(method, 7, tmp_path))
    assert (cfg.method.name, cfg.trainer.max_steps, cfg.run.name) == (method, 7, method)
