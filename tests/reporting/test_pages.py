"""Every page takes names of any kind as text, and no markup, rule or script stands in Python."""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from inference import naming, overviews
from inspection import clusters, explanation, retrieving
from reporting import comparison, comparison_page, page
from reporting.comparison_page import Gallery
from reporting.exemplars import ClusterSurvey
from reporting.published import Cited, of
from tests.reporting.test_comparison import finished

ROOT = Path(__file__).resolve().parents[2]
EVIL = """</script></style></title><script>alert(1)</script><b onclick="x">"'&amp; {{ 7 * 7 }} {% end %}"""


def noise(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def settings(name: str):
    own = {"data": {"name": name}, "method": {"name": name}, "evaluation": {"window": {"size": None}}}
    return OmegaConf.create(own)


def legend(name: str) -> naming.Legend:
    return naming.Legend([name, f"{name} 2"], [(10, 20, 30), (200, 100, 50)])


def comparison_of(name: str, folder: Path) -> str:
    facts = {"backbone": name, "protocol/matching": name, "val/kmeans/miou": 12.0, "headline": "kmeans"}
    runs = [finished(name, folder=f"{name}{number}", **facts) for number in range(2)]
    runs.append(finished(f"{name} b", **{**facts, "protocol/crf": name}))
    for number, run in enumerate(runs):
        own = folder / str(number)
        own.mkdir()
        object.__setattr__(run, "folder", own)
        run.environment.update(seed=0, git_commit=name, command=["run.py", name], versions={"torch": name})
        (own / "metrics.csv").write_text("step,val/kmeans/miou\n2,10\n4,20\n")
        quoted = name.replace('"', '""')
        (own / "classes.csv").write_text(f'class_id,class,pixels,kmeans\n0,"{quoted}",5,40.0\n')
        (own / "clusters.csv").write_text(f'cluster,class_id,class,pixels,share\n0,0,"{quoted}",5,50.0\n')
    sections = comparison.arrange(runs)
    sections[0].entries[0].published, sections[0].entries[0].source = {"kmeans/miou": 20.0}, name
    shown = {name: [page.picture(noise(), name)]}
    galleries = [Gallery(shown, page.legend([name], [(1, 2, 3)]), [name]), Gallery(shown, missing=[name])]
    cited = [Cited(name, name, name, {"linear_miou": name}, {name: "3.0"}, name, name, name)]
    return comparison_page.render(name, sections, galleries, [name], [name], cited)


def clusters_of(name: str, folder: Path) -> str:
    survey, values = ClusterSurvey(2), torch.eye(2)
    codes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    image = torch.from_numpy(noise()).permute(2, 0, 1) / 255
    survey.add(name, image, torch.ones(24, 32, dtype=torch.bool), codes, codes)
    editor = naming.editor(folder / name / "names.yaml", legend(name), "kmeans", values)
    near = [[(1, 0.5)], [(0, 0.5)]]
    text = clusters.as_page(name, Path(name), "kmeans", legend(name), survey, near, editor)
    content = re.search('<script id="names-content" type="application/json">(.*?)</script>', text, re.S).group(1)
    assert [entry["name"] for entry in json.loads(content)["clusters"]] == [name, f"{name} 2"]
    return text


def explain_of(name: str, folder: Path) -> str:
    found = {"id": 0, "name": name, "colour": [1, 2, 3], "cosine": 0.5, "probability": 0.4}
    content = {
        "picture": name.replace("/", "_"), "point": [3, 4], "patch": [0, 1], "grid": [6, 8], "probe": name,
        "method": name, "checkpoint": name, "confidence": 0.5, "lead": 0.1, "clusters": [found],
    }  # fmt: skip
    page.Image.fromarray(noise()).save(folder / "a.png")
    sections = [explanation.Section(name, name, "a.png"), explanation.Section(name, name)]
    return explanation.page_of(folder, content, settings(name), 3, sections)


def retrieve_of(name: str, folder: Path) -> str:
    number, map_ = torch.zeros(1, dtype=torch.long), np.zeros((24, 32), dtype=np.int64)
    pictures = retrieving.Pictures([noise()], [map_], [name], torch.ones(1, 2), number, number)
    found = [{"segment": 0, "pixels": 768, "nearest": [(0.9, 0)]}]
    retrieving.write(folder, settings(name), name, pictures, pictures, found)
    return (folder / "gallery.html").read_text()


def overlays_of(name: str, folder: Path) -> str:
    areas = overviews.Areas(legend(name))
    areas.add(name, f"{name}.png", np.repeat([0, 1], [1, 499]).reshape(20, 25))
    return overviews.overlays_page(name, legend(name), areas, "kmeans", folder / name)


class Structure(HTMLParser):
    """Elements with the names of their attributes, and all texts and values as a reader gets them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, *(name for name, _ in attrs)))
        self.texts += [value or "" for _, value in attrs]

    def handle_endtag(self, tag):
        self.elements.append((f"/{tag}",))

    def handle_data(self, data):
        self.texts.append(data)


PAGES = {
    "comparison": (comparison_of, 10),
    "clusters": (clusters_of, 10),
    "explain": (explain_of, 8),
    "retrieve": (retrieve_of, 3),
    "overlays": (overlays_of, 4),
}
"""How each page is made with a name, and in how many places at least that name stands."""


@pytest.mark.parametrize("kind", PAGES)
def test_names_that_hold_markup_are_text(kind, tmp_path):
    make, least = PAGES[kind]
    found = []
    for number, name in enumerate(("plain", EVIL)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(Structure(make(name, folder)))
    plain, evil = found
    assert evil.elements == plain.elements
    assert sum("alert(1)" in text for text in evil.texts) >= least
    shown = [text for text in evil.texts if "alert(1)" in text and "\\u003c" not in text]
    whole = EVIL.replace("/", "_") if kind == "explain" else EVIL
    assert all(EVIL in text or whole in text or "%7B%7B" in text for text in shown)


def test_published_rows_stand_apart_and_are_marked():
    rows = of("cocostuff27")
    text = comparison_page.render("T", [], [], [], [], rows)
    assert "<h2>Cited: cocostuff27</h2>" in text
    assert text.count("<i>cited</i>") == len(rows)
    assert text.index("Cited: cocostuff27") < text.index("Environment")


def test_a_missing_value_ends_and_is_no_hole_in_the_page():
    with pytest.raises(page.jinja2.UndefinedError):
        page.render("retrieve.html.j2", picture="a", data="b", method="c")


TAGS = (
    "a|b|body|br|button|circle|code|details|div|em|figcaption|figure|form|g|h[1-6]|head|hr|html|i|iframe|img|input|li|line|"
    "link|meta|nav|ol|option|p|path|polyline|pre|rect|script|section|select|small|span|strong|style|sub|summary|sup|svg|"
    "table|tbody|td|text|textarea|th|thead|tr|ul"
)
MARKUP = re.compile(
    rf"<({TAGS})(\s[^<>]*)?/?>|<\w+\s[\w-]+=[\"'{{]|</\w+>|<!doctype|<!--"  # html
    r"|\bstyle=[\"']|\bclass=[\"']|@media|[\w.#\])]\s*\{[^{}]*[\w-]+\s*:[^{}]*;"  # rules
    r"|\b(background|color|display|padding|margin|width|height|left|font|grid-template-columns):[^\s]"
    r"|\bdocument\.\w+|addEventListener|=>\s*[{(]|\b(const|let|var) \w+ =|\bfunction\s*\w*\(",  # scripts
    re.I,
)


def literals(text: str) -> list[tuple[int, str]]:
    """String literals of a module with their lines, without docstrings; values inside f-strings become an X."""
    tree = ast.parse(text)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            found.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            found.append((node.lineno, node.value))
    return found


def test_no_markup_stands_in_python():
    """Of the rooms; docs/ and benchmarks/ write marks into Markdown, and no page."""
    found = []
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT)
        if place.parts[0] in ("tests", "docs", "benchmarks", "runs", "build") or any(
            part.startswith(".") for part in place.parts
        ):
            continue
        found += [f"{place}:{line}: {text[:80]!r}" for line, text in literals(path.read_text()) if MARKUP.search(text)]
    assert not found, "markup belongs into reporting/templates:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        """x = f'<span class="{kind}">{text}</span>'""",
        """x = "<b>" + name""",
        """x = f'<img src="{link}">'""",
        """x = '</details>'""",
        """x = '''\n.bars { display: grid; gap: 4px; }\n'''""",
        """x = f"background:#{red:02x}{green:02x}" """,
        """x = '''document.querySelectorAll("th").forEach(head => { sort(head); });'''""",
        """x = '<svg viewBox="0 0 1 1">'""",
    ],
)
def test_markup_in_python_is_found(line):
    assert [text for _, text in literals(line) if MARKUP.search(text)]
