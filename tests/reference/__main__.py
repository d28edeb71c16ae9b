"""Replay saved cases: `python -m tests.reference DIR [--only GLOB] [--dump FOLDER]`.

Prints `ok | FAIL | missing | unjudged  case  worst array  error`, a line a case.
Exit code 1 on any FAIL, 2 where no case was found.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

from engine import setup
from tests.reference import framework


def main(words: list[str] | None = None) -> int:
    """The exit code: 0 fine, 1 a case failed, 2 no case was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds the saved cases, <method>.<function>.<n>.npz")
    parser.add_argument("--only", default="*", metavar="GLOB", help="matched against the file name without .npz")
    parser.add_argument("--dump", type=Path, metavar="FOLDER", help="write the replayed results here, one npz a case")
    parser.add_argument("--prefix", default="shared", choices=("shared", "held"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    setup.begin()
    torch.set_num_threads(1)  # as the saved numbers were made; more threads sum in another order
    cases = framework.find_cases(args.folder, args.only)
    if not cases:
        sys.stderr.write(f"{args.folder}: no case <method>.<function>.<n>.npz matches {args.only}\n")
        return 2
    width = max(len(path.stem) for path in cases)
    counts: Counter[str] = Counter()
    for line in framework.replay_folder(args.folder, args.only, args.dump, args.prefix):
        counts[line.status] += 1
        sys.stdout.write(f"{line.status:<8}  {line.case:<{width}}  {line.array}  {line.error}".rstrip() + "\n")
        sys.stdout.flush()
    sys.stdout.write(", ".join(f"{counts[key]} {key}" for key in ("ok", "FAIL", "missing", "unjudged")) + "\n")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
