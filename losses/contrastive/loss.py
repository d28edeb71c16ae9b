"""The contrastive loss over global hidden positives: its arguments, its candidates, and which way it is computed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common import chance
from common.errors import ConfigError
from losses.contrastive.dense import dense_sweep
from losses.contrastive.pairs import Pairs
from losses.contrastive.plan import BASE_TEMPERATURE, DENOMINATORS, MIN_TEMPERATURE, VERSIONS, Plan
from losses.contrastive.positives import full
from losses.contrastive.sparse import all_pairs, sparse_sum
from losses.contrastive.work import affordable_pairs, told

CONTRASTS = ("auto", "dense", "sparse")

_DRAWS = 1 << 20


def lambda_schedule(iteration: int, warmup: int, maximum: int) -> float:
    """Weight of the task-specific positives: 0 up to and including step `warmup`, then linear, 1 at step `maximum`.

    Raises:
        ConfigError: asked for a step after a warm-up that is not shorter than the run.
    """
    if iteration <= warmup:
        return 0.0
    if maximum <= warmup:
        raise ConfigError(
            f"lambda schedule: warm-up of {warmup} steps in a run of {maximum} steps; the warm-up must be shorter"
        )
    return (iteration - warmup) / (maximum - warmup)


def random_candidates(
    seed: int, step: int, cells: int, total: int, rho: float, device: torch.device | str = "cpu", part: int = 0
) -> Tensor | None:
    """The random part of the denominators, [N_p,N] bool: entry (i, j) is u_ij < rho, one row pattern for all pictures.

    None stands for rho >= 1, where every patch is a candidate. Drawn in blocks on the device by (seed, step, part).
    """
    if rho >= 1:
        return None
    generator = chance.generator(seed, "candidates", step, *([part] if part else []), device=device)
    chosen = torch.empty(cells, total, dtype=torch.bool, device=device)
    for part in chosen.split(max(1, _DRAWS // total)):
        part.copy_(torch.rand(part.shape, generator=generator, device=device).lt_(rho))  # faster than into booleans
    return chosen


def ghp_contrastive(
    z: Tensor,
    z_mix: Tensor | None,
    f: Tensor | None,
    s_ema: Tensor | None,
    threshold_ag: Tensor | None,
    threshold_sp: Tensor | None,
    *,
    cells: int,
    temperature: float,
    lam: float,
    candidates: Tensor | None,
    reweighting: bool = True,
    version: int | str = 1,
    symmetric: bool = True,
    denominator: str = "agnostic",
    pictures: tuple[int, int] | None = None,
    guarded: bool = True,
    contrast: str = "auto",
    chosen: Callable[[str], None] | None = None,
    block_bytes: int | None = None,
) -> Tensor:
    """The contrastive loss over global hidden positives; a scalar.

    Args:
        z: [N,D] unit rows, projected codes. Gradient reaches them as anchors and as contrast.
        z_mix: the same of the codes mixed with their neighbours; None switches local positives off.
        f: [N,C] unit rows, features of the frozen backbone (task-agnostic positives); None switches TA off.
        s_ema: [N,D'] unit rows, codes of the momentum head (task-specific positives); None switches TS off.
        threshold_ag, threshold_sp: [N], see `thresholds`.
        cells: patches a picture, N_p = h*w; N is a multiple of it.
        lam: weight of the task-specific positives.
        candidates: [N_p,N] bool, see `random_candidates`; None means every patch is in the denominators.
        reweighting: an anchor counts in proportion to its number of positives within its picture.
        version: 1 is one weighted mean over both kinds of positives, of anchors that have a TA positive; 2 adds lam
            times a mean of its own for TS, and as released puts z in the place of z_mix; "2-fixed" does not.
        symmetric: a patch is a positive also where only the other's threshold is passed ("SA" in the ablation).
        denominator: what a positive is compared with beside the candidates. `agnostic`: the TA positives, as released.
            `positives`: those of both kinds, as the paper's formulas have it. A TS positive that is left out pulls
            without an end, and its weight raises the push on all that are in: see docs/methods/hidden_positives.md.
        pictures: (first, count), the pictures whose patches are this rank's anchors; None means all. The columns are
            always all N.
        guarded: anchors without positives, or with an empty denominator, are left out before the logarithm, and a
            picture without anchors adds 0. False is the release: such a picture gives a NaN loss, an empty
            denominator NaN gradients.
        contrast: `dense` computes all pairs of patches, `sparse` those that are positives or candidates, `auto` what
            counts less. Value and gradients differ by rounding. Ranks may go different ways.
        chosen: is told the way that was taken, `dense` or `sparse`, with its counted work, in one line.
        block_bytes: size of the blocks in memory; the default suits the device. Changes rounding only.

    With TA off the TS positives take its place in anchors and denominators, and the loss is multiplied by lam (the
    first term of Phi_ag + lam * Phi_sp is gone). All but z and z_mix is detached. Computed in float32 (float64 for
    float64 z), also inside autocast.

    The sum over the given pictures is divided by 2 * count, or by count where z_mix is None.

    Raises:
        ConfigError: TA and TS both off, temperature below MIN_TEMPERATURE, an unknown version, denominator or contrast.
        ValueError: N is not a multiple of cells, features without thresholds, candidates of another shape.
    """
    _check(z, f, s_ema, threshold_ag, threshold_sp, cells, temperature, candidates, version, denominator, contrast)
    first, count = pictures if pictures is not None else (0, len(z) // cells)
    if version == 2:  # the released slip: both halves read z, and their mean is one of them
        z_mix = None
    if lam == 0 and f is not None:  # positives that weigh nothing need not be found
        s_ema = threshold_sp = None
    sides = 1 if z_mix is None else 2
    z = full(z)
    plan = Plan(
        kinds=[
            None if rows is None else (rows.detach().to(z.dtype).contiguous(), threshold.detach().to(z.dtype))
            for rows, threshold in ((f, threshold_ag), (s_ema, threshold_sp))
        ],
        candidates=candidates,
        cells=cells,
        pictures=range(first, first + count),
        temperature=temperature,
        lam=lam,
        factor=-temperature / BASE_TEMPERATURE / (sides * count),
        joint=version == 1,
        reweighting=reweighting,
        symmetric=symmetric,
        whole=denominator == "positives",
        guarded=guarded,
        block_bytes=block_bytes,
    )
    with torch.autocast(z.device.type, enabled=False):
        z_mix = None if z_mix is None else z_mix.to(z.dtype).contiguous()
        pairs = _pairs(plan, z, sides, contrast)
        if chosen is not None:
            chosen(told(plan, z, sides, pairs))
        return _Contrast.apply(z, z_mix, plan, pairs, torch.is_grad_enabled())


def _pairs(plan: Plan, z: Tensor, sides: int, contrast: str) -> Pairs | None:
    """The positives of the sparse way; None where the dense sweep is to run."""
    if contrast == "dense":
        return None
    most = None if contrast == "sparse" else affordable_pairs(plan, z, sides)
    return all_pairs(plan, most) if most is None or most > 0 else None


class _Contrast(torch.autograd.Function):
    """Loss and gradients in one go; the backward pass only scales what is there."""

    @staticmethod
    def forward(ctx, z: Tensor, z_mix: Tensor | None, plan: Plan, pairs: Pairs | None, recording: bool) -> Tensor:
        sides = [z] if z_mix is None else [z, z_mix]
        needed = [recording and need for need in ctx.needs_input_grad[: len(sides)]]
        grads = [torch.zeros_like(side) if need else None for side, need in zip(sides, needed, strict=True)]
        loss = dense_sweep(sides, grads, plan) if pairs is None else sparse_sum(sides, grads, plan, pairs)
        ctx.save_for_backward(*grads)
        return loss.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad * scale for grad in ctx.saved_tensors]
        return *grads, *[None] * (5 - len(grads))


def _check(
    z, f, s_ema, threshold_ag, threshold_sp, cells, temperature, candidates, version, denominator, contrast
) -> None:
    if f is None and s_ema is None:
        raise ConfigError("hidden positives: task-agnostic and task-specific positives are both off; switch one on")
    if temperature < MIN_TEMPERATURE:
        raise ConfigError(f"temperature = {temperature}: must be at least {MIN_TEMPERATURE}")
    if version not in VERSIONS:
        raise ConfigError(f"loss version = {version}: must be one of {', '.join(map(str, VERSIONS))}")
    for name, value, known in (("denominator", denominator, DENOMINATORS), ("contrast", contrast, CONTRASTS)):
        if value not in known:
            raise ConfigError(f"{name} = {value}: must be one of {', '.join(known)}")
    if (f is None) != (threshold_ag is None) or (s_ema is None) != (threshold_sp is None):
        raise ValueError("features and their threshold must be given, or left out, together")
    if len(z) % cells:
        raise ValueError(f"{len(z)} rows are not a whole number of pictures of {cells} patches")
    if candidates is not None and candidates.shape != (cells, len(z)):
        raise ValueError(f"candidates of shape {tuple(candidates.shape)}, expected {(cells, len(z))}")
