"""The three read-outs that every method is judged by: linear, online clusters, k-means.

All live at patch resolution and on detached codes; `evaluation/readout.py` takes their K score maps to label size.
Both trained probes are those of STEGO (Hamilton et al., ICLR 2022, released modules.py and train_segmentation.py; the
same in HP), with the loss made exact under DDP and the memory of the upsampled logits bounded.
"""

import math

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common import chance, distributed
from common.errors import CheckpointError, ConfigError, one_of
from common.precision import exact, real
from evaluation import readout
from retrieval import kmeans, whitening

LABEL_PROBES = ("linear", "linear_posthoc", "fcn", "retrieval")
"""Probes that learn from labels: they predict classes, all others clusters."""
UNLABELLED = ("cluster", "kmeans")

"""Probes that are scored without labels as well (`metrics.ClusterUsage`)."""
SEEDING_POINTS = 4096
"""Patches, over all ranks, that seeding of centroids looks at."""
COLUMNS = 4
"""Columns of a picture, at least, that these patches come from."""
STARTS, ITERATIONS = 10, 20
"""Of the k-means on the first batch. One start alone costs 2 to 3 points of mIoU on the scenes: a centroid that is
placed badly hardly moves in a few hundred steps."""


def predicts_clusters(probe: str) -> bool:
    """Whether a read-out (or the refined one of it, `_crf`) predicts clusters, which become classes by matching."""
    return probe.removesuffix("_crf") not in LABEL_PROBES


class LinearProbe(nn.Module):
    """One 1x1 convolution D -> C with bias, trained with labels; the network below never sees its gradient.

    mean: what the summed loss of the labelled pixels is divided by: the number of these (`labelled`), or of all pixels
    of the pictures (`all`, as PriMaPs releases it), so that a picture with few labels moves the probe little.
    """

    def __init__(self, dim: int, classes: int, seed: int = 0, mean: str = "labelled"):
        super().__init__()
        one_of("evaluation.linear_mean", mean, ("labelled", "all"))
        self.mean = mean
        with chance.library_draws(seed, "linear_probe"):
            self.classifier = nn.Conv2d(dim, classes, 1)

    def forward(self, codes: Tensor, constant: bool = False) -> Tensor:
        """Logits at patch resolution: [B,D,h,w] -> [B,C,h,w], float32 whatever autocast says. constant: the probe's
        own weights get no gradient."""
        weight, bias = self.classifier.weight.flatten(1), self.classifier.bias
        if constant:
            weight, bias = weight.detach(), bias.detach()
        with torch.autocast(codes.device.type, enabled=False):
            return readout.pointwise(codes.to(weight.dtype), weight) + bias[:, None, None]

    def loss(self, codes: Tensor, label: Tensor, valid: Tensor | None = None, *, leaks: bool = False) -> Tensor:
        """Cross-entropy of the upsampled logits, mean over the labelled pixels of the global batch (see `mean`).

        codes [B,D,h,w] (detached here; with `leaks`, for variants that train with labels, they alone get the gradient
        and the probe none); label int64 [B,H,W], pixels outside 0..C-1 are ignored; valid bool [B,H,W].
        Every rank's sum is divided by the number of those pixels of all ranks and multiplied by the number of ranks, so
        that DDP's mean of the gradients is the gradient of one process with the whole batch. 0 with a graph where no
        pixel is valid. A collective: all ranks must call it.
        """
        logits = self(codes, constant=True) if leaks else self(codes.detach())
        counted = (label >= 0) & (label < logits.shape[1])
        if valid is not None:
            counted &= valid
        seen = torch.ones_like(counted) if valid is None else valid
        pixels = distributed.total((counted if self.mean == "labelled" else seen).sum())
        summed = _UpsampledCrossEntropy.apply(logits, torch.where(counted, label, -1))
        return summed * (distributed.world_size() / pixels.clamp(min=1).to(summed.dtype))


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy over the pixels with a target >= 0, in blocks of pictures.

    The gradient, softmax less one-hot target, is taken block by block in the forward pass and kept at patch resolution,
    so neither the upsampled logits nor their log-softmax of a whole batch are ever held. Upsampling and its transpose
    are products with one matrix a side, on a CPU several times faster than torch's kernels and equal up to rounding.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        want = ctx.needs_input_grad[0]
        total, gradients = logits.new_zeros(()), []
        blocks = readout.picture_blocks(logits, target.shape[-2:])
        with exact(logits.device):
            sides = zip(logits.shape[-2:], target.shape[-2:], strict=True)
            rows, columns = (readout.upsampling(source, wanted, logits) for source, wanted in sides)
            for block, wanted in zip(blocks, target.split([len(part) for part in blocks]), strict=True):
                log_probs = readout.stretched(block, rows, columns).log_softmax(1)
                counted, wanted = (wanted >= 0).unsqueeze(1), wanted.clamp(min=0).unsqueeze(1)
                chosen = log_probs.gather(1, wanted)
                total -= torch.where(counted, chosen, 0.0).sum()
                if want:
                    slopes = log_probs.exp_().scatter_(1, wanted, chosen.expm1()).mul_(counted)
                    gradients.append(readout.stretched(slopes, rows.T, columns.T))
        if want:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.saved_tensors[0] * grad, None


