"""STEGO's correspondence loss against plain loops, and what its draws promise."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError
from losses import correspondence as stego
from losses.correspondence import Term


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sampling_reads_the_swapped_place():
    field = maps(0, 2, 3, 5, 6)
    points = torch.rand(2, 4, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    found = stego.sample(field, points)
    x, y = (points[1, 2, 0] + 1) / 2 * torch.tensor([5.0, 4.0], dtype=torch.float64)  # align_corners: 6 - 1 and 5 - 1
    left, top = int(x), int(y)
    across, down = x - left, y - top
    corner = field[1, :, top : top + 2, left : left + 2]
    rows = corner[..., 0] * (1 - across) + corner[..., 1] * across
    torch.testing.assert_close(found[1, :, 0, 2], rows[:, 0] * (1 - down) + rows[:, 1] * down)


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("zero_clamp", [True, False])
@pytest.mark.parametrize("stabilize", [True, False])
def test_one_pair_equals_the_formula(pointwise, zero_clamp, stabilize):
    f, g, s = maps(0, 2, 4, 3, 2), maps(1, 2, 4, 2, 2), maps(2, 2, 5, 3, 2)
    t = torch.cat([s[:, :, :2], maps(3, 2, 5, 2, 2)], dim=3)[..., :2]  # codes above 0.8 and below 0 occur
    loss, found = stego.correspondence(
        (f, g), (s, t), 0.2, pointwise=pointwise, zero_clamp=zero_clamp, stabilize=stabilize
    )
    wanted = torch.einsum("bchw,bcij->bhwij", F.normalize(f, dim=1), F.normalize(g, dim=1))
    mean = wanted.mean()
    if pointwise:
        wanted = wanted - wanted.mean((3, 4), keepdim=True)
        wanted = wanted - wanted.mean() + mean
    cosine = torch.einsum("bchw,bcij->bhwij", F.normalize(s, dim=1), F.normalize(t, dim=1))
    torch.testing.assert_close(found, cosine)
    limited = cosine.clamp(0 if zero_clamp else -9999.0, 0.8 if stabilize else 9999.0)
    torch.testing.assert_close(loss, -limited * (wanted - 0.2))
    assert (cosine < 0).any()
    assert (cosine > 0.8).any()


def test_the_mean_of_all_ranks_takes_the_place_of_the_own():
    f, s = maps(0, 1, 4, 3, 3), maps(1, 1, 5, 3, 3)
    plain = stego.correspondence((f, f), (s, s), 0.1)[0]
    other = stego.correspondence((f, f), (s, s), 0.1, average=lambda mean: mean + 0.5)[0]
    torch.testing.assert_close(other, plain - 0.5 * stego.cosines(s, s).clamp(min=0))


def test_negatives_are_never_the_picture_itself():
    for kind in stego.NEGATIVES:
        rows = stego.random_negatives(0, 3, 50, 7, kind)
        assert rows.shape == (50, 7)
        assert (rows != torch.arange(7)).all()
        assert (rows >= 0).all()
        assert (rows < 7).all()
        assert torch.equal(rows, stego.random_negatives(0, 3, 50, 7, kind))
        assert not torch.equal(rows, stego.random_negatives(0, 4, 50, 7, kind))
        assert len({tuple(row.tolist()) for row in rows}) > 10
    ordered = stego.random_negatives(0, 3, 50, 7, "cycle").sort(1).values
    assert torch.equal(ordered, torch.arange(7).expand(50, 7))
    assert any(len(set(row.tolist())) < 7 for row in stego.random_negatives(0, 3, 50, 7, "shifted"))


def test_a_single_picture_is_its_own_negative():
    for kind in stego.NEGATIVES:
        assert stego.random_negatives(0, 0, 2, 1, kind).tolist() == [[0], [0]]


def test_an_unknown_draw_is_refused():
    with pytest.raises(ConfigError) as caught:
        stego.random_negatives(0, 0, 1, 2, "cycled")
    assert str(caught.value) == "method.negatives.draw=cycled: not one of shifted, cycle"


def test_points_belong_to_the_step_and_cover_the_frame():
    points = stego.random_points(0, "a", 5, 6, 11)
    assert points.shape == (6, 11, 11, 2)
    assert points.abs().max() <= 1
    assert points.amin() < -0.98
    assert points.amax() > 0.98
    assert torch.equal(points, stego.random_points(0, "a", 5, 6, 11))
    assert not torch.equal(points, stego.random_points(0, "a", 6, 6, 11))


def parts(weights):
    features, codes = maps(0, 3, 4, 5, 5), maps(1, 3, 6, 5, 5).requires_grad_()
    near = maps(2, 3, 4, 5, 5), maps(3, 3, 6, 5, 5).requires_grad_()
    points = tuple(stego.random_points(0, name, 0, 3, 4).double() for name in "ab")
    negatives = stego.random_negatives(0, 0, 2, 3)
    terms = {kind: Term(weight, 0.1) for kind, weight in zip(("self", "knn", "random"), weights, strict=True)}
    result = stego.correspondence_loss(features, codes, near, (features, codes), points, negatives, terms)
    return result, codes, near[1], (features, near[0], points, negatives)


def test_the_total_is_the_weighted_sum_of_plain_means():
    result, codes, near, (features, near_features, points, negatives) = parts((0.5, 2.0, 3.0))
    pair = lambda f, g, s, t: stego.correspondence((f, g), (s, t), 0.1)[0].mean()  # noqa: E731
    f, s = stego.sample(features, points[0]), stego.sample(codes, points[0])
    own = pair(f, f, s, s)
    knn = pair(f, stego.sample(near_features, points[1]), s, stego.sample(near, points[1]))
    random = sum(
        pair(f, stego.sample(features[row], points[1]), s, stego.sample(codes[row], points[1])) for row in negatives
    )
    torch.testing.assert_close(result.total, 0.5 * own + 2 * knn + 3 * random / 2)
    result.total.backward()
    assert codes.grad.abs().sum() > 0
    assert near.grad.abs().sum() > 0


def test_a_weight_of_zero_leaves_a_term_out():
    result, codes, near, _ = parts((0.0, 0.0, 1.0))
    assert set(result.losses) == set(result.similarities) == {"random"}
    result.total.backward()
    assert near.grad is None
    assert codes.grad.abs().sum() > 0


def test_autocast_changes_nothing():
    f, s = maps(0, 2, 4, 3, 3).float(), maps(1, 2, 5, 3, 3).float()
    plain = stego.correspondence((f, f), (s, s), 0.1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stego.correspondence((f, f), (s, s), 0.1)[0]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


def test_reconstruction_is_the_negative_cosine():
    decoded, features = maps(0, 2, 4, 3, 3).requires_grad_(), maps(1, 2, 4, 3, 3).requires_grad_()
    loss = stego.reconstruction(decoded, features)
    expected = -(F.normalize(decoded, dim=1) * F.normalize(features, dim=1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert features.grad is None
    assert stego.reconstruction(features * 3, features).item() == pytest.approx(-1)


class View:
    """A crop of rows 2 to 6 and columns 4 to 8 of a frame of 8 x 8 pixels; the second picture mirrored."""

    boxes = torch.tensor([[2.0, 4.0, 4.0, 4.0]]).expand(2, 4)
    flip = torch.tensor([False, True])
    source = (8, 8)
    size = (8, 8)


def test_alignment_compares_the_same_places():
    codes = maps(0, 2, 5, 8, 8)
    same = codes[:, :, 2:6, 4:8].clone()
    same[1] = same[1].flip(-1)
    assert stego.alignment(codes, same, View()).item() == pytest.approx(-1)
    swapped = same.clone()
    swapped[1] = swapped[1].flip(-1)
    assert stego.alignment(codes, swapped, View()).item() > -0.9
    assert not math.isnan(stego.alignment(codes * 0, same, View()).item())


def test_salient_points_are_pixels_of_the_mask_or_uniform():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 40, 40, 2, generator=generator) * 2 - 1
    draws = torch.rand(3, 40, 40, 2, generator=generator)
    salient = torch.zeros(3, 9, 13, dtype=torch.bool)
    salient[0, 2, 5] = salient[0, 8, 12] = salient[1, :, :4] = True  # the last has none
    found = stego.salient_points(points, salient, draws, share=0.75)
    moved = (found != points).any(-1).float().mean((1, 2))
    assert torch.allclose(moved, torch.tensor([0.75, 0.75, 0.0]), atol=0.05)
    changed = found[0][(found[0] != points[0]).any(-1)]
    expected = torch.tensor([[2 * 5 / 12 - 1, 2 * 2 / 8 - 1], [1.0, 1.0]])
    nearest = torch.cdist(changed, expected)
    assert nearest.amin(1).max() < 1e-6
    assert 0.4 < (nearest.argmin(1) == 0).float().mean() < 0.6
    values = stego.sample(salient[1:2, None].float(), found[1:2])
    picked = (found[1] != points[1]).any(-1).T  # `sample` swaps the axes
    assert values[0, 0][picked].min() == 1


def test_a_signal_of_labels_has_a_class_for_pixels_without():
    label = torch.tensor([[[0, 2], [255, -1]]])
    assert stego.label_signal(label, 3).argmax(1).tolist() == [[[0, 2], [3, 3]]]
    assert stego.label_signal(label, 3).sum(1).tolist() == [[[1, 1], [1, 1]]]


def test_a_quantile_is_that_of_each_picture_and_their_mean():
    signals = [torch.arange(20.0).view(2, 1, 1, 2, 5), 100 + torch.arange(20.0).view(2, 1, 1, 2, 5)]
    assert float(stego.quantile(signals, 0.7)) == (6 + 16 + 106 + 116) / 4
    assert float(stego.quantile(signals, 0.001)) == (0 + 10 + 100 + 110) / 4


def test_a_term_without_a_shift_asks_for_one():
    features, codes = maps(0, 3, 4, 5, 5), maps(1, 3, 6, 5, 5)
    near = maps(2, 3, 4, 5, 5), maps(3, 3, 6, 5, 5)
    points = tuple(stego.random_points(0, name, 0, 3, 4).double() for name in "ab")
    negatives = stego.random_negatives(0, 0, 2, 3)
    asked = {}
    totals = []
    for shift in (None, 0.3):
        terms = {"self": Term(1.0, 0.1), "knn": Term(1.0, 0.2), "random": Term(1.0, shift)}
        found = stego.correspondence_loss(
            features, codes, near, (features, codes), points, negatives, terms,
            shift_of=lambda kind, signals: asked.setdefault(kind, signals) and torch.tensor(0.3, dtype=torch.float64),
        )  # fmt: skip
        totals.append(found.total)
        assert found.shifts == {"self": 0.1, "knn": 0.2, "random": pytest.approx(0.3)}
    torch.testing.assert_close(totals[0], totals[1])
    assert set(asked) == {"random"}
    assert [values.shape for values in asked["random"]] == [(3, 4, 4, 4, 4)] * 2
