"""The checkpoint formats that the authors of STEGO and of Hidden Positives released, as tensors under our names.

Both hold a frozen DINO transformer, the head (`cluster1`, `cluster2`), a linear and a cluster probe; all their layers
are 1x1 convolutions as here. Names from mhamilton723/STEGO and hynnsk/HP.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError
from released.asked import METHODS, expect_origin
from released.inert import InertFile, mapping, setting

log = logging.getLogger(__name__)

ENTRIES = {
    "stego": ("state_dict",),
    "hp": ("net_model_state_dict", "linear_model_state_dict", "cluster_model_state_dict"),
}
"""Entries of the file that hold the tensors."""

BACKBONES = {(384, 8): "dino_vits8_300ep", (384, 16): "dino_vits16", (768, 8): "dino_vitb8", (768, 16): "dino_vitb16"}
"""(channels, patch) -> preset. All are DINO transformers of 12 blocks for 224 px."""
BLOCKS, NATIVE = 12, 224

HEAD = {"cluster1.0": "linear", "cluster2.0": "nonlinear.0", "cluster2.2": "nonlinear.2"}
"""Layers of the released head -> those of models/heads.py. HP's momentum copy is `ema_model1`, `ema_model2`."""

SAVED = {
    "pos_intra_weight": "method.terms.self.weight",
    "pos_intra_shift": "method.terms.self.shift",
    "pos_inter_weight": "method.terms.knn.weight",
    "pos_inter_shift": "method.terms.knn.shift",
    "neg_inter_weight": "method.terms.random.weight",
    "neg_inter_shift": "method.terms.random.shift",
    "feature_samples": "method.samples",
    "neg_samples": "method.negatives.repeats",
    "num_neighbors": "method.neighbours.drawn",
    "pointwise": "method.pointwise",
    "zero_clamp": "method.zero_clamp",
    "stabalize": "method.stabilize",
    "dropout": "method.dropout.signal",
    "batch_size": "data.batch_size",
    "max_steps": "trainer.max_steps",
}
"""STEGO's saved settings -> ours."""


@dataclass(frozen=True)
class Released:
    """What a released file holds."""

    method: str
    backbone: str
    """Name of the preset."""
    weights: dict[str, Tensor]
    """The backbone's, float32, under the names of the DINO release, which are timm's."""
    state: dict[str, Tensor]
    """Head, momentum head and probes, float32, under the names of our state dict."""
    settings: dict[str, Any]
    """Our keys -> values that the tensors or the saved settings tell."""
    classes: int
    data: str | None
    """The data set as the authors call it; None where the file does not say."""
    step: int
    objects: tuple[str, ...]
    """Names of saved objects in the file, beyond tensors."""