class ClusterProbe(nn.Module):
    """K centroids [K,D] trained online by gradient: spherical k-means, one step a batch.

    init: `normal` draws the centroids from a standard normal (as released); `first_batch` starts with those of a
    spherical k-means on the codes of the first training batch, so that none starts where no code is.
    reseed: every that many calls of `loss`, clusters that won no patch since the last time are placed on codes of the
    current batch; 0 never (as released, where a dead cluster stays dead).
    All that it remembers is in the state dict.
    """

    def __init__(self, dim: int, k: int, seed: int = 0, init: str = "normal", reseed: int = 0):
        super().__init__()
        one_of("evaluation.cluster_init", init, ("normal", "first_batch"))
        if reseed < 0:
            raise ConfigError(f"evaluation.cluster_reseed={reseed}: expected 0 (never) or a number of steps")
        self.seed, self.reseed = seed, reseed
        self.clusters = nn.Parameter(torch.randn(k, dim, generator=chance.generator(seed, "cluster_probe")))
        self.register_buffer("placed", torch.tensor(init == "normal"))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("wins", torch.zeros(k, dtype=torch.int64))
        self._waiting = init == "first_batch" or reseed > 0

    def scores(self, codes: Tensor) -> Tensor:
        """Dot products of the codes as they are with unit centroids: [B,D,h,w] -> [B,K,h,w].

        Their arg max is that of the cosine, also after upsampling.
        """
        return readout.dot_products(codes, self.clusters)

    def cosines(self, codes: Tensor) -> Tensor:
        """Cosines of codes and centroids, -1..1: [B,D,h,w] -> [B,K,h,w]."""
        scores = self.scores(codes)
        norm = torch.linalg.vector_norm(codes.to(scores.dtype), dim=1, keepdim=True)
        return scores / norm.clamp(min=readout.EPS)

    def forward(self, codes: Tensor, alpha: float | None = None, log_probs: bool = False):
        """The released forward pass on codes [B,D,h,w], which are not detached here.

        Returns (loss, p [B,K,h,w]) with s the cosines, loss = -mean over patches of sum_k p_k s_k, and p the one-hot
        arg max of s (alpha None; it carries no gradient) or softmax(alpha s). With `log_probs`, log_softmax(alpha s)
        alone; raises ValueError when alpha is None then.
        """
        cosines = self.cosines(codes)
        if log_probs:
            if alpha is None:
                raise ValueError("log_probs needs alpha: the arg max has no log-probabilities")
            return (alpha * cosines).log_softmax(1)
        if alpha is None:
            best = cosines.detach().argmax(1, keepdim=True)
            return -cosines.gather(1, best).mean(), torch.zeros_like(cosines).scatter_(1, best, 1.0)
        probs = (alpha * cosines).softmax(1)
        return -(probs * cosines).sum(1).mean(), probs

    def loss(self, codes: Tensor) -> Tensor:
        """-mean over patches of the cosine to the winner: [B,D,h,w] -> scalar. Codes are detached.

        Only winning centroids get a gradient. With `init=first_batch` or `reseed`, a collective in training mode.
        """
        codes = codes.detach()
        fitted = self._place(codes) if self._waiting and self.training else False
        best = self.cosines(codes).max(1)
        if self.reseed and self.training:
            self.wins += distributed.total(best.indices.flatten().bincount(minlength=len(self.wins)))
        loss = -best.values.mean()
        # Centroids that were fitted to these very codes have no gradient but rounding, which Adam would make a step of.
        return loss.detach() + 0 * self.clusters.sum() if fitted else loss

    def log_probs(self, codes: Tensor, size: tuple[int, int], alpha: float = 2.0) -> Tensor:
        """Log-probabilities at label resolution, [B,D,h,w] -> [B,K,H,W]; see `readout.cluster_log_probs`."""
        return readout.cluster_log_probs(codes, self.clusters, size, alpha)

    @torch.no_grad()
    def initialise(self, codes: Tensor) -> None:
        """Replace all centroids by those of a spherical k-means on the codes [B,D,h,w] of all ranks, the best of
        STARTS; keyed, equal everywhere. With fewer codes than clusters they are codes, some of them twice."""
        points, k = seeding_points(codes), len(self.clusters)
        if len(points) < k:
            found = plus_plus(points, points.new_empty(0, points.shape[1]), k, self.seed, 0)
        else:
            found = kmeans.fit(points, k, seed=self.seed, iterations=ITERATIONS, restarts=STARTS).centroids
        self._write(torch.arange(k), found)
        self.placed.fill_(True)

    @torch.no_grad()
    def _place(self, codes: Tensor) -> bool:
        """Seed the centroids at the first call; after every `reseed` calls, place the dead ones anew. Returns whether
        all of them were fitted to these codes."""
        fitted = not self.placed
        if fitted:
            self.initialise(codes)
        if not self.reseed:
            self._waiting = False
            return fitted
        calls = int(self.calls)
        if calls and calls % self.reseed == 0:
            dead = (self.wins == 0).nonzero().flatten().cpu()
            if len(dead):
                alive = F.normalize(self.clusters[self.wins > 0].float(), dim=1).cpu()
                self._write(dead, plus_plus(seeding_points(codes), alive, len(dead), self.seed, calls))
            self.wins.zero_()
        self.calls += 1
        return fitted

    def _write(self, rows: Tensor, values: Tensor) -> None:
        values = distributed.broadcast(values.to(self.clusters))
        self.clusters[rows.to(self.clusters.device)] = values


