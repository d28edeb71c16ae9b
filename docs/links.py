"""Do the links of README.md and docs/ lead somewhere? Files, headings (`#…`), and no page that the site's nav lacks.

python -m docs.links
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.S | re.M)


def problems(root: Path = ROOT) -> Iterator[str]:
    """A line for each link to a file or heading that is not there, and for each page that mkdocs.yml does not name."""
    docs = root / "docs"
    pages = sorted(docs.rglob("*.md"))
    for page in [root / "README.md", *pages]:
        for target in LINK.findall(CODE.sub("", page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            outside = page != root / "README.md" and docs not in (file, *file.parents)
            if not file.is_file() or outside:
                yield f"{page.relative_to(root)}: {target} is no file{' of docs/' if outside else ''}"
            elif heading and heading not in headings(file):
                yield f"{page.relative_to(root)}: {target}: {file.name} has no such heading"
    named = set(re.findall(r"\b([\w/]+\.md)\b", (root / "mkdocs.yml").read_text()))
    for page in pages:
        if str(page.relative_to(docs)) not in named:
            yield f"{page.relative_to(root)}: is not in the nav of mkdocs.yml"
    for name in sorted(named):
        if not (docs / name).is_file():
            yield f"mkdocs.yml: {name} is no page of docs/"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them; a repeated one has a number behind it."""
    found: set[str] = set()
    for text in re.findall(r"^#+ +(.+?)\s*$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
        words = re.sub(r"[^\w\s-]", "", plain.encode("ascii", "ignore").decode()).strip().lower()
        anchor = base = re.sub(r"[-\s]+", "-", words)
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{base}_{number}"
        found.add(anchor)
    return found


def main() -> int:
    """1 where a link is dead."""
    found = list(problems())
    sys.stderr.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
