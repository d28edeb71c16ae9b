"""Local positives of HP: weights of the 3x3 neighbourhood and mixing, against the dense formula of the release."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError
from losses import local_positives
from losses.local_positives import affinity_weights, attention_weights, neighbour_mix, neighbourhood, row_attention


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def neighbour_mask(h, w):
    """[N_p,N_p]: cells at most one row and one column apart."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1)


def dense_attention(scores, sigma=28.0):
    """The released steps, one row at a time."""
    rows = []
    for row in scores:
        low, high = (torch.quantile(row, level) for level in (0.1, 0.9))
        attention = torch.softmax(row.clamp(low, high), 0) * sigma
        rows.append(torch.where(attention < attention.mean(), 0.0, attention))
    return torch.stack(rows)


def dense_mix(codes, attention, mask):
    """(1 / c_i) sum_j A_ij mask_ij s_j with the full matrix."""
    rows = codes.flatten(2).transpose(1, 2)
    mixed = (attention * mask) @ rows / mask.sum(1)[:, None]
    return mixed.transpose(1, 2).unflatten(2, codes.shape[2:])


@pytest.mark.parametrize("prefix", [1, 5])
def test_weights_and_mix_equal_the_dense_formula_on_a_map_that_is_not_square(prefix):
    h, w, batch = 4, 6, 2
    logits = maps(batch, 3, prefix + h * w, prefix + h * w, dtype=torch.float32)
    codes = maps(batch, 5, h, w, dtype=torch.float32).requires_grad_()
    weights = attention_weights(logits, prefix, (h, w))
    assert weights.shape == (batch, h * w, 9)
    attention = torch.stack([dense_attention(picture.mean(0)) for picture in logits[:, :, prefix:, prefix:]])
    expected = dense_mix(codes, attention, neighbour_mask(h, w))
    (gradient,) = torch.autograd.grad(expected.square().sum(), codes)
    got = neighbour_mix(codes, weights)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), codes)[0], gradient)


def test_sigma_scales_the_weights():
    logits = maps(1, 2, 13, 13, dtype=torch.float32)
    weights = attention_weights(logits, 1, (3, 4), sigma=7.0)
    torch.testing.assert_close(weights * 4, attention_weights(logits, 1, (3, 4)))


def test_rows_are_cut_below_their_mean():
    attention = row_attention(maps(20, 30, dtype=torch.float32))
    kept = attention > 0
    assert kept.any(1).all()
    assert not kept.all(1).any()
    assert (attention[kept] >= 28 / 30 - 1e-5).all()
    torch.testing.assert_close(attention, dense_attention(maps(20, 30, dtype=torch.float32)))