def clusters_of(cfg: DictConfig, probe: str) -> int:
    """K of the probe `cluster` or `kmeans`, or of a method's own classes."""
    return (cfg.evaluation.kmeans.clusters if probe == "kmeans" else None) or cfg.method.num_clusters


def components_of(cfg: DictConfig, dim: int) -> int | None:
    """R of the k-means probe, None where codes of D numbers are clustered as they are. Raises ConfigError."""
    settings = cfg.evaluation.kmeans
    if settings.reduce == "none":
        return None
    if settings.components > dim:
        raise ConfigError(
            f"evaluation.kmeans.components={settings.components}: the codes have {dim} channels; set {dim} at most, or "
            "evaluation.kmeans.reduce=none"
        )
    return settings.components


class KMeansProbe(nn.Module):
    """Centroids of an offline spherical k-means [K,D], kept with the run once fitted.

    components: R, the principal directions that codes are reduced to before (`evaluation.kmeans.reduce`); then the
    centroids are [K,R], and the map to them, a mean [D] and axes [R,D], is kept beside them. None: codes as they are.
    """

    def __init__(self, dim: int, k: int, components: int | None = None):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(k, components or dim))
        self.register_buffer("fitted", torch.tensor(False))
        self.reduces = components is not None
        if self.reduces:
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("axes", torch.zeros(components, dim))

    @torch.no_grad()
    def fit_axes(self, codes: Tensor, whiten: bool) -> None:
        """The mean and the principal directions of unit codes [n,D] of all ranks; whiten: each divided by the standard
        deviation along it. A collective."""
        mean, axes = whitening.principal_of_all_ranks(codes, len(self.axes), whiten)
        self.mean.copy_(distributed.broadcast(mean))
        self.axes.copy_(distributed.broadcast(axes))  # signs of eigenvectors are each machine's own

    def reduced(self, codes: Tensor) -> Tensor:
        """What k-means sees of codes [B,D,h,w]: [B,R,h,w], of the codes' own length, so that products with unit
        centroids divided by it are cosines; the codes themselves where nothing is reduced."""
        if not self.reduces:
            return codes
        with exact(codes.device):
            codes = real(codes)
            length = torch.linalg.vector_norm(codes, dim=1, keepdim=True).clamp(min=readout.EPS)
            along = readout.pointwise(codes / length - self.mean[:, None, None], self.axes)
            return F.normalize(along, dim=1, eps=readout.EPS) * length

    @torch.no_grad()
    def set(self, centroids: Tensor) -> None:
        """Take fitted centroids [K,D]. Raises ValueError for another shape or values that are not finite."""
        if centroids.shape != self.centroids.shape:
            raise ValueError(
                f"k-means probe: expected centroids {tuple(self.centroids.shape)}, got {tuple(centroids.shape)}"
            )
        if not torch.isfinite(centroids).all():
            raise ValueError("k-means probe: the centroids hold values that are not finite")
        self.centroids.copy_(centroids)
        self.fitted.fill_(True)

    def scores(self, codes: Tensor) -> Tensor:
        """Dot products of codes, reduced where asked, with unit centroids: [B,D,h,w] -> [B,K,h,w]. Raises
        CheckpointError before `set`."""
        self._expect_fitted()
        return readout.dot_products(self.reduced(codes), self.centroids)

    def log_probs(self, codes: Tensor, size: tuple[int, int], alpha: float = 2.0) -> Tensor:
        """As `ClusterProbe.log_probs`. Raises CheckpointError before `set`."""
        self._expect_fitted()
        return readout.cluster_log_probs(self.reduced(codes), self.centroids, size, alpha)

    def _expect_fitted(self) -> None:
        if not self.fitted:
            raise CheckpointError(
                "probe=kmeans: its centroids are fitted when a run ends, and this checkpoint was written before; "
                "use a finished run or probe=cluster"
            )


