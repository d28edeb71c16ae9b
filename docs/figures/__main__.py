"""`python -m docs.figures [method ...]`: draws docs/methods/<name>.png."""

import argparse
import logging
from pathlib import Path

from docs.figures import drawing, methods

FOLDER = Path(__file__).resolve().parents[1] / "methods"

log = logging.getLogger("docs.figures")


def main(words: list[str] | None = None) -> None:
    """Draw the figures of the named methods, or of all."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="method", help=", ".join(methods.FIGURES))
    names = parser.parse_args(words).methods or list(methods.FIGURES)
    unknown = [name for name in names if name not in methods.FIGURES]
    if unknown:
        parser.error(f"{unknown[0]}: no figure of that name; there are {', '.join(methods.FIGURES)}")
    for name in names:
        path = FOLDER / f"{name}.png"
        drawing.save(path, methods.FIGURES[name]())
        log.warning("%s", path)


if __name__ == "__main__":
    main()
