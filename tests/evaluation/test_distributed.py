"""Two real gloo processes against one: counts, usage, and the gradients of both probes."""

import pytest
import torch
import torch.distributed as dist

from evaluation.metrics import ClusterUsage, SegmentationScore
from evaluation.probes import ClusterProbe, LinearProbe
from tests.support.ranks import on_two_ranks

SHARES = ((slice(0, 2), slice(2, 3), slice(3, 5)), (slice(5, 6),))
"""Pictures of a set of six that each rank sees, batch by batch: uneven on purpose."""


def data():
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(5, (6, 8, 8), generator=generator)
    label = torch.randint(4, (6, 8, 8), generator=generator)
    label[label == 3] = 255
    label[5] = 255
    label[5, 0, :3] = 1  # rank 1 has few valid pixels, so a mean of means would be off
    codes = torch.randn(6, 7, 4, 4, generator=generator)
    return pred, label, codes


def measure(batches, training):
    """Everything that a rank computes, as plain numbers."""
    pred, label, codes = data()
    score, usage = SegmentationScore(5, 3), ClusterUsage(5)
    cluster, linear = ClusterProbe(7, 5, init="first_batch"), LinearProbe(7, 3)
    for batch in batches:
        score.update(pred[batch], label[batch])
        usage.update(cluster.scores(codes[batch]), codes[batch])
    result = {"miou": score.compute().miou, "counts": score.compute().counts, "usage": usage.compute()}
    loss = linear.loss(codes[training], label[training]) + cluster.loss(codes[training])
    loss.backward()
    result["clusters"] = cluster.clusters.detach()
    counting = ClusterProbe(7, 5, reseed=10)
    counting.loss(codes[training])
    result["wins"] = counting.wins
    result["grads"] = [p.grad for p in (*linear.parameters(), *cluster.parameters())]
    return result


def worker(rank):
    result = measure(SHARES[rank], slice(0, 3) if rank == 0 else slice(3, 6))
    for grad in result["grads"]:  # what DDP does
        dist.all_reduce(grad)
        grad /= 2
    return result


@pytest.mark.ddp
def test_two_processes_equal_one():
    one = measure(SHARES[0] + SHARES[1], slice(0, 6))
    for two in on_two_ranks(worker):
        assert two["counts"].tolist() == one["counts"].tolist()
        assert two["miou"] == one["miou"]
        assert two["usage"] == pytest.approx(one["usage"])
        assert torch.equal(two["clusters"], one["clusters"])
        assert two["wins"].tolist() == one["wins"].tolist()
        for a, b in zip(two["grads"], one["grads"], strict=True):
            assert torch.allclose(a, b, atol=1e-6)
