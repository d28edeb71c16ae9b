"""Context prediction (Doersch et al., ICCV 2015), as IIC ran it: in which direction the second patch lies.

The network learns what stands above, below and beside what. Code of the baseline: xu-ji/IIC.
"""

from torch import Tensor
from torch.nn import functional as F

from lightning_modules.patch_pairs import places
from lightning_modules.patch_pairs.base import PatchPairs


class ContextPrediction(PatchPairs):
    """The head names the direction from the first patch to the other, one of eight."""

    title = "context prediction"

    def build(self) -> None:
        self.outputs = self.cfg.method.directions
        super().build()

    def draw(self) -> places.Draw:
        return places.draw_directions(self.outputs)

    @staticmethod
    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the direction."""
        return F.cross_entropy(logits, targets, reduction="none")
