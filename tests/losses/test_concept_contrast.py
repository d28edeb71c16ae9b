"""The contrast by concepts: equal to a loop over pairs, whatever the blocks, and harmless where nothing is alike."""

import pytest
import torch
import torch.nn.functional as F

from losses.concept_contrast import Likeness, concept_contrast, nearest

T = 0.2


def made(seed=0, pictures=2, patches=5, wide=4, concepts=4, rows=9):
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    likeness = Likeness.of(normal(concepts, 3), 0.3, 0.1)
    of_anchors = torch.randint(concepts, (pictures, patches), generator=draws)
    of_rows = torch.randint(concepts, (rows,), generator=draws)
    return normal(pictures, patches, wide), of_anchors, normal(rows, wide), of_rows, likeness


def looped(anchors, concepts, rows, of, likeness, first=None):
    """Pair by pair, as the term is written."""
    z, t = F.normalize(anchors, dim=2), F.normalize(rows, dim=1)
    terms = []
    for b, own in enumerate(concepts):
        values = []
        for i, concept in enumerate(own):
            itself = None if first is None else first + b * len(own) + i
            near = [j for j in range(len(t)) if likeness.near[concept, of[j]] and j != itself]
            kept = [j for j in range(len(t)) if (likeness.near | likeness.far)[concept, of[j]] and j != itself]
            logits = t @ z[b, i] / T
            values += [torch.logsumexp(logits[kept], 0) - logits[j] for j in near]
        terms.append(torch.stack(values).mean() if values else None)
    return terms


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 20, None])
def test_a_term_is_that_of_a_loop_over_pairs(seed, block):
    anchors, concepts, rows, of, likeness = made(seed)
    ours, theirs = anchors.clone().requires_grad_(), anchors.clone().requires_grad_()
    terms, pairs = concept_contrast(ours, concepts, rows, of, likeness, T, block=block)
    wanted = looped(theirs, concepts, rows, of, likeness)
    for term, count, value in zip(terms, pairs, wanted, strict=True):
        assert (count > 0) == (value is not None)
        torch.testing.assert_close(term, torch.zeros_like(term) if value is None else value)
    terms.sum().backward()
    sum(value for value in wanted if value is not None).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_anchor_is_paired_with_itself():
    anchors, concepts, _, _, likeness = made()
    teacher = made(seed=1, rows=14)[2]
    of = torch.cat([concepts.new_zeros(4), concepts.flatten()])
    ours = concept_contrast(anchors, concepts, teacher, of, likeness, T, first=4)[0]
    for term, value in zip(ours, looped(anchors, concepts, teacher, of, likeness, first=4), strict=True):
        torch.testing.assert_close(term, value)


def test_concepts_between_the_thresholds_change_nothing():
    anchors, _, rows, _, _ = made()
    near = torch.eye(3, dtype=torch.bool)
    far = ~near
    far[:, 2] = far[2] = False
    likeness = Likeness(near, far)
    concepts, of = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 0, 1]]), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1])
    alone = concept_contrast(anchors, concepts, rows, of, likeness, T)[0]
    more = torch.cat([rows, rows.flip(1)])
    torch.testing.assert_close(
        concept_contrast(anchors, concepts, more, torch.cat([of, torch.full_like(of, 2)]), likeness, T)[0], alone
    )


def test_without_positives_a_term_is_zero_and_so_is_its_gradient():
    anchors, concepts, rows, of, _ = made()
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    for likeness in (Likeness(nothing, ~nothing), Likeness(nothing, nothing)):
        leaf = anchors.clone().requires_grad_()
        terms, pairs = concept_contrast(leaf, concepts, rows, of, likeness, T)
        assert terms.abs().sum() == 0
        assert pairs.sum() == 0
        terms.sum().backward()
        assert leaf.grad.abs().sum() == 0


def test_only_the_anchors_get_gradient():
    anchors, concepts, rows, of, likeness = made()
    rows.requires_grad_()
    concept_contrast(anchors.requires_grad_(), concepts, rows, of, likeness, T)[0].sum().backward()
    assert rows.grad is None
    assert anchors.grad.abs().sum() > 0


def test_sharp_temperatures_stay_finite():
    anchors, concepts, rows, of, likeness = made()
    anchors, rows = anchors.float(), rows.float()
    leaf = anchors.requires_grad_()
    terms, _ = concept_contrast(leaf, concepts, rows, of, likeness, 0.008)
    terms.sum().backward()
    assert torch.isfinite(terms).all()
    assert torch.isfinite(leaf.grad).all()


def test_nearest_is_by_cosine():
    book = torch.tensor([[10.0, 0.0], [0.1, 0.1]])
    assert nearest(torch.tensor([[[1.0, 0.9], [1.0, 0.1]]]), book).tolist() == [[1, 0]]
