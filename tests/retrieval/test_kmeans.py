"""k-means against a plain Lloyd's algorithm from the same start, its quality, its errors, and two ranks."""

import numpy as np
import pytest
import torch

from common.errors import ConfigError, LabelfreeError
from retrieval import kmeans, search

ENGINES = ["faiss_cpu", "torch"]


def blobs(centres: torch.Tensor, each: int, spread: float, seed: int = 0) -> torch.Tensor:
    """[n*each,D]: `each` points around every centre, centre by centre."""
    noise = torch.randn(len(centres), each, centres.shape[1], generator=torch.Generator().manual_seed(seed))
    return (centres[:, None] + spread * noise).flatten(0, 1)


def lloyd(points: np.ndarray, start: np.ndarray, spherical: bool, iterations: int) -> tuple[np.ndarray, float]:
    """Written out in float64: (centroids, mean squared distance to the own centroid)."""
    centroids = start.astype(np.float64)
    for _ in range(iterations):
        owner = ((points[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
        centroids = np.stack([points[owner == i].mean(0) for i in range(len(centroids))])
        if spherical:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids, ((points[:, None] - centroids[None]) ** 2).sum(2).min(1).mean()


def hard_case() -> torch.Tensor:
    """25 tight blobs on a grid: random starts leave two of them to one centroid nearly always."""
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    return blobs(grid * 10, 30, 0.3)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("init", kmeans.INITS)
@pytest.mark.parametrize("engine", ENGINES)
def test_equals_plain_lloyd_from_the_same_start(engine, init, spherical):
    points = blobs(torch.randn(6, 10, generator=torch.Generator().manual_seed(5)) * 2, 40, 0.8) + 0.5
    unit = torch.nn.functional.normalize(points, dim=1) if spherical else points
    start = kmeans.initial_centroids(unit, 6, init, seed=11)
    result = kmeans.fit(points, 6, spherical=spherical, seed=11, iterations=7, init=init, backend=engine)
    wanted, objective = lloyd(unit.double().numpy(), start.numpy(), spherical, 7)
    np.testing.assert_allclose(result.centroids.numpy(), wanted, atol=1e-5)
    assert result.objective == pytest.approx(objective, rel=1e-4)
    assert int(result.counts.sum()) == 240
    assert result.dead == []
    if spherical:
        torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(6))
    owners = kmeans.assign(points, result.centroids, spherical, engine)
    assert torch.equal(torch.bincount(owners, minlength=6), result.counts)


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_finds_five_separated_clusters(engine, spherical):
    points = blobs(torch.eye(5, 8) * 6, 60, 0.3)
    truth = torch.arange(5).repeat_interleave(60)
    result = kmeans.fit(points, 5, spherical=spherical, backend=engine)
    found = kmeans.assign(points, result.centroids, spherical, engine)
    pairs = torch.stack([truth, found]).unique(dim=1)
    assert pairs.shape[1] == 5
    assert sorted(pairs[1].tolist()) == list(range(5))


def test_plus_plus_beats_random_starts():
    points = hard_case()
    scores = {
        init: [kmeans.fit(points, 25, spherical=False, seed=seed, init=init).objective for seed in range(4)]
        for init in kmeans.INITS
    }
    best = 2 * 0.3**2  # the mean squared distance of 2-dimensional noise of this spread
    assert max(scores["k-means++"]) < 1.1 * best
    assert min(scores["random"]) > 3 * best


def test_restarts_keep_the_best_run():
    points = hard_case()
    settings = {"spherical": False, "seed": 1, "init": "random"}
    runs = []
    for restart in range(4):
        start = kmeans.initial_centroids(points, 25, "random", 1, restart)
        centroids = kmeans._faiss_run(points, start, False, 50)
        runs.append(search.nearest(points, centroids, 1, "l2")[0].double().mean().item())
    assert min(runs) < runs[0]
    assert kmeans.fit(points, 25, **settings).objective == pytest.approx(runs[0])
    assert kmeans.fit(points, 25, restarts=4, **settings).objective == pytest.approx(min(runs))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_is_a_result(engine):
    points = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    first = kmeans.fit(points, 9, seed=4, backend=engine)
    torch.manual_seed(2)  # the global stream has no say
    again = kmeans.fit(points, 9, seed=4, backend=engine)
    other = kmeans.fit(points, 9, seed=5, backend=engine)
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_points_are_used(engine):
    """faiss by itself samples 256 points a cluster: the mean of one cluster shows whether it did."""
    points = torch.randn(3000, 3, generator=torch.Generator().manual_seed(1))
    result = kmeans.fit(points, 1, spherical=False, backend=engine)
    torch.testing.assert_close(result.centroids[0], points.double().mean(dim=0).float(), atol=1e-6, rtol=1e-5)


def test_half_precision_and_graphs_go_in_and_nothing_else_changes():
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = points.detach().clone()
    result = kmeans.fit(points, 3)
    assert not result.centroids.requires_grad
    assert torch.equal(points.detach(), before)
    half = kmeans.fit(points.detach().half(), 3)
    assert torch.equal(half.centroids, kmeans.fit(points.detach().half().float(), 3).centroids)


@pytest.mark.parametrize("engine", ENGINES)
def test_dead_clusters_are_reported(engine, caplog):
    result = kmeans.fit(torch.ones(10, 3), 4, spherical=False, backend=engine)
    assert len(result.dead) == 3
    assert sorted(result.counts.tolist()) == [0, 0, 0, 10]
    assert torch.isfinite(result.centroids).all()
    names = ", ".join(map(str, result.dead))
    assert caplog.messages == [f"k-means: 3 of 4 clusters have no point: {names}"]


def test_an_emptied_cluster_gets_points_again_in_torch():
    points = blobs(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]), 20, 0.1)
    start = torch.tensor([[0.0, 0.0], [10.0, 10.0], [90.0, 90.0]])  # nothing is nearest to the third
    centroids = kmeans._torch_run(points, start, False, 20)
    counts = torch.bincount(kmeans.assign(points, centroids, False), minlength=3)
    assert counts.tolist() == [20, 20, 20]


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_zero_length_take_no_part_in_a_spherical_fit(engine, caplog):
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    alone = kmeans.fit(points, 4, backend=engine)
    mixed = torch.cat([points, torch.zeros(7, 5)])
    result = kmeans.fit(mixed, 4, backend=engine)
    assert torch.equal(result.centroids, alone.centroids)
    assert torch.equal(result.counts, alone.counts)
    assert result.skipped == 7
    assert caplog.messages == ["k-means: 7 of 67 points have zero length and took no part"]
    assert kmeans.assign(mixed, result.centroids, backend=engine).shape == (67,)
    assert kmeans.fit(mixed, 4, spherical=False, backend=engine).counts.sum() == 67


