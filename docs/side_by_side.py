"""One picture of several runs on the same validation pictures, for the README:

    python -m docs.side_by_side docs/results.png --count 5 "k-means=runs/a:kmeans" "Hidden Positives=runs/b:cluster"

Columns: picture, truth, then one for each NAME=RUN:PROBE, coloured by the classes that the run matched its clusters to.
"""

import argparse
from pathlib import Path

import torch

import config
from engine import setup
from evaluation import panels, readout


def main(words: list[str] | None = None) -> None:
    """Write the png. Raises LabelfreeError for a folder without checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m docs.side_by_side", description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("columns", nargs="+", metavar="NAME=RUN:PROBE")
    parser.add_argument("--count", type=int, default=5, help="pictures, evenly spread over the validation split")
    parser.add_argument("--cell", type=int, default=160, help="px, width of a picture")
    args = parser.parse_args(words)
    setup.begin()
    rows: list[panels.Row] = []
    mappings, meta = {}, None
    for column in args.columns:
        name, _, place = column.partition("=")
        folder, _, probe = place.rpartition(":")
        checkpoint = setup.read_checkpoint(Path(folder) / "checkpoints" / "last.ckpt")
        cfg, data = setup.build_data(config.restore(checkpoint["labelfree"]["config"], ["data.eval_batch_size=1"]))
        meta, mappings[name] = data.meta, checkpoint["labelfree"]["clusters"][probe]
        model = setup.restore_model(checkpoint, cfg)
        step = max(1, len(data.source("val")) // args.count)
        chosen = range(step // 2, len(data.source("val")), step)[: args.count]
        data.pad_multiple = model.pad_multiple
        found = [batch for i, batch in enumerate(data.loader("val")) if i in chosen]
        rows = rows or [panels.Row(batch["image"][0], {}, batch["label"][0]) for batch in found]
        for row, batch in zip(rows, found, strict=True):
            with torch.inference_mode():
                row.maps[name] = readout.predict(model.read(batch["image"])[1][probe], batch["image"].shape[-2:])[0]
    panels.save(args.output, rows, meta, mappings, cell=args.cell)


if __name__ == "__main__":
    main()
