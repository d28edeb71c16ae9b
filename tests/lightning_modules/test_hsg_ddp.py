"""Two real gloo processes against one: the loss of HSG and its gradients, towards codes and transformers."""

import pytest
import torch

from tests.lightning_modules import test_hsg
from tests.support.ranks import on_two_ranks

PICTURES = 4


def measure(part: slice) -> dict[str, torch.Tensor]:
    model = test_hsg.build()
    draw = torch.Generator().manual_seed(0)
    views, rows = {"index": torch.tensor([7, 3, 5, 1])[part]}, torch.arange(8) // 4
    for name in model.views:
        views[name] = torch.zeros(PICTURES, 3, 8, 8)[part]
        regions = (rows[:, None] * 2 + rows).repeat(PICTURES, 1, 1)
        regions[1, 4:] = -1  # so that ranks count different numbers of cells
        views[f"{name}.regions"] = regions[part]
        views[f"{name}.valid"] = torch.ones(PICTURES, 8, 8, dtype=torch.bool)[part]
    whole = torch.randn(PICTURES, 2, model.code_dim, 4, 4, generator=draw)
    codes = whole[part].flatten(0, 1).requires_grad_()
    model.features, model.embed = (lambda images: images), (lambda features: codes)
    found = model.loss(views, None)
    found.total.backward()
    weights = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert any(name.startswith("hierarchy.coarse") for name in weights)
    parts = {name: torch.as_tensor(value) for name, value in found.parts.items()}
    return {"codes": codes.grad, "total": found.total.detach()} | parts | weights


def one_of_two(rank: int) -> dict[str, torch.Tensor]:
    return measure(slice(2 * rank, 2 * rank + 2))


@pytest.mark.ddp
def test_two_processes_have_the_loss_and_the_gradients_of_one():
    parts, whole = on_two_ranks(one_of_two), measure(slice(0, PICTURES))
    for name, value in whole.items():
        both = [part[name] for part in parts]
        found = torch.cat(both) / 2 if name == "codes" else (both[0] + both[1]) / 2
        scale = float(value.abs().max())
        torch.testing.assert_close(found, value, rtol=0, atol=max(2e-4 * scale, 2e-5), msg=name)
