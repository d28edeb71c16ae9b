"""Names and colours that people give to clusters: a yaml file to edit, which belongs to one set of centroids."""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from common.errors import CheckpointError, ConfigError
from common.files import write_text
from common.formats import trees
from common.names import shown
from common.palette import default_palette
from common.spec import ClassMeta
from engine import setup
from evaluation.probes import clusters_of
from inference.asked import expect_names
from lightning_modules.base import UnsupervisedSegmenter
from reporting import panels

log = logging.getLogger(__name__)

HEAD = """\
# Names and colours of the clusters: change them here, `predict` takes them from this file. Clusters with one name are
# one class in tables and legends, in the colour of the first of them. `probe` and `centroids` say which clusters these
# are; leave both as they are.
"""
KEYS = ("probe", "centroids", "clusters")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Legend:
    """Names and colours (red, green, blue 0..255) of the K clusters in the order of their ids."""

    names: list[str]
    colours: list[Colour]
    source: Path | None = None
    """The file they were read from; None where nobody named them."""

    def classes(self) -> dict[str, list[int]]:
        """Name -> ids of the clusters that have it, in the order of the first of them."""
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.names):
            found.setdefault(name, []).append(number)
        return found

    def joined(self) -> np.ndarray:
        """int64 [K]: the first cluster of each cluster's name, so that clusters of one name have one id."""
        first = np.arange(len(self.names))
        for numbers in self.classes().values():
            first[numbers] = numbers[0]
        return first


def choose_probe(cfg: DictConfig, model: UnsupervisedSegmenter) -> str:
    """`predict.probe`, with `auto` resolved. Raises CheckpointError for k-means before its centroids were fitted."""
    fitted = bool(model.kmeans_probe.fitted)
    if cfg.predict.probe == "auto":
        return "kmeans" if fitted else "cluster"
    if cfg.predict.probe == "kmeans" and not fitted:
        raise CheckpointError(
            "predict.probe=kmeans: the centroids are fitted when a run ends, and this checkpoint was written before; "
            "use last.ckpt of a finished run, or predict.probe=cluster"
        )
    return cfg.predict.probe


def centroids(model: UnsupervisedSegmenter, probe: str) -> Tensor:
    """Centroids [K,D] of the probe `cluster` or `kmeans`; [K,R] where codes are reduced before."""
    return model.kmeans_probe.centroids if probe == "kmeans" else model.cluster_probe.clusters.detach()


