"""HSG with the batch norms of its transformers held at mean 0 and variance 1.

Over a handful of groups these norms multiply a change of 1e-7 about thirtyfold a step, whatever made it; held, it stays
below 1e-6 through a small run. Their statistics over ranks, and the gradients through them, are compared in
lightning_modules/test_hsg_ddp.py.
"""

from torch import Tensor

from common.precision import real
from models.clustering import NodeNorm

SCRIPT = """
import sys
import run
from models.clustering import NodeNorm
from tests.support.held_norms import held

NodeNorm.forward = held
if __name__ == "__main__":
    sys.exit(run.main())
"""
"""`run.py` with held norms."""


def held(norm: NodeNorm, rows: Tensor, padding: Tensor | None = None) -> Tensor:
    """In the place of `NodeNorm.forward`."""
    return real(rows) * norm.weight + norm.bias
