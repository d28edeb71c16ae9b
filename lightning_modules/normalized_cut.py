"""Normalised cuts of colours and of deep features (Shi and Malik, PAMI 2000), with the classes of their regions.

The classical graph joins pixels that are near and alike in colour, the deep one patches whose features are alike. Each
picture is cut into segments by the eigenvectors of the graph `method.graph.kind`, and segments of all pictures are
clustered to classes by the mean of what the graph compares. Nothing is trained but the probes; scored as val/own/*. The
panel of the stage shows both graphs side by side: second eigenvector and segments.
"""

from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from datamodules.base import SegmentationDataModule
from lightning_modules.families.cut_regions import RegionSegmenter
from lightning_modules.families.graph_cuts import KINDS
from models.backbone import Features
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import Segments, Shades, View


class NormalizedCut(RegionSegmenter):
    """Codes = L2-normalised backbone features."""

    title = "Normalized Cut"
    trains = False

    def build(self) -> None:
        if self.cfg.method.segments.mode == "single":
            raise ConfigError(
                "method.segments.mode=single: gives no classes; use fixed or adaptive, or method=deep_spectral"
            )
        self.build_regions()
        self.code_dim = self.backbone.dim

    def embed(self, features: Features) -> Tensor:
        return F.normalize(features.concat(), dim=1)

    def steps(self, data: SegmentationDataModule) -> list[Step]:
        """Of both graphs; clusters of the chosen one alone."""
        found = [step for kind in KINDS for step in self.steps_of(kind, f"_{kind}")]
        return [step for step in found if not step.name.startswith("clusters") or step.name.endswith(self.kind)]

    def staged(self, results: Results, data: SegmentationDataModule) -> None:
        super().staged({"clusters": results[f"clusters_{self.kind}"]}, data)

    def shown(self, results: Results) -> dict[str, View]:
        found: dict[str, View] = {}
        for kind in KINDS:
            found[f"{kind}: eigenvector"] = Shades(results[f"eigenvectors_{kind}"], 1)
            found[f"{kind}: segments"] = Segments(results[f"regions_{kind}"], None, bool(self.cfg.method.background))
        return found | {f"{self.kind}: classes": self.labels(results, f"_{self.kind}")}
