"""SlotCon (Wen et al., NeurIPS 2022): prototypes group pixels into slots, which agree between two crops of a picture.

K prototypes give every pixel of a crop a soft assignment, and the crop K slots, means of its pixels. A student learns,
at every place that two crops share, to assign as its slow teacher does in the other crop, and to find the teacher's
slot of the same prototype and picture among all slots of the batch. It trains a backbone, or a light head on frozen
features. The teacher's prototypes are the classifier, scored as val/own/*. Code: CVMI-Lab/SlotCon.

Here, and not as released: losses are float32 in mixed precision; the contrast is a mean over the anchors of all
processes, not of each (`method.contrast.mean`).
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError
from common.spec import Geometric, Meeting, Photometric, ViewSpec
from datamodules.base.transforms import both_sides
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.base.optim import cosine
from lightning_modules.representations.crops import crop_boxes, cut, shared_boxes
from losses.representations.slot_contrast import place_distillation, slot_contrast
from losses.self_distillation import moved_centre
from models.backbone import Features
from models.momentum import follow
from models.slots.prototypes import ProjectionMLP, PrototypeHead, Slots, cosines, group, winners
from retrieval import kmeans

CROPS = ("crop0", "crop1")
NEVER = -1e4
"""Score of a class without a prototype; finite, since enlarging takes no share of infinity."""
MOST_ENLARGED = 4
"""How many times larger than a training picture's shorter side a crop may be made."""
DRAWS = 11
"""Of the second crop: ten that have to meet the first one, then one that stands."""


