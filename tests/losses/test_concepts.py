"""TransFGU's losses: rules that the recorded cases do not show."""

import pytest
import torch
import torch.nn.functional as F

from losses import concepts


def maps(*places):
    """One picture [1,C,1,places] from the scores of each place."""
    return torch.tensor(places).T[None, :, None]


def test_a_class_is_the_largest_score_and_the_background_wins_below_half_its_level():
    scores = maps([0.0, 1.0], [0.04, 0.0], [0.06, 0.0])
    soft, flat, evidence = concepts.soft_labels(scores, background=True)
    assert soft.argmax(1).flatten().tolist() == [2, 0, 1]
    torch.testing.assert_close(soft[0, 0, 0], torch.tensor([0.0, 0.06, 0.04]))
    assert flat.tolist() == [False]
    assert evidence.flatten().tolist() == [True, False, False]
    assert concepts.soft_labels(scores)[0].argmax(1).flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("taught", [True, False])
def test_a_picture_without_evidence_has_class_zero(taught):
    scores = torch.cat([torch.full((1, 3, 2, 2), 0.7), torch.rand(1, 3, 2, 2)])
    teacher = torch.randn(2, 4, 2, 2) if taught else None
    soft, flat, evidence = concepts.soft_labels(scores, teacher, background=True)
    assert flat.tolist() == [True, False]
    assert not soft[0].argmax(0).any()
    assert not evidence[0].any()
    logits = torch.randn(2, 4, 2, 2)
    own = concepts.uncertainty(logits[1:, 1:])[evidence[1:]].mean()
    torch.testing.assert_close(concepts.thing_uncertainty(logits, evidence), own)
    assert concepts.thing_uncertainty(logits[:1], evidence[:1]).isnan()


def test_the_negative_is_a_permutation_of_the_classes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 3, generator=generator, requires_grad=True)
    soft, order = torch.rand(2, 5, 3, 3, generator=generator), torch.tensor([3, 0, 4, 1, 2])
    labels = soft.argmax(1)
    negative = order.argsort()[labels]  # the place j with order[j] = label
    wanted = F.cross_entropy(logits, labels) - 0.05 * F.cross_entropy(logits, negative)
    torch.testing.assert_close(concepts.bootstrapped(logits, soft, order, 0.05).mean(), wanted)
    kept = concepts.bootstrapped(logits, soft, torch.arange(5), 1.0)
    assert torch.equal(kept, torch.zeros_like(kept))


def test_the_weight_of_the_negative_grows_to_a_tenth():
    assert [round(concepts.negative_weight(epoch), 2) for epoch in (0, 1, 6, 7, 8, 50)] == [
        0.03,
        0.04,
        0.09,
        0.1,
        0.1,
        0.1,
    ]


def test_losses_are_float32_for_half_precision():
    logits = torch.randn(1, 3, 2, 2).bfloat16()
    assert concepts.uncertainty(logits).dtype == torch.float32
    assert concepts.bootstrapped(logits, torch.rand(1, 3, 2, 2)).dtype == torch.float32
    rows = F.normalize(torch.randn(1, 4, 8), dim=2)
    pairs = concepts.embedding_diversity(rows)[0]
    assert pairs.tolist() == pytest.approx(
        [1 + float(rows[0, i] @ rows[0, j]) for i in range(4) for j in range(i + 1, 4)]
    )