def test_points_that_are_not_finite_are_named():
    points = torch.randn(20, 3)
    points[7, 1] = float("nan")
    points[12, 0] = float("inf")
    with pytest.raises(LabelfreeError) as caught:
        kmeans.fit(points, 3)
    assert str(caught.value) == (
        "k-means: 2 of 20 points are not finite (first: row 7); "
        "look for a learning rate or a precision that is too much for this run"
    )


def test_too_few_points_and_wrong_words_are_named():
    ending = "there must be at least one point a cluster; lower method.num_clusters or give more pictures"
    for points, text in (
        (torch.randn(5, 3), f"k-means: 27 clusters from 5 points: {ending}"),
        (
            torch.cat([torch.ones(4, 3), torch.zeros(40, 3)]),
            f"k-means: 27 clusters from 4 points of more than zero length (44 in all): {ending}",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            kmeans.fit(points, 27)
        assert str(caught.value) == text
    with pytest.raises(ConfigError) as caught:
        kmeans.fit(torch.randn(5, 3), 2, init="kmeans")
    assert str(caught.value) == "k-means: init=kmeans: must be one of k-means++, random"
    with pytest.raises(ConfigError) as caught:
        kmeans.fit(torch.randn(5, 3), 2, restarts=0)
    assert str(caught.value) == "k-means: restarts=0: must be at least 1"


def test_as_many_clusters_as_points_gives_the_points():
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for engine in ENGINES:
        for init in kmeans.INITS:
            result = kmeans.fit(points, 6, spherical=False, init=init, backend=engine)
            assert result.counts.tolist() == [1] * 6
            assert result.objective < 1e-6


def test_plus_plus_never_draws_a_point_twice_while_others_are_left():
    points = torch.cat([torch.zeros(30, 2), torch.eye(2), -torch.eye(2)])
    for seed in range(5):
        start = kmeans.initial_centroids(points, 5, "k-means++", seed)
        assert len(start.unique(dim=0)) == 5


def test_a_drawn_point_is_never_drawn_again_where_rounding_is_larger_than_the_distances():
    points = 100 + 0.01 * torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
    for seed in range(5):
        assert len(kmeans.initial_centroids(points, 12, "k-means++", seed).unique(dim=0)) == 12


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_around_a_fit_changes_nothing(engine):
    points = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    wanted = kmeans.fit(points, 60, iterations=1, backend=engine)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kmeans.fit(points, 60, iterations=1, backend=engine)
    assert torch.equal(found.centroids, wanted.centroids)


@pytest.mark.ddp
def test_two_ranks_fit_what_one_process_fits(two_ranks):
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))  # 35 and 15 rows on the ranks
    alone = kmeans.fit_distributed(points, 3, seed=2)
    for found in two_ranks:
        torch.testing.assert_close(found["centroids"], alone.centroids)
        assert torch.equal(found["counts"], alone.counts)
        assert found["objective"] == pytest.approx(alone.objective)
        assert (found["dead"], found["skipped"]) == ([], 0)
        assert found["error"].startswith("k-means: 3 clusters from 2 points: there must be")  # on both ranks
    assert torch.equal(two_ranks[0]["centroids"], two_ranks[1]["centroids"])
