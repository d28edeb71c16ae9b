"""What finds objects in pictures: files of a user, attention, graph cuts. See `mask_providers.py`.

No label is read: a folder of pngs is the user's to answer for. B pictures, h x w cells of a mask (patches, or pixels of
a file), n masks of a picture.
"""

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common import rules
from common.errors import ConfigError, did_you_mean
from common.files import no_folder
from datamodules.base.resizing import resize_ids
from datamodules.files.opening import opened
from datamodules.files.reading import UnreadableError, is_picture, read_label
from grouping import attention_masks, maskcut, salience, spectral
from lightning_modules.families.graph_cuts import graph_vectors, no_keys, patch_features
from lightning_modules.families.mask_crf import MaskCRF
from models.backbone import Backbone

NAMED = 3
"""Files that a line names before it says how many more there are."""


@dataclass
class Found:
    """Objects of one picture, before `refined`; where `drop` says why, there are none."""

    masks: Tensor
    """bool [n,h,w]"""
    scores: Tensor
    """float32 [n], the surer the larger; only their order means something."""
    drop: str = ""


class MaskProvider(ABC):
    """Finds the objects of pictures. `options`: its settings by name, `OPTIONS` with what `method.masks.options` says.

    Class facts: `OPTIONS` (name -> default and rule in the words of common/rules.py, none for true or false), `sees`
    (False: it looks at no picture, and so no backbone counts). `remark`: a line that a run has to say of it. `pixels`:
    its masks have the size of the pictures, not that of the patches.
    """

    OPTIONS: ClassVar[dict[str, tuple[Any, str]]] = {}
    sees = True
    remark = ""
    pixels = False

    def __init__(self, backbone: Backbone, masks: Any) -> None:
        self.backbone, self.options = backbone, SimpleNamespace(**settled(type(self), masks))

    def identity(self) -> dict[str, Any]:
        """What its masks depend on, beside pictures and backbone: plain values."""
        return {"class": type(self).__name__, **vars(self.options)}

    def announce(self) -> str:
        """A line before the work starts, or none; may raise ConfigError."""
        return ""

    @abstractmethod
    def find(self, images: Tensor, batch: Mapping[str, Any]) -> list[Found]:
        """The objects of each of the pictures [B,3,H,W] in 0..1; `batch` is what they came in."""


class FolderMasks(MaskProvider):
    """Pngs of a user, `<root>/<id of the picture>.png`: 0 is background, every other value an object.

    With `threshold` the file is a map of salience, and what is above is the one object; `norm` stretches the map to
    0..1 (see `grouping/salience.py`). A picture whose file is absent, cannot be read, has another size or is one object
    everywhere (as `run.py pseudo` writes pictures that it left out) is dropped; `announce` names and counts the absent
    ones and those of another size.
    """

    OPTIONS: ClassVar = {
        "threshold": (None, "nullable(number(0, below=1))"),
        "norm": ("image", f"choice({', '.join(salience.NORMS)})"),
    }
    sees, pixels = False, True

    def __init__(self, backbone: Backbone, masks: Any, source: Any = None) -> None:
        super().__init__(backbone, masks)
        if masks.root is None:
            raise ConfigError("method.masks.root=null: with method.masks.provider=folder name the folder of pngs")
        self.root, self.source = Path(masks.root).expanduser(), source
        if not self.root.is_dir():
            raise ConfigError(f"method.masks.root={self.root}: {no_folder(self.root)}")

    def file(self, name: str) -> Path:
        stem = os.path.splitext(name)[0] if is_picture(Path(name).name) else name
        return self.root / f"{stem}.png"

    def identity(self) -> dict[str, Any]:
        found = hashlib.sha256()
        for index in range(len(self.source)):
            path = self.file(self.source.id(index))
            found.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
        return super().identity() | {"files": found.hexdigest()}

    def announce(self) -> str:
        names = [self.source.id(index) for index in range(len(self.source))]
        absent = [str(self.file(name).relative_to(self.root)) for name in names if not self.file(name).is_file()]
        if len(absent) == len(names):
            raise ConfigError(
                f"method.masks.root={self.root}: no picture has a mask there; expected {self.file(names[0])} for "
                f"picture '{names[0]}', a grey png as large as the picture"
            )
        other = [said for index, name in enumerate(names) if (said := self._other_size(index, self.file(name)))]
        parts = [f"no file in {self.root} for {counted(absent)}"] if absent else []
        parts += [f"another size than its picture: {counted(other)}"] if other else []
        return f"of {len(names)} pictures {'; '.join(parts)}; these pictures are left out" if parts else ""

    def _other_size(self, index: int, path: Path) -> str:
        """The file and both sizes, where they differ and can be told without decoding; else nothing."""
        if not hasattr(self.source, "size") or not path.is_file():
            return ""
        with contextlib.suppress(Exception), opened(path) as image:  # what cannot be read is dropped when it is read
            wanted = tuple(self.source.size(index))
            if image.size[::-1] != wanted:
                return f"{path.relative_to(self.root)} {image.height} x {image.width}, not {wanted[0]} x {wanted[1]}"
        return ""

    def find(self, images: Tensor, batch: Mapping[str, Any]) -> list[Found]:
        found = [self._read(images, batch, row) for row in range(len(images))]
        rows = [row for row, ids in enumerate(found) if isinstance(ids, Tensor)]
        if rows and self.options.threshold is not None:
            maps = torch.stack([found[row] for row in rows]).float() / 255
            masks = salience.salient(maps, self.options.threshold, self.options.norm)[:, None]
        else:
            masks = [each_id(found[row]) for row in rows]
        for row, own in zip(rows, masks, strict=True):
            found[row] = Found(own, images.new_ones(len(own)))
        return found

    def _read(self, images: Tensor, batch: Mapping[str, Any], row: int) -> Found | Tensor:
        """The file's values int64 [h,w] at the size of the pictures, or nothing and why."""
        path, size = self.file(batch["id"][row]), tuple(images.shape[-2:])
        if not path.is_file():
            return nothing(images, "no_file")
        try:
            ids = read_label(path, "a mask holds 0 where there is no object")
        except UnreadableError:
            return nothing(images, "unreadable")
        if ids.shape != tuple(batch["size"][row].tolist()):
            return nothing(images, "wrong_size")
        if self.options.threshold is None and ids.min() == ids.max() > 0:
            return nothing(images, "whole_picture")
        return torch.from_numpy(resize_ids(ids.astype(np.int32), size, "nearest")).to(images.device)


