"""k-means on frozen features (or on colours): the row that every method has to beat. Its score is val/kmeans/*.

Nothing is trained but the two online probes. `method.features: keys` clusters what EAGLE is trained on; `colour` mean
patch colours, the floor that any feature has to beat.
"""

from torch import Tensor
from torch.nn import functional as F

from lightning_modules.families.keys import KeyFeatures
from models.backbone import Features


class KMeansBaseline(KeyFeatures):
    """Codes = L2-normalised backbone features (all of `backbone.levels`), attention keys, or patch colours."""

    title = "k-means"
    headline = "kmeans"
    trains = False

    def build(self) -> None:
        settings = self.cfg.method
        self.colour = settings.features == "colour"
        self.build_keys(settings.blocks if settings.features == "keys" else 0)
        self.code_dim = 3 if self.colour else self.feature_dim

    def features(self, images: Tensor) -> Features:
        if not self.colour:
            return super().features(images)
        colours = F.avg_pool2d(images, min(self.backbone.strides))
        return Features(levels=[colours - 0.5], cls=None, attention=None, qkv=None, prefix=0)

    def embed(self, features: Features) -> Tensor:
        return F.normalize(features.concat(), dim=1)
