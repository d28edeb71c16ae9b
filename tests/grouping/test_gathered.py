"""Segments of two ranks: all in one table, or each rank's alone (`trainer.contrast=local`)."""

import pytest
import torch

from common.distributed import EVERYONE, Reach
from grouping.gathered import gather_segments
from losses.vmf import vmf
from tests.support.ranks import on_two_ranks


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows of two pictures of 20 pixels and their segments, of which the second picture has one more."""
    rows = torch.nn.functional.normalize(torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0)), dim=2)
    return rows, torch.stack([torch.arange(20) % 3, torch.arange(20) % 4])


def loss_of(rows: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, reach: Reach) -> tuple[torch.Tensor, ...]:
    rows = rows.flatten(0, 1).requires_grad_()
    table = gather_segments(rows, ids.flatten(), counts, reach)
    loss = vmf(rows, table.prototypes, table.own, 10.0, present=table.present) * table.share
    return loss.detach(), torch.autograd.grad(loss, rows)[0], table.present.sum(), table.values(ids.flatten() % 2)


def own_picture(rank: int, local: bool) -> tuple[torch.Tensor, ...]:
    rows, ids = pixels()
    mine = slice(rank, rank + 1)
    return loss_of(rows[mine], ids[mine], torch.tensor([3 + rank]), Reach(local))


@pytest.mark.ddp
def test_local_segments_are_those_of_a_process_by_itself():
    rows, ids = pixels()
    for rank, found in enumerate(on_two_ranks(own_picture, True)):
        mine = slice(rank, rank + 1)
        alone = loss_of(rows[mine], ids[mine], torch.tensor([3 + rank]), EVERYONE)
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.ddp
def test_global_segments_are_those_of_one_process():
    rows, ids = pixels()
    together = ids + torch.tensor([[0], [3]])
    whole, gradient, present, _ = loss_of(rows, together, torch.tensor([3, 4]), EVERYONE)
    two = on_two_ranks(own_picture, False)
    torch.testing.assert_close((two[0][0] + two[1][0]) / 2, whole)
    torch.testing.assert_close(torch.cat([two[0][1], two[1][1]]) / 2, gradient)
    assert two[0][2] == two[1][2] == present == 7
    alone = on_two_ranks(own_picture, True)
    assert abs(float((alone[0][0] + alone[1][0]) / 2 - whole)) > 0.01
