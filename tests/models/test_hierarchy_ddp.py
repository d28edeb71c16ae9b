"""Two real gloo processes against one: statistics and gradients of the clustering transformer's norms."""

import pytest
import torch

from models.clustering import NodeNorm
from tests.support.ranks import on_two_ranks


def measure(part: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 4, 3, generator=generator)[:, part].clone().requires_grad_()
    weights = torch.randn(5, 4, 3, generator=generator)[:, part]
    padding = torch.rand(5, 4, generator=generator)[:, part] < 0.3
    results = {}
    for name, mask in (("plain", None), ("masked", padding)):
        norm, rows.grad = NodeNorm(3), None
        found = norm(rows, mask)
        (found**2 * weights).sum().backward()
        results |= {f"{name}.found": found.detach(), f"{name}.grad": rows.grad, f"{name}.var": norm.running_var}
    return results


def uneven(rank: int) -> dict[str, torch.Tensor]:
    return measure(slice(0, 1) if rank == 0 else slice(1, 4))


@pytest.mark.ddp
def test_two_processes_normalise_as_one():
    parts, whole = on_two_ranks(uneven), measure(slice(0, 4))
    for name, value in whole.items():
        if name.endswith("var"):
            for part in parts:
                torch.testing.assert_close(part[name], value)
        else:
            torch.testing.assert_close(torch.cat([part[name] for part in parts], dim=1), value, rtol=1e-4, atol=1e-5)