class SlotCon(UnsupervisedSegmenter):
    """Codes = the teacher's projection, or its features. Trained: projector, prototypes, predictor and, unless it is
    frozen, the backbone, all of them as a student that the teacher follows."""

    title = "SlotCon"
    trains_backbone = None
    wants_features = False
    exports = "the momentum teacher"

    def build(self) -> None:
        settings = self.cfg.method
        self.refuse_padding()
        self.backbone.check_size(settings.crops.size, "method.crops.size")
        self.count = settings.prototypes or settings.num_clusters
        check_settings(self.count, settings, min(both_sides(self.cfg.data.train_size)))
        self.projects = settings.codes == "projected"
        self.code_dim = settings.dim if self.projects else self.backbone.dim
        self.student = None
        if not self.backbone.frozen:
            self.student = copy.deepcopy(self.backbone)
            self.backbone.requires_grad_(False)
        sizes = settings.head.hidden, settings.dim
        self.head = PrototypeHead(self.backbone.dim, *sizes, self.count, settings.head.norm)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.predictor = ProjectionMLP(settings.dim, *sizes, settings.head.norm)
        self.register_buffer("centre", torch.zeros(self.count))
        self.register_buffer("owner", torch.arange(self.count) % settings.num_clusters)
        self.register_buffer("grouped", torch.tensor(self.count == settings.num_clusters))

    def train(self, mode: bool = True) -> "SlotCon":
        """As usual, but the teacher's backbone is in training mode only inside `loss` (its batch norms see batches)."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def views(self) -> dict[str, ViewSpec]:
        """Two crops that share a part, each in colours of its own."""
        crops, augment = self.cfg.method.crops, self.cfg.method.augment
        jitter = {name: augment[name] for name in ("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p")}
        geometry = Geometric(size=crops.size, scale=tuple(crops.scale))
        meets = Meeting(CROPS[:1], crops.overlap, of_own=True, tries=DRAWS, whole=False)

        def colour(number: int) -> Photometric:
            blur = {"blur_p": augment.blur_p[number], "blur_kernel": augment.blur_kernel}
            return Photometric(**jitter, **blur, solarize_p=augment.solarize_p[number])

        return {CROPS[0]: ViewSpec(colour(0), geometry), CROPS[1]: ViewSpec(colour(1), geometry, meets=meets)}

    def param_groups(self) -> list[dict[str, Any]]:
        """Biases and norms (vectors) are not decayed."""
        parts = {"head": [*self.head.parameters(), *self.predictor.parameters()]}
        if self.student is not None:
            parts["backbone"] = [weight for weight in self.student.parameters() if weight.requires_grad]
        groups = []
        for name, weights in parts.items():
            groups.append({"name": name, "params": [weight for weight in weights if weight.dim() > 1]})
            vectors = [weight for weight in weights if weight.dim() <= 1]
            groups.append({"name": name, "params": vectors, "weight_decay": 0.0, "weight_decay_end": None})
        return [part for part in groups if part["params"]]

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """Both losses in both directions. The teacher moves between the student's pass and its own, the centre after
        its use; each crop is a pass of its own, since batch norms see one crop at a time."""
        settings = self.cfg.method
        images = [views[name] for name in CROPS]
        seen = [self._student_features(image) for image in images]
        learnt = [self._slots(self.head(maps), self.head.prototypes) for maps in seen]
        self._follow()
        with torch.no_grad():
            held = seen if self.student is None else [self._teacher_features(image) for image in images]
            projected = [self.teacher(maps) for maps in held]
            taught = [self._slots(maps, self.teacher.prototypes) for maps in projected]
        parts = {"grouping": self._grouping(learnt, taught, views), **self._contrast(learnt, taught)}
        scores = torch.cat([slots.scores for slots in taught]).movedim(1, -1)
        parts |= self._watched(scores)
        self.centre.copy_(moved_centre(self.centre, scores, settings.centre_momentum))
        weight = settings.grouping_weight
        total = weight * parts["grouping"] + (1 - weight) * parts["contrast"]
        codes = projected[0] if self.projects else held[0]
        return Loss(total, {name: value.detach() for name, value in parts.items()}, codes=codes, view=CROPS[0])

    def _student_features(self, images: Tensor) -> Tensor:
        if self.student is None:
            return self.backbone.features(images).concat()
        return self.student.features(images, grad=True).concat()

    def _teacher_features(self, images: Tensor) -> Tensor:
        self.backbone.train()
        features = self.backbone.features(images)
        self.backbone.eval()
        return features.concat()

    def _slots(self, maps: Tensor, prototypes: Tensor) -> Slots:
        return group(maps, prototypes, self.cfg.method.temperature.teacher)

    @torch.no_grad()
    def _follow(self) -> None:
        m = cosine(self.cfg.method.momentum, 1.0, self.global_step, self.total_steps)
        follow(self.teacher, self.head, m)
        if self.student is not None:
            follow(self.backbone, self.student, m)

    def _grouping(self, learnt: list[Slots], taught: list[Slots], views: dict[str, Any]) -> Tensor:
        """Each crop's student against the other crop's teacher, at the places that both show."""
        settings = self.cfg.method
        shared = shares(views)
        student, teacher = ([part(slots.scores, *where) for slots, where in zip(found, shared, strict=True)]
                            for found in (learnt, taught))  # fmt: skip
        temperatures = settings.temperature.student, settings.temperature.teacher
        return sum(place_distillation(student[own], teacher[1 - own], self.centre, *temperatures) for own in (0, 1))

    def _contrast(self, learnt: list[Slots], taught: list[Slots]) -> dict[str, Tensor]:
        settings, losses, counts = self.cfg.method.contrast, [], []
        for own in (0, 1):
            student, teacher = learnt[own], taught[1 - own]
            candidates = winners(teacher.scores) > 0
            anchors = (winners(student.scores) > 0) & candidates
            counts.append(anchors.float().sum(1).mean())
            per_rank = settings.mean == "rank"
            found = student.vectors, teacher.vectors, anchors, candidates
            losses.append(slot_contrast(*found, self.predictor, settings.temperature, self.reach, per_rank))
        return {"contrast": sum(losses), "anchors": sum(counts) / 2}

    @torch.no_grad()
    def _watched(self, scores: Tensor) -> dict[str, Tensor]:
        """Signs of collapse, of all processes, from the teacher's scores [...,K]: how many prototypes win a pixel, the
        entropy of the mean assignment and the mean entropy of assignments, as shares of log K."""
        rows = ((scores - self.centre) / self.cfg.method.temperature.teacher).softmax(-1).flatten(0, -2)
        won = torch.zeros_like(rows).scatter_(1, rows.argmax(1, keepdim=True), 1.0).sum(0)
        own = torch.special.entr(rows).sum(1).mean()
        won, mean = distributed.mean(torch.stack([won, rows.mean(0)]))
        most = math.log(max(2, self.count))
        return {
            "prototypes": (won > 0).float().sum(),
            "usage": torch.special.entr(mean).sum() / most,
            "entropy": own / most,
        }

    # ------------------------------------------------------------------ classes of its own

    def embed(self, features: Features) -> Tensor:
        maps = features.concat()
        return self.teacher(maps) if self.projects else maps

    def classify(self, codes: Tensor) -> Tensor:
        """The teacher's cosines over its temperature: [B,D,h,w] -> [B,K,h,w]. With more prototypes than classes, the
        best of each class."""
        maps = codes if self.projects else self.teacher(codes)
        scores = cosines(maps, self.teacher.prototypes) / self.cfg.method.temperature.teacher
        if self.count == self.cfg.method.num_clusters:
            return scores
        found = scores.new_full((len(scores), self.cfg.method.num_clusters, *scores.shape[2:]), NEVER)
        rows = self.owner[None, :, None, None].expand_as(scores)
        return found.scatter_reduce(1, rows, scores, "amax")

    @property
    def own_fitted(self) -> bool:
        return bool(self.grouped)

    @torch.no_grad()
    def fit_own(self) -> None:
        """Classes of more prototypes than that: spherical k-means over the teacher's prototypes."""
        settings, points = self.cfg.method, distributed.broadcast(self.teacher.prototypes)
        seed = chance.key(self.cfg.seed, "slotcon.own")
        found = kmeans.fit(points, settings.num_clusters, seed=seed, restarts=10)
        owner = cosines(points[..., None, None], found.centroids)[:, :, 0, 0].argmax(1)
        self.owner.copy_(distributed.broadcast(owner))
        self.grouped.fill_(True)

    def on_validation_epoch_start(self) -> None:
        if not self.own_fitted:
            with torch.inference_mode(False):
                self.fit_own()
        super().on_validation_epoch_start()

    def after_step(self) -> None:
        if self.count != self.cfg.method.num_clusters:
            self.grouped.fill_(False)  # prototypes have moved

    def offline_state(self) -> dict[str, Tensor]:
        own = {name: value for name, value in self.state_dict().items() if name in ("owner", "grouped")}
        return super().offline_state() | own


