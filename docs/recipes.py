"""The tables of docs/reproduce.md, out of configs/experiment/*.yaml: `python -m docs.recipes` writes them anew."""

import re
from pathlib import Path

import config
from lightning_modules.facts import facts

PAGE = Path(__file__).parent / "reproduce.md"
SCALING = PAGE.with_name("scaling.md")
START, END = "<!-- written by python -m docs.recipes -->\n", "<!-- end -->\n"
HEAD = "| recipe | needs | command | to reach, percent | source | hours and memory |\n|---|---|---|---|---|---|"

COSTS = {
    "dino_tiny": "about an hour on one CPU core with bf16 instructions; memory not known",
    "dino_tiny_pictures": "half an hour on a CPU; memory not known",
    **dict.fromkeys(
        ("segsort_scenes", "hsg_scenes", "segsort_camvid", "hsg_camvid"),
        "some minutes on two CPU cores; memory not known",
    ),
}
"""What a recipe was seen to take."""
COUNTED = {
    "hidden_positives_cocostuff27_vits8": 3 * 5 * 97_702,  # epochs, crops of a picture, pictures of the coarse list
    "stego_cocostuff27_vits8": 5_000 * 16,  # steps, pictures of a step
}
"""Training pictures of the recipes that docs/scaling.md counts a step of 64 pictures of."""
FLOAT32 = (989 * 0.4) / (67 * 0.6)
"""How much longer a float32 backbone takes there than one in half precision, by the rates of that page."""
WEIGHTS = {"bundled": "bundled weights", "none": "no weights (random)", "hub": "weights from the hub"}


def weights(experiment: str) -> str:
    """What the backbone of a recipe starts from: a value of `backbone.weights`; `file`: one has to be named."""
    return str(config.compose([f"experiment={experiment}"]).backbone.weights or "file")


def cost(experiment: str) -> str:
    """Hours and memory: as seen, else computed from the estimated step of docs/scaling.md, else not known."""
    if experiment not in COUNTED:
        return COSTS.get(experiment, "not known")
    cfg = config.compose([f"experiment={experiment}"])
    estimate = re.search(rf"^\| {cfg.method.name} \| 1 \| ([\d.]+) \| ([\d.]+) \|", SCALING.read_text("utf-8"), re.M)
    backbone, rest = (float(part) for part in estimate.groups())
    backbone *= FLOAT32 if cfg.backbone.precision == "float32" else 1
    minutes = COUNTED[experiment] / 64 * (backbone + rest) / 1000 / 60
    return f"*computed*, one H200: {minutes:.0f} minutes for the steps; memory not known"


def row(experiment: str) -> str:
    """A line of the table."""
    recipe = config.load_group("experiment", experiment)
    words, figure, start = recipe["words"], recipe["figure"], weights(experiment)
    args = ["data.root=<folder>"] if words["data"] != "scenes" else []
    args += ["backbone.weights=<file>"] if start == "file" else []
    command = f"make train EXPERIMENT={experiment}" + (f' ARGS="{" ".join(args)}"' if args else "")
    reach = config.figure(experiment).removeprefix("to reach: ").partition(";")[0]
    reach = reach.removesuffix(f" ({figure['source']})") + (
        f"; reached here: {figure['here']}" if figure["here"] else ""
    )
    needs = f"`{words['data']}`, `{words['backbone']}` with {WEIGHTS.get(start, 'a file of weights')}"
    cells = [f"`{experiment}`", needs, f"`{command}`", reach, figure["source"], cost(experiment)]
    return f"| {' | '.join(cells)} |"


def tables() -> str:
    """A table for each method that has recipes."""
    found = {name: config.load_group("experiment", name)["words"]["method"] for name in config.names("experiment")}
    parts = []
    for method in sorted(set(found.values())):
        rows = "\n".join(row(name) for name, own in found.items() if own == method)
        parts.append(f"\n## {facts(method).title}\n\n[What it does](methods/{method}.md).\n\n{HEAD}\n{rows}\n")
    return "".join(parts)


def page(text: str) -> str:
    """The text of the page with its tables as they have to be."""
    before, _, rest = text.partition(START)
    return f"{before}{START}{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
