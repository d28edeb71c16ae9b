"""The losses of SlotCon: prototypes of a place agree between two crops, and slots find themselves in the other crop.

Source: SlotCon (NeurIPS 2022), sections 3.2 and 3.3. B pictures, K prototypes, D dimension. All float32 inside.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import EVERYONE, Reach
from common.precision import exact, real
from losses.self_distillation import centred_targets


def place_distillation(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean over places of the cross entropy between the teacher's and the student's prototypes there.

    student, teacher: cosines [n,K], or maps [B,K,h,w] of the same places. centre [K] is taken off the teacher's, which
    are detached.
    """
    targets = centred_targets(teacher.movedim(1, -1), centre.flatten(), teacher_temperature)
    predicted = F.log_softmax(real(student).movedim(1, -1) / student_temperature, dim=-1)
    return -(targets * predicted).sum(-1).mean()


def slot_contrast(
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    predictor: Callable[[Tensor], Tensor],
    temperature: float,
    reach: Reach = EVERYONE,
    per_rank: bool = False,
) -> Tensor:
    """Mean over anchors of the cross entropy by which a predicted slot finds that of the same picture and prototype,
    times twice the temperature.

    student, teacher: slots [B,K,D] of two crops; the teacher's are detached. anchors: bool [B,K], slots that both crops
    show. candidates: bool [B,K], slots that the teacher's crop shows, with every anchor among them; they are looked for
    among those of all pictures that are reached, so slots of one prototype in different pictures are kept apart.
    predictor: rows [n,D] -> [n,D]; it sees the anchors alone.

    The mean over ranks of what each returns is the mean over all anchors, or (`per_rank`, as released) that of the
    ranks' own means. Without an anchor it is 0, with a gradient of 0.
    """
    with torch.no_grad():
        keys, present = (
            reach.gather(F.normalize(real(teacher), dim=2)).flatten(0, 1),
            reach.gather(candidates).flatten(),
        )
        first = reach.rank() * anchors.numel()
        own = anchors.flatten().nonzero().squeeze(1)
        targets = present.cumsum(0)[first + own] - 1
        count = anchors.sum().float()
        if not per_rank:
            count = reach.summed(count) / reach.ranks()
    queries = real(predictor(real(student).flatten(0, 1)[own]))
    with exact(student.device):
        logits = F.normalize(queries, dim=1) @ keys[present].T / temperature
        found = F.cross_entropy(logits, targets, reduction="sum") if len(own) else logits.sum()
    return 2 * temperature * found / count.clamp(min=1.0 / reach.ranks())