def each_id(ids: Tensor) -> Tensor:
    """The places of every value but 0 of a map int [h,w], ascending: bool [n,h,w]."""
    names = ids.unique()
    return ids == names[names != 0][:, None, None]


class SpectralMasks(MaskProvider):
    """The foreground of the first eigenvectors of the normalised cut, behind the constant one; a mask each.

    The side of a vector's sign that has less of the picture's border. Source: Melas-Kyriazi et al. (CVPR 2022), whose
    side is the smaller one (`side=smaller`).
    """

    OPTIONS: ClassVar = {
        "vectors": (1, "whole(1, 1000)"),
        "features": ("levels", "choice(keys, levels)"),
        "centred": (True, ""),
        "side": ("border", "choice(border, smaller)"),
    }

    def find(self, images: Tensor, batch: Mapping[str, Any]) -> list[Found]:
        own = self.options
        graph = SimpleNamespace(
            features=own.features, centred=own.centred, scale=1, nonnegative=True, normalized=True, colour_weight=0.0
        )
        eigs = SimpleNamespace(k=own.vectors + 1, solver="auto", tolerance=1e-5)
        spectrum, size = graph_vectors(self.backbone, images, "deep", graph, eigs)
        scores = 1.0 / torch.arange(1, spectrum.vectors.shape[1], device=images.device)
        found = []
        for vectors in spectrum.vectors[:, 1:].unflatten(2, size):
            if own.side == "smaller":
                masks = torch.stack([spectral.foreground(vector) for vector in vectors])
            else:
                masks = vectors > 0
                turned = spectral.border_share(masks) > spectral.border_share(~masks)
                masks = torch.where(turned[:, None, None], ~masks, masks)
            found.append(Found(masks, scores))
        return found


class ClassAttention(MaskProvider):
    """Where the class token of the last block looks.

    rule `mass`: the cells that hold `mass` of its attention, heads averaged, as the maps of DINO keep 0.6 of every head
    (Caron et al., ICCV 2021). rule `votes`: MaskDistill's, see `grouping/attention_masks.py` (released: mass 0.5, topk
    0.4, all heads but the last). heads: which are averaged; null: all.
    """

    OPTIONS: ClassVar = {
        "rule": ("mass", "choice(mass, votes)"),
        "mass": (0.6, "number(above=0, below=1)"),
        "heads": (None, "nullable(listed(whole(0, 1023), least=1, distinct=True))"),
        "topk": (0.4, "number(above=0, most=1)"),
        "topk_policy": ("stable", f"choice({', '.join(attention_masks.TOPK_POLICIES)})"),
    }

    def __init__(self, backbone: Backbone, masks: Any) -> None:
        super().__init__(backbone, masks)
        heads = self.options.heads
        if heads is not None and backbone.heads and max(heads) >= backbone.heads:
            raise ConfigError(
                f"method.masks.options.heads={heads}: {backbone.name} has heads 0 to {backbone.heads - 1}; name some "
                "of them"
            )

    def find(self, images: Tensor, batch: Mapping[str, Any]) -> list[Found]:
        own = self.options
        if own.rule == "votes":
            masks = self._voted(images)
        else:
            seen = self.backbone.features(images, attention=True)
            heads = seen.attention[:, :, 0].softmax(-1)[:, :, seen.prefix :]
            weights = (heads if own.heads is None else heads[:, own.heads]).mean(1)
            masks = attention_masks.mass_filter(weights, own.mass).unflatten(1, tuple(seen.map.shape[-2:]))
        return [Found(mask[None], images.new_ones(1)) for mask in masks]

    def _voted(self, images: Tensor) -> Tensor:
        own, seen = self.options, self.backbone.features(images, qkv=True)
        queries, keys, _ = seen.qkv
        scores = attention_masks.class_scores(queries, keys, seen.prefix, own.heads)
        rows, size = keys[:, :, seen.prefix :].transpose(1, 2).flatten(2), tuple(seen.map.shape[-2:])
        rules_of = {"topk": own.topk, "mass": own.mass, "topk_policy": own.topk_policy}
        return attention_masks.attention_masks(scores, rows, size, **rules_of).masks