def read(origin: str, path: Path) -> Released:
    """Read `file=` of `from=`.

    Raises ConfigError for another origin, CheckpointError naming the file and the first key that differs.
    """
    expect_origin(origin)
    file = InertFile(path)
    content = mapping(file.content) or {}
    found: dict[str, Any] = {}
    for entry in ENTRIES[origin]:
        inside = mapping(content.get(entry))
        if inside is None:
            other = next((name for name, needed in ENTRIES.items() if needed[0] in content), None)
            hint = f"; it looks like from={other}" if other not in (None, origin) else ""
            raise CheckpointError(f"file={path}: holds no {entry}, so it is no released checkpoint of {origin}{hint}")
        if not all(isinstance(key, str) and key.isprintable() for key in inside):
            raise file.unreadable()
        found |= {f"{entry}.{key}": value for key, value in inside.items()}
    saved = _saved_settings(content) if origin == "stego" else {}
    _refuse_settings(path, saved)
    keys = _Keys(origin, file, found)
    dim, channels = keys.sizes(keys.head("cluster1.0.weight"), "D", "C", 1, 1)[:2]
    patch = keys.sizes(keys.backbone("patch_embed.proj.weight"), "C", 3, "p", "p")[2]
    classes = keys.sizes(keys.linear("weight"), "classes", "D", 1, 1)[0]
    clusters = keys.sizes(keys.clusters, "K", "D")[0]
    backbone = BACKBONES.get((channels, patch))
    if backbone is None:
        raise CheckpointError(
            f"file={path}: {keys.backbone('patch_embed.proj.weight')}: a backbone of {channels} channels and patches "
            f"of {patch} px; there are presets of those of 384 and 768 channels (8 or 16 px)"
        )
    if clusters < classes:
        raise CheckpointError(f"file={path}: {keys.clusters}: {clusters} clusters, fewer than its {classes} classes")
    nonlinear = origin == "hp" or any(key.startswith(keys.head("cluster2.")) for key in found)
    expected = keys.expected(dim, channels, patch, classes, clusters, nonlinear)
    tensors = keys.tensors({key: shape for key, (shape, _) in expected.items()})
    ours = {target: tensors[key] for key, (_, target) in expected.items() if target}
    backbone_prefix = "backbone."
    settings = {"method.dim": dim, "method.num_clusters": clusters}
    if origin == "stego":
        settings["method.projection"] = "nonlinear" if nonlinear else "linear"
        settings |= {own: saved[name] for name, own in SAVED.items() if saved.get(name) is not None}
    step = setting(content.get("global_step" if origin == "stego" else "iter"))
    return Released(
        METHODS[origin],
        backbone,
        {key.removeprefix(backbone_prefix): value for key, value in ours.items() if key.startswith(backbone_prefix)},
        {key: value for key, value in ours.items() if not key.startswith(backbone_prefix)},
        settings,
        classes,
        saved.get("dataset_name"),
        step if type(step) is int and step > 0 else 0,
        tuple(file.objects),
    )


def _saved_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """STEGO's saved `cfg`, plain values alone."""
    saved = mapping((mapping(content.get("hyper_parameters")) or {}).get("cfg")) or {}
    return {key: setting(value) for key, value in saved.items() if isinstance(key, str)}


def _refuse_settings(path: Path, saved: dict[str, Any]) -> None:
    """Networks that the tensors cannot be told from: raises CheckpointError."""
    for name, known in (("arch", "dino"), ("dino_feat_type", "feat")):
        if name in saved and saved[name] != known:
            raise CheckpointError(
                f"file={path}: its saved settings have {name}={saved[name]}, and codes of {name}={known} alone are "
                "built here; choose another checkpoint"
            )
    if "projection_type" in saved and saved["projection_type"] not in ("nonlinear", "linear"):
        raise CheckpointError(
            f"file={path}: its saved settings have projection_type={saved['projection_type']}, so its codes are the "
            "features themselves; use method=kmeans_baseline"
        )