def seeding_points(codes: Tensor) -> Tensor:
    """Unit codes of evenly spaced patches of all ranks' pictures, [n,D] on the CPU, at most about SEEDING_POINTS."""
    patches = F.normalize(codes.detach().float().flatten(2), dim=1).transpose(1, 2)
    pictures, width = patches.shape[0] * distributed.world_size(), codes.shape[3]
    step = max(1, -(-pictures * patches.shape[1] // SEEDING_POINTS))
    while width // math.gcd(step, width) < min(width, COLUMNS):  # else each row gives the same one or two columns
        step += 1
    return distributed.gather_uneven(patches[:, step // 2 :: step].flatten(0, 1)).cpu()


def plus_plus(points: Tensor, chosen: Tensor, k: int, seed: int, step: int) -> Tensor:
    """k further seeds among unit points [n,D], given the unit centroids that stand already [m,D] -> [k,D].

    Each is drawn with probability proportional to 1 - (highest cosine to a centroid so far), k-means++ on the sphere
    (Arthur and Vassilvitskii 2007). With fewer distinct points than seeds the rest are repeats.
    """
    generator = chance.numpy_generator(seed, "cluster_probe.seeding", step)
    nearest = (points @ chosen.T).amax(1) if len(chosen) else torch.zeros(len(points))
    seeds = []
    for _ in range(k):
        share = (1 - nearest).clamp(min=0).double().cumsum(0)
        if share[-1] <= 0:
            share = torch.ones(len(points), dtype=torch.float64).cumsum(0)
        place = torch.searchsorted(share, float(generator.random()) * share[-1], right=True)
        seeds.append(points[place.clamp(max=len(points) - 1)])
        nearest = torch.maximum(nearest, points @ seeds[-1]) if len(seeds) > 1 or len(chosen) else points @ seeds[-1]
    return torch.stack(seeds)
