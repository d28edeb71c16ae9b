"""Collectives that are the identity in a single process. Gathers keep rank order."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """True inside a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def gather(tensor: Tensor, grad: bool = False) -> Tensor:
    """[n, ...] of every rank -> [world * n, ...] in rank order; all ranks must hold the same n.

    With `grad` the gradients of all ranks flow back to the rank that owns the rows (they are summed).
    """
    if not active():
        return tensor if grad else tensor.detach()
    if grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(tensor.contiguous()))
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def gather_uneven(tensor: Tensor) -> Tensor:
    """As `gather` without gradient, for ranks that hold different numbers of rows."""
    if not active():
        return tensor.detach()
    count = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = gather(count).tolist()
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor.detach()
    rows = gather(padded).split(max(counts)) if max(counts) else [padded] * len(counts)
    return torch.cat([part[:n] for part, n in zip(rows, counts, strict=True)])


def total(tensor: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    tensor = tensor.detach().clone()
    if active():
        dist.all_reduce(tensor)
    return tensor


def summed(tensor: Tensor) -> Tensor:
    """The sum over ranks, with gradient: what each rank's loss has to say of the sum reaches the parts of all ranks.

    A loss that every rank computes from the sum so has, averaged over ranks as DDP does, the gradient of one process.
    """
    if not active():
        return tensor
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(tensor.contiguous())


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, without gradient."""
    return total(tensor) / world_size()


def objects(value: Any) -> list[Any]:
    """What every rank gives, plain values or tensors on the CPU, in rank order, on every rank."""
    if not active():
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def local_rank() -> int:
    """Place of this process among those of its machine; in one process 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank())))


def anywhere(flag: bool | Tensor, device: torch.device) -> bool:
    """True where it holds on any rank; `device` is that of the collective."""
    return bool(total(torch.as_tensor(flag, device=device, dtype=torch.float32)) > 0)


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """The tensor of rank `source` on every rank (same shape and type everywhere)."""
    tensor = tensor.detach().clone().contiguous()
    if active():
        dist.broadcast(tensor, source)
    return tensor


@dataclass(frozen=True)
class Reach:
    """Whose patches or segments a contrastive term compares: those of all ranks, or (`local`) of this rank alone."""

    local: bool = False

    def gather(self, tensor: Tensor, grad: bool = False) -> Tensor:
        """As `gather`, over the ranks that are reached."""
        return gather(tensor, grad) if not self.local else tensor if grad else tensor.detach()

    def summed(self, tensor: Tensor) -> Tensor:
        """As `summed`, over the ranks that are reached."""
        return tensor if self.local else summed(tensor)

    def ranks(self) -> int:
        """How many ranks are reached."""
        return 1 if self.local else world_size()

    def rank(self) -> int:
        """The place of this rank's rows in what `gather` gives."""
        return 0 if self.local else rank()

    def part(self) -> int:
        """A number for the keys of draws, so that ranks that look at themselves alone draw differently; else 0."""
        return rank() if self.local else 0


EVERYONE = Reach()


def own_slice(tensor: Tensor) -> Tensor:
    """The rows of this rank out of a tensor whose rows are a global batch (contiguous slices in rank order)."""
    if not active():
        return tensor
    return tensor.chunk(world_size())[rank()]
