"""`python -m retrieval.selftest`: does faiss work beside torch here? For a child process, since a clash may end it.

Imports torch, then faiss, and runs a 16 x 8 search and a small k-means on the CPU and on every GPU, compared with
torch. One line an engine, `<engine> <device>: ok` or `<engine> <device>: failed: <reason>`; exit code 1 if one failed.
"""

import logging
import sys
from collections.abc import Iterator

import torch

from common import chance
from retrieval import kmeans, search


def lines() -> Iterator[tuple[str, str]]:
    """(engine and device, "" or what is wrong), one by one."""
    faiss, reason = search.load_faiss()
    yield "torch cpu", check("torch", torch.device("cpu"))
    yield "faiss_cpu cpu", reason or check("faiss_cpu", torch.device("cpu"))
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        yield f"torch {device}", check("torch", device)
        if faiss is not None and (not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() <= number):
            reason = "this faiss does not see it (faiss-cpu, or a build for another CUDA); torch searches there instead"
        yield f"faiss_gpu {device}", reason or check("faiss_gpu", device)


def check(engine: str, device: torch.device) -> str:
    """Search, then three clusters that no run may miss; "" or what is wrong. Never raises."""
    reason = search.self_test(engine, device)
    if reason:
        return f"search: {reason}"
    generator = chance.generator(0, "retrieval/self-test")
    centres = 10 * torch.eye(3, 8)
    points = (centres.repeat_interleave(20, dim=0) + torch.rand(60, 8, generator=generator)).to(device)
    truth = torch.arange(3, device=device).repeat_interleave(20)
    try:
        for spherical in (True, False):
            found = kmeans.fit(points, 3, spherical=spherical, iterations=10, backend=engine)
            ids = kmeans.assign(points, found.centroids, spherical, backend=engine)
            if len(torch.stack([truth, ids]).unique(dim=1).T) != 3:
                return f"k-means (spherical {spherical}) did not find three plain clusters"
            means = torch.stack([_rows(points, spherical)[ids == i].mean(dim=0) for i in range(3)])
            error = (_rows(means, spherical) - found.centroids).abs().max().item()
            if not error < 1e-4:
                return f"k-means (spherical {spherical}): centroids are off by {error:.1e}"
    except Exception as error:
        return f"k-means: {type(error).__name__}: {str(error).strip() or 'without a message'}"
    return ""


def _rows(points: torch.Tensor, spherical: bool) -> torch.Tensor:
    return torch.nn.functional.normalize(points, dim=1) if spherical else points


def main() -> int:
    """Writes the lines; the exit code."""
    failed = False
    for name, reason in lines():
        failed |= bool(reason)
        sys.stdout.write(f"{name}: {'failed: ' + ' '.join(reason.split()) if reason else 'ok'}\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
