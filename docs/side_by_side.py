"""One picture of several runs on the same validation pictures, for the README:

    python -m docs.side_by_side docs/results.png --count 5 "k-means=runs/a:kmeans" "Hidden Positives=runs/b:cluster"

Columns: picture, truth, then one for each NAME=RUN:PROBE, coloured by the classes that the run matched its clusters to.
For hsg a level of its hierarchy (segments, fine, coarse) may stand in the place of a probe.
"""

import argparse
from pathlib import Path

import torch

import config
from engine import setup
from evaluation import hierarchy, readout
from lightning_modules.hsg import MAPS
from reporting import panels


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
    mappings, levels, meta = {}, [], None
    for column in args.columns:
        name, _, place = column.partition("=")
        folder, _, probe = place.rpartition(":")
        checkpoint = setup.read_checkpoint(Path(folder) / "checkpoints" / "last.ckpt")
        cfg, data = setup.build_data(config.restore(checkpoint["labelfree"]["config"], ["data.eval_batch_size=1"]))
        meta = data.meta
        if probe in MAPS:
            levels.append(name)
        else:
            mappings[name] = checkpoint["labelfree"]["clusters"][probe]
        model = setup.restore_model(checkpoint, cfg)
        step = max(1, len(data.source("val")) // args.count)
        chosen = range(step // 2, len(data.source("val")), step)[: args.count]
        data.pad_multiple = model.pad_multiple
        found = [batch for i, batch in enumerate(data.loader("val")) if i in chosen]
        rows = rows or [panels.Row(batch["image"][0], {}, batch["label"][0]) for batch in found]
        for row, batch in zip(rows, found, strict=True):
            image, valid = batch["image"], batch["valid"]
            with torch.inference_mode():
                if probe in MAPS:
                    level = model.levels(image, valid)[MAPS.index(probe)]
                    row.maps[name] = hierarchy.pixel_maps([level], valid)[0][0]
                else:
                    row.maps[name] = readout.predict(model.read(image)[1][probe], image.shape[-2:])[0]
    panels.save(args.output, rows, meta, mappings, groups=levels, cell=args.cell)


if __name__ == "__main__":
    main()
