"""EAGLE (Kim et al., CVPR 2024): segments of eigenvectors are objects, whose prototypes draw their patches to them.

A head maps the attention keys of frozen blocks to codes. STEGO's correspondence with a shift that follows the batch
trains it first; then mainly the object loss: a graph of a picture's codes and colours falls into segments (EiCue), and
every patch, in this view and in a blurred one, is told by the prototype of its segment. Code: MICV-yonsei/EAGLE.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common import chance, distributed
from common.errors import ConfigError
from common.spec import Photometric, ViewSpec
from evaluation.probes import ClusterProbe
from grouping import eicue
from lightning_modules.base import Loss
from lightning_modules.base.relations import Place, Relation, Seen, cell
from lightning_modules.families import head_start
from lightning_modules.families.keys import KeyFeatures
from losses.adaptive_shift import Pair, ShiftRule, adaptive_correspondence
from losses.correspondence import random_negatives, random_points, sample
from losses.object_contrast import object_loss, object_share, patch_weights, prototypes
from models.backbone import Features
from models.heads import ProjectionHead, SegmentationHead, drop_channels, own_channel_masks

ANCHORS = {"positive": "augmented", "augmented": "positive"}
"""The two views that have objects, each with the one that it is compared with."""
BLUR = {"blur_kernel": 3, "blur_sigma": (0.1, 2.0)}
"""Of the augmented view, as released."""


class Eagle(KeyFeatures):
    """Codes s = head(keys of the last blocks); probes read s. Trained: head, projection, and a cue probe a view."""

    title = "EAGLE"

    def build(self) -> None:
        settings = self.cfg.method
        check_settings(settings)
        self.refuse_padding()
        self.code_dim = settings.dim
        self.build_keys(settings.blocks)
        self.head = SegmentationHead(self.feature_dim, settings.dim)
        self.projection = ProjectionHead(settings.dim)
        cue = settings.cue
        self.cues = nn.ModuleDict(
            {
                view: ClusterProbe(cue.vectors - 1, cue.clusters, chance.key(self.cfg.seed, f"eagle.cue.{view}"))
                for view in ANCHORS
            }
        )
        self.rule = ShiftRule(**settings.shift)

    @property
    def views(self) -> dict[str, ViewSpec]:
        blur = Photometric(jitter_p=0.0, gray_p=0.0, blur_p=self.cfg.method.blur_p, **BLUR)
        return {"augmented": ViewSpec(photometric=blur)}

    def prepare(self, loader: Callable[..., Any]) -> None:
        """The head's start, see `method.head_start`."""
        head_start.begin(self, loader, lambda batch: self.features(batch["image"].to(self.device)).concat())

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"name": "head", "params": self.head.parameters()},
            {"name": "projection", "params": self.projection.parameters()},
            {"name": "cue", "params": self.cues.parameters()},
        ]

    def embed(self, features: Features) -> Tensor:
        return self.head(features.concat())

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """(1 - u) of the correspondence, u of the object losses, and the cue probes' own loss, which trains them alone.

        The view `positive` is the picture with other draws of the dropout. While u is 0 the projection gets a gradient
        of zeros, not none, so that its optimiser counts these steps as the released one does.
        """
        settings = self.cfg.method
        frozen, blurred = features.concat(), self.features(views["augmented"]).concat()
        seen = {view: self._dropped(view, maps) for view, maps in
                (("image", frozen), ("positive", frozen), ("augmented", blurred))}  # fmt: skip
        parts: dict[str, Any] = {}
        share = object_share(self.global_step, settings.objects.start, settings.objects.share)
        total = (1 - share) * self._correspondence(seen, parts)
        vectors = self.vectors(views["image"], {view: seen[view][1] for view in ANCHORS})
        projected = {view: self.projection(seen[view][1]).unflatten(0, (len(frozen), -1)) for view in ANCHORS}
        for view, other in ANCHORS.items():
            cue, _ = self.cues[view](vectors[view], alpha=1.0)
            labels = self.segments(view, vectors[view]).flatten(1)
            objects = self._objects(projected[view], projected[other], labels, patch_weights(seen[view][0]))
            total = total + share * settings.objects.weights[view] * objects + cue / len(ANCHORS)
            found = {"cue": cue, "object": objects, "segments": used(labels, settings.cue.clusters)}
            parts |= {f"{name}_{view}": value for name, value in found.items()}
        parts["object_share"] = share
        logged = {name: torch.as_tensor(value).detach() for name, value in parts.items()}
        return Loss(total, logged, codes=seen["image"][1])

    def _correspondence(self, seen: dict[str, tuple[Tensor, Tensor]], parts: dict[str, Any]) -> Tensor:
        """The blurred view against the picture's second draws, and the picture against random ones of the batch."""
        settings, step = self.cfg.method, self.global_step
        count = len(seen["image"][0]) * distributed.world_size()
        points = [self._points(number, count).to(self.device) for number in (1, 2, 3)]
        anchor, near, blurred = (
            tuple(sample(maps, at) for maps in seen[view])
            for view, at in zip(("image", "positive", "augmented"), points, strict=True)
        )
        pool = (self.reach.gather(seen["image"][0]), self.reach.gather(seen["image"][1], grad=True))
        among, drawn = len(pool[0]), settings.negatives
        key = self.cfg.seed, step, drawn.repeats, among, drawn.draw, self.reach.part()
        first = self.reach.rank() * len(anchor[0])
        chosen = random_negatives(*key, purpose="eagle.negatives")[:, first : first + len(anchor[0])].to(self.device)
        others = [tuple(sample(maps[rows], points[1]) for maps in pool) for rows in chosen]
        found = {
            "positive": [self._pair(blurred, near, positive=True)],
            "negative": [self._pair(anchor, other, positive=False) for other in others],
        }
        total = pool[1].sum() * 0
        for kind, pairs in found.items():
            parts[kind] = torch.stack([pair.loss for pair in pairs]).mean()
            parts[f"shift_{kind}"] = torch.stack([pair.shift for pair in pairs]).mean()
            parts[f"similarity_{kind}"] = torch.stack([pair.similarity for pair in pairs]).mean()
            total = total + settings.terms[kind] * parts[kind]
        return total

    def _pair(self, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], positive: bool) -> Pair:
        settings = self.cfg.method
        return adaptive_correspondence(
            (one[0], two[0]),
            (one[1], two[1]),
            self.rule,
            positive,
            pointwise=settings.pointwise,
            zero_clamp=settings.zero_clamp,
            stabilize=settings.stabilize,
            average=self._mean,
        )

    def _points(self, number: int, count: int) -> Tensor:
        """Sample points [B,S,S,2] of this rank's pictures, of `count` of all ranks: 1 of the picture, 2 of its positive
        view and of all its negatives, 3 of the blurred one."""
        points = random_points(
            self.cfg.seed, f"eagle.points.{number}", self.global_step, count, self.cfg.method.samples
        )
        return distributed.own_slice(points)

    def vectors(self, images: Tensor, codes: dict[str, Tensor]) -> dict[str, Tensor]:
        """EiCue's eigenvectors [B,k-1,h,w] by view, of pictures [B,3,H,W] in 0..1 and the views' codes [B,D,h,w]."""
        cue, size = self.cfg.method.cue, tuple(next(iter(codes.values())).shape[2:])
        normalised = (images - self.backbone.mean) / self.backbone.std
        coloured = eicue.colours(images, normalised, size, cue.colour)
        return dict(zip(codes, eicue.vectors(list(codes.values()), coloured, cue.vectors, cue.sign), strict=True))

    def segments(self, view: str, vectors: Tensor) -> Tensor:
        """The segment of every patch by a view's cue probe, its nearest centroid: int64 [B,h,w]."""
        return self.cues[view].scores(vectors).argmax(1)

    def _objects(self, own: Tensor, other: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The object loss of an anchor view: unit rows [B,N,D] of it and of the other one, labels and weights [B,N]."""
        settings = self.cfg.method
        known, of_known = own, labels
        if settings.cue.scope == "batch":
            known, of_known = self.reach.gather(own, grad=True), self.reach.gather(labels)
            known, of_known, own, other, labels, weights = (
                part.flatten(0, 1)[None] for part in (known, of_known, own, other, labels, weights)
            )
        found = object_loss(
            own,
            other,
            labels,
            weights,
            prototypes(known, of_known, settings.cue.clusters, settings.objects.prototypes),
            temperature=settings.objects.temperature,
            across=settings.objects.across,
            smoothing=settings.objects.smoothing,
            average=self._mean,
        )
        return found.total

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks that are reached, with gradient; a collective."""
        return self.reach.gather(values[None], grad=True).mean(0)

    # ------------------------------------------------------------------ for `explain`

    @torch.no_grad()
    def relations(self, pictures: Sequence[Seen], place: Place) -> list[Relation]:
        """The segment that holds the patch, as the cue of codes without dropout has it."""
        own = self._segments_of(pictures[0])
        asked = own[cell(place, tuple(own.shape))]
        everywhere = self.cfg.method.cue.scope == "batch"
        maps = [own == asked]
        for seen in pictures[1:]:
            labels = self._segments_of(seen) if everywhere else torch.full(seen.codes.shape[2:], -1, device=own.device)
            maps.append((labels == asked) & (labels >= 0))
        count, whole = int((own >= 0).sum()), len(own[own >= 0].unique())
        others = "the id means the same in all pictures" if everywhere else "other pictures have segments of their own"
        rule = (
            "Patches whose eigenvectors, of a graph of their picture's codes and colours, are nearest to the same of "
            f"{self.cfg.method.cue.clusters} centroids: {int(maps[0].sum())} of {count} patches, one of {whole} "
            f"segments of this picture; {others}. In training, where codes have channel dropout, the segment's "
            "prototype draws these patches to it and those of other segments away."
        )
        return [Relation("segment", "Segment", rule, maps)]

    def _segments_of(self, seen: Seen) -> Tensor:
        """The segments of a picture without its padding, int64 [h,w], -1 on padding."""
        grid = tuple(seen.codes.shape[2:])
        rows, columns = (int(seen.inside(grid).any(axis).sum()) for axis in (1, 0))
        sides = [side // cells for side, cells in zip(seen.image.shape[1:], grid, strict=True)]
        image = seen.image[None, :, : rows * sides[0], : columns * sides[1]]
        vectors = self.vectors(image, {"positive": seen.codes[:, :, :rows, :columns]})["positive"]
        labels = torch.full(grid, -1, device=vectors.device)
        labels[:rows, :columns] = self.segments("positive", vectors)[0]
        return labels

    # ------------------------------------------------------------------ channel dropout

    def _dropped(self, view: str, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B,C,h,w] as the losses see them, and their codes [B,D,h,w]: three draws of channel dropout."""
        codes = self.head(maps, (self._mask(f"{view}.linear", maps), self._mask(f"{view}.nonlinear", maps)))
        signal = drop_channels(maps, self._mask(f"{view}.signal", maps) if self.cfg.method.dropout.signal else None)
        return signal, codes

    def _mask(self, purpose: str, maps: Tensor) -> Tensor | None:
        key = (self.cfg.seed, f"eagle.dropout.{purpose}", self.global_step)
        return own_channel_masks(*key, maps, self.cfg.method.dropout.p)


def used(labels: Tensor, count: int) -> Tensor:
    """For the log: how many segments a picture has, mean over pictures; labels int64 [B,N] below `count`."""
    return torch.zeros(len(labels), count, device=labels.device).scatter_(1, labels, 1.0).sum(1).mean()


def check_settings(settings: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    if not any(settings.terms.values()) and not (settings.objects.share and any(settings.objects.weights.values())):
        raise ConfigError("method.terms: every weight is 0, so nothing would be learned; set one above 0")
