"""The networks of this project that a backbone may be made of, as timm is told of them."""

from models.scratch.net10a import net10a
from models.scratch.ordered import ordered

MAKERS = (net10a, ordered)
"""By the names of these functions `backbone.timm` names the networks."""
