"""Self-distillation without labels: the cross entropies of DINO (pictures) and iBOT (masked patches).

A teacher's outputs are made into targets by centring and sharpening; the student has to predict them from other crops
of the picture, or from a crop with holes. Sources: DINO (ICCV 2021) sections 3.1 and 5.3; iBOT (ICLR 2022) section 3;
Sinkhorn-Knopp centring: SwAV (NeurIPS 2020), DINOv2 (2023) section 4. Everything is float32 inside.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed


def multi_crop_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean cross entropy H(targets_i, softmax(student_v / temperature)) over pictures and all pairs i != v.

    student: logits [V,B,K] of all views, the two that the teacher saw first. targets: probabilities [2,B,K], without
    gradient. There are 2 V - 2 pairs: each target meets every view but its own.
    """
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    targets = targets.detach().float()
    # H is linear in its target, so a view that meets both targets meets their sum: one product instead of two.
    pairs = torch.cat([targets.flip(0), targets.sum(0, keepdim=True).expand(len(student) - 2, -1, -1)])
    return -(pairs * log_p).sum() / (student.shape[1] * (2 * len(student) - 2))


def masked_patch_loss(student: Tensor, targets: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Cross entropy at masked patches: mean over the masked patches of a picture, then over all pictures.

    student [n,K] logits and targets [n,K] probabilities belong to the true cells of mask [B,h,w], in its order. A
    picture without a masked patch counts with 0, as in the release of iBOT.
    """
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    losses = -(targets.detach().float() * log_p).sum(-1)
    counts = mask.flatten(1).sum(1)
    shares = (1.0 / counts.clamp(min=1)).repeat_interleave(counts)
    return (losses * shares).sum() / len(mask)


def centred_targets(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """softmax((logits - centre) / temperature) [..., K]: the teacher's outputs, centred and sharpened."""
    return F.softmax((logits.detach().float() - centre) / temperature, dim=-1)


def moved_centre(centre: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """The centre [K] after a batch: momentum * centre + (1 - momentum) * mean of the rows [n,K] of all ranks.

    No row anywhere leaves it as it is.
    """
    rows = logits.detach().float().reshape(-1, logits.shape[-1])
    count = distributed.total(torch.tensor(float(len(rows)), device=rows.device))
    mean = distributed.total(rows.sum(0)) / count.clamp(min=1)
    return torch.where(count > 0, centre * momentum + mean * (1 - momentum), centre)


def centred_within(logits: Tensor, counts: Tensor) -> Tensor:
    """Teacher logits of patches [n,K] minus their mean over the own picture; `counts` [B] patches of each, in order.

    What all patches of a picture share (its light, its cast of colour) is then no part of the target.
    """
    rows = logits.detach().float()
    owner = torch.repeat_interleave(counts)
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, owner, rows)
    return rows - (sums / counts.clamp(min=1)[:, None])[owner]


def sinkhorn_targets(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets [n,K] under which every prototype gets an equal share of the rows of all ranks (Sinkhorn-Knopp).

    Takes the place of centring; ranks may hold different numbers of rows.
    """
    rows = logits.detach().float() / temperature
    if not distributed.active() and not len(rows):
        return rows
    highest = rows.max() if len(rows) else rows.new_tensor(-math.inf)
    q = (rows - distributed.gather(highest.reshape(1)).max()).exp()
    total_rows = distributed.total(torch.tensor(float(len(rows)), device=rows.device))
    q = q / distributed.total(q.sum())
    for _ in range(iterations):
        q = q / (distributed.total(q.sum(0)).clamp(min=1e-30) * q.shape[1])
        q = q / (q.sum(1, keepdim=True).clamp(min=1e-30) * total_rows)
    return q * total_rows


def entropies(targets: Tensor) -> tuple[Tensor, Tensor]:
    """(mean entropy of the rows, entropy of the mean row of all ranks) of targets [n,K], each as a share of log K.

    Ranks must hold the same n. The first is 1 where the teacher says nothing, the second near 0 where it says the same
    few things of every picture.
    """
    rows = targets.detach().float()
    mean = distributed.mean(rows.mean(0))
    own = -(rows * rows.clamp(min=1e-30).log()).sum(1).mean()
    joint = -(mean * mean.clamp(min=1e-30).log()).sum()
    return own / math.log(rows.shape[1]), joint / math.log(rows.shape[1])


def spread(features: Tensor) -> Tensor:
    """Standard deviation over the rows of L2-normalised features [n,D], times sqrt(D): 0 where all rows are equal."""
    unit = F.normalize(features.detach().float(), dim=1)
    return unit.std(0, correction=0).mean() * math.sqrt(features.shape[1])
