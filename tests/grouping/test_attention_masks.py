"""MaskDistill's attention mask against the plain formulas, and where no patch is left."""

import pytest
import torch
from scipy import ndimage

from common.errors import ConfigError
from grouping import attention_masks as am


def drawn(seed, pictures=3, heads=4, size=(5, 6), width=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, pictures, heads, 1 + size[0] * size[1], width)
    return torch.randn(shape, generator=generator)


def columns(keys, prefix=1):
    return keys[:, :, prefix:].transpose(1, 2).flatten(2)


def plain(scores, keys, size, topk, mass):
    """One picture, the graph of all patches and numpy's components."""
    order = scores.argsort()
    share = (scores[order] / scores.sum()).cumsum(0)
    left = torch.zeros_like(scores)
    left[order[share > 1 - mass]] = scores[order[share > 1 - mass]]
    chosen = left.sort(descending=True, stable=True).indices[: int(topk * len(scores))]
    graph = keys @ keys.T
    voters = [int(node) for node in chosen if graph[chosen[0], node] > 0]
    votes = (graph[voters].sum(0) > 0).view(size).numpy()
    named = ndimage.label(votes)[0]
    return torch.from_numpy(named == named.flatten()[int(chosen[0])]), int(chosen[0])


@pytest.mark.parametrize("seed", range(4))
def test_mask_is_that_of_the_whole_graph(seed):
    queries, keys = drawn(seed)
    scores = am.class_scores(queries, keys).abs()
    found = am.attention_masks(scores, columns(keys), (5, 6), topk=0.3, mass=0.6)
    for row in range(3):
        mask, source = plain(scores[row], columns(keys)[row], (5, 6), 0.3, 0.6)
        assert torch.equal(found.masks[row], mask)
        assert found.sources[row] == source
        assert found.masks[row].flatten()[source]


def test_scores_are_the_mean_of_the_named_heads_over_patches():
    queries, keys = drawn(0)
    wanted = sum(queries[:, head, 0, None] @ keys[:, head, 3:].mT for head in (0, 2)).squeeze(1) / 2
    assert torch.allclose(am.class_scores(queries, keys, prefix=3, heads=[0, 2]), wanted, atol=1e-6)
    with pytest.raises(ConfigError, match="heads 0 to 3"):
        am.class_scores(queries, keys, heads=[0, 5])


def test_filter_keeps_the_patches_that_hold_the_mass():
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert am.mass_filter(scores, 0.5).tolist() == [[False, True, False, True]]
    assert am.mass_filter(scores, 0.3).tolist() == [[False, True, False, False]]


def test_policies_differ_in_patches_without_a_score():
    scores = torch.tensor([[5.0, 0.1, 0.1, 0.1, 0.1, 0.1]])
    keys = torch.ones(1, 6, 2)
    chosen = {
        policy: am.attention_masks(scores, keys, (2, 3), topk=0.5, topk_policy=policy).chosen[0]
        for policy in am.TOPK_POLICIES
    }
    assert chosen["stable"].tolist() == [0, 1, 2]
    assert chosen["positive_only"].tolist() == [0]
    assert chosen["released"][0] == 0
    assert len(chosen["released"]) == 3


def test_batch_gives_what_pictures_give_alone():
    queries, keys = drawn(5)
    scores = am.class_scores(queries, keys)
    together = am.attention_masks(scores, columns(keys), (5, 6))
    alone = [am.attention_masks(scores[row, None], columns(keys)[row, None], (5, 6)).masks for row in range(3)]
    assert torch.equal(together.masks, torch.cat(alone))


def test_picture_without_keys_has_no_object():
    found = am.attention_masks(torch.ones(1, 6), torch.zeros(1, 6, 2), (2, 3))
    assert not found.masks.any()


@pytest.mark.parametrize("words", [{"topk": 0}, {"mass": 1.5}, {"topk_policy": "newest"}])
def test_refusals(words):
    with pytest.raises(ConfigError, match=next(iter(words))):
        am.attention_masks(torch.ones(1, 4), torch.ones(1, 4, 2), (2, 2), **words)


def test_foreground_holds_the_mass_of_the_blurred_attention_without_specks():
    weights = torch.full((1, 9, 9), 1e-4)
    weights[0, 2:5, 2:5] = 1.0
    weights[0, 7, 7] = 0.9
    assert am.attention_foreground(weights, 0.85, sigma=0.1).nonzero()[:, 1:].tolist() == [
        [row, column] for row in (2, 3, 4) for column in (2, 3, 4)
    ]
    assert am.attention_foreground(weights, 0.99, sigma=0.1).sum() == 9  # the single cell is a speck
    assert am.attention_foreground(weights, 0.99, sigma=0.1, specks=0)[0, 7, 7]
    blurred = am.attention_foreground(weights, 0.9, sigma=2.0)
    assert blurred.sum() > 12


def test_foreground_of_a_grid_smaller_than_the_blur():
    weights = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]])
    assert am.attention_foreground(weights, 0.5, sigma=0.1, specks=0)[0].tolist() == [[True, False], [False, False]]
    assert am.attention_foreground(weights[:, :1, :1], 0.5, specks=0).all()


def test_foreground_is_the_same_under_autocast():
    weights = torch.rand(200, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = am.attention_foreground(weights)
    assert torch.equal(found, am.attention_foreground(weights))
