"""Every engine against a float64 product, ties, odd inputs, the choice of the engine and its error texts."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from retrieval import kmeans, search, selftest

ROOT = Path(__file__).parents[2]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ENGINES = ["faiss_cpu", "torch", pytest.param("faiss_gpu", marks=GPU), pytest.param("torch_gpu", marks=GPU)]


def place(engine: str) -> tuple[str, torch.device]:
    """(backend, device) of a parameter."""
    device = torch.device("cuda" if engine.endswith("gpu") else "cpu")
    return ("torch" if engine == "torch_gpu" else engine), device


@pytest.fixture(autouse=True)
def fresh():
    """The choice of the engine starts anew in every test."""
    search._chosen.clear()
    search.configure("auto")
    yield
    search._chosen.clear()
    search.configure("auto")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(queries: torch.Tensor, bank: torch.Tensor, metric: str) -> torch.Tensor:
    """The whole float64 matrix, larger is nearer."""
    queries, bank = queries.double(), bank.double()
    return queries @ bank.T if metric == "ip" else -(queries[:, None] - bank[None]).square().sum(dim=2)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("count", "rows", "k"), [(7, 30, 1), (50, 300, 5), (3, 20, 20), (25, 1100, 150)])
def test_every_engine_equals_the_whole_product(engine, metric, count, rows, k, monkeypatch):
    backend, device = place(engine)
    monkeypatch.setattr(search, "BANK_BLOCK", 170)  # several blocks both ways
    monkeypatch.setattr(search, "BLOCK_BYTES", {"cpu": 9000, "cuda": 9000})
    queries, bank = random(count, 12, seed=1), random(rows, 12, seed=2)
    scores, ids = search.nearest(queries.to(device), bank.to(device), k, metric, backend)
    values, wanted = plain(queries, bank, metric).topk(k, dim=1)
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(ids.cpu(), wanted)
    torch.testing.assert_close(scores.cpu().double(), values if metric == "ip" else -values, atol=2e-5, rtol=1e-5)
    only = search.best(queries.to(device), bank.to(device), metric, backend)
    torch.testing.assert_close(only, scores[:, 0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [1, 3, 8, 11, 24])
def test_ties_come_lowest_id_first_also_across_place_k(engine, metric, k, monkeypatch):
    backend, device = place(engine)
    monkeypatch.setattr(search, "BANK_BLOCK", 16)
    base = torch.randint(-3, 4, (8, 6), generator=torch.Generator().manual_seed(3)).float()  # exact in float32
    bank = base.repeat(6, 1)
    for queries in (base[:4], base.repeat(4, 1)):  # faiss takes another path from 20 queries on
        wanted = plain(queries, bank, metric).sort(dim=1, descending=True, stable=True).indices[:, :k]
        scores, ids = search.nearest(queries.to(device), bank.to(device), k, metric, backend)
        assert torch.equal(ids.cpu(), wanted)
        assert torch.equal(
            scores.cpu().double(),
            plain(queries, bank, metric).gather(1, wanted).abs()
            if metric == "l2"
            else plain(queries, bank, metric).gather(1, wanted),
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_other_types_strides_and_graphs_go_in(engine):
    backend, device = place(engine)
    queries, bank = random(9, 16).to(device), random(40, 16, seed=1).to(device)
    wanted = search.nearest(queries, bank, 3, backend=backend)
    strided = bank.T.contiguous().T
    assert not strided.is_contiguous()
    graph = queries.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = search.nearest(graph, strided, 3, backend=backend)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], atol=1e-6, rtol=1e-6)  # autocast would be off by 1e-2
    assert not found[0].requires_grad
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        found = search.nearest(queries.to(kind), bank, 3, backend=backend)
        again = search.nearest(queries.to(kind).float(), bank, 3, backend=backend)
        assert torch.equal(found[0], again[0])
        assert found[0].dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_bank_no_queries_and_large_k_are_defined(engine):
    backend, device = place(engine)
    queries, bank = random(4, 5).to(device), random(3, 5).to(device)
    scores, ids = search.nearest(queries, bank[:0], 2, backend=backend)
    assert scores.shape == ids.shape == (4, 0)
    scores, ids = search.nearest(queries[:0], bank, 2, backend=backend)
    assert scores.shape == ids.shape == (0, 2)
    assert ids.dtype == torch.int64
    scores, ids = search.nearest(queries, bank, 99, backend=backend)
    assert ids.sort(dim=1).values.tolist() == [[0, 1, 2]] * 4
    assert search.best(queries, bank[:0], "ip", backend).tolist() == [float("-inf")] * 4
    assert search.best(queries, bank[:0], "l2", backend).tolist() == [float("inf")] * 4
    assert search.best(queries[:0], bank, backend=backend).shape == (0,)


def test_distances_are_never_negative_and_ascend():
    points = random(30, 8) + 50
    for backend in ("faiss_cpu", "torch"):
        scores, ids = search.nearest(points, points, 5, "l2", backend)
        assert (scores >= 0).all()
        assert (scores.diff(dim=1) >= 0).all()
        assert ids.shape == (30, 5)


def test_products_stay_plain_float32_whatever_the_program_chose():
    queries, bank = random(64, 64), random(128, 64, seed=1)
    wanted = search.best(queries, bank, backend="torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 products on CPUs that have them
        assert torch.equal(search.best(queries, bank, backend="torch"), wanted)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_matrix_of_all_scores_exists():
    queries, bank = random(3000, 4), random(2000, 4, seed=1)  # the matrix would be 24 MB
    for call in (
        lambda: search.best(queries, bank, "ip", "torch"),
        lambda: search.nearest(queries, bank, 3, "l2", "torch"),
    ):
        recorder = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
        with pytest.MonkeyPatch.context() as patch, recorder as profile:
            patch.setattr(search, "BLOCK_BYTES", {"cpu": 1 << 20})
            call()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert largest <= 1 << 20


@pytest.mark.parametrize(
    ("queries", "bank", "k", "metric", "text"),
    [
        ((2, 3), (4, 5), 1, "ip", "queries have D=3, the bank has D=5: must be equal"),
        ((2,), (4, 5), 1, "ip", "queries have shape (2,): must be [rows, D]"),
        ((2, 5), (4, 5, 1), 1, "ip", "bank have shape (4, 5, 1): must be [rows, D]"),
        ((2, 5), (4, 5), 0, "ip", "k=0: must be at least 1"),
        ((2, 5), (4, 5), 1, "cosine", "metric='cosine': must be one of ip, l2"),
    ],
)
def test_what_does_not_fit_is_named(queries, bank, k, metric, text):
    with pytest.raises(ValueError) as caught:
        search.nearest(torch.zeros(queries), torch.zeros(bank), k, metric)
    assert str(caught.value) == text


def test_unknown_and_missing_engines_are_config_errors():
    with pytest.raises(ConfigError) as caught:
        search.configure("fais_cpu")
    assert str(caught.value) == (
        "search.backend=fais_cpu: must be one of auto, faiss_gpu, faiss_cpu, torch; did you mean faiss_cpu?"
    )
    with pytest.raises(ConfigError) as caught:
        search.nearest(torch.zeros(2, 3), torch.zeros(2, 3), 1, backend="faiss_gpu")
    assert str(caught.value) == (
        "search.backend=faiss_gpu: it searches tensors on cuda, these are on cpu; take search.backend=auto"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_forcing_a_gpu_engine_without_a_gpu_fails_at_once():
    with pytest.raises(ConfigError) as caught:
        search.configure("faiss_gpu")
    assert str(caught.value) == "search.backend=faiss_gpu: torch sees no CUDA device; take search.backend=auto"


def test_configure_forces_and_the_argument_wins(monkeypatch):
    used = []
    for name, call in dict(search._ENGINE_CALLS).items():
        monkeypatch.setitem(
            search._ENGINE_CALLS, name, lambda *args, name=name, call=call: used.append(name) or call(*args)
        )
    queries = random(3, 4)
    assert search.backend_for("cpu") == "faiss_cpu"
    search.configure("torch")
    assert search.backend_for("cpu") == "torch"
    used.clear()
    search.nearest(queries, queries, 2)
    search.nearest(queries, queries, 2, backend="faiss_cpu")
    assert used == ["torch", "faiss_cpu"]


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "retrieval.search"):
        for _ in range(3):
            search.nearest(random(2, 4), random(5, 4), 1)
    assert [record.getMessage() for record in caplog.records] == ["search on cpu: faiss_cpu"]


def test_an_engine_that_fails_its_self_test_gives_way_with_one_warning(caplog, monkeypatch):
    def wrong(queries, bank, k, metric):
        scores, ids = search._torch(queries, bank, k, metric)
        return scores, ids.flip(1)

    monkeypatch.setitem(search._ENGINE_CALLS, "faiss_cpu", wrong)
    search._tested.cache_clear()
    try:
        for _ in range(3):
            assert search.backend_for("cpu") == "torch"
        with pytest.raises(
            ConfigError, match=r"^search.backend=faiss_cpu: its self-test failed \(ip search of 3 queries"
        ):
            search.backend_for("cpu", "faiss_cpu")
    finally:
        search._tested.cache_clear()
    assert len(caplog.records) == 1
    assert (
        caplog.records[0].getMessage().startswith("search on cpu: torch, because its self-test failed (ip search of 3")
    )


PROGRAM = """
import logging, sys, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from common.errors import ConfigError
from retrieval import kmeans, search, selftest
points = torch.eye(6)
print("faiss looked for at import:", search.load_faiss.cache_info().misses > 0)
print(search.nearest(points, points, 1)[1].squeeze(1).tolist(), search.backend_for("cpu"))
print(kmeans.fit(points, 6).counts.tolist())
try:
    search.configure("faiss_cpu")