def test_entries_of_a_row_are_those_of_the_whole_row():
    scores = maps(3, 20, 31, dtype=torch.float32)
    scores[0, 4, 5] = -torch.inf
    columns = torch.randint(31, (3, 20, 4), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(row_attention(scores, 28.0, columns), row_attention(scores).gather(-1, columns))
    torch.testing.assert_close(row_attention(scores[0]), dense_attention(scores[0]))


@pytest.mark.parametrize("columns", [1, 2, 3, 10, 11, 12])
def test_short_rows_and_equal_scores(columns):
    scores = maps(6, columns, dtype=torch.float32)
    scores[1], scores[2, : columns // 2] = 3.0, -1.0
    found = row_attention(scores)
    torch.testing.assert_close(found[1], torch.full((columns,), 28.0 / columns))
    torch.testing.assert_close(found[[0, 3, 4, 5]], dense_attention(scores[[0, 3, 4, 5]]))


def test_a_row_with_a_nan_is_nan():
    scores = maps(3, 20, dtype=torch.float32)
    scores[1, 4] = torch.nan
    found = row_attention(scores)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_chunks_of_rows_do_not_matter(monkeypatch):
    logits, features = maps(2, 2, 13, 13, dtype=torch.float32), maps(2, 8, 3, 4, dtype=torch.float32)
    whole = attention_weights(logits, 1, (3, 4)), affinity_weights(features)
    monkeypatch.setattr(local_positives, "_CHUNK", 25)
    torch.testing.assert_close(attention_weights(logits, 1, (3, 4)), whole[0], rtol=0, atol=0)
    torch.testing.assert_close(affinity_weights(features), whole[1])


def test_neighbourhood_counts_four_six_and_nine():
    index, valid = neighbourhood(3, 4)
    assert valid.sum(1).tolist() == [4, 6, 6, 4, 6, 9, 9, 6, 4, 6, 6, 4]
    assert index[5].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    full = torch.zeros(12, 12, dtype=torch.bool)
    for cell in range(12):
        full[cell, index[cell][valid[cell]]] = True
    assert torch.equal(full, neighbour_mask(3, 4))


def test_weights_outside_the_map_are_zero():
    _, valid = neighbourhood(3, 4)
    for weights in (attention_weights(maps(1, 2, 13, 13), 1, (3, 4)), affinity_weights(maps(1, 8, 3, 4))):
        assert (weights[0][~valid] == 0).all()


def test_gradient_reaches_only_neighbours_above_the_mean():
    h, w = 5, 6
    logits = maps(1, 2, 1 + h * w, 1 + h * w, dtype=torch.float32)
    attention = dense_attention(logits[0, :, 1:, 1:].mean(0))
    codes = maps(1, 3, h, w).requires_grad_()
    mixed = neighbour_mix(codes, attention_weights(logits, 1, (h, w)))
    for cell in (0, 8, 14, 29):
        (gradient,) = torch.autograd.grad(mixed[0, :, cell // w, cell % w].sum(), codes, retain_graph=True)
        reached = gradient[0].abs().sum(0).flatten() > 0
        assert torch.equal(reached, neighbour_mask(h, w)[cell] & (attention[cell] > 0))
    assert 0 < (attention > 0)[neighbour_mask(h, w)].double().mean() < 1


def test_gradient_agrees_with_finite_differences():
    codes, weights = maps(2, 3, 3, 4).requires_grad_(), affinity_weights(maps(2, 8, 3, 4)).double()
    assert torch.autograd.gradcheck(lambda c: neighbour_mix(c, weights), codes)


def test_weights_carry_no_gradient():
    features = maps(1, 8, 3, 4, dtype=torch.float32).requires_grad_()
    assert not affinity_weights(features).requires_grad
    assert not attention_weights(maps(1, 1, 13, 13).requires_grad_(), 1, (3, 4)).requires_grad
    weights = torch.rand(1, 12, 9, requires_grad=True)
    neighbour_mix(maps(1, 3, 3, 4, dtype=torch.float32).requires_grad_(), weights).sum().backward()
    assert weights.grad is None


def test_affinity_is_the_scaled_cosine_with_the_same_steps():
    h, w = 4, 5
    features = maps(2, 8, h, w, dtype=torch.float32)
    index, valid = neighbourhood(h, w)
    for picture, weights in zip(features, affinity_weights(features, sigma=28.0, spread=2.0), strict=True):
        rows = F.normalize(picture.flatten(1).T, dim=1)
        cosine = rows @ rows.T
        attention = dense_attention(2.0 * cosine / cosine.std(correction=0))
        torch.testing.assert_close(weights, attention.gather(1, index) * valid, rtol=1e-4, atol=1e-5)


def test_affinity_prefers_the_own_region():
    features = maps(1, 8, 6, 6, dtype=torch.float32) * 0.05
    features[:, 0, :, :3] += 1
    features[:, 1, :, 3:] += 1
    weights = affinity_weights(features)[0].reshape(6, 6, 3, 3)
    assert (weights[2, 2, :, 2] == 0).all()  # the column beyond the border
    assert (weights[2, 2, :, :2] > 0).any()


def test_affinity_of_equal_features_is_flat():
    weights = affinity_weights(torch.ones(1, 4, 3, 4))
    _, valid = neighbourhood(3, 4)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights[0][valid], torch.full((int(valid.sum()),), 28 / 12))


def test_a_wrong_grid_is_named():
    with pytest.raises(ConfigError) as caught:
        attention_weights(torch.zeros(1, 2, 13, 13), 1, (3, 3))
    assert str(caught.value) == (
        "attention over 13 tokens does not fit a 3x3 map with 1 prefix tokens (10): "
        "pass the grid and prefix of the same forward pass"
    )