class TokenCutMasks(MaskProvider):
    """The object of TokenCut (Wang et al., CVPR 2022), see `grouping/spectral.py`."""

    OPTIONS: ClassVar = {
        "tau": (0.2, "number(above=-1, below=1)"),
        "eps": (1e-5, "number(above=0, below=1)"),
        "binary": (True, ""),
        "side": ("border", "choice(border, peak)"),
    }

    def __init__(self, backbone: Backbone, masks: Any) -> None:
        super().__init__(backbone, masks)
        if not backbone.has_attention:
            self.remark = no_keys(backbone)

    def find(self, images: Tensor, batch: Mapping[str, Any]) -> list[Found]:
        own, maps = self.options, patch_features(self.backbone, images)
        affinity = spectral.threshold_affinity(maps.flatten(2).mT, own.tau, own.eps, own.binary)
        cut = spectral.token_cut(affinity, tuple(maps.shape[-2:]), side=own.side)
        return [Found(mask[None], maps.new_ones(1)) for mask in cut.masks]


class MaskCutMasks(MaskProvider):
    """Up to `count` objects, none on another, see `grouping/maskcut.py` (released: features keys,
    not centred, tau 0.15, count 3).

    centred: features less their mean over the picture, where all cosines of a network are high. solver, on_reject,
    orient, overlap, smallest: as there. crf dense: each is refined on the pixels, see `mask_crf.py` (released), and
    then two may share some. The objects of a picture are equally sure.
    """

    OPTIONS: ClassVar = {
        "count": (3, "whole(1, 100)"),
        "tau": (0.2, "number(0, below=1)"),
        "eps": (1e-5, "number(above=0, below=1)"),
        "features": ("levels", "choice(keys, levels)"),
        "centred": (True, ""),
        "on_reject": ("stop", f"choice({', '.join(maskcut.REJECTIONS)})"),
        "orient": ("peak_then_corners", f"choice({', '.join(maskcut.ORIENTATIONS)})"),
        "overlap": (0.5, "number(0, most=1)"),
        "smallest": (0.01, "number(0, below=1)"),
        "crf": ("none", "choice(none, dense)"),
    }

    def __init__(self, backbone: Backbone, masks: Any) -> None:
        super().__init__(backbone, masks)
        if not backbone.has_attention and self.options.features == "keys":
            self.remark = no_keys(backbone)
        self.pixels = self.options.crf == "dense"
        self.crf = MaskCRF()

    def find(self, images: Tensor, batch: Mapping[str, Any]) -> list[Found]:
        own = vars(self.options).copy()
        maps = patch_features(self.backbone, images, own.pop("features"))
        maps = spectral.centred(maps) if own.pop("centred") else maps
        del own["crf"]
        cut = maskcut.mask_cut(maps.flatten(2).mT, tuple(maps.shape[-2:]), **own)
        kept = [masks[masks.any((1, 2))] for masks in cut.masks]
        if self.pixels:
            kept = [self.crf(image, masks) for image, masks in zip(images[:, :3], kept, strict=True)]
        return [Found(masks, images.new_ones(len(masks))) for masks in kept]


def nothing(images: Tensor, drop: str) -> Found:
    """No object in a picture, and why."""
    return Found(images.new_zeros(0, *images.shape[-2:], dtype=torch.bool), images.new_zeros(0), drop)


def settled(kind: type[MaskProvider], masks: Any) -> dict[str, Any]:
    """The options of a provider. Raises ConfigError for one that it does not have or a value that cannot be."""
    given, found = dict(masks.options), {name: default for name, (default, _) in kind.OPTIONS.items()}
    for name, value in given.items():
        key = f"method.masks.options.{name}"
        if name not in kind.OPTIONS:
            known = did_you_mean(name, kind.OPTIONS) if kind.OPTIONS else "it has none"
            raise ConfigError(f"{key}={value}: method.masks.provider={masks.provider} has no such option; {known}")
        default, text = kind.OPTIONS[name]
        rule = rules.read(text) if text else rules.Typed((type(default),))
        value = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        refusal = rule.refusal(value)
        if refusal is not None:
            raise ConfigError(f"{key}={value}: {refusal}")
        found[name] = rule.cast(value)
    return found


def counted(names: list[str]) -> str:
    """How many names there are, and the first few of them."""
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} ({', '.join(names[:NAMED])}{more})"
