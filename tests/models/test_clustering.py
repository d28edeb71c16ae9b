"""The attention of the clustering transformer beside torch's own, whose weights it has."""

import pytest
import torch
from torch import nn

from models.clustering import Attention


def _pair(dropout: float = 0.0) -> tuple[Attention, nn.MultiheadAttention]:
    ours, theirs = Attention(16, 4, dropout).double(), nn.MultiheadAttention(16, 4, dropout).double()
    generator = torch.Generator().manual_seed(0)
    for weight in ours.parameters():
        weight.data.normal_(generator=generator)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_results_and_gradients_are_those_of_torch(itself, padded):
    ours, theirs = _pair()
    generator = torch.Generator().manual_seed(1)
    rows, keys, values = (
        torch.randn(size, 3, 16, generator=generator, dtype=torch.double) for size in (7 if itself else 5, 7, 7)
    )
    keys = rows if itself else keys
    hidden = torch.rand(3, 7, generator=generator) > 0.5 if padded else None
    if padded:
        hidden[:, 2] = False
    found = []
    for call in (
        lambda: ours(rows, keys, values, hidden),
        lambda: theirs(rows, keys, values, key_padding_mask=hidden)[0],
    ):
        for tensor in (rows, keys, values):
            tensor.requires_grad_().grad = None
        result = call()
        result.square().sum().backward()
        found.append([result, rows.grad, keys.grad, values.grad])
    found.append([weight.grad for weight in ours.parameters()])
    found.append([weight.grad for weight in theirs.parameters()])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])


def test_dropout_falls_on_the_weights_in_training_only():
    ours, theirs = _pair(dropout=0.5)
    rows = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    torch.testing.assert_close(ours.eval()(rows, rows, rows), theirs.eval()(rows, rows, rows)[0])
    ours.train()
    first, second = ours(rows, rows, rows), ours(rows, rows, rows)
    assert not torch.equal(first, second)