def mark(values: Tensor) -> str:
    """What tells these centroids from others: the start of the sha256 of their float32 values."""
    return hashlib.sha256(values.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


def default_file(checkpoint: Path) -> Path:
    """Where `clusters` puts the names of a checkpoint, and `predict` looks for them."""
    return folder_of(checkpoint, "clusters") / "names.yaml"


def folder_of(checkpoint: Path, what: str) -> Path:
    """`<run>/<what>/<checkpoint name>/`, or beside a checkpoint that lies in no run."""
    parent = checkpoint.resolve().parent
    return (parent.parent if parent.name == "checkpoints" else parent) / what / checkpoint.stem


def unnamed(clusters: int, mapping: list[int] | None, meta: ClassMeta) -> Legend:
    """Names and colours of the clusters: those of the matched classes where the run had labels (`3: road`)."""
    if mapping is None or not meta.has_labels:
        return Legend([f"cluster {i}" for i in range(clusters)], list(default_palette(clusters)))
    colours = panels.cluster_colours(meta, mapping, clusters)
    names = [f"{i}: {meta.names[target]}" if target >= 0 else f"cluster {i}" for i, target in enumerate(mapping)]
    return Legend(names, [tuple(int(part) for part in colour) for colour in colours])


def editor(path: Path, legend: Legend, probe: str, values: Tensor) -> dict[str, Any]:
    """What `names_editor.html.j2` needs: the form that edits names and colours and offers the file at `path` anew."""
    entries = [
        {"name": name, "colour": f"#{bytes(colour).hex()}"}
        for name, colour in zip(legend.names, legend.colours, strict=True)
    ]
    return {"content": {"head": HEAD, "probe": probe, "centroids": mark(values), "clusters": entries}, "path": path}


def write(path: Path, legend: Legend, probe: str, values: Tensor) -> None:
    """Write the names file."""
    lines = [
        f'  {number}: {{name: {json.dumps(name, ensure_ascii=False)}, colour: "#{bytes(colour).hex()}"}}'
        for number, (name, colour) in enumerate(zip(legend.names, legend.colours, strict=True))
    ]
    write_text(path, f'{HEAD}probe: {probe}\ncentroids: "{mark(values)}"\nclusters:\n' + "\n".join(lines) + "\n")


def load(path: Path) -> dict[str, Any]:
    """The content of a names file. Raises ConfigError where it is none."""
    expect_names(str(path))
    try:
        content = trees.yaml_of(path)
    except trees.TreeError as error:
        raise ConfigError(
            f"names={path}: cannot be read as yaml ({error}); put names that hold : or # in quotes"
        ) from None
    if not isinstance(content, dict) or any(key not in content for key in KEYS):
        raise ConfigError(f"names={path}: must hold the keys {', '.join(KEYS)}; let `run.py clusters` write it anew")
    return content


def read(path: Path, probe: str, values: Tensor) -> Legend:
    """The names of a file that belongs to these centroids [K,D].

    Raises ConfigError where it is missing, spoilt, or of other clusters.
    """
    content, own = load(path), mark(values)
    if (content["probe"], str(content["centroids"])) != (probe, own):
        raise ConfigError(
            f"names={path}: names the clusters {shown(content['centroids'])[:40]} of probe "
            f"{shown(content['probe'])[:40]}, "
            f"this checkpoint has {own} of probe {probe}; let `run.py clusters` write a new file, or set names=none"
        )
    entries = content["clusters"]
    if not isinstance(entries, dict) or set(entries) != set(range(len(values))):
        raise ConfigError(f"names={path}: clusters: must hold an entry for each id from 0 to {len(values) - 1}")
    names, colours, first = [], [], {}
    for number in range(len(values)):
        entry = entries[number]
        name = entry.get("name") if isinstance(entry, dict) else None
        if name in (None, ""):
            raise ConfigError(
                f'names={path}: cluster {number}: expected {{name: sky, colour: "#3478be"}}, got {shown(entry)[:100]}'
            )
        colour = first.setdefault(shown(name), parse_colour(path, number, entry.get("colour")))
        names.append(shown(name))
        colours.append(colour)
    return Legend(names, colours, path)


def parse_colour(path: Path, number: int, text: Any) -> Colour:
    """`#3478be` as numbers. Raises ConfigError."""
    if not isinstance(text, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise ConfigError(
            f'names={path}: cluster {number}: colour={text}: expected six hexadecimal digits in quotes, as in "#3478be"'
        )
    return tuple(bytes.fromhex(text[1:]))


def of_labels(checkpoint: dict[str, Any], cfg: DictConfig, probe: str) -> Legend:
    """Names and colours of a checkpoint's clusters before anyone named them: of its matched classes, see `unnamed`."""
    mapping = checkpoint["labelfree"].get("clusters", {}).get(probe)
    return unnamed(clusters_of(cfg, probe), mapping, setup.stored_meta(checkpoint))


def legend_for(
    path: Path, checkpoint: dict[str, Any], model: UnsupervisedSegmenter, probe: str, wanted: str | None
) -> Legend:
    """The names to use: those of `names=<file>`, of the file beside the checkpoint at `path`, or `of_labels`.

    `wanted`: the value of `names=`; None where it was not given, `none` for no file. Raises ConfigError, see `read`.
    """
    file = Path(wanted) if wanted is not None else default_file(path)
    if wanted == "none" or (wanted is None and not file.is_file()):
        return of_labels(checkpoint, model.cfg, probe)
    log.info("names of the clusters: %s", file)
    return read(file, probe, centroids(model, probe))