class _Keys:
    """Names and shapes of one format, held against the tensors of a file."""

    def __init__(self, origin: str, file: InertFile, found: dict[str, Any]) -> None:
        self.origin, self.file, self.found = origin, file, found
        self.read: dict[str, Tensor | None] = {}
        self.net = "state_dict.net." if origin == "stego" else "net_model_state_dict."
        probe = "state_dict.linear_probe." if origin == "stego" else "linear_model_state_dict."
        self.linear = lambda key: f"{probe}{key}"
        self.clusters = (
            "state_dict.cluster_probe.clusters" if origin == "stego" else "cluster_model_state_dict.clusters"
        )

    def head(self, key: str) -> str:
        return f"{self.net}{key}"

    def backbone(self, key: str) -> str:
        return f"{self.net}model.{key}"

    def expected(
        self, dim: int, channels: int, patch: int, classes: int, clusters: int, nonlinear: bool
    ) -> dict[str, tuple[list[int], str | None]]:
        """Key of the file -> (shape, our name; None for a tensor that evaluation never reads)."""
        wanted: dict[str, tuple[list[int], str | None]] = {
            self.backbone(key): (shape, f"backbone.{key}") for key, shape in dino_shapes(channels, patch).items()
        }

        def convolution(key: str, rows: int, columns: int, target: str | None) -> None:
            for name, shape in (("weight", [rows, columns, 1, 1]), ("bias", [rows])):
                wanted[f"{key}.{name}"] = (shape, target and f"{target}.{name}")

        copies = {"cluster": "head"} | ({"ema_model": "momentum_head.copy"} if self.origin == "hp" else {})
        for released, own in copies.items():
            for layer, place in HEAD.items():
                if nonlinear or place == "linear":
                    rows = channels if place == "nonlinear.0" else dim
                    convolution(self.head(layer.replace("cluster", released)), rows, channels, f"{own}.{place}")
        convolution(self.linear("weight").removesuffix(".weight"), classes, dim, "linear_probe.classifier")
        wanted[self.clusters] = ([clusters, dim], "cluster_probe.clusters")
        if self.origin == "stego":  # two parts that the release makes and never uses in evaluation
            wanted["state_dict.train_cluster_probe.clusters"] = ([classes, dim], None)
            convolution("state_dict.decoder", channels, dim, None)
        return wanted

    def sizes(self, key: str, *shape: int | str) -> list[int]:
        """The shape of a tensor that tells a size; `shape` has words for what may be any number."""
        found = self.shape(key)
        fits = isinstance(found, list) and len(found) == len(shape)
        if not fits or any(isinstance(want, int) and want != size for want, size in zip(shape, found, strict=True)):
            raise self.differs(key, list(shape), found)
        return found

    def tensor(self, key: str) -> Tensor | None:
        if key not in self.read:
            self.read[key] = self.file.tensor(self.found[key])
        return self.read[key]

    def shape(self, key: str) -> list[int] | str:
        if key not in self.found:
            return "no such key"
        tensor = self.tensor(key)
        if tensor is None:
            return "no tensor"
        return list(tensor.shape) if tensor.is_floating_point() else f"{tensor.dtype} {list(tensor.shape)}"

    def tensors(self, expected: dict[str, list[int]]) -> dict[str, Tensor]:
        """All tensors of the file, float32. Raises CheckpointError naming the first key that differs."""
        for key, want in expected.items():
            found = self.shape(key)
            if found != want:
                raise self.differs(key, want, found)
        for key in self.found:
            if key not in expected:
                raise self.differs(key, "no such key", self.shape(key))
        tensors = {key: self.tensor(key).float().contiguous() for key in expected}
        for key, value in tensors.items():
            if not torch.isfinite(value).all():
                raise CheckpointError(f"file={self.file.path}: {key}: holds values that are not finite; fetch it again")
        return tensors

    def differs(self, key: str, want: Any, found: Any) -> CheckpointError:
        want = f"[{', '.join(map(str, want))}]" if isinstance(want, list) else want
        return CheckpointError(
            f"file={self.file.path}: no released checkpoint of {self.origin}: first differing key {key}: expected "
            f"{want}, found {found}; give the file as its authors released it"
        )


def dino_shapes(channels: int, patch: int) -> dict[str, list[int]]:
    """Names and shapes of the DINO release's vision transformer without a classifier."""
    shapes = {
        "cls_token": [1, 1, channels],
        "pos_embed": [1, 1 + (NATIVE // patch) ** 2, channels],
        "patch_embed.proj.weight": [channels, 3, patch, patch],
        "patch_embed.proj.bias": [channels],
    }
    for block in range(BLOCKS):
        for layer, rows, columns in (
            ("norm1", channels, 0),
            ("attn.qkv", 3 * channels, channels),
            ("attn.proj", channels, channels),
            ("norm2", channels, 0),
            ("mlp.fc1", 4 * channels, channels),
            ("mlp.fc2", channels, 4 * channels),
        ):
            shapes[f"blocks.{block}.{layer}.weight"] = [rows, columns] if columns else [rows]
            shapes[f"blocks.{block}.{layer}.bias"] = [rows]
    return shapes | {"norm.weight": [channels], "norm.bias": [channels]}
