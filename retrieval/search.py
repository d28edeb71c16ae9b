"""Exact nearest neighbours by inner product or squared Euclidean distance: one interface, three engines.

| engine      | tensors on     | how                                                                             |
|-------------|----------------|---------------------------------------------------------------------------------|
| `faiss_gpu` | a CUDA device  | `faiss.knn_gpu` on the tensors' own device, one resource object a process and device |
| `faiss_cpu` | the CPU        | `faiss.knn` on the tensors, without a copy                                      |
| `torch`     | any device     | products in blocks under a byte budget, running top-k                           |

`auto` takes faiss where a small self-test on that device agrees with torch, and torch elsewhere; banks are never moved
between devices. The choice is logged once a device, a faiss that is missing or fails is one warning.

Precision: float32 inside, whatever autocast or the matmul precision of the program say. Values must be finite.
Ties: rows of equal score come lowest id first, and where a tie straddles place k the lowest ids are kept, on every
engine (faiss by itself returns inner-product ties highest id first). Two engines may round a score differently.
"""

import logging
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch  # before faiss, always: a CUDA-12 faiss imported first broke a CUDA-13 torch
from torch import Tensor

from common import chance
from common.errors import ConfigError, did_you_mean
from common.precision import exact

log = logging.getLogger(__name__)

ENGINES = ("faiss_gpu", "faiss_cpu", "torch")
METRICS = ("ip", "l2")
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Bytes of the score block of the torch engine by device type (`cpu` stands for all that are not named)."""
BANK_BLOCK = 8192
"""Bank rows in one block of the torch engine; a longer bank is merged block by block."""
GPU_TEMP_BYTES = 256 << 20
GPU_MAX_K = 2048
"""The longest result list that faiss selects on a GPU."""

_forced = "auto"
_chosen: dict[torch.device, str] = {}


# Choice of the engine.


@cache
def load_faiss() -> tuple[ModuleType | None, str]:
    """(faiss with its torch bridge, "") or (None, why it cannot be used). Imported at the first call, after torch."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every CPU variant it did not find
    try:
        import faiss
        import faiss.contrib.torch_utils
    except Exception as error:  # a broken build raises ImportError, OSError, AttributeError, RuntimeError
        return None, f"faiss cannot be imported ({type(error).__name__}: {error})"
    if sys.platform == "darwin":  # two OpenMP runtimes in one process crash there
        faiss.omp_set_num_threads(1)
    return faiss, ""


@cache
def gpu_resources(index: int) -> Any:
    """The faiss resources of CUDA device `index`, made once a process (each reserves its own scratch memory)."""
    faiss, reason = load_faiss()
    if faiss is None:
        raise RuntimeError(reason)
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(GPU_TEMP_BYTES)
    return resources


def configure(backend: str = "auto") -> None:
    """Forces an engine for the whole process (`search.backend`): auto, faiss_gpu, faiss_cpu or torch.

    Raises ConfigError for an unknown word and for an engine that this machine does not have at all. Tensors on a device
    that the forced engine does not serve raise ConfigError when they are searched.
    """
    global _forced
    _check_word(backend)
    if backend.startswith("faiss"):
        faiss, reason = load_faiss()
        if faiss is not None and backend == "faiss_gpu":
            reason = _no_gpu(faiss)
        if reason:
            raise _refusal(backend, reason)
    _forced = backend


def backend_for(device: torch.device | str, backend: str | None = None) -> str:
    """The engine that serves tensors of `device`: `backend` or the configured word, and what `auto` means there.

    The first call of a device runs the self-test (16 rows of 8 numbers against torch) and logs the choice.
    Raises ConfigError where a forced engine does not exist on the device.
    """
    device = _own(torch.device(device))
    word = _forced if backend is None else backend
    _check_word(word)
    if word == "torch":
        return word
    if word == "auto":
        if device not in _chosen:
            _chosen[device] = _choose(device)
        return _chosen[device]
    reason = _unusable(word, device)
    if reason:
        raise _refusal(word, reason)
    return word


def self_test(engine: str, device: torch.device | str) -> str:
    """Runs a 16 x 8 search on `device`, both metrics, against a plain product: "" or what is wrong. Never raises."""
    try:
        generator = chance.generator(0, "search/self-test")
        bank = torch.randn(16, 8, generator=generator).to(device)
        for count in (3, 40):  # faiss takes another path below 20 queries
            queries = torch.randn(count, 8, generator=generator).to(device)
            for metric in METRICS:
                with exact(bank.device):
                    scores, ids = _ENGINE_CALLS[engine](queries, bank, 4, metric)
                    full = queries.double() @ bank.double().T
                    if metric == "l2":
                        full = -torch.cdist(queries.double(), bank.double()).square()
                    found, best = full.gather(1, ids), full.topk(4, dim=1).values
                error = max((scores - found).abs().max().item(), (found - best).abs().max().item())
                if not error < 1e-4:
                    return f"{metric} search of {count} queries is off by {error:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    return ""


