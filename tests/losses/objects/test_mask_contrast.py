"""Contrast of masks against its formula, written out at once in float64, gradient included; and what it holds."""

import pytest
import torch
import torch.nn.functional as F

from losses.objects import mask_contrast as losses


def scene(pictures=3, dim=5, cells=4, size=9, queue=6, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    bank = F.normalize(normal(pictures + queue, dim), dim=1)
    return {
        "maps": normal(pictures, dim, cells, cells),
        "masks": torch.rand(pictures, size, size, generator=draw) < 0.4,
        "prototypes": bank,
        "weights": torch.rand(len(bank), generator=draw, dtype=torch.float64) + 0.5,
        "own": torch.tensor([2, 0, 1]),
    }


def dense(case, temperature, present=None):
    """All pixels at once, by autograd."""
    large = F.interpolate(case["maps"], case["masks"].shape[-2:], mode="bilinear", align_corners=False)
    rows = F.normalize(large, dim=1).permute(0, 2, 3, 1)[case["masks"]]
    own = case["own"].repeat_interleave(case["masks"].sum((1, 2)))
    logits = rows @ case["prototypes"].T / temperature
    if present is not None:
        logits[:, ~present] = -torch.inf
    loss = logits.logsumexp(1) - logits.gather(1, own[:, None])[:, 0]
    weights = case["weights"][own]
    return (weights * loss).sum() / weights.sum()


def with_gradient(case, function):
    maps = case["maps"].clone().requires_grad_()
    loss = function(case | {"maps": maps})
    (3 * loss).backward()
    return loss.detach(), maps.grad


@pytest.mark.parametrize("absent", [[], [4, 7]])
def test_equals_the_formula_with_its_gradient(absent):
    case = scene()
    present = torch.ones(9, dtype=torch.bool)
    present[absent] = False
    found = with_gradient(case, lambda c: losses.object_contrast(**c, temperature=0.5, present=present))
    wanted = with_gradient(case, lambda c: dense(c, 0.5, present))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert wanted[1].abs().sum() > 0


def test_two_ranks_together_are_one():
    """With the weighted sum of all, the parts add up to the whole."""
    case = scene()
    whole = losses.object_contrast(**case, temperature=0.3)
    total = (case["masks"].sum((1, 2)) * case["weights"][case["own"]]).sum()
    parts = [
        losses.object_contrast(
            case["maps"][rows], case["masks"][rows], case["prototypes"], case["weights"], 0.3, own=case["own"][rows],
            total=total,
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


def test_no_pixel_is_no_loss_but_a_graph():
    case = scene()
    case["masks"] &= False
    loss, gradient = with_gradient(case, lambda c: losses.object_contrast(**c, temperature=0.5))
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    with torch.no_grad():
        assert losses.object_contrast(**scene(), temperature=0.5) > 0


def test_pixels_times_prototypes_are_not_kept_for_the_backward_pass():
    """What the graph holds after the forward pass is the gradient of the small maps."""
    case = scene(size=64, queue=500)
    maps = case["maps"].requires_grad_()
    loss = losses.object_contrast(**case, temperature=0.5)
    assert [held.shape for held in loss.grad_fn.saved_tensors] == [maps.shape]
    loss.backward()
    assert maps.grad.abs().sum() > 0


def test_prototypes_are_unit_means_and_zero_without_a_mask():
    case = scene()
    case["masks"][1] = False
    found = losses.mask_prototypes(case["maps"], case["masks"])
    large = F.normalize(F.interpolate(case["maps"], (9, 9), mode="bilinear", align_corners=False), dim=1)
    wanted = F.normalize(large[0][:, case["masks"][0]].mean(1), dim=0)
    torch.testing.assert_close(found[0], wanted)
    assert torch.equal(found[1], torch.zeros_like(found[1]))


def test_weights_fall_with_the_share():
    weights = losses.class_weights(torch.tensor([30, 10, 0]))
    wanted = [1 / torch.log(torch.tensor(1.02 + share)) for share in (0.75, 0.25, 0.0)]
    torch.testing.assert_close(weights, torch.stack(wanted))
    assert losses.class_weights(torch.zeros(2)).isfinite().all()


def test_salience_is_balanced_and_silent_without_both_sides():
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :3], masks[1, 2, 2] = True, True
    loss = losses.balanced_salience(logits, masks)
    large = F.interpolate(logits[:, None], (8, 8), mode="bilinear", align_corners=False)[:, 0].sigmoid()
    share = (~masks).double().mean()
    wanted = -(share * large[masks].log().sum() + (1 - share) * (1 - large[~masks]).log().sum()) / masks.numel()
    torch.testing.assert_close(loss, wanted)
    for none in (masks & False, masks | True):
        assert losses.balanced_salience(logits, none) == 0
    counts = torch.tensor([masks.sum(), (~masks).sum()], dtype=torch.float64)
    parts = [losses.balanced_salience(logits[rows], masks[rows], lambda _: counts) for rows in (slice(1), slice(1, 2))]
    torch.testing.assert_close(sum(parts), loss)


def test_an_object_is_embedded_by_its_salience():
    maps, salience = torch.randn(2, 3, 2, 2), torch.full((2, 4, 4), -1.0)
    salience[0, :, :2] = torch.tensor([0.6, 2.0])
    vectors, objects = losses.object_embedding(maps, salience, 0.5)
    assert torch.equal(objects, salience > 0.5)
    large = F.interpolate(maps[:1], (4, 4), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(vectors[0], F.normalize((large * salience[0] * objects[0]).sum((1, 2)), dim=0))
    assert torch.equal(vectors[1], torch.zeros(3))
