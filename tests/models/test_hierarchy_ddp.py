"""Two real gloo processes against one: statistics and gradients of the clustering transformer's norms."""

import multiprocessing as forkserver
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.clustering import NodeNorm


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


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(measure(slice(0, 1) if rank == 0 else slice(1, 4)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_normalise_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forkserver.set_forkserver_preload(["torch"])
    mp.start_processes(worker, (port, str(tmp_path)), nprocs=2, start_method="forkserver")
    parts, whole = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)], measure(slice(0, 4))
    for name, value in whole.items():
        if name.endswith("var"):
            for part in parts:
                torch.testing.assert_close(part[name], value)
        else:
            torch.testing.assert_close(torch.cat([part[name] for part in parts], dim=1), value, rtol=1e-4, atol=1e-5)
