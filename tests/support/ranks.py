"""Two real gloo processes on this machine, for tests of what ranks do together."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.support.processes import serve


def on_two_ranks(work: Callable[..., Any], *args: Any, start: str = "forkserver") -> list[Any]:
    """What `work(rank, *args)`, a function of a module, returned on ranks 0 and 1.

    start: `fork` for arguments and patches that cannot be pickled, else `forkserver`, which inherits no threads and has
    imported everything.
    """
    serve()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, args=(work, args, folder), nprocs=2, start_method=start)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(rank: int, work: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still asks
    dist.destroy_process_group()