@cache
def _tested(engine: str, device: torch.device) -> str:
    return self_test(engine, device)


def _choose(device: torch.device) -> str:
    wanted = {"cuda": "faiss_gpu", "cpu": "faiss_cpu"}.get(device.type, "torch")
    reason = "" if wanted == "torch" else _unusable(wanted, device)
    if reason:
        log.warning("search on %s: torch, because %s", device, reason)
        return "torch"
    log.info("search on %s: %s", device, wanted)
    return wanted


def _unusable(engine: str, device: torch.device) -> str:
    """Why a faiss engine cannot serve `device`, or ""."""
    wanted = {"faiss_gpu": "cuda", "faiss_cpu": "cpu"}[engine]
    if device.type != wanted:
        return f"it searches tensors on {wanted}, these are on {device.type}"
    faiss, reason = load_faiss()
    if faiss is None:
        return reason
    if engine == "faiss_gpu" and (reason := _no_gpu(faiss)):
        return reason
    reason = _tested(engine, device)
    return f"its self-test failed ({reason})" if reason else ""


def _no_gpu(faiss: ModuleType) -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return "this faiss sees no GPU (faiss-cpu, or built for another CUDA driver)"
    return ""


def _check_word(backend: str) -> None:
    words = ("auto", *ENGINES)
    if backend not in words:
        raise ConfigError(
            f"search.backend={backend}: must be one of {', '.join(words)}; {did_you_mean(backend, words)}"
        )


def _refusal(backend: str, reason: str) -> ConfigError:
    return ConfigError(f"search.backend={backend}: {reason}; take search.backend=auto")


def _own(device: torch.device) -> torch.device:
    """The device with its number: `cuda` means the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


# The searches.


@torch.no_grad()
def nearest(
    queries: Tensor, bank: Tensor, k: int, metric: str = "ip", backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of every query, exactly.

    queries [Q,D], bank [M,D]: any floating type, any strides, on one device; `k` is clamped to M.
    Returns scores float32 [Q,k] and ids int64 [Q,k], detached: inner products descending (`ip`; normalise first for
    cosines) or squared distances ascending (`l2`, never negative; computed by expansion, so the distance of a row to
    itself is zero only to rounding). An empty bank gives (Q,0), no queries give (0,k).
    Raises ValueError for shapes or devices that do not fit, ConfigError for a forced engine that is not there.
    """
    queries, bank = _checked(queries, bank, metric)
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    count, rows = queries.shape[0], bank.shape[0]
    k = min(k, rows)
    engine = _engine(queries.device, backend, k)
    if not count or not k:
        empty = (count, k)
        return queries.new_empty(empty), torch.empty(empty, dtype=torch.int64, device=queries.device)
    with exact(queries.device):
        single = k == 1 and engine != "faiss_gpu"  # those two return the lowest id by themselves
        scores, ids = _ENGINE_CALLS[engine](queries, bank, k if single else min(k + 1, rows), metric)
        if not single:
            scores, ids = _settle_ties(scores, ids, queries, bank, k, metric)
    return (scores if metric == "ip" else scores.neg_().clamp_(min=0)), ids


@torch.no_grad()
def best(queries: Tensor, bank: Tensor, metric: str = "ip", backend: str | None = None) -> Tensor:
    """The score of the nearest bank row of every query: float32 [Q], detached. Arguments and errors as in `nearest`.

    Works in blocks: no Q x M matrix exists. An empty bank gives -inf (`ip`) or inf (`l2`).
    """
    queries, bank = _checked(queries, bank, metric)
    engine = _engine(queries.device, backend, 1)
    if not queries.shape[0] or not bank.shape[0]:
        return queries.new_full((queries.shape[0],), float("-inf") if metric == "ip" else float("inf"))
    with exact(queries.device):
        if engine == "torch":
            scores = _torch_best(queries, bank, metric)
        else:
            scores = _ENGINE_CALLS[engine](queries, bank, 1, metric)[0].squeeze(1)
    return scores if metric == "ip" else scores.neg_().clamp_(min=0)


def _checked(queries: Tensor, bank: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Both as detached, contiguous float32 matrices."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: must be one of {', '.join(METRICS)}")
    for name, tensor in (("queries", queries), ("bank", bank)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}: must be [rows, D]")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries have D={queries.shape[1]}, the bank has D={bank.shape[1]}: must be equal")
    if queries.device != bank.device:
        raise ValueError(f"queries are on {queries.device}, the bank is on {bank.device}: must be one device")
    return tuple(tensor.detach().to(torch.float32).contiguous() for tensor in (queries, bank))


