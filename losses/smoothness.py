"""The energy of SmooSeg (NeurIPS 2023): patches with near features get one label, within a picture and across two.

A pair of patches has the energy (F - b) * D, with F the (centred) cosine of their features, b a shift, and D one minus
the cosine of their soft labels. Nothing in it is clamped, so its mean over all pairs of two pictures is made of sums
over each picture, without a matrix of pairs (`smoothness`): with unit features f, unit labels p of the first picture
and g, q of the second, r_i the mean of F over the second's patches, m the mean of all r_i,

    mean = (m - b) - [<sum f p', sum g q'> - <sum r p, sum q> + (m - b) <sum p, sum q>] / (N_f N_g).

`pair_energy` is the plain form. Shapes: K clusters; all else as in common/spec.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed
from common.precision import exact, real
from losses.correspondence import EPS, cosines, same, signal

KINDS = ("within", "across")
"""A picture with itself, and with its partner."""


@dataclass(frozen=True)
class Sums:
    """What the energy needs of each picture, whatever it is paired with."""

    joint: Tensor
    """Sum over patches of feature times label, [B,C,K]."""
    features: Tensor
    """Sum of unit features, [B,C]; no gradient."""
    labels: Tensor
    """Sum of unit soft labels, [B,K]."""

    def of(self, pictures: Tensor) -> "Sums":
        """Those of pictures int64 [B]."""
        return Sums(self.joint[pictures], self.features[pictures], self.labels[pictures])

    def gathered(self, reach: distributed.Reach) -> "Sums":
        """Those of the pictures of all ranks that are reached; gradient flows back to the rank of a picture."""
        joint, labels = (reach.gather(part, grad=True) for part in (self.joint, self.labels))
        return Sums(joint, reach.gather(self.features), labels)


@dataclass(frozen=True)
class Smoothness:
    """Mean energies and mean discontinuities D by kind (`within`, `across`), and the shifts that held."""

    energies: dict[str, Tensor]
    discontinuities: dict[str, Tensor]
    shifts: dict[str, Tensor | float]


def smoothness(
    features: Tensor,
    labels: Tensor,
    partners: Tensor,
    shifts: dict[str, float | None],
    *,
    pointwise: bool = True,
    reach: distributed.Reach = distributed.EVERYONE,
    average: Callable[[Tensor], Tensor] = same,
    shift_of: Callable[[str, Tensor], Tensor] | None = None,
    places: Tensor | None = None,
) -> Smoothness:
    """Both mean energies of a batch, in time and memory linear in the number of patches; a collective.

    Args:
        features: what says how near two patches are, [B,C,h,w]; a constant.
        labels: soft labels, [B,K,h,w], at least 0. Gradient reaches both sides of a pair.
        partners: int64 [B], the picture that each of these is compared with, among those of all ranks.
        shifts: b of `within` and `across`; None: given by `shift_of`.
        pointwise: F is centred over the second picture's patches for every patch of the first, then the mean of the
            whole batch is added back.
        reach: whose pictures may be partners.
        average: turns this rank's mean into that of all ranks; a collective under several.
        shift_of: gives the shift of a kind from its F at the `places`, [B,S,S].
        places: int64 [S], the patches at which `shift_of` looks at F.
    """
    with exact(features.device):
        unit = F.normalize(real(features.detach()), dim=1, eps=EPS).flatten(2)
        soft = F.normalize(real(labels), dim=1, eps=EPS).flatten(2)
        own = Sums(torch.bmm(unit, soft.mT), unit.sum(2), soft.sum(2))
        others = {"within": own, "across": own.gathered(reach).of(partners)}
        looked = None if places is None else unit[:, :, places]
        energies, discontinuities, held = {}, {}, {}
        for kind, other in others.items():
            means = torch.bmm(other.features[:, None], unit)[:, 0] / unit.shape[2]
            centre = average(means.mean())
            given = shifts[kind]
            if given is None:
                theirs = looked if kind == "within" else reach.gather(looked)[partners]
                pairs = torch.bmm(looked.mT, theirs)
                given = shift_of(kind, pairs - means[:, places, None] + centre if pointwise else pairs)
            held[kind] = given
            energies[kind], discontinuities[kind] = _mean(own, other, soft, means, centre, given, pointwise)
        return Smoothness(energies, discontinuities, held)


def _mean(
    own: Sums, other: Sums, soft: Tensor, means: Tensor, centre: Tensor, shift: float | Tensor, pointwise: bool
) -> tuple[Tensor, Tensor]:
    """Mean energy and mean discontinuity of the pairs of `own` and `other`; means [B,N] are the r of the module."""
    pairs = soft.shape[2] ** 2
    alike = (own.joint * other.joint).sum((1, 2))
    overlap = (own.labels * other.labels).sum(1)
    if pointwise:
        alike = alike - (torch.bmm(soft, means[:, :, None])[:, :, 0] * other.labels).sum(1)
        offset = centre - shift
        energy = offset - (alike + offset * overlap).mean() / pairs
    else:
        energy = means.mean() - shift - (alike - shift * overlap).mean() / pairs
    return energy, 1 - overlap.detach().mean() / pairs


def soft_labels(cosines: Tensor, temperature: float) -> Tensor:
    """softmax over K of cosines [B,K,h,w] / temperature, float32."""
    return (real(cosines) / temperature).softmax(1)


def pair_energy(
    features: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], shift: float, pointwise: bool = True
) -> tuple[Tensor, Tensor]:
    """The plain form: energy and discontinuity D of every pair of patches, both [B,h,w,i,j].

    features, labels: of the first and of the second picture, [B,C,h,w] and [B,C,i,j], [B,K,h,w] and [B,K,i,j].
    Gradient reaches the labels only.
    """
    discontinuity = 1 - cosines(*labels)
    return (signal(*features, pointwise) - shift) * discontinuity, discontinuity


def data_term(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of the student's cosines [B,K,h,w], as logits, against the teacher's arg max.

    No gradient reaches the teacher's cosines. Bounded logits keep it above 0.
    """
    return F.cross_entropy(real(student), teacher.argmax(1))
