"""What is float32 whatever `trainer.precision` says, and products whose last bits decide something.

`trainer.precision` (32-true, bf16-mixed, 16-mixed) concerns the networks that are trained, heads and projections, and a
backbone that is trained: their products run under autocast, in half precision where it is mixed. Everything else is
float32 (float64 where it says so), and each piece sees to it itself, so that it holds for any caller:

- weights, momentum copies and the optimiser's state: mixed precision keeps float32 ones;
- the features that a backbone gives, in every precision of its own products (`backbone.precision`);
- losses (`losses/`): similarities, thresholds, exponentials, counts of positives and their sums. The sums of Hidden
  Positives run over N_p x N pairs (784 x 50176 at 224 px): float16 ends at 65504, bfloat16 counts to 256;
- probes (`evaluation/probes.py`): cosines, logits, cross entropies and their gradients;
- banks and reference pools, k-means and searches (`retrieval/`), prototypes and graphs (`grouping/`); a bank may be
  asked to keep half precision (`method.pool.half`), its products are float32 then too;
- scores: confusion counts in whole numbers, entropies and means in float64.

TF32 is not free here: positives are strict comparisons of cosines, and 10 bits of mantissa choose others. `exact` keeps
it out where comparisons, labels or neighbours follow, also where `trainer.matmul=high` lets the other matrix products
have it; convolutions on a GPU have torch's own default (TF32). Convolutional backbones run in channels-last memory
(`models/backbone.py`).

float16 has no autocast with loss scaling on a CPU: `usable` names what is used in its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Of `trainer.precision`: the type of products under autocast, None without."""


def usable(precision: str, device: str) -> str:
    """The `trainer.precision` that a kind of device (cpu, cuda) runs where this one is asked for."""
    return "bf16-mixed" if precision == "16-mixed" and device == "cpu" else precision


def real_dtype(values: Tensor) -> torch.dtype:
    """float64 for float64 values, else float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def real(values: Tensor) -> Tensor:
    """The values in `real_dtype`, as they are where they have it."""
    return values.to(real_dtype(values))


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Plain float32 products inside: autocast off, no TF32 or bfloat16 shortcuts; settings are restored after."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    with torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext():
        if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch before 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        kept = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, kept, strict=True):
                backend.fp32_precision = precision
