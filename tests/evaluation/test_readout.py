"""The read-out at patch resolution against the released order: upsample the code, then classify every pixel."""

import pytest
import torch
import torch.nn.functional as F

from evaluation import readout

SIZES = [
    ((5, 5), (20, 20)),
    ((7, 4), (33, 50)),
    ((1, 6), (9, 31)),
    ((3, 1), (8, 8)),
    ((6, 9), (6, 9)),
    ((12, 10), (7, 5)),
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_cosines(codes, clusters, size):
    up = F.interpolate(codes, size=size, mode="bilinear", align_corners=False)
    return torch.einsum("bdyx,kd->bkyx", F.normalize(up, dim=1), F.normalize(clusters, dim=1))


def assert_same_winner(pred, values, tolerance):
    """Every chosen id is the best one, up to rounding at ties."""
    assert pred.dtype == torch.int64
    chosen = values.gather(1, pred[:, None])[:, 0]
    assert (values.amax(1) - chosen).max() <= tolerance
    assert (pred == values.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_cluster_prediction_is_that_of_upsampled_codes(source, size):
    codes, clusters = draw(3, 16, *source), draw(9, 16, seed=1)
    pred = readout.predict(readout.dot_products(codes, clusters), size)
    assert_same_winner(pred, naive_cosines(codes, clusters, size), 1e-5)


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_linear_prediction_is_that_of_upsampled_codes(source, size):
    codes, weight, bias = draw(2, 8, *source), draw(5, 8, 1, 1, seed=1), draw(5, seed=2)
    up = F.interpolate(codes, size=size, mode="bilinear", align_corners=False)
    logits = F.conv2d(codes, weight, bias)
    assert_same_winner(readout.predict(logits, size), F.conv2d(up, weight, bias), 1e-4)
    expected = F.conv2d(up, weight, bias).log_softmax(1)
    assert torch.allclose(readout.log_probs(logits, size), expected, atol=2e-5)


def test_prediction_in_blocks_of_pictures_is_the_same(monkeypatch):
    scores = draw(5, 4, 6, 6)
    whole = readout.predict(scores, (24, 24))
    monkeypatch.setattr(readout, "BLOCK", 2 * 4 * 24 * 24)
    assert [len(block) for block in readout.picture_blocks(scores, (24, 24))] == [2, 2, 1]
    assert torch.equal(readout.predict(scores, (24, 24)), whole)


@pytest.mark.parametrize(("source", "size"), [*SIZES, ((9, 11), (301, 407))])
@pytest.mark.parametrize("maps", [1, 3, 7])
def test_prediction_in_blocks_of_maps_is_the_same_to_the_bit(source, size, maps, monkeypatch):
    """Ties included (maps 2 and 5 are alike, and rounded values meet), and NaN as in torch's arg max."""
    scores = (3 * draw(2, 7, *source)).round()
    scores[:, 5] = scores[:, 2]
    scores[1, 4, 0, 0] = torch.nan
    whole, exact = readout.predict(scores, size), draw(2, 7, *source, seed=3)
    single = readout.predict(exact, size)
    up = torch.cat([readout.upsample(scores[:, k : k + 1], size) for k in range(7)], dim=1)
    assert torch.equal(whole, up.argmax(1))
    monkeypatch.setattr(readout, "BLOCK", maps * size[0] * size[1])
    assert torch.equal(readout.predict(scores, size), whole)
    assert torch.equal(readout.predict(exact, size), single)


def test_a_large_picture_is_read_in_bounded_memory(monkeypatch):
    """No upsampled block holds more than BLOCK elements, or one map."""
    seen = []
    upsample = readout.upsample
    monkeypatch.setattr(readout, "upsample", lambda maps, size: seen.append(len(maps)) or upsample(maps, size))
    monkeypatch.setattr(readout, "BLOCK", 2 * 90 * 70)
    readout.predict(draw(1, 9, 6, 5), (90, 70))
    assert seen == [2, 2, 2, 2, 1]
    seen.clear()
    readout.predict(draw(1, 3, 6, 5), (900, 700))
    assert seen == [1, 1, 1]


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_cluster_log_probs_are_those_of_upsampled_codes(source, size):
    codes, clusters = draw(2, 12, *source, dtype=torch.float64), draw(7, 12, seed=1, dtype=torch.float64)
    for alpha in (2.0, 13.0):
        expected = (alpha * naive_cosines(codes, clusters, size)).log_softmax(1)
        got = readout.cluster_log_probs(codes, clusters, size, alpha)
        assert got.shape == (2, 7, *size)
        assert torch.allclose(got, expected, atol=1e-11)
        single = readout.cluster_log_probs(codes.float(), clusters.float(), size, alpha)
        assert torch.allclose(single, expected.float(), atol=1e-4 * alpha)


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_norm_of_the_upsampled_code(source, size):
    codes = draw(2, 3, *source, dtype=torch.float64)
    up = F.interpolate(codes, size=size, mode="bilinear", align_corners=False)
    assert torch.allclose(readout.upsampled_norm(codes, size), up.norm(dim=1), atol=1e-11)


def test_zero_codes_give_finite_log_probs():
    codes = torch.zeros(1, 4, 3, 3)
    got = readout.cluster_log_probs(codes, draw(5, 4), (8, 8), 2.0)
    assert torch.allclose(got, torch.full_like(got, -torch.log(torch.tensor(5.0)).item()))


def test_float32_inside_autocast():
    codes, clusters = draw(1, 16, 4, 4), draw(5, 16, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = readout.dot_products(codes, clusters)
        probs = readout.cluster_log_probs(codes, clusters, (16, 16), 2.0)
    assert scores.dtype == probs.dtype == torch.float32
    assert torch.equal(scores, readout.dot_products(codes, clusters))
    assert torch.equal(probs, readout.cluster_log_probs(codes, clusters, (16, 16), 2.0))


def test_flip_average():
    code = draw(2, 3, 4, 5)
    assert torch.allclose(readout.flip_average(code, code.flip(-1)), code)
    other = draw(2, 3, 4, 5, seed=1)
    assert readout.flip_average(code, other)[0, 1, 2, 0] == (code[0, 1, 2, 0] + other[0, 1, 2, 4]) / 2


def test_winners():
    codes = torch.tensor([[3.0, 4.0], [0.0, -2.0]]).T.reshape(1, 2, 1, 2)  # two patches: (3, 4) and (0, -2)
    clusters = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, -1.0]])
    cluster, cosine = readout.winners(readout.dot_products(codes, clusters), codes)
    assert cluster.tolist() == [[[1, 2]]]
    assert cosine.flatten().tolist() == pytest.approx([0.8, 1.0])
