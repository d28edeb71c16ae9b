"""Modularity under vectors: equal to the plain form with all products, and blind to order and length."""

import pytest
import torch
import torch.nn.functional as F

from losses.modularity import concept_modularity, modularity_loss, winners


def made(pictures=2, patches=13, channels=6, centres=5, seed=0):
    draws = torch.Generator().manual_seed(seed)
    vectors = torch.randn(pictures, patches, channels, generator=draws, dtype=torch.float64) + 0.2
    return vectors, torch.randn(centres, channels, generator=draws, dtype=torch.float64)


def plain(vectors, centres, temperature):
    unit = F.normalize(vectors, dim=2)
    edges = (unit @ unit.mT).clamp(min=0)
    edges = edges - torch.diag_embed(edges.diagonal(dim1=1, dim2=2))
    degrees = edges.sum(2)
    total = degrees.sum(1)[:, None, None]
    weights = (edges - degrees[:, :, None] * degrees[:, None] / total) / total
    like = (unit @ F.normalize(centres, dim=1).T).clamp(min=0)
    pairs = torch.tanh(like[:, :, None] * like[:, None] / temperature).amax(3)
    return -(weights * pairs).sum((1, 2)).mean()


@pytest.mark.parametrize("sizes", [{}, {"patches": 1}, {"centres": 1}, {"pictures": 5, "patches": 4, "centres": 40}])
def test_it_is_the_plain_form_in_value_and_gradient(sizes):
    if sizes.get("patches") == 1:  # no edge at all
        vectors, centres = made(**sizes)
        assert modularity_loss(vectors, centres.requires_grad_()) == 0
        return
    vectors, centres = made(**sizes)
    ours, theirs = centres.clone().requires_grad_(), centres.clone().requires_grad_()
    loss, wanted = modularity_loss(vectors, ours, 0.3), plain(vectors, theirs, 0.3)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().sum() > 0


def test_winners_of_any_block_are_those_of_all_products(monkeypatch):
    like = torch.rand(3, 7, 11, generator=torch.Generator().manual_seed(1))
    wanted = (like[:, :, None] * like[:, None]).argmax(3)
    for room in (1, 100, 1 << 20):
        monkeypatch.setattr("losses.modularity.CACHED", room)
        assert torch.equal(winners(like), wanted)


def test_order_and_length_of_patches_and_centres_do_not_matter():
    vectors, centres = made()
    loss = modularity_loss(vectors, centres)
    draws = torch.Generator().manual_seed(2)
    patches, rows = torch.randperm(13, generator=draws), torch.randperm(5, generator=draws)
    torch.testing.assert_close(modularity_loss(vectors[:, patches], centres[rows]), loss)
    lengths = torch.rand(13, 1, generator=draws, dtype=torch.float64) + 0.1
    torch.testing.assert_close(modularity_loss(vectors * lengths, centres * 7), loss)


def test_a_picture_without_edges_counts_zero_among_all_pictures():
    vectors, centres = made()
    apart = torch.zeros_like(vectors[:1])
    apart[0, 0, 0], apart[0, 1, 0] = 1, -1
    both = torch.cat([vectors, apart])
    leaf = centres.requires_grad_()
    loss = modularity_loss(both, leaf)
    torch.testing.assert_close(loss, modularity_loss(vectors, centres) * 2 / 3)
    loss.backward()
    assert torch.isfinite(leaf.grad).all()
    assert modularity_loss(both, centres, guarded=False).isnan()


def test_the_graph_is_a_constant():
    vectors, centres = made()
    vectors.requires_grad_()
    modularity_loss(vectors, centres.requires_grad_()).backward()
    assert vectors.grad is None


def plain_of_concepts(vectors, concepts):
    """ACSeg's, with all products of P x P x M."""
    unit = F.normalize(vectors, dim=2)
    edges = (unit @ unit.mT).clamp(min=0)
    degrees = edges.sum(2)
    total = degrees.sum(1)[:, None, None]
    like = (unit @ F.normalize(concepts, dim=2).mT).clamp(min=0)
    together = (like[:, :, None] * like[:, None]).amax(3)
    return -((edges - degrees[:, :, None] * degrees[:, None] / total) / total * together).sum((1, 2))


@pytest.mark.parametrize("room", [1, 40, 1 << 18])
@pytest.mark.parametrize("sizes", [{}, {"patches": 1}, {"centres": 1}, {"pictures": 4, "patches": 5, "centres": 9}])
def test_that_of_concepts_is_the_plain_form_in_value_and_gradient(sizes, room, monkeypatch):
    monkeypatch.setattr("losses.modularity.CACHED", room)
    vectors, centres = made(**sizes)
    concepts = centres + torch.randn(len(vectors), *centres.shape, generator=torch.Generator().manual_seed(3)).double()
    ours, theirs = concepts.clone().requires_grad_(), concepts.clone().requires_grad_()
    weights = torch.arange(1.0, len(vectors) + 1, dtype=torch.float64)
    loss, wanted = concept_modularity(vectors, ours), plain_of_concepts(vectors, theirs)
    torch.testing.assert_close(loss, wanted)
    (loss * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert sizes.get("patches") == 1 or ours.grad.abs().sum() > 0


def test_that_of_concepts_is_float32_under_autocast_and_counts_no_picture_without_features():
    vectors, centres = (part.float() for part in made())
    concepts = centres.expand(2, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = concept_modularity(vectors, concepts)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, concept_modularity(vectors, concepts), rtol=0, atol=0)
    vectors[1] = 0
    leaf = concepts.clone().requires_grad_()
    loss = concept_modularity(vectors, leaf)
    assert loss[1] == 0
    loss.sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_one_concept_a_direction_is_the_modularity_of_that_partition():
    """Three groups at right angles: A is 1 inside a group, so the modularity is 1 less the squares of their shares of
    all edges."""
    sizes = torch.tensor([5, 3, 2])
    vectors = torch.eye(3)[torch.arange(3).repeat_interleave(sizes)][None]
    shares = sizes.double().square() / sizes.double().square().sum()
    torch.testing.assert_close(
        concept_modularity(vectors, torch.eye(3)[None]).double(), -(1 - shares.square().sum())[None]
    )
