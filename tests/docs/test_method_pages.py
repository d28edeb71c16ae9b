"""Every method has a page with a figure and its recipes, and the tables of docs/reproduce.md are those of the yamls."""

import re
from pathlib import Path

import pytest
from PIL import Image

import config
from docs import recipes
from docs.figures import drawing, methods
from lightning_modules import registry

FOLDER = recipes.PAGE.parent / "methods"
HEADINGS = [
    "The idea", "Run it", "Settings that matter", "Published figures and recipes", "Departures from the release",
    "Measured here", "Cost",
]  # fmt: skip


def page(method: str) -> str:
    path = FOLDER / f"{method}.md"
    if not path.is_file():
        pytest.fail(
            f"docs/methods/{method}.md: the page of method={method} is missing; sections: {', '.join(HEADINGS)}"
        )
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("method", registry.names())
def test_a_page_has_the_sections_of_all(method):
    assert re.findall(r"^## (.*)$", page(method), re.M) == HEADINGS
    assert 60 <= len(page(method).splitlines()) <= 150


@pytest.mark.parametrize("method", registry.names())
def test_the_figure_of_a_page_is_there_and_small(method):
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page(method))
    assert shown == [f"{method}.png"]
    path = FOLDER / shown[0]
    assert path.stat().st_size < 150_000
    with Image.open(path, formats=["PNG"]) as image:
        assert min(image.size) > 300
    assert method in methods.FIGURES, f"docs/figures/methods.py: no function {method} draws {shown[0]}"


@pytest.mark.parametrize("method", registry.names())
def test_a_page_names_the_recipes_of_its_method_and_keys_that_exist(method):
    text = page(method)
    for name in config.names("experiment"):
        if config.load_group("experiment", name)["words"]["method"] == method:
            assert f"`{name}`" in text, f"docs/methods/{method}.md does not name the recipe {name}"
    known = config.flatten(config.compose([f"method={method}"]))
    for key in re.findall(r"`((?:method|optim|evaluation|backbone|data|trainer)\.(?!md)[a-z_.]+)(?:=[^`]*)?`", text):
        assert any(name == key or name.startswith(f"{key}.") for name in known), f"{method}.md: {key} is no key"


@pytest.mark.parametrize("path", [*sorted(FOLDER.glob("*.md")), recipes.PAGE], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).is_file(), f"{path.name}: {target}"


def test_no_page_is_of_a_method_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.md")} == {*registry.names(), "index"}


def test_the_tables_of_recipes_are_those_of_the_files():
    text = recipes.PAGE.read_text(encoding="utf-8")
    assert text == recipes.page(text), "docs/reproduce.md: run python -m docs.recipes"
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == sorted(
        config.names("experiment"), key=lambda name: (config.load_group("experiment", name)["words"]["method"], name)
    )
    assert set(recipes.COSTS) <= set(config.names("experiment"))


def test_a_row_says_what_a_recipe_needs():
    row = recipes.row("hidden_positives_cocostuff27_vits8")
    assert "`cocostuff27`, `dino_vits8_300ep` with a file of weights" in row
    assert 'ARGS="data.root=<folder> backbone.weights=<file>"' in row
    assert "cluster_crf 57.2 acc / 24.6 mIoU" in row
    assert row.count("HP, CVPR 2023") == 1
    assert "`make train EXPERIMENT=hsg_scenes`" in recipes.row("hsg_scenes")


def test_a_grid_is_a_png_of_its_cells(tmp_path):
    batch = drawing.ids([[0, 1], [2, -1]])
    assert tuple(batch[1, 1]) == (24, 24, 24)
    assert len({tuple(colour) for colour in batch.reshape(-1, 3)}) == 4
    drawing.save(
        tmp_path / "a.png", drawing.Grid(["one", "two\nlines"], [[batch, drawing.Cell(batch, (1, 1), (0, 0, 1, 1))]])
    )
    with Image.open(tmp_path / "a.png", formats=["PNG"]) as image:
        assert image.size[0] > image.size[1] > 150


def test_computed_times_follow_the_estimated_steps():
    """Milliseconds of a step of 64 pictures, its backbone 9.84 times as long in float32."""
    minutes = {name: re.search(r"([0-9]+) minutes", recipes.cost(name)).group(1) for name in recipes.COUNTED}
    backbone, rest = map(
        float, re.search(r"^\| stego \| 1 \| (\S+) \| (\S+) ", recipes.SCALING.read_text(), re.M).groups()
    )
    assert minutes["stego_cocostuff27_vits8"] == f"{80_000 / 64 * (9.84 * backbone + rest) / 60_000:.0f}"
    assert config.compose(["experiment=stego_cocostuff27_vits8"]).trainer.max_steps * 16 == 80_000
    assert config.compose(["experiment=hidden_positives_cocostuff27_vits8"]).trainer.max_epochs == 3
    assert recipes.cost("hsg_kitti_resnet50") == "not known"
