"""TokenCut (Wang et al., CVPR 2022): the object of a picture by the normalised cut of its patch graph.

Nothing is trained but the probes. Patches are joined where their keys are alike (cosine above tau); the second
eigenvector splits them, one side is the object (`method.side`), and of it the component of its largest entry. Read out
as val/foreground/* (`evaluation/foreground.py`). `run.py pseudo` keeps the masks of the training pictures, which other
methods may start from. The paper's refinement by a bilateral solver is not here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.base import SegmentationDataModule
from grouping import masks, spectral
from lightning_modules.base.staged import check_stage
from lightning_modules.families.graph_cuts import patch_features, patch_of, say_features
from lightning_modules.families.objects import ObjectFinder, ObjectMasks
from models.backbone import Features
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import Saliency, View


class TokenCut(ObjectFinder):
    """Codes = L2-normalised backbone features; the cut is read out beside them."""

    title = "TokenCut"
    headline = "foreground"
    trains = False
    stage_in_training = False

    def build(self) -> None:
        settings = self.cfg.method
        check_stage(settings.stage, self.backbone)
        self.code_dim = self.backbone.dim
        self.build_foreground()
        say_features(self.backbone)

    def embed(self, features: Features) -> Tensor:
        return F.normalize(features.concat(), dim=1)

    @torch.no_grad()
    def objects(self, images: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.cfg.method
        maps = patch_features(self.backbone, images)
        affinity = spectral.threshold_affinity(maps.flatten(2).mT, settings.tau, settings.eps, settings.binary)
        found = spectral.token_cut(affinity, tuple(maps.shape[-2:]), solver=settings.solver, side=settings.side).masks
        size, patch = tuple(images.shape[-2:]), patch_of(self.backbone)
        return found, torch.stack([masks.tight_box(mask, patch, size) for mask in found])

    def steps(self, data: SegmentationDataModule) -> list[Step]:
        return [ObjectMasks(self)]

    def shown(self, results: Results) -> dict[str, View]:
        return {"object": Saliency(results["masks"])}
