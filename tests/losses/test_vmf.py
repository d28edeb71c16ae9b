"""vMF losses against their formulas written out densely in float64, gradient included."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError
from losses.vmf import vmf, vmf_nca


def scene(pixels=40, segments=12, memory=5, labels=4, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def unit(rows):
        return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)

    own = torch.randint(-1, segments, (pixels,), generator=generator)
    own[own == 3] = 2
    kinds = torch.randint(labels, (segments,), generator=generator)
    kinds[3], kinds[7] = -1, 99  # a row that is no segment, and a label of its own
    own[0] = 7
    return {
        "pixels": unit(pixels),
        "prototypes": unit(segments),
        "labels": kinds,
        "own": own,
        "memory": (unit(memory) * 3, torch.tensor([0, 1, -1, 99, 2][:memory])) if memory else None,
    }


def dense(case, kappa, kind):
    """Loss of every pixel, loops over pixels and segments."""
    bank, labels = case["prototypes"], case["labels"]
    if kind != "all" and case["memory"] is not None:
        bank = torch.cat([bank, F.normalize(case["memory"][0], dim=1)])
        labels = torch.cat([labels, case["memory"][1]])
    losses = []
    for pixel, own in zip(case["pixels"], case["own"].tolist(), strict=True):
        if own < 0:
            losses.append(pixel.sum() * 0)
            continue
        terms = (kappa * (bank @ pixel)).exp()
        rows = [s for s in range(len(bank)) if labels[s] >= 0]
        positives = [s for s in rows if labels[s] == labels[own] and s != own]
        others = [s for s in rows if labels[s] != labels[own]]
        if kind == "all":
            above, below = terms[own], terms[rows].sum()
        elif kind == "own" or not positives:
            above, below = terms[own], terms[own] + terms[others].sum()
        else:
            above, below = terms[positives].sum(), terms[positives].sum() + terms[others].sum()
        losses.append(below.log() - above.log())
    return torch.stack(losses)


def ours(case, kappa, kind, **settings):
    if kind == "all":
        return vmf(case["pixels"], case["prototypes"], case["own"], kappa, present=case["labels"] >= 0, **settings)
    rows = case["pixels"], case["prototypes"], case["labels"], case["own"], kappa
    return vmf_nca(*rows, memory=case["memory"], nca=kind == "nca", **settings)


def with_gradients(case, function):
    leaves = {name: case[name].clone().requires_grad_() for name in ("pixels", "prototypes")}
    loss = function(case | leaves)
    loss.backward()
    return loss.detach(), *[leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("kind", ["all", "nca", "own"])
@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize("block", [None, 1, 7 * 17 * 8])
def test_equals_the_plain_formula_with_its_gradients(kind, memory, block):
    case = scene(memory=memory)
    counted = case["own"] >= 0
    wanted = with_gradients(case, lambda c: dense(c, 10.0, kind)[counted].mean())
    found = with_gradients(case, lambda c: ours(c, 10.0, kind, block_bytes=block))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert wanted[2].abs().sum() > 0
    single = ours(case, 10.0, kind, reduction="none", block_bytes=block)
    torch.testing.assert_close(single, dense(case, 10.0, kind), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["all", "nca", "own"])
def test_float32_stays_near_where_the_own_segment_dominates(kind):
    """The released subtraction is off by up to 3e-3 there."""
    case = scene(seed=3)
    case["pixels"] = F.normalize(case["prototypes"][case["own"].clamp(min=0)] + 0.02 * case["pixels"], dim=1)
    counted = case["own"] >= 0
    wanted = with_gradients(case, lambda c: dense(c, 16.0, kind)[counted].mean())
    low = {name: value.float() if name in ("pixels", "prototypes") else value for name, value in case.items()}
    found = with_gradients(low, lambda c: ours(c, 16.0, kind))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=5e-6 * float(other.abs().max()))
    single = ours(low, 16.0, kind, reduction="none").double()
    torch.testing.assert_close(single, dense(case, 16.0, kind), rtol=1e-5, atol=1e-5)


def test_gradient_reaches_pixels_through_prototypes_and_never_the_memory():
    case = scene()
    pixels = case["pixels"].clone().requires_grad_()
    rows = case["memory"][0].clone().requires_grad_()
    own = case["own"].clamp(min=0)
    bank = F.normalize(torch.zeros(12, 6, dtype=torch.float64).index_add(0, own, pixels) + 1e-3, dim=1)
    vmf_nca(pixels, bank, case["labels"], own, 10.0, memory=(rows, case["memory"][1])).backward()
    alone = case["pixels"].clone().requires_grad_()
    vmf_nca(alone, bank.detach(), case["labels"], own, 10.0, memory=case["memory"]).backward()
    assert rows.grad is None
    assert not torch.allclose(pixels.grad, alone.grad)


def test_one_segment_and_nothing_at_all():
    pixels = scene()["pixels"][:5].float().requires_grad_()
    bank = scene()["prototypes"][:1].float().requires_grad_()
    for own, label in ((torch.zeros(5, dtype=torch.int64), 4), (torch.full((5,), -1), 4), (torch.full((5,), -1), -1)):
        losses = [
            vmf(pixels, bank, own, 10.0, present=torch.tensor([label >= 0])),
            vmf_nca(pixels, bank, torch.tensor([label]), own, 10.0),
            vmf_nca(pixels[:0], bank, torch.tensor([label]), own[:0], 10.0),
        ]
        for loss in losses:
            grads = torch.autograd.grad(loss, (pixels, bank))
            assert loss == 0
            assert all((grad == 0).all() for grad in grads)


def test_labels_of_any_size_are_told_apart():
    case = scene(memory=0)
    big = torch.where(case["labels"] < 0, -1, case["labels"] + 2**40)
    torch.testing.assert_close(ours(case | {"labels": big}, 10.0, "nca"), ours(case, 10.0, "nca"))


def test_pixels_times_segments_are_never_held():
    """Peak memory by torch's own count of what is allocated: blocks, and no n x S matrix."""
    pixels, segments = 3000, 1000
    case = scene(pixels=pixels, segments=segments, memory=0, labels=30)
    case = {name: value.float() if name in ("pixels", "prototypes") else value for name, value in case.items()}
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(value.untyped_storage().nbytes() for value in [result] if isinstance(value, torch.Tensor))
            return result

    with Largest():
        with_gradients(case, lambda c: ours(c, 10.0, "nca", block_bytes=1 << 18))
    assert 1 << 17 < max(sizes) <= 1 << 18 < pixels * segments


def test_wrong_settings_are_refused():
    case = scene(memory=0)
    with pytest.raises(ConfigError) as error:
        ours(case, 200.0, "all")
    assert str(error.value) == "kappa = 200.0: must be above 0 and at most 60"
    with pytest.raises(ValueError, match="reduction='sum'"):
        ours(case, 10.0, "nca", reduction="sum")
    with pytest.raises(ValueError, match=r"expected \[n,D\], \[S,D\], \[n\]"):
        vmf(case["pixels"], case["prototypes"][:, :3], case["own"], 10.0)
    with pytest.raises(ValueError, match="labels of shape"):
        vmf_nca(case["pixels"], case["prototypes"], case["labels"][:3], case["own"], 10.0)