def _engine(device: torch.device, backend: str | None, k: int) -> str:
    engine = backend_for(device, backend)
    if engine == "faiss_gpu" and k >= GPU_MAX_K:
        if (_forced if backend is None else backend) == "faiss_gpu":
            raise _refusal(engine, f"it returns fewer than {GPU_MAX_K} neighbours, k={k} were asked for")
        return "torch"
    return engine


# All engines return scores where larger is nearer: inner products, or negated squared distances.


def _faiss_cpu(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    faiss, _ = load_faiss()
    if metric == "ip":
        return faiss.knn(queries, bank, k, metric=faiss.METRIC_INNER_PRODUCT)
    distances, ids = faiss.knn(queries, bank, k, metric=faiss.METRIC_L2)
    return distances.neg_(), ids


def _faiss_gpu(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    faiss, _ = load_faiss()
    device = _own(queries.device)
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    with torch.cuda.device(device):  # the bridge orders its work on the stream of the current device
        scores, ids = faiss.knn_gpu(gpu_resources(device.index), queries, bank, k, metric=kind, device=device.index)
    return (scores if metric == "ip" else scores.neg_()), ids


def _torch(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    scores = queries.new_empty(queries.shape[0], k)
    ids = torch.empty(queries.shape[0], k, dtype=torch.int64, device=queries.device)
    for rows, blocks in _blocks(queries, bank, metric, max(k, BANK_BLOCK)):
        top = at = None
        for start, block in blocks:
            if k == 1:  # unlike topk, max names the first of equals
                new, where = block.max(dim=1, keepdim=True)
            else:
                new, where = block.topk(min(k, block.shape[1]), dim=1)
            where = where + start
            if top is not None:  # earlier ids stand first, a stable sort keeps them there
                new, order = torch.cat([top, new], dim=1).sort(dim=1, descending=True, stable=True)
                new, where = new[:, :k], torch.cat([at, where], dim=1).gather(1, order[:, :k])
            top, at = new, where
        scores[rows], ids[rows] = top, at
    return scores, ids


def _torch_best(queries: Tensor, bank: Tensor, metric: str) -> Tensor:
    scores = queries.new_full((queries.shape[0],), float("-inf"))
    for rows, blocks in _blocks(queries, bank, metric, BANK_BLOCK):
        for _, block in blocks:
            scores[rows] = torch.maximum(scores[rows], block.amax(dim=1))
    return scores


def _blocks(queries: Tensor, bank: Tensor, metric: str, width: int) -> Iterator[tuple[slice, Iterator]]:
    """Blocks of the score matrix under the byte budget: (query rows, iterator over (first bank id, scores [q,m])).

    The scores lie in one kept buffer: they are gone when the next block is asked for.
    """
    budget = BLOCK_BYTES.get(queries.device.type, BLOCK_BYTES["cpu"])
    width = min(width, bank.shape[0])
    height = min(max(1, budget // (4 * width)), queries.shape[0])
    kept = queries.new_empty(height * width)
    norms = bank.square().sum(dim=1) if metric == "l2" else None

    def over_bank(part: Tensor) -> Iterator[tuple[int, Tensor]]:
        own = part.square().sum(dim=1, keepdim=True) if metric == "l2" else None
        for start in range(0, bank.shape[0], width):
            rows = bank[start : start + width]
            block = kept[: part.shape[0] * rows.shape[0]].view(part.shape[0], rows.shape[0])
            if norms is None:
                torch.mm(part, rows.T, out=block)
            else:
                torch.addmm(norms[start : start + width], part, rows.T, beta=-1, alpha=2, out=block)
                block.sub_(own)
            yield start, block

    for first in range(0, queries.shape[0], height):
        yield slice(first, first + height), over_bank(queries[first : first + height])


def _settle_ties(
    scores: Tensor, ids: Tensor, queries: Tensor, bank: Tensor, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """[Q, k or k+1] results of an engine -> [Q, k] with equal scores in order of id, lowest ids kept at the edge."""
    ids, order = ids.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if scores.shape[1] > k:
        torn = (scores[:, k] == scores[:, k - 1]).nonzero().squeeze(1)
        scores, ids = scores[:, :k].contiguous(), ids[:, :k].contiguous()
        if len(torn):
            for rows, blocks in _blocks(queries[torn], bank, metric, bank.shape[0]):
                _, block = next(blocks)
                top, order = block.sort(dim=1, descending=True, stable=True)
                scores[torn[rows]], ids[torn[rows]] = top[:, :k], order[:, :k]
    return scores, ids


_ENGINE_CALLS = {"faiss_gpu": _faiss_gpu, "faiss_cpu": _faiss_cpu, "torch": _torch}
