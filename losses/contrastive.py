"""Global hidden positives of HP (CVPR 2023): the positives of a patch in its batch, and the contrastive loss over them.

An anchor's positives are the patches that are more similar to it than any entry of a reference pool is. The released
code keeps about seven N x N float matrices for the backward pass. Here the loss and its gradient are computed in closed
form in one sweep over blocks of anchors: what stays are boolean masks of one picture's anchors and the N x D gradients.

Code: loss.py of hynnsk/HP. Rows of all [N,...] tensors are patches, picture by picture, `cells` a picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common import chance
from common.errors import ConfigError
from common.precision import real

BASE_TEMPERATURE = 0.07
"""Constant of the release: the loss is multiplied by temperature / BASE_TEMPERATURE."""

MIN_TEMPERATURE = 0.02
"""Below it exp(1 / temperature) leaves float32; unit rows need no subtraction of a maximum above it."""

VERSIONS = (1, 2, "2-fixed")
DENOMINATORS = ("agnostic", "positives")

_BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_BLOCKS = 3
"""Float blocks [anchors,N] that live at a time: weights, denominators, scores."""
_MIN_ANCHORS = 128
"""Anchors of a block at least: below it the products turn into memory traffic."""
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


@torch.no_grad()
def thresholds(features: Tensor, pool: Tensor) -> Tensor:
    """c_i = max_m <f_i, q_m> for unit rows features [N,C] and pool [M,C]; [N] float32, no gradient.

    Raises:
        ConfigError: the pool is empty.
    """
    if not len(pool):
        raise ConfigError("the reference pool is empty: fill it before the first training step")
    with torch.autocast(features.device.type, enabled=False):
        features = _full(features)
        pool = pool.to(features.dtype)
        height = _block_height(len(features), len(pool), features)
        scores = features.new_empty(height, len(pool))
        best = [torch.mm(part, pool.T, out=scores[: len(part)]).amax(1) for part in features.split(height)]
        return torch.cat(best)


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
        part.copy_(torch.rand(part.shape, generator=generator, device=device) < rho)
    return chosen


@torch.no_grad()
def positive_mask(features: Tensor, threshold: Tensor, rows: slice, *, symmetric: bool = True) -> Tensor:
    """A_ij of the anchors i in `rows` against all N, [rows,N] bool: <f_i,f_j> > c_i, or > c_j where `symmetric`.

    features [N,C] unit rows, threshold [N]. The comparison is strict, and a patch is no positive of itself.
    """
    count = rows.stop - rows.start
    mask = torch.empty(count, len(features), dtype=torch.bool, device=features.device)
    shape = _block_height(count, len(features), features), len(features)
    _fill_positives(mask, features, threshold, rows, symmetric, features.new_empty(shape), features.new_empty(shape))
    return mask


@torch.no_grad()
def denominator_mask(positives: Tensor, candidates: Tensor | None, start: int, out: Tensor | None = None) -> Tensor:
    """D_ij = (positive or random candidate) and j != i for one picture's anchors, whose first patch is row `start`.

    positives [N_p,N] bool; candidates [N_p,N] bool, None for all. [N_p,N] bool.
    """
    out = torch.empty_like(positives) if out is None else out
    if candidates is None:
        out.fill_(True)
    else:
        torch.logical_or(positives, candidates, out=out)
    out.diagonal(start).fill_(False)
    return out


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
        block_bytes: size of the float blocks in memory; the default suits the device. Changes rounding only.

    With TA off the TS positives take its place in anchors and denominators, and the loss is multiplied by lam (the
    first term of Phi_ag + lam * Phi_sp is gone). All but z and z_mix is detached. Computed in float32 (float64 for
    float64 z), also inside autocast.

    The sum over the given pictures is divided by 2 * count, or by count where z_mix is None.

    Raises:
        ConfigError: TA and TS both off, temperature below MIN_TEMPERATURE, an unknown version or denominator.
        ValueError: N is not a multiple of cells, features without thresholds, candidates of another shape.
    """
    _check(z, f, s_ema, threshold_ag, threshold_sp, cells, temperature, candidates, version, denominator)
    first, count = pictures if pictures is not None else (0, len(z) // cells)
    if version == 2:  # the released slip: both halves read z, and their mean is one of them
        z_mix = None
    if lam == 0 and f is not None:  # positives that weigh nothing need not be found
        s_ema = threshold_sp = None
    sides = 1 if z_mix is None else 2
    z = _full(z)
    plan = _Plan(
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
        return _Contrast.apply(z, z_mix, plan, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Plan:
    """The settings of one call."""

    kinds: list[tuple[Tensor, Tensor] | None]
    """Rows and threshold of TA and of TS; None where off."""
    candidates: Tensor | None
    cells: int
    pictures: range
    temperature: float
    lam: float
    factor: float
    """Of every anchor's weighted mean of log p: -tau / 0.07 over the number of terms."""
    joint: bool
    reweighting: bool
    symmetric: bool
    whole: bool
    """Whether TS positives are in the denominators beside TA positives."""
    guarded: bool
    block_bytes: int | None


@dataclass(frozen=True)
class _Picture:
    """What one picture's anchors need, whatever the codes."""

    start: int
    """Row of its first patch."""
    positives: list[tuple[Tensor, Tensor]]
    """A kind's mask [N_p,N] bool, and what each of its positives weighs for an anchor [N_p]."""
    denominators: Tensor
    """[N_p,N] bool."""
    mass: Tensor
    """Sum of an anchor's weights [N_p]; 0 for an anchor that is left out."""
    kept: Tensor
    """0-d int: how many anchors are kept."""


class _Contrast(torch.autograd.Function):
    """Loss and gradients in one sweep; the backward pass only scales what is there."""

    @staticmethod
    def forward(ctx, z: Tensor, z_mix: Tensor | None, plan: _Plan, recording: bool) -> Tensor:
        sides = [z] if z_mix is None else [z, z_mix]
        needed = [recording and need for need in ctx.needs_input_grad[: len(sides)]]
        grads = [torch.zeros_like(side) if need else None for side, need in zip(sides, needed, strict=True)]
        loss = torch.zeros((), dtype=torch.float64, device=z.device)
        sweep = _Sweep(z, plan)
        for number in plan.pictures:
            picture = sweep.picture(number)
            for part in _row_blocks(slice(0, plan.cells), sweep.height):
                sweep.enter(picture, part)
                for side, grad in zip(sides, grads, strict=True):
                    loss += sweep.add(side, grad)
            if not plan.guarded:
                loss += torch.where(picture.kept == 0, torch.nan, 0.0)
        ctx.save_for_backward(*grads)
        return loss.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad * scale for grad in ctx.saved_tensors]
        return *grads, *[None] * (4 - len(grads))


class _Sweep:
    """The steps of the sweep, and the memory they share: float blocks of some anchors, masks of a picture's anchors."""

    def __init__(self, z: Tensor, plan: _Plan):
        self.plan = plan
        self.height = _block_height(plan.cells, len(z), z, plan.block_bytes)
        self.blocks = [z.new_empty(self.height, len(z)) for _ in range(_BLOCKS)]
        self.bits = [torch.empty(plan.cells, len(z), dtype=torch.bool, device=z.device) for _ in range(3)]

    def picture(self, number: int) -> _Picture:
        """Masks and weights of the anchors of one picture."""
        plan, start = self.plan, number * self.plan.cells
        rows = slice(start, start + plan.cells)
        counts = [
            None if kind is None else _fill_positives(mask, *kind, rows, plan.symmetric, *self.blocks[:2])
            for kind, mask in zip(plan.kinds, self.bits[:2], strict=True)
        ]
        present = [i for i, kind in enumerate(plan.kinds) if kind is not None]
        denominators = denominator_mask(self.bits[present[0]], plan.candidates, start, out=self.bits[2])
        if plan.whole and len(present) == 2:
            denominators |= self.bits[1]
        shares, kept = self._shares(counts, denominators)
        mass = sum(counts[i] * shares[i] for i in present)
        return _Picture(start, [(self.bits[i], shares[i]) for i in present], denominators, mass, kept)

    def _shares(self, counts: list[Tensor | None], denominators: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """What one positive of each kind weighs for each anchor [N_p], and the number of kept anchors."""
        plan = self.plan
        ag, sp = counts
        if ag is None:
            share, kept = self._mean(sp, sp > 0)
            return [None, share * plan.lam], kept
        if sp is None:
            share, kept = self._mean(ag, ag > 0)
            return [share, None], kept
        if plan.joint:
            share, kept = self._mean(ag + plan.lam * sp, ag > 0)
            return [share, share * plan.lam], kept
        filled = denominators.any(1) if plan.guarded else torch.ones_like(sp, dtype=torch.bool)
        (first, kept), (second, kept_too) = self._mean(ag, ag > 0), self._mean(sp, (sp > 0) & filled)
        return [first, second * plan.lam], torch.minimum(kept, kept_too)

    def _mean(self, count: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Factor, 1 / k_i and the mean over kept anchors in one; with reweighting k_i cancels and one sum is left."""
        kept = keep.sum()
        whole = (count * keep).sum() if self.plan.reweighting else count * kept
        return torch.where(keep, self.plan.factor / whole, 0.0), kept

    def enter(self, picture: _Picture, part: slice) -> None:
        """Turn to a block of anchors of a picture: weights and denominators as floats."""
        weights, inside, spare = (block[: part.stop - part.start] for block in self.blocks)
        (first, share), *rest = picture.positives
        # Read as bytes: torch turns bytes into floats several times faster than booleans.
        weights.copy_(first[part].view(torch.uint8)).mul_(share[part, None])
        for mask, other in rest:
            weights.addcmul_(spare.copy_(mask[part].view(torch.uint8)), other[part, None])
        inside.copy_(picture.denominators[part].view(torch.uint8))
        self.weights, self.inside, self.scores = weights, inside, spare
        self.mass = picture.mass[part]
        self.rows = slice(picture.start + part.start, picture.start + part.stop)

    def add(self, side: Tensor, grad: Tensor | None) -> Tensor:
        """The share of the block's anchors in the loss, for one set of codes; gradients are added to `grad` [N,D].

        With s the scores over temperature, W the weights, k their sum and p the softmax over the denominators, the
        loss is sum(W s) - sum(k log Z) and its gradient towards s is W - k p.
        """
        anchors, scores = side[self.rows] / self.plan.temperature, self.scores
        torch.mm(anchors, side.T, out=scores)
        attracted = torch.dot(scores.view(-1), self.weights.view(-1)).double()
        total = scores.exp_().mul_(self.inside).sum(1)
        counted = self.mass != 0
        loss = attracted - torch.where(counted, self.mass * total.log(), 0.0).sum(dtype=torch.float64)
        if grad is not None:
            pull = -self.mass / total
            if self.plan.guarded:
                pull = torch.where(counted, pull, 0.0)
            torch.addcmul(self.weights, scores, pull[:, None], out=scores)
            grad.addmm_(scores.T, anchors)
            grad[self.rows].addmm_(scores, side, alpha=1.0 / self.plan.temperature)
        return loss


def _check(z, f, s_ema, threshold_ag, threshold_sp, cells, temperature, candidates, version, denominator) -> None:
    if f is None and s_ema is None:
        raise ConfigError("hidden positives: task-agnostic and task-specific positives are both off; switch one on")
    if temperature < MIN_TEMPERATURE:
        raise ConfigError(f"temperature = {temperature}: must be at least {MIN_TEMPERATURE}")
    if version not in VERSIONS:
        raise ConfigError(f"loss version = {version}: must be one of {', '.join(map(str, VERSIONS))}")
    if denominator not in DENOMINATORS:
        raise ConfigError(f"denominator = {denominator}: must be one of {', '.join(DENOMINATORS)}")
    if (f is None) != (threshold_ag is None) or (s_ema is None) != (threshold_sp is None):
        raise ValueError("features and their threshold must be given, or left out, together")
    if len(z) % cells:
        raise ValueError(f"{len(z)} rows are not a whole number of pictures of {cells} patches")
    if candidates is not None and candidates.shape != (cells, len(z)):
        raise ValueError(f"candidates of shape {tuple(candidates.shape)}, expected {(cells, len(z))}")


def _full(rows: Tensor) -> Tensor:
    return real(rows).contiguous()


def _fill_positives(
    mask: Tensor, features: Tensor, threshold: Tensor, rows: slice, symmetric: bool, scores: Tensor, limits: Tensor
) -> Tensor:
    """Write `positive_mask` into `mask` [rows,N] in blocks of the height of `scores` and `limits`; positives [rows]."""
    counts = []
    for part in _row_blocks(rows, len(scores)):
        own, anchors = threshold[part, None], features[part]
        block = torch.mm(anchors, features.T, out=scores[: len(anchors)])
        # Compared and counted as floats, which torch does several times faster than into booleans.
        block.gt_(torch.minimum(own, threshold, out=limits[: len(anchors)]) if symmetric else own)
        block.diagonal(part.start).fill_(0.0)
        counts.append(block.sum(1))
        mask[part.start - rows.start : part.stop - rows.start] = block
    return torch.cat(counts)


def _block_height(count: int, width: int, like: Tensor, block_bytes: int | None = None) -> int:
    """How many of `count` rows of `width` floats are worked on at a time; even parts of about the size asked for."""
    wanted = block_bytes or _BLOCK_BYTES.get(like.device.type, 1 << 30)
    fitting = wanted // (_BLOCKS * like.element_size() * width)
    height = max(1, fitting if block_bytes else max(fitting, _MIN_ANCHORS))
    return -(-count // -(-count // height))


def _row_blocks(rows: slice, height: int) -> Iterator[slice]:
    """Slices of at most `height` rows."""
    return (slice(first, min(first + height, rows.stop)) for first in range(rows.start, rows.stop, height))
