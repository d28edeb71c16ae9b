"""The probes: what is learned, what is not, and that two ranks equal one process."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from common.errors import CheckpointError, ConfigError
from evaluation import probes, readout
from evaluation.probes import ClusterProbe, KMeansProbe, LinearProbe, components_of, plus_plus
from retrieval import kmeans


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape, classes=4, seed=3):
    """Ids 0..classes-1, with 255, -1 and `classes` among them (all three are ignored)."""
    values = torch.tensor([*range(classes), 255, -1, classes])
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))]


def naive_linear_loss(probe, codes, label, classes):
    """As released: all logits at label size, then the valid pixels picked out."""
    layer = probe.classifier
    logits = F.interpolate(F.conv2d(codes, layer.weight, layer.bias), size=label.shape[-2:], mode="bilinear")
    rows = logits.permute(0, 2, 3, 1).reshape(-1, classes)
    mask = ((label >= 0) & (label < classes)).flatten()
    return F.cross_entropy(rows[mask], label.flatten()[mask])


@pytest.mark.parametrize("per_block", [1, 2, 5])
def test_linear_loss_and_gradients_are_the_released_ones(monkeypatch, per_block):
    monkeypatch.setattr(readout, "BLOCK", per_block * 4 * 15 * 21)
    probe, codes, label = LinearProbe(6, 4, seed=1), draw(5, 6, 5, 7), labels(5, 15, 21)
    loss = probe.loss(codes, label)
    got = torch.autograd.grad(3 * loss, probe.parameters())
    expected = naive_linear_loss(probe, codes, label, 4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(got, torch.autograd.grad(3 * expected, probe.parameters()), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 7), (5, 21), (15, 7), (4, 3), (64, 9)])
def test_linear_loss_of_labels_of_any_size(size):
    probe, codes, label = LinearProbe(6, 4, seed=1), draw(2, 6, 5, 7), labels(2, *size)
    loss, expected = probe.loss(codes, label), naive_linear_loss(probe, codes, label, 4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = torch.autograd.grad(expected, probe.parameters())
    for a, b in zip(torch.autograd.grad(loss, probe.parameters()), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_linear_loss_leaves_out_padding():
    probe, codes, label = LinearProbe(6, 4), draw(2, 6, 4, 4), labels(2, 16, 16)
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[:, :, 9:] = False
    assert torch.equal(probe.loss(codes, label, valid), probe.loss(codes, label.masked_fill(~valid, 255)))
    assert not torch.equal(probe.loss(codes, label, valid), probe.loss(codes, label))


def test_linear_loss_is_a_mean_over_labelled_pixels_or_over_all():
    codes, label = draw(2, 6, 4, 4), labels(2, 16, 16)
    label[0] = 255
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[:, :, 9:] = False
    one, every = LinearProbe(6, 4), LinearProbe(6, 4, mean="all")
    known = (label >= 0) & (label < 4)
    for inside in (None, valid):
        counted = known if inside is None else known & valid
        total = label.numel() if inside is None else int(valid.sum())
        share = float(counted.sum()) / total
        assert every.loss(codes, label, inside).item() == pytest.approx(share * one.loss(codes, label, inside).item())


def test_linear_loss_without_a_valid_pixel_is_zero_with_a_graph():
    probe = LinearProbe(6, 4)
    loss = probe.loss(draw(2, 6, 4, 4), torch.full((2, 16, 16), 255))
    assert loss.item() == 0
    loss.backward()
    assert probe.classifier.weight.grad.abs().max() == 0


def test_no_probe_sends_a_gradient_to_the_codes():
    codes = draw(2, 6, 4, 4).requires_grad_()
    loss = LinearProbe(6, 4).loss(codes, labels(2, 16, 16)) + ClusterProbe(6, 5).loss(codes)
    loss.backward()
    assert codes.grad is None


def test_a_leaking_probe_trains_the_codes_alone():
    probe, codes, label = LinearProbe(6, 4), draw(2, 6, 5, 7).requires_grad_(), labels(2, 15, 21)
    loss = probe.loss(codes, label, leaks=True)
    assert loss.item() == pytest.approx(probe.loss(codes, label).item())
    loss.backward()
    assert codes.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in probe.parameters())


def test_initial_weights_are_keyed_and_leave_the_global_stream_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = LinearProbe(6, 4, seed=5), ClusterProbe(6, 4, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    second = LinearProbe(6, 4, seed=5), ClusterProbe(6, 4, seed=5)
    other = LinearProbe(6, 4, seed=6), ClusterProbe(6, 4, seed=6)
    for a, b, c in zip(first, second, other, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_clusters_start_standard_normal():
    clusters = ClusterProbe(512, 200).clusters
    assert abs(clusters.mean()) < 0.01
    assert abs(clusters.std() - 1) < 0.01


def test_cluster_loss_is_minus_the_mean_cosine_to_the_winner_and_moves_winners_only():
    probe, codes = ClusterProbe(6, 30), draw(2, 6, 3, 3)
    loss = probe.loss(codes)
    cosines = torch.einsum("bdyx,kd->bkyx", F.normalize(codes, dim=1), F.normalize(probe.clusters, dim=1))
    assert loss.item() == pytest.approx(-cosines.amax(1).mean().item(), rel=1e-6)
    loss.backward()
    moved = probe.clusters.grad.abs().sum(1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(cosines.argmax(1).flatten().tolist())
    assert moved.sum() < 30


def test_cluster_loss_equals_the_released_forward_pass():
    probe, codes = ClusterProbe(6, 5), draw(2, 6, 4, 3)
    loss, probs = probe(codes)
    assert loss.item() == pytest.approx(probe.loss(codes).item())
    assert not probs.requires_grad
    assert torch.equal(probs.sum(1), torch.ones(2, 4, 3))
    assert torch.equal(probs.argmax(1), probe.scores(codes).argmax(1))


def test_soft_forward_pass():
    probe, codes = ClusterProbe(6, 5), draw(2, 6, 4, 3)
    loss, probs = probe(codes, alpha=2.0)
    assert torch.allclose(probs.sum(1), torch.ones(2, 4, 3))
    assert loss.item() == pytest.approx(-(probs * probe.cosines(codes)).sum(1).mean().item())
    assert torch.allclose(probe(codes, alpha=2.0, log_probs=True).exp(), probs)
    assert torch.allclose(probe.log_probs(codes, (4, 3)), probe(codes, alpha=2.0, log_probs=True), atol=1e-5)
    with pytest.raises(ValueError, match="log_probs needs alpha: the arg max has no log-probabilities"):
        probe(codes, log_probs=True)


def test_training_the_clusters_finds_separated_groups():
    centres = F.normalize(draw(4, 16), dim=1)
    group = torch.arange(8 * 16) % 4
    codes = (centres[group] + 0.05 * draw(128, 16, seed=2)).reshape(8, 4, 4, 16).permute(0, 3, 1, 2)
    probe = ClusterProbe(16, 4, init="first_batch")
    optimizer = torch.optim.Adam(probe.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        probe.loss(codes).backward()
        optimizer.step()
    assert probe.loss(codes).item() < -0.97
    found = probe.scores(codes).argmax(1).flatten()
    assert all(len(found[group == i].unique()) == 1 for i in range(4))
    assert len(found.unique()) == 4


def test_first_batch_seeds_the_clusters_once():
    codes = draw(3, 8, 4, 4)
    probe = ClusterProbe(8, 6, seed=2, init="first_batch")
    assert not probe.placed
    probe.eval()
    probe.loss(codes)
    assert not probe.placed  # validation places nothing
    probe.train()
    loss = probe.loss(codes)
    loss.backward()
    assert probe.placed
    assert loss < -0.3
    assert not probe.clusters.grad.any()  # fitted to these codes: what is left is rounding
    points = F.normalize(codes.flatten(2), dim=1).transpose(1, 2).reshape(-1, 8)
    found = (points @ probe.clusters.T).max(1)
    for cluster in range(6):  # a fixed point of k-means: every centroid is the mean of its own codes
        mean = F.normalize(points[found.indices == cluster].sum(0), dim=0)
        assert torch.allclose(probe.clusters[cluster], mean, atol=1e-5)
    one = kmeans.fit(points, 6, seed=2, restarts=1, iterations=20)
    assert 2 - 2 * found.values.mean() < one.objective + 1e-6
    seeds = probe.clusters.detach().clone()
    probe.loss(draw(3, 8, 4, 4, seed=9))
    assert torch.equal(probe.clusters, seeds)
    again = ClusterProbe(8, 6, seed=2, init="first_batch")
    again.load_state_dict(probe.state_dict())
    again.loss(draw(3, 8, 4, 4, seed=9))
    assert torch.equal(again.clusters, seeds)  # a resumed probe does not seed again


def test_dead_clusters_are_placed_anew():
    codes = draw(2, 4, 4, 4)
    codes[:, 3] = 0
    codes = F.normalize(codes, dim=1)
    probe = ClusterProbe(4, 5, reseed=3)
    with torch.no_grad():
        probe.clusters[0] = codes.mean((0, 2, 3))
        probe.clusters[1:] = -probe.clusters[0]  # with its opposites it is above 0 for every code
        probe.clusters[4] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # 0 for all: it never wins
    kept = probe.clusters[0].detach().clone()
    for _ in range(3):
        probe.loss(codes)
    dead = probe.wins == 0
    assert dead[4]
    probe.loss(codes)
    assert torch.equal(probe.clusters[0], kept)
    placed = probe.clusters[dead].detach()
    points = codes.flatten(2).transpose(1, 2).reshape(-1, 4)
    assert torch.allclose((points @ placed.T).amax(0), torch.ones(int(dead.sum())), atol=1e-5)


def test_without_reseed_nothing_is_counted():
    probe = ClusterProbe(4, 5)
    probe.loss(draw(2, 4, 4, 4))
    assert probe.wins.sum() == 0
    assert probe.calls == 0


def test_seeds_among_fewer_distinct_points_than_clusters():
    points = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), dim=1)
    seeds = plus_plus(points, points.new_empty(0, 2), 4, seed=0, step=0)
    assert {tuple(row) for row in seeds.tolist()} == {(1.0, 0.0), (0.0, 1.0)}


def test_unknown_words_are_refused():
    with pytest.raises(ConfigError) as error:
        ClusterProbe(4, 5, init="kmeans")
    assert str(error.value) == "evaluation.cluster_init=kmeans: not one of normal, first_batch"
    with pytest.raises(ConfigError) as error:
        ClusterProbe(4, 5, reseed=-1)
    assert str(error.value) == "evaluation.cluster_reseed=-1: expected 0 (never) or a number of steps"


def test_seeds_come_from_all_over_a_picture(monkeypatch):
    monkeypatch.setattr(probes, "SEEDING_POINTS", 16)
    codes = torch.zeros(1, 2, 16, 16)
    angles = torch.arange(16) / 10  # told apart by their columns
    codes[0, 0], codes[0, 1] = angles.cos(), angles.sin()
    points = probes.seeding_points(codes)
    assert len(points) <= 16
    assert len(points.unique(dim=0)) >= 4


def test_kmeans_probe_refuses_scores_before_it_is_fitted():
    probe = KMeansProbe(3, 2)
    with pytest.raises(CheckpointError) as error:
        probe.scores(draw(1, 3, 2, 2))
    assert str(error.value) == (
        "probe=kmeans: its centroids are fitted when a run ends, and this checkpoint was written before; "
        "use a finished run or probe=cluster"
    )


def test_kmeans_probe_keeps_its_centroids_in_the_state():
    probe, codes = KMeansProbe(3, 2), draw(1, 3, 4, 4)
    probe.set(torch.tensor([[0.0, 0.0, 2.0], [0.0, 5.0, 0.0]]))
    assert torch.allclose(probe.scores(codes), codes[:, [2, 1]])
    again = KMeansProbe(3, 2)
    again.load_state_dict(probe.state_dict())
    assert again.fitted
    assert torch.equal(again.scores(codes), probe.scores(codes))
    assert torch.allclose(again.log_probs(codes, (8, 8)).exp().sum(1), torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match=r"expected centroids \(2, 3\), got \(3, 2\)"):
        probe.set(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="hold values that are not finite"):
        probe.set(torch.full((2, 3), float("nan")))


@pytest.mark.parametrize("whiten", [False, True])
def test_kmeans_of_reduced_codes_is_that_of_their_principal_components(whiten):
    torch.manual_seed(3)
    rows = F.normalize(torch.randn(200, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 1, dim=1)
    probe = KMeansProbe(6, 2, components=3)
    probe.fit_axes(rows, whiten)
    centred = rows.double() - rows.double().mean(0)
    left, _, directions = torch.linalg.svd(centred, full_matrices=False)
    expected = (left[:, :3] if whiten else centred @ directions[:3].T).float()
    codes = 7 * rows.T[None, :, :, None]  # of any length
    own = probe.reduced(codes)[0, :, :, 0].T
    assert torch.allclose(torch.linalg.vector_norm(own, dim=1), torch.full((200,), 7.0), atol=1e-4)
    signs = torch.sign((own * expected).sum(0))
    assert torch.allclose(own / 7 * signs, F.normalize(expected, dim=1), atol=2e-3)
    probe.set(own[:2])
    again = KMeansProbe(6, 2, components=3)
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again.scores(codes), probe.scores(codes))
    assert torch.allclose(probe.scores(codes)[0, 0, 0], torch.tensor(7.0), atol=1e-4)  # the length times a cosine of 1


def test_more_components_than_channels_end_in_one_line():
    cfg = OmegaConf.create({"evaluation": {"kmeans": {"reduce": "pca", "components": 9}}})
    with pytest.raises(ConfigError) as error:
        components_of(cfg, 4)
    assert str(error.value) == (
        "evaluation.kmeans.components=9: the codes have 4 channels; set 4 at most, or evaluation.kmeans.reduce=none"
    )


def test_probes_stay_in_float32_inside_autocast():
    codes, label = draw(2, 6, 4, 4), labels(2, 16, 16)
    linear, cluster = LinearProbe(6, 4), ClusterProbe(6, 4)
    expected = linear.loss(codes, label), cluster.loss(codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear.loss(codes, label), cluster.loss(codes)
        assert linear(codes).dtype == torch.float32
    assert torch.equal(torch.stack(got), torch.stack(expected))
    assert np.isfinite(linear.loss(codes.bfloat16(), label).item())
