"""Leopart (Ziegler and Asano, CVPR 2022) trains a network's patches by clusters that crops of a picture agree on.

A teacher, the slow copy of network and head, assigns the patches of two large crops to prototypes, in equal shares
(Sinkhorn-Knopp over all devices and a queue of earlier patches). Every other crop of the picture has to predict these
assignments where both show the same part, after both maps were cut to it. With `attention.tokens` fg only places count
that the teacher's class token looks at. The trained network is the result: probes read its features, and the run
exports it. Code: MkuuWaUjinga/leopart. Its own ways are options: `teacher.head=own`, `queue.prototypes=student`,
`attention.tolerance=0`, `skipped=count`. Its queue is not in checkpoints, ours is.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common import chance, distributed
from common.errors import ConfigError
from common.spec import Photometric, ViewSpec
from grouping.attention_masks import attention_foreground
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.base.optim import cosine
from lightning_modules.dino import check_crops
from lightning_modules.representations.crops import GLOBALS, crop_boxes, cut, local_names, multi_crop, shared_boxes
from losses.representations import aligned_clusters as losses
from losses.self_distillation import entropies, sinkhorn_targets
from models.backbone import Backbone, Features
from models.class_token import pooled_path
from models.momentum import Momentum
from models.representations.prototype_head import PrototypeHead
from retrieval.memory import MemoryBank

log = logging.getLogger(__name__)

COLOURS = ("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p", "blur_p", "blur_kernel")
"""Keys of `method.augment`."""


class Leopart(UnsupervisedSegmenter):
    """Codes = the trained network's features at `backbone.levels`. Network, head and prototypes are trained."""

    title = "Leopart"
    trains_backbone = True
    exports = "the network after training"
    wants_features = False

    def build(self) -> None:
        settings = self.cfg.method
        check_settings(self.cfg, self.backbone)
        self.refuse_padding()
        self.code_dim = self.backbone.dim
        self.held = tuple(hold_all_but_last(self.backbone, settings.train_blocks))
        self.head = PrototypeHead(self.backbone.dim, settings.head.hidden, settings.head.dim, settings.prototypes)
        self.teacher = self.teacher_head = None
        if settings.teacher.enabled:
            self.teacher, self.teacher_head = Momentum(self.backbone), Momentum(self.head)
            if settings.teacher.head == "own":
                self.teacher_head.copy.reset()
        queue = settings.queue.size
        self.banks = nn.ModuleList(MemoryBank(queue, settings.head.dim) for _ in GLOBALS if queue)
        self.fresh: list[Tensor] = []
        self.masked = settings.attention.tokens != "all"
        self.by_class_token = looks_by_class_token(settings.attention.by, self.backbone)
        if self.masked and not self.by_class_token:
            log.info(
                f"method.attention.by={settings.attention.by}: {self.backbone.network} has no trained "
                "class token, so the lengths of the teacher's features stand for its attention"
            )

    def train(self, mode: bool = True) -> "Leopart":
        """As usual, but the teacher and blocks that are held stay in evaluation mode."""
        super().train(mode)
        for part in self.held:
            part.eval()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @property
    def view_names(self) -> tuple[str, ...]:
        """V crops, the large ones first."""
        return GLOBALS + local_names(self.cfg.method.crops.local_count)

    @property
    def views(self) -> dict[str, ViewSpec]:
        augment = self.cfg.method.augment
        return multi_crop(self.cfg.method.crops, Photometric(**{name: augment[name] for name in COLOURS}))

    def param_groups(self) -> list[dict[str, Any]]:
        """Of network and of head: what has two axes or more, positions and prototypes among it, and the rest, which is
        not decayed."""
        groups = []
        for name, part in (("backbone", self.backbone), ("head", self.head)):
            trained = [value for value in part.parameters() if value.requires_grad]
            groups.append({"name": name, "params": [value for value in trained if value.dim() > 1]})
            rest = [value for value in trained if value.dim() <= 1]
            groups.append({"name": name, "params": rest, "weight_decay": 0.0, "weight_decay_end": None})
        return [group for group in groups if group["params"]]

    def embed(self, features: Features) -> Tensor:
        return features.concat()

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """Cross entropy of all crops with the teacher's assignments of the large ones, where they show the same."""
        settings = self.cfg.method
        self.head.normalise()
        if self.teacher is not None:
            self.teacher_head.copy.normalise()
        large = torch.cat([views[name] for name in GLOBALS])
        seen = self.backbone.features(large, grad=True, attention=self.teacher is None and self._looks)
        codes = seen.concat()
        own = head_maps(self.head, codes)
        if self.teacher is None:
            told, assigned = seen, tuple(part.detach() for part in own)
        else:
            told = self.teacher(large, attention=self._looks)
            with torch.no_grad():
                assigned = head_maps(self.teacher_head.copy, told.concat())
        masks = self._masks(told).unflatten(0, (len(GLOBALS), -1)) if self.masked else None
        targets = self._assign(*(part.unflatten(0, (len(GLOBALS), -1)) for part in assigned), masks)

        logits = list(own[1].chunk(len(GLOBALS)))
        small = [views[name] for name in self.view_names[len(GLOBALS) :]]
        if small:
            found = self.backbone.features(torch.cat(small), grad=True)
            logits += head_maps(self.head, found.concat())[1].chunk(len(small))
        cells = self._cells(views, logits)
        rules = settings.cells, settings.temperature, masks, settings.attention.tolerance, settings.skipped
        total, counts = aligned_loss(targets, logits, cells, *rules)
        if self.teacher is not None:
            self._follow()
        parts = {"clusters": total.detach(), "pairs": (counts > 0).float().mean()}
        if masks is not None:
            parts["foreground"] = masks.float().mean()
        parts["entropy"], parts["usage"] = entropies(targets.movedim(2, -1).flatten(0, -2))
        return Loss(total, parts, codes=codes[: len(views[GLOBALS[0]])].detach(), view=GLOBALS[0])

    @property
    def _looks(self) -> bool:
        """Whether attention of the class token is wanted."""
        return self.masked and self.by_class_token

    def _cells(self, views: dict[str, Any], logits: Sequence[Tensor]) -> Tensor:
        """What each crop shares with each other, in cells of its own map: [B,V,V,4]."""
        boxes, mirrored = crop_boxes([views[f"{name}.params"] for name in self.view_names])
        sizes = torch.tensor([(part.shape[3], part.shape[2]) for part in logits], device=boxes.device)
        return shared_boxes(boxes, sizes, mirrored)

    def _masks(self, features: Features) -> Tensor:
        """Places that count, bool [2B,h,w]: what the teacher looks at most (fg), or the rest (bg)."""
        settings = self.cfg.method.attention
        if self.by_class_token:
            heads = features.attention[:, :, 0].softmax(-1)[:, :, features.prefix :]
            attention = heads.mean(1).unflatten(1, tuple(features.map.shape[-2:]))
        else:
            attention = pooled_path(features.concat()).patch_attention
        rules = {"sigma": settings.blur, "kernel": settings.kernel, "specks": settings.smallest - 1}
        found = attention_foreground(attention.detach(), settings.mass, **rules)
        return found if settings.tokens == "fg" else ~found

    @torch.no_grad()
    def _assign(self, codes: Tensor, logits: Tensor, masks: Tensor | None) -> Tensor:
        """Assignments [2,B,K,h,w] of codes [2,B,D,h,w] with logits [2,B,K,h,w] of the large crops, each crop by itself.

        `masks` bool [2,B,h,w], None for all: the places whose codes may enter the queue after this step.
        """
        settings, found = self.cfg.method, []
        self.fresh = []
        for number, (crop_codes, crop_logits) in enumerate(zip(codes, logits, strict=True)):
            rows = crop_logits.movedim(1, -1).flatten(0, 2)
            earlier = self._queued(number)
            shares = sinkhorn_targets(
                torch.cat([earlier, rows]), settings.sinkhorn.epsilon, settings.sinkhorn.iterations
            )[len(earlier) :]
            grid = crop_logits.shape[0], *crop_logits.shape[2:]
            found.append(shares.unflatten(0, grid).movedim(-1, 1))
            if self.banks:
                tokens = crop_codes.movedim(1, -1)
                self.fresh.append(
                    self._chosen(tokens.flatten(0, 2) if masks is None else tokens[masks[number]], number)
                )
        return torch.stack(found)

    def _queued(self, number: int) -> Tensor:
        """Logits of this rank's part of the codes in the queue of a large crop; no row until it is full."""
        by_student = self.teacher_head is None or self.cfg.method.queue.prototypes == "student"
        head = self.head if by_student else self.teacher_head.copy
        rows = self.banks[number].rows() if self.banks else head.prototypes[:0]
        full = len(self.banks) > 0 and len(rows) == self.banks[number].size
        rows = rows.tensor_split(distributed.world_size())[distributed.rank()] if full else rows[:0]
        return head.compare(rows)

    def _chosen(self, rows: Tensor, number: int) -> Tensor:
        """Random rows [n,D] of those of all ranks for the queue of a large crop, the part of this rank."""
        counts = distributed.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        pictures = self.cfg.data.batch_size
        wanted = min(self.cfg.method.queue.per_picture * pictures, self.banks[number].size)
        key = (self.cfg.seed, "leopart.queue", self.global_step, number)
        picked = queue_picks(sum(counts), wanted, *key).to(rows.device) - sum(counts[: distributed.rank()])
        return rows[picked[(picked >= 0) & (picked < len(rows))]].detach()

    def _follow(self) -> None:
        """Before the backward pass, so by the weights that this step was computed with."""
        settings = self.cfg.method.teacher
        m = cosine(settings.momentum, settings.momentum_end, self.global_step, self.total_steps)
        self.teacher.update(m)
        self.teacher_head.update(m)

    def after_step(self) -> None:
        for bank, rows in zip(self.banks, self.fresh, strict=True):
            bank.enqueue(rows.flip(0))  # of rows chosen in one step the last are the first to go, as in the release


