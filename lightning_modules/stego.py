"""STEGO (Hamilton et al., ICLR 2022): codes whose cosines copy, sharpened, the cosines of frozen features.

A small head maps frozen patch features to codes whose cosines copy, sharpened, those of the features: between a picture
and itself, one of its nearest pictures, and random pictures of the batch. Section 3 of the paper.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from common.spec import Geometric, NeighbourSpec, Photometric, RegionSpec, ViewSpec
from evaluation import readout
from lightning_modules.base import Loss
from lightning_modules.families import head_start
from lightning_modules.families.shifts import QuantileShifts
from losses.correspondence import (
    Term,
    alignment,
    correspondence_loss,
    label_signal,
    random_negatives,
    random_points,
    reconstruction,
    salient_points,
)
from losses.crf import crf_matrix, random_pixels
from models.backbone import Features
from models.heads import SegmentationHead, drop_channels, own_channel_masks

CRF_CONSTANTS = ("alpha", "beta", "gamma", "appearance", "smoothness", "shift")


class Stego(QuantileShifts):
    """Codes s = head(features); probes read s. Only the head is trained (and the decoder, where it has a weight)."""

    title = "STEGO"

    def build(self) -> None:
        settings = self.cfg.method
        check_settings(settings)
        self.refuse_padding()
        self.uses_labels = settings.signal == "labels"
        if self.uses_labels and not self.meta.has_labels:
            raise ConfigError(
                "method.signal=labels: the oracle copies correspondences of labels and the data has none; "
                "set method.signal=features"
            )
        self.code_dim = settings.dim
        self.head = SegmentationHead(self.backbone.dim, settings.dim, nonlinear=settings.projection == "nonlinear")
        self.decoder = nn.Conv2d(settings.dim, self.backbone.dim, 1) if settings.reconstruction.weight > 0 else None
        self.terms = {kind: Term(term.weight, term.shift) for kind, term in settings.terms.items()}
        self.build_shifts()

    @property
    def views(self) -> dict[str, ViewSpec]:
        settings = self.cfg.method.alignment
        if settings.weight == 0:
            return {}
        return {"augmented": ViewSpec(Photometric(faithful=settings.faithful), Geometric())}

    @property
    def neighbours(self) -> NeighbourSpec | None:
        return NeighbourSpec(**self.cfg.method.neighbours) if self.terms["knn"].weight else None

    region_key = "method.salience.root"

    @property
    def region_maps(self) -> RegionSpec | None:
        """Salience masks travel as region maps: 0 is background, all else salient."""
        root = self.cfg.method.salience.root
        return None if root is None else RegionSpec(source="folder", root=root)

    def prepare(self, loader: Callable[..., Any]) -> None:
        """The head's start, see `method.head_start`."""
        head_start.begin(self, loader)

    def param_groups(self) -> list[dict[str, Any]]:
        trained = [self.head] if self.decoder is None else [self.head, self.decoder]
        return [{"name": "head", "params": [p for module in trained for p in module.parameters()]}]

    def embed(self, features: Features) -> Tensor:
        return self.head(features.concat())

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """Section 3.2 of the paper. The backbone sees every picture of the step once; all terms share its features."""
        settings = self.cfg.method
        signal, codes = self._dropped("image", features.concat())
        parts: dict[str, Tensor] = {}
        total = self._correspondence(views, signal, codes, parts)
        if settings.crf.weight > 0:
            parts["crf"] = self._crf(views["image"], codes)
            total = total + settings.crf.weight * parts["crf"]
        if self.decoder is not None:
            parts["reconstruction"] = reconstruction(self.decoder(codes), signal)
            total = total + settings.reconstruction.weight * parts["reconstruction"]
        if settings.alignment.weight > 0:
            augmented = self._dropped("augmented", self.backbone.features(views["augmented"]).concat())[1]
            parts["alignment"] = alignment(codes, augmented, views["augmented.params"])
            total = total + settings.alignment.weight * parts["alignment"]
        return Loss(total, {name: value.detach() for name, value in parts.items()}, codes=codes)

    def _correspondence(self, views: dict[str, Any], signal: Tensor, codes: Tensor, parts: dict[str, Tensor]) -> Tensor:
        settings, step = self.cfg.method, self.global_step
        near = None
        if self.terms["knn"].weight:
            near = self._dropped("neighbour", self.features_of(views, "neighbour").concat())
        if self.uses_labels:
            signal = label_signal(views["label"], self.meta.num_classes)
            near = near and (label_signal(views["neighbour.label"], self.meta.num_classes), near[1])
        pool = (signal, codes)
        if self.terms["random"].weight:
            pool = (self.reach.gather(signal), self.reach.gather(codes, grad=True))
        count, drawn = len(signal) * distributed.world_size(), settings.negatives
        places = self._points(views, "image", count), self._points(views, "neighbour", count)
        among = len(signal) * self.reach.ranks()
        negatives = random_negatives(self.cfg.seed, step, drawn.repeats, among, drawn.draw, self.reach.part())
        first = self.reach.rank() * len(signal)
        result = correspondence_loss(
            signal,
            codes,
            near,
            pool,
            places,
            negatives[:, first : first + len(signal)].to(signal.device),
            self.terms,
            pointwise=settings.pointwise,
            zero_clamp=settings.zero_clamp,
            stabilize=settings.stabilize,
            average=distributed.mean,
            shift_of=self.shift_of,
        )
        parts |= result.losses
        parts |= self.shifts_by_quantile(result.shifts)
        parts |= {f"similarity_{kind}": value for kind, value in result.similarities.items()}
        return result.total

    def _points(self, views: dict[str, Any], view: str, count: int) -> Tensor:
        """Sample points [B,S,S,2] of this rank's pictures, of `count` of all ranks: of the picture itself, or of its
        near picture, which all its negatives share."""
        settings, prefix = self.cfg.method, "" if view == "image" else f"{view}."

        def drawn(purpose: str) -> Tensor:
            points = random_points(self.cfg.seed, purpose, self.global_step, count, settings.samples)
            return distributed.own_slice(points).to(views["image"].device)

        key = "stego.points.2" if prefix else "stego.points.1"
        points, salient = drawn(key), views.get(f"{prefix}regions")
        if salient is None:
            return points
        return salient_points(points, salient > 0, (drawn(f"{key}.salience") + 1) / 2, settings.salience.share)

    def _crf(self, images: Tensor, codes: Tensor) -> Tensor:
        """The auxiliary CRF loss on pictures [B,3,H,W] in 0..1, normalised as the backbone sees them, and codes."""
        settings = self.cfg.method.crf
        size = (settings.size, settings.size)
        guidance = readout.upsample((images - self.backbone.mean) / self.backbone.std, size)
        unit = F.normalize(readout.upsample(codes, size), dim=1, eps=1e-10)
        rows, columns = (place.to(codes.device) for place in self._pixels(size))
        constants = {name: settings[name] for name in CRF_CONSTANTS}
        return crf_matrix(guidance, unit, rows, columns, **constants).mean()

    def _pixels(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return random_pixels(self.cfg.seed, self.global_step, self.cfg.method.crf.pixels, size)

    # ------------------------------------------------------------------ channel dropout

    def _dropped(self, use: str, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B,C,h,w] as the loss sees them, and their codes [B,D,h,w]: three draws of channel dropout."""
        codes = self.head(maps, (self._mask(f"{use}.linear", maps), self._mask(f"{use}.nonlinear", maps)))
        signal = drop_channels(maps, self._mask(f"{use}.signal", maps) if self.cfg.method.dropout.signal else None)
        return signal, codes

    def _mask(self, purpose: str, maps: Tensor) -> Tensor | None:
        key = (self.cfg.seed, f"stego.dropout.{purpose}", self.global_step)
        return own_channel_masks(*key, maps, self.cfg.method.dropout.p)


def check_settings(settings: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    near = settings.neighbours
    if near.stored < near.drawn:
        raise ConfigError(f"method.neighbours.stored={near.stored}: must be at least neighbours.drawn={near.drawn}")
    weights = [term.weight for term in settings.terms.values()]
    weights += [settings[name].weight for name in ("crf", "reconstruction", "alignment")]
    if not any(weights):
        raise ConfigError("method.terms: every weight is 0, so nothing would be learned; set one above 0")