except ConfigError as error:
    print(error, flush=True)
sys.exit(selftest.main())
"""


@pytest.fixture
def without_faiss(tmp_path) -> dict[str, str]:
    """The environment of a program in which `import faiss` fails as with a missing CUDA library."""
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text('raise ImportError("libcublas.so.12: cannot open")\n')
    return {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


def test_everything_runs_without_faiss_and_the_self_test_says_so(without_faiss):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=without_faiss, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    reason = "faiss cannot be imported (ImportError: libcublas.so.12: cannot open)"
    lines = done.stdout.splitlines()
    assert lines[:6] == [
        "faiss looked for at import: False",
        "[0, 1, 2, 3, 4, 5] torch",
        "[1, 1, 1, 1, 1, 1]",
        f"search.backend=faiss_cpu: {reason}; take search.backend=auto",
        "torch cpu: ok",
        f"faiss_cpu cpu: failed: {reason}",
    ]
    assert done.stderr.splitlines() == [f"WARNING search on cpu: torch, because {reason}"]


def test_the_self_test_passes_here_and_names_what_is_wrong(capsys, monkeypatch):
    assert selftest.main() == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["torch cpu: ok", "faiss_cpu cpu: ok"]
    monkeypatch.setattr(kmeans, "_faiss_run", lambda points, start, spherical, iterations: start)
    assert selftest.main() == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("faiss_cpu cpu: failed: k-means (spherical True)")


def test_faiss_is_imported_in_one_file_only():
    rooms = [
        path for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "runs", "build")
    ]
    imports = ("import faiss", "from faiss")
    inside = {
        str(path.relative_to(ROOT))
        for path in rooms
        if any(line.strip().startswith(imports) for line in path.read_text().splitlines())
    }
    assert inside == {"retrieval/search.py"}
