"""The concept generator: concepts of a picture's own, and the test that the specification of ACSeg names."""

import pytest
import torch
from torch.nn import functional as F

from common.errors import ConfigError
from losses.modularity import concept_modularity, cosines
from models.slots.concept_generator import ConceptGenerator, few_queries


def made(count=5, dim=24, **settings):
    torch.manual_seed(0)
    return ConceptGenerator(count, dim, **{"layers": 2, "hidden": 32, "start": 1.0, **settings})


@pytest.mark.parametrize("norm", ["pre", "output"])
def test_concepts_are_of_their_picture_and_blind_to_the_order_of_patches(norm):
    model, patches = made(norm=norm), torch.randn(3, 11, 24)
    concepts = model(patches)
    assert concepts.shape == (3, 5, 24)
    assert not torch.allclose(concepts[0], concepts[1], atol=1e-3)
    torch.testing.assert_close(model(patches[1:2])[0], concepts[1])
    torch.testing.assert_close(model(patches[:, torch.randperm(11)]), concepts)


def test_no_concept_looks_at_what_is_left_out():
    model, patches = made(), torch.randn(2, 9, 24)
    padded = torch.cat([patches, torch.full((2, 4, 24), 7.0)], dim=1)
    left_out = (torch.arange(13) >= 9).expand(2, -1)
    torch.testing.assert_close(model(padded, left_out), model(patches))


def test_few_queries_are_answered_as_the_attention_itself_answers():
    torch.manual_seed(1)
    attention = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        torch.nn.init.normal_(bias)
    queries, rows = torch.randn(2, 4, 24).double().requires_grad_(), torch.randn(2, 9, 24).double()
    left_out = torch.zeros(2, 9, dtype=torch.bool)
    left_out[1, 5:] = True
    for out in (None, left_out):
        ours = few_queries(attention, queries, rows, out)
        theirs = attention(queries, rows, rows, key_padding_mask=out, need_weights=False)[0]
        torch.testing.assert_close(ours, theirs)
        wanted = [queries, attention.in_proj_weight, attention.out_proj.weight]
        grads = [torch.autograd.grad(value.square().sum(), wanted, retain_graph=True) for value in (ours, theirs)]
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two)


def test_lengths_of_patches_do_not_matter_unless_they_are_taken_raw():
    patches = torch.randn(2, 9, 24)
    torch.testing.assert_close(made()(patches * 5), made()(patches))
    raw = made(inputs="raw")
    assert not torch.allclose(raw(patches * 5), raw(patches), atol=1e-3)


def test_both_orders_of_norms_have_the_same_weights_and_give_other_concepts():
    pre, output, patches = made(), made(norm="output"), torch.randn(2, 9, 24)
    output.load_state_dict(pre.state_dict())
    assert not torch.allclose(output(patches), pre(patches), atol=1e-2)


@pytest.mark.parametrize("norm", ["pre", "output"])
def test_concepts_begin_near_the_prototypes(norm):
    patches = torch.randn(2, 9, 24)
    for start, apart in ((0.0, 0.0), (0.05, 0.6)):
        model = made(norm=norm, start=start)
        moved = (model(patches) - model.prototypes).square().mean().sqrt()
        assert moved <= apart
        assert (moved > 0) == (start > 0)


def test_heads():
    assert made(dim=320, heads=None).blocks[0].cross.num_heads == 5
    assert made(dim=384, heads=None).blocks[0].own.num_heads == 6
    with pytest.raises(ConfigError) as caught:
        made(heads=7)
    assert str(caught.value).startswith("method.generator.heads=7: must divide the 24 channels of the features")


def test_three_directions_become_three_concepts_after_200_steps():
    """Pictures of patches from three well separated directions, five concepts: three of them win patches, and no region
    mixes directions."""
    draws = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(48, 48, generator=draws))[0][:3]

    def pictures(count):
        names = torch.randint(3, (count, 36), generator=draws)
        names[:, :3] = torch.arange(3)
        return directions[names] + 0.05 * torch.randn(count, 36, 48, generator=draws), names

    model = made(count=5, dim=48, start=0.1)
    groups = [{"params": [model.prototypes], "lr": 3e-2}, {"params": model.blocks.parameters(), "lr": 1e-4}]
    adam = torch.optim.AdamW(groups, weight_decay=0.01)
    for _ in range(200):
        patches, _ = pictures(8)
        loss = concept_modularity(patches, model(patches)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    patches, names = pictures(16)
    with torch.no_grad():
        found = cosines(F.normalize(patches, dim=2), model(patches)).argmax(2)
    for picture, truth in zip(found, names, strict=True):
        pairs = torch.stack([picture, truth]).unique(dim=1)
        assert pairs.shape[1] == 3
        assert len(pairs[0].unique()) == len(pairs[1].unique()) == 3
