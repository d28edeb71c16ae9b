"""Products whose last bits decide something: comparisons, labels, nearest neighbours."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available


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