def aligned_loss(
    targets: Tensor,
    logits: Sequence[Tensor],
    cells: Tensor,
    size: int,
    temperature: float,
    masks: Tensor | None = None,
    tolerance: float = 1e-5,
    skipped: str = "leave_out",
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and how many cells each pair of crops has that count, [2 (V - 1)].

    targets: assignments [2,B,K,h,w] of the large crops, no gradient. logits: a map [B,K,h,w] of each of V crops, the
    large ones first. cells: [B,V,V,4], what crop v shares with crop u in cells of v. size: R. masks: bool [2,B,h,w] of
    the large crops, None for all: a cell of a cut counts where it lies wholly inside, but for `tolerance`. skipped:
    losses.SKIPPED.
    """
    count = len(targets)
    predicted = torch.stack([cut(part, cells[:, view, :count], size) for view, part in enumerate(logits)], dim=1)
    terms, counts = [], []
    for number, assigned in enumerate(targets):
        others = [view for view in range(len(logits)) if view != number]
        boxes = cells[:, number, others]
        kept = None if masks is None else losses.inside(cut(masks[number][:, None].float(), boxes, size), tolerance)
        found = losses.pair_terms(cut(assigned, boxes, size), predicted[:, others, number], temperature, kept)
        terms.append(found[0])
        counts.append(found[1])
    means = [losses.mean_of_pairs(*pair, skipped) for pair in zip(terms, counts, strict=True)]
    return torch.stack(means).mean(), torch.cat(counts)


def head_maps(head: PrototypeHead, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B,D,h,w] and logits [B,K,h,w] of maps [B,C,h,w]."""
    grid = maps.shape[0], *maps.shape[2:]
    codes, logits = head(maps.movedim(1, -1).flatten(0, 2))
    return codes.unflatten(0, grid).movedim(-1, 1), logits.unflatten(0, grid).movedim(-1, 1)


def queue_picks(count: int, wanted: int, seed: int, purpose: str, step: int, number: int) -> Tensor:
    """Which of `count` rows enter a queue, int64 [n <= wanted]: without repetition, and from the last to the first, so
    that ranks write theirs in the order of one process."""
    order = torch.randperm(count, generator=chance.generator(seed, purpose, step, number))
    return order[:wanted].sort(descending=True).values


def looks_by_class_token(wanted: str, backbone: Backbone) -> bool:
    """Whether `method.attention.by` means the class token. Raises ConfigError where the network has none."""
    there = backbone.has_attention and backbone.prefix > 0
    if wanted == "class" and not there:
        raise ConfigError(
            f"method.attention.by=class: {backbone.network} has no class token that looks at patches; set "
            "method.attention.by=features, or method.attention.tokens=all"
        )
    return wanted == "class" or (wanted == "auto" and there and backbone.class_token)


def hold_all_but_last(backbone: Backbone, blocks: int | None) -> list[nn.Module]:
    """Take the gradients of all blocks of the network but the last `blocks` away, and of what comes before them; None
    leaves all as they are. What it holds. Blocks are those up to the last of `backbone.levels`; of a network that is no
    transformer, the parts that its timm model is made of, in order.

    Raises ConfigError for more blocks than there are.
    """
    if blocks is None:
        return []
    net = backbone.net
    if backbone.transformer:
        parts = list(net.blocks[: max(backbone.order) + 1])
    else:
        parts = [part for name, child in net.named_children() for part in (child if name == "blocks" else [child])]
        parts = [part for part in parts if any(True for _ in part.parameters())]
    if blocks > len(parts):
        raise ConfigError(
            f"method.train_blocks={blocks}: {backbone.network} has {len(parts)} blocks up to the last of "
            f"backbone.levels; set {len(parts)} at most, or null for the whole network"
        )
    trained = [*parts[len(parts) - blocks :], *([net.norm] if backbone.transformer else [])]
    last = {id(value) for part in trained for value in part.parameters()}
    for value in net.parameters():
        value.requires_grad_(value.requires_grad and id(value) in last)
    return parts[: len(parts) - blocks]


def check_settings(cfg: Any, backbone: Backbone) -> None:
    """Raises ConfigError for values that do not go with each other or the backbone; its yaml says what each may be."""
    settings = cfg.method
    for kind in ("global", "local"):
        backbone.check_size(settings.crops[f"{kind}_size"], f"method.crops.{kind}_size")
    check_crops(settings.crops, cfg.data.train_size)