def shares(views: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Of each crop: the box [B,4] that it shares with the other one, x0, y0, x1, y1 in shares of its own (mirrored)
    sides, and whether it is mirrored, bool [B]."""
    boxes, mirrored = crop_boxes([views[f"{name}.params"] for name in CROPS])
    found = shared_boxes(boxes, boxes.new_ones(2, 2), mirrored)
    return [(found[:, own, 1 - own], mirrored[:, own]) for own in (0, 1)]


def part(scores: Tensor, box: Tensor, mirrored: Tensor) -> Tensor:
    """What maps [B,K,h,w] show in a box [B,4] of theirs (shares of their sides), mirrored back, on a grid of the same
    size; 0 in a box of negative extent."""
    height, width = scores.shape[-2:]
    cells = box * box.new_tensor([width, height, width, height])
    return cut(scores, cells[:, None], (height, width), mirrored[:, None])[:, 0]


def check_settings(prototypes: int, settings: Any, shorter: int) -> None:
    """Raises ConfigError for values that do not go together, and for crops that would be a blur of training pictures
    whose shorter side is so many px; what each may be stands in the method's yaml."""
    if settings.crops.size > MOST_ENLARGED * shorter:
        raise ConfigError(
            f"method.crops.size={settings.crops.size}: training pictures are {shorter} px (data.train_size), and a "
            f"crop of them would be enlarged more than {MOST_ENLARGED} times; set {MOST_ENLARGED * shorter} at most"
        )
    if prototypes < settings.num_clusters:
        raise ConfigError(
            f"method.prototypes={prototypes}: method.num_clusters={settings.num_clusters} classes need at least as "
            f"many; set method.prototypes={settings.num_clusters} or more, or null for exactly one each"
        )
