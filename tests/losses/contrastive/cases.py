"""Cases of the contrastive loss, and its formula written out densely."""

import torch
import torch.nn.functional as F

from losses.contrastive import ghp_contrastive


def scene(pictures=3, cells=12, dim=6, channels=8, pool=4, seed=0, dtype=torch.float64):
    """Smooth random rows with some positives, as the arguments of the loss."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows, width):
        return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)

    total = pictures * cells
    case = {
        "z": unit(total, dim),
        "z_mix": unit(total, dim),
        "f": unit(total, channels),
        "s_ema": unit(total, dim),
        "pool_ag": unit(pool, channels),
        "pool_sp": unit(pool, dim),
        "candidates": torch.rand(cells, total, generator=generator) < 0.3,
        "cells": cells,
    }
    case["threshold_ag"] = (case["f"] @ case["pool_ag"].T).amax(1)
    case["threshold_sp"] = (case["s_ema"] @ case["pool_sp"].T).amax(1)
    return case


way = "auto"
"""How the loss is computed where a test does not say."""


def call(case, **changes):
    names = ("z", "z_mix", "f", "s_ema", "threshold_ag", "threshold_sp")
    settings = {"cells": case["cells"], "candidates": case["candidates"], "temperature": 0.6, "lam": 0.4}
    settings |= {"contrast": way} | changes
    positional = [settings.pop(name, case[name]) for name in names]
    return ghp_contrastive(*positional, **settings)


def with_gradients(case, **changes):
    sides = [case[name].clone().requires_grad_() for name in ("z", "z_mix")]
    loss = call(case | {"z": sides[0], "z_mix": sides[1]}, **changes)
    loss.backward()
    return loss.detach(), *[side.grad for side in sides]


def formula(
    case, *, lam=0.4, temperature=0.6, reweighting=True, version=1, symmetric=True, candidates="case",
    denominator="agnostic",
):  # fmt: skip
    """The formula of the paper and its release, with N x N matrices and autograd (all anchors filled)."""
    total, cells = len(case["z"]), case["cells"]
    off_diagonal = ~torch.eye(total, dtype=torch.bool)

    def mask(rows, threshold):
        similarity = rows @ rows.T
        above = similarity > threshold[:, None]
        return (above | (similarity > threshold[None, :]) if symmetric else above) & off_diagonal

    ag, sp = mask(case["f"], case["threshold_ag"]), mask(case["s_ema"], case["threshold_sp"])
    chosen = case["candidates"] if candidates == "case" else torch.ones(cells, total, dtype=torch.bool)
    inside = (ag | chosen.repeat(total // cells, 1)) & off_diagonal
    inside = inside | sp if denominator == "positives" else inside
    sides = [case["z"].clone().requires_grad_(), case["z_mix"].clone().requires_grad_()]

    def mean_over_anchors(log_p, weights, kept):
        anchors = [i for i in range(total) if kept[i]]
        losses = []
        for picture in range(total // cells):
            own = [i for i in anchors if i // cells == picture]
            if not own:
                continue
            k = weights[own].sum(1)
            each = -(temperature / 0.07) * (weights[own] * log_p[own]).sum(1) / k
            losses.append((each * k / k.mean() if reweighting else each).mean())
        return sum(losses) if losses else sides[0].sum() * 0

    loss = 0
    for side in sides:
        scores = side @ side.T / temperature
        log_p = scores - torch.log((scores.exp() * inside).sum(1, keepdim=True))
        if version == 1:
            loss = loss + mean_over_anchors(log_p, ag.double() + lam * sp.double(), ag.any(1))
        else:
            loss = loss + mean_over_anchors(log_p, ag.double(), ag.any(1))
            loss = loss + lam * mean_over_anchors(log_p, sp.double(), sp.any(1))
    loss = loss / (2 * (total // cells))
    loss.backward()
    return loss.detach(), sides[0].grad, sides[1].grad


def assert_same(got, expected, rtol=1e-9, atol=1e-11):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=atol)


def no_positives(case, rows, candidates_too=False):
    """The case with nothing similar to the given rows; with empty denominators on request."""
    f, threshold, candidates = case["f"].clone(), case["threshold_ag"].clone(), case["candidates"].clone()
    f[rows] = 0.0
    threshold[rows] = 2.0
    threshold = threshold.clamp_min(1e-3)
    if candidates_too:
        candidates[rows] = False
    return case | {"f": f, "threshold_ag": threshold, "candidates": candidates}
