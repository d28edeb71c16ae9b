"""The head of Leopart: its initial weights, unit codes, prototypes that are normalised in place."""

import torch

from models.representations.prototype_head import PrototypeHead


def test_codes_are_unit_and_logits_are_cosines_of_normalised_prototypes():
    head = PrototypeHead(8, 16, 4, 6)
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    codes, logits = head(rows)
    assert torch.allclose(codes.norm(dim=1), torch.ones(20), atol=1e-6)
    assert logits.abs().max() < 0.2  # prototypes of standard deviation 0.02
    held = head.prototypes
    head.normalise()
    assert head.prototypes is held
    assert torch.allclose(held.norm(dim=1), torch.ones(6), atol=1e-6)
    assert torch.allclose(head(rows)[1], torch.cosine_similarity(codes[:, None], held[None], dim=2), atol=1e-5)
    assert torch.equal(head.compare(codes), head(rows)[1])


def test_weights_are_drawn_small_and_anew():
    head = PrototypeHead(64, 128, 32, 100)
    before = [value.clone() for value in head.parameters()]
    assert not head.mlp[0].bias.any()
    assert abs(head.mlp[2].weight.std().item() - 0.02) < 0.002
    assert abs(head.prototypes.std().item() - 0.02) < 0.002
    head.reset()
    assert all(torch.equal(a, b) == (a.dim() == 1) for a, b in zip(before, head.parameters(), strict=True))


def test_codes_and_logits_are_float32_under_autocast():
    head = PrototypeHead(8, 16, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes, logits = head(torch.randn(3, 8))
    assert codes.dtype == logits.dtype == torch.float32
