"""The engines of `retrieval.search` beside the plain formulation: seconds and peak memory, as ratios, in one run.

`python -m benchmarks.search [rows=2048,20000] [queries=12544] [dim=384] [k=30] [repeats=3] [threads=0]`

Plain: the whole score matrix in float32, then its maximum or its top k. Each side runs in a process of its own with the
same inputs and allocator; seconds are the median of `repeats` after one warm-up; memory is the peak of that process
(of the GPU's allocator, on a GPU, where the fixed scratch memory of faiss is not seen) above what it held before.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from retrieval import search

DEFAULTS = {"rows": "2048,20000", "queries": "12544", "dim": "384", "k": "30", "repeats": "3", "threads": "0"}


def plain(queries: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    scores = queries @ bank.T
    return scores.max(dim=1).values if k == 1 else scores.topk(k, dim=1).values


def with_engine(engine: str) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    def run(queries: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
        if k == 1:
            return search.best(queries, bank, backend=engine)
        return search.nearest(queries, bank, k, backend=engine)[0]

    return run


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process held since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(settings: dict[str, str]) -> dict[str, float]:
    """One side, in this process: seconds, bytes, and a checksum of the scores."""
    if int(settings["threads"]):
        torch.set_num_threads(int(settings["threads"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.Generator().manual_seed(0)
    queries, bank = (
        torch.nn.functional.normalize(torch.randn(int(settings[name]), int(settings["dim"]), generator=draw), dim=1)
        for name in ("queries", "rows")
    )
    queries, bank, k = queries.to(device), bank.to(device), int(settings["k"])
    side = settings["side"]
    run = plain if side == "plain" else with_engine(side)
    run(queries[:32], bank[:32], 1)  # libraries loaded, self-test done
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    else:
        held = resident()
        forget_peak()
    seconds = []
    for _ in range(int(settings["repeats"]) + 1):
        start = time.perf_counter()
        scores = run(queries, bank, k)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    most = torch.cuda.max_memory_allocated() if on_gpu else peak()
    return {
        "seconds": statistics.median(seconds[1:]),
        "bytes": most - held,
        "sum": scores.double().sum().item(),
        "device": str(device),
    }


def in_own_process(settings: dict[str, str]) -> dict[str, float]:
    words = [f"{name}={value}" for name, value in settings.items()]
    done = subprocess.run([sys.executable, "-m", "benchmarks.search", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str]) -> int:
    settings = DEFAULTS | dict(word.split("=", 1) for word in words)
    unknown = sorted(set(settings) - set(DEFAULTS) - {"side"})
    if unknown:
        print(f"{unknown[0]}: unknown; known: {', '.join(DEFAULTS)}", file=sys.stderr)
        return 2
    if "side" in settings:
        print(json.dumps(measure(settings)))
        return 0
    engine = "faiss_gpu" if torch.cuda.is_available() else "faiss_cpu"
    print(f"{settings['queries']} queries of {settings['dim']} numbers; ratio = plain / side, higher is better")
    print(f"{'rows':>7} {'k':>4} {'side':<10} {'seconds':>9} {'MiB':>8} {'time x':>7} {'memory x':>9}  difference")
    for rows in settings["rows"].split(","):
        for k in ("1", settings["k"]):
            sides = {
                side: in_own_process(settings | {"rows": rows, "k": k, "side": side})
                for side in ("plain", engine, "torch")
            }
            base = sides["plain"]
            for side, found in sides.items():
                print(
                    f"{rows:>7} {k:>4} {side:<10} {found['seconds']:>9.4f} {found['bytes'] / 2**20:>8.1f} "
                    f"{base['seconds'] / found['seconds']:>7.2f} {base['bytes'] / max(found['bytes'], 1):>9.1f}  "
                    f"{abs(found['sum'] - base['sum']) / abs(base['sum']):.1e}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
