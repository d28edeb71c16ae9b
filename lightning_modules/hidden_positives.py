"""Hidden Positives (Seong et al., CVPR 2023): a contrastive loss whose positives are found in pools of patches.

A light head on frozen features is trained by a contrastive loss over patches. The positives of a patch are other
patches of the batch that are more similar to it than every entry of a reference pool: task-agnostic ones by the frozen
features, task-specific ones by a momentum copy of the head, whose weight lambda grows from 0 to 1. The same loss on
codes mixed with their attentive neighbours sends gradient to neighbours (local hidden positives).
"""

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from common.spec import Photometric, ViewSpec
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.base.relations import Place, Relation, Seen, cell, stacked
from lightning_modules.families import head_start
from losses.consistency import consistency
from losses.contrastive import (
    ghp_contrastive,
    lambda_schedule,
    positive_mask,
    random_candidates,
    thresholds,
)
from losses.local_positives import affinity_weights, attention_weights, neighbour_mix, neighbourhood
from models.backbone import Features
from models.heads import ProjectionHead, SegmentationHead, channel_masks, drop_channels, own_channel_masks, patch_rows
from models.momentum import Momentum
from retrieval.memory import ReferencePool, collect, random_positions

VERSIONS = {"1": 1, "2": 2, "2-fixed": "2-fixed"}
"""Values of method.loss_version and what the loss calls them."""

OF = {"agnostic": "features of the frozen backbone", "specific": "codes of the momentum head"}
"""What each kind of positives compares."""
NO_POOL = "The pools of this checkpoint are empty (it was imported, or saved before the first step): no thresholds."
DRAWN = (
    "In training the other patches are those of the batch, with channel dropout as here. The pool sets the thresholds "
    "and cannot be shown: it holds vectors, no pictures."
)

log = logging.getLogger(__name__)


class HiddenPositives(UnsupervisedSegmenter):
    """Codes s = head(features); probes read s. Only the head and the projection are trained."""

    title = "Hidden Positives"

    def build(self) -> None:
        settings = self.cfg.method
        check_settings(settings, self.backbone)
        self.refuse_padding()
        self.code_dim = settings.dim
        self.head = SegmentationHead(self.backbone.dim, settings.dim)
        self.momentum_head = Momentum(self.head)
        self.projection = ProjectionHead(settings.dim)
        size = settings.pool.size
        self.pool_size = self._pool_for_the_batch() if size is None else size
        self.pool = ReferencePool(self.pool_size, self.backbone.dim, settings.dim, settings.pool.half)
        attention = settings.lhp.attention
        self.wants_attention = settings.lhp.enabled and (
            attention == "backbone" or (attention == "auto" and self.backbone.has_attention)
        )
        self._said: set[str] = set()
        if settings.lhp.enabled and attention == "auto" and not self.wants_attention:
            log.info("local positives take an affinity of the features: this network has no attention")

    def _pool_for_the_batch(self) -> int:
        """An eighth of a step's patches, up to a power of two.

        A patch is a positive where it is nearer than all of a pool, so among N patches of other pictures about N / M
        are: eight to sixteen. Those of an anchor's own picture are nearer, and share the draws of its dropout: on the
        scenes some fifty more. See docs/methods/hidden_positives.md for other sizes.
        """
        sides = self.cfg.data.train_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        stride = min(self.backbone.strides)
        patches = self.cfg.data.batch_size * -(-height // stride) * -(-width // stride)
        return 2 ** max(7, math.ceil(math.log2(patches / 8)))

    @property
    def views(self) -> dict[str, ViewSpec]:
        augment = self.cfg.method.augment
        return {"augmented": ViewSpec(photometric=Photometric(**augment))} if self.cfg.method.alpha > 0 else {}

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"name": "head", "params": self.head.parameters()},
            {"name": "projection", "params": self.projection.parameters()},
        ]

    def embed(self, features: Features) -> Tensor:
        return self.head(features.concat())

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """Contrast over hidden positives. Codes of the step go to the probes as they are, with the head's dropout."""
        settings, step = self.cfg.method, self.global_step
        frozen = features.concat()
        self._renew_pool(step)
        codes = self.head(frozen, self._head_masks("head", frozen))
        lam = lambda_schedule(step, settings.lambda_warmup, self.total_steps)
        kinds = settings.positives
        # Beside the other kind those of weight 0 change nothing, so nothing is computed for them.
        counts = kinds.specific and (lam > 0 or not kinds.agnostic)
        momentum_codes = self._momentum_codes(frozen) if counts else None
        self.momentum_head.update(settings.ema)

        z = self.projection(codes)
        parts: dict[str, Any] = {"lambda": lam}
        total = parts["contrastive"] = self._contrastive(features, frozen, codes, momentum_codes, z, lam)
        if settings.alpha > 0:
            augmented = self.backbone.features(views["augmented"]).concat()
            z_augmented = self.projection(self.head(augmented, self._head_masks("augmented", augmented)))
            parts["consistency"] = consistency(z, z_augmented)
            total = total + settings.alpha * parts["consistency"]
        # Last, so that no patch of this batch meets its own entry in a pool.
        self.pool.observe(frozen, self._positions("hp.ring", step, frozen))
        return Loss(total, {name: torch.as_tensor(value).detach() for name, value in parts.items()}, codes=codes)

    def _contrastive(
        self, features: Features, frozen: Tensor, codes: Tensor, momentum_codes: Tensor | None, z: Tensor, lam: float
    ) -> Tensor:
        settings = self.cfg.method
        z_mix = None
        if settings.lhp.enabled:
            mixed = neighbour_mix(codes, self._neighbour_weights(features, frozen))
            z_mix = self.reach.gather(self.projection(self._dropped("mixed_out", mixed)), grad=True)
        kinds = self._selection(frozen, momentum_codes)
        if not kinds:
            return z.sum() * 0  # both kinds off: nothing is a positive, only the consistency term trains
        kinds = {kind: tuple(self.reach.gather(part) for part in pair) for kind, pair in kinds.items()}
        agnostic, specific = (kinds.get(kind, (None, None)) for kind in ("agnostic", "specific"))
        pictures, cells = frozen.shape[0], frozen.shape[2] * frozen.shape[3]
        z = self.reach.gather(z, grad=True)
        return ghp_contrastive(
            z,
            z_mix,
            agnostic[0],
            specific[0],
            threshold_ag=agnostic[1],
            threshold_sp=specific[1],
            cells=cells,
            temperature=settings.temperature,
            lam=lam,
            candidates=random_candidates(
                self.cfg.seed, self.global_step, cells, len(z), settings.rho, z.device, self.reach.part()
            ),
            reweighting=settings.reweighting,
            version=VERSIONS[settings.loss_version],
            symmetric=settings.positives.symmetric,
            denominator=settings.denominator,
            pictures=(self.reach.rank() * pictures, pictures),
            guarded=settings.guarded,
            contrast=settings.contrast,
            chosen=self._say_contrast,
        )

    def _say_contrast(self, line: str) -> None:
        """Log which way the loss is computed, once for each: the number of positives may turn it."""
        way = line.partition(":")[0]
        if way not in self._said:
            self._said.add(way)
            log.info(f"contrastive loss, {line}")

    def _momentum_codes(self, frozen: Tensor) -> Tensor:
        return self.momentum_head(frozen, self._head_masks("momentum", frozen))

    def _selection(self, frozen: Tensor, momentum_codes: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """What positives are chosen by: kind -> unit rows of these pictures [N,C] and their thresholds [N].

        momentum_codes: None leaves the task-specific kind out.
        """
        kinds = {}
        if self.cfg.method.positives.agnostic:
            rows = unit_rows(self._dropped("features", frozen))
            kinds["agnostic"] = rows, thresholds(rows, self.pool.agnostic_rows())
        if momentum_codes is not None:
            rows = unit_rows(self._dropped("momentum_out", momentum_codes))
            kinds["specific"] = rows, thresholds(rows, self.pool.specific_rows())
        return kinds

    def _neighbour_weights(self, features: Features, frozen: Tensor) -> Tensor:
        sigma = self.cfg.method.lhp.sigma
        if self.wants_attention:
            return attention_weights(features.attention, features.prefix, tuple(frozen.shape[-2:]), sigma)
        return affinity_weights(frozen, sigma)

    # ------------------------------------------------------------------ for `explain`

    @torch.no_grad()
    def relations(self, pictures: Sequence[Seen], place: Place) -> list[Relation]:
        """Both kinds of positives of a patch among the patches of all pictures, as if they were a batch (with one draw
        of the dropout), and the weights of its neighbourhood."""
        return [*self._positives(pictures, place), *self._neighbours(pictures[0], place)]

    def _positives(self, pictures: Sequence[Seen], place: Place) -> list[Relation]:
        if not self.pool.agnostic_filled:
            return [Relation("positives", "Hidden positives", NO_POOL)]
        frozen, inside, grids = stacked(pictures)
        row, column = cell(place, grids[0])
        anchor = int(inside.flatten()[: row * frozen.shape[3] + column].sum())
        symmetric, found = self.cfg.method.positives.symmetric, []
        momentum_codes = self._momentum_codes(frozen) if self.cfg.method.positives.specific else None
        for kind, (rows, limits) in self._selection(frozen, momentum_codes).items():
            rows, limits = rows[inside.flatten()], limits[inside.flatten()]
            mask = torch.zeros_like(inside)
            mask[inside] = positive_mask(rows, limits, slice(anchor, anchor + 1), symmetric=symmetric)[0]
            maps = [own[:height, :width] for own, (height, width) in zip(mask, grids, strict=True)]
            of, pool = OF[kind], len(getattr(self.pool, f"{kind}_rows")())
            either = ", or above the highest of the other patch" if symmetric else ""
            counts = f" They count in the loss from step {self.cfg.method.lambda_warmup} on." * (kind == "specific")
            rule = (
                f"Patches of these pictures whose cosine to the patch, in {of}, is above its highest cosine to the "
                f"{pool} entries of the {kind} pool, {float(limits[anchor]):.3f}{either}: {int(mask.sum())} of "
                f"{len(rows)} patches.{counts} {DRAWN}"
            )
            found.append(Relation(f"positives_{kind}", f"Task-{kind} hidden positives", rule, maps))
        return found

    def _neighbours(self, seen: Seen, place: Place) -> list[Relation]:
        if not self.cfg.method.lhp.enabled:
            return []
        frozen = seen.features.concat()
        grid = tuple(frozen.shape[-2:])
        row, column = cell(place, grid)
        index, valid = neighbourhood(*grid, frozen.device)
        own = row * grid[1] + column
        weights = frozen.new_full((grid[0] * grid[1],), math.nan)
        weights[index[own][valid[own]]] = self._neighbour_weights(seen.features, frozen)[0, own][valid[own]]
        source = "attention of the backbone's last block" if self.wants_attention else "affinity of the features"
        rule = (
            f"Weights, from the {source}, by which the codes of the patch and its neighbours are mixed (their sum is "
            f"divided by {int(valid[own].sum())}, the number of patches here). Scores are clamped to their middle 80 % "
            "before the softmax, so near patches often weigh alike; 0: below the mean of all patches."
        )
        return [Relation("neighbourhood", "Local hidden positives", rule, [weights.view(grid)])]

    # ------------------------------------------------------------------ channel dropout

    def _mask(self, purpose: str, maps: Tensor) -> Tensor | None:
        key = (self.cfg.seed, f"hp.dropout.{purpose}", self.global_step)
        return own_channel_masks(*key, maps, self.cfg.method.dropout.p)

    def _head_masks(self, purpose: str, maps: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._mask(f"{purpose}.linear", maps), self._mask(f"{purpose}.nonlinear", maps)

    def _dropped(self, purpose: str, maps: Tensor) -> Tensor:
        return drop_channels(maps, self._mask(purpose, maps) if self.cfg.method.dropout.outputs else None)

    # ------------------------------------------------------------------ reference pools

    def _positions(self, purpose: str, step: int, maps: Tensor) -> Tensor:
        """One patch position a picture [B], drawn for the global batch."""
        count = maps.shape[0] * distributed.world_size()
        cells = maps.shape[2] * maps.shape[3]
        return distributed.own_slice(random_positions(self.cfg.seed, purpose, step, count, cells)).to(maps.device)

    def prepare(self, loader: Callable[..., Any]) -> None:
        """Fill both pools before the first step: M pictures, one random patch each, independent draws for the two."""
        if head_start.begin(self, loader):
            self.momentum_head.update(0.0)
        agnostic, kept = self._random_patches(loader, "hp.pool", 0, ("agnostic", "specific"))
        self.pool.fill_agnostic(distributed.gather_uneven(agnostic))
        self._replace_kept(kept)
        self.pool.refill(self._pool_codes(0))

    def _pool_codes(self, step: int) -> Callable[[Tensor], Tensor]:
        """The momentum head for rows [m,C], with draws of its own: dropout is on while the release fills its pool.

        The head drops its two inputs itself; the rows come to it as they are (make_reference_pool.py of the release).
        """
        dropout, blocks = self.cfg.method.dropout, itertools.count()

        def mask(use: str, rows: Tensor, block: int) -> Tensor | None:
            key = (self.cfg.seed, f"hp.pool.{use}.{block}", step)
            return channel_masks(*key, *rows.shape, dropout.p, rows.device) if dropout.p > 0 else None

        def codes(rows: Tensor) -> Tensor:
            block = next(blocks)
            found = self.momentum_head(rows, (mask("linear", rows, block), mask("nonlinear", rows, block)))
            return drop_channels(found, mask("codes", found, block) if dropout.outputs else None)

        return codes

    def _renew_pool(self, step: int) -> None:
        """Refill the task-specific pool when its time has come.

        `kept` counts steps of the run; `release` counts steps of the epoch, as the released loop does.
        """
        pool = self.cfg.method.pool
        count = step if pool.refill == "kept" else step % self.trainer.datamodule.steps_per_epoch
        if count == 0 or count % pool.renew_every:
            return
        if pool.refill == "release":
            self._replace_kept(*self._random_patches(self.unlabelled_loader, "hp.pool.renewal", step, ("specific",)))
        self.pool.refill(self._pool_codes(step))

    def _replace_kept(self, rows: Tensor) -> None:
        """Put this rank's rows (gathered over ranks) in place of all kept features."""
        self.pool.kept.reset()
        self.pool.kept.enqueue(rows)

    @torch.no_grad()
    def _random_patches(
        self, loader: Callable[..., Any], purpose: str, step: int, draws: tuple[str, ...]
    ) -> list[Tensor]:
        """Frozen features of random patches of training pictures: this rank's rows [m,C] for every draw.

        One patch of each of M pictures; of fewer pictures, as many of each as make up M (the release fails there). The
        agnostic rows carry the output dropout of the release; the others are kept as they are.
        """
        settings = self.cfg.method
        batches = loader("train", "train", order="shuffled", limit=self.pool_size, purpose=f"{purpose}.{step}")
        pictures = min(self.pool_size, len(batches.dataset))
        patches = -(-self.pool_size // pictures)
        # The position in the whole pass keys the draws of a picture; ranks read contiguous parts of it.
        place = pictures * distributed.rank() // distributed.world_size()
        rows: list[list[Tensor]] = [[] for _ in draws]
        for batch in batches:
            maps = self.frozen_features("train", batch).concat()
            places = range(place, place := place + len(maps))
            cells = maps.shape[2] * maps.shape[3]
            for draw, collected in zip(draws, rows, strict=True):
                key = (self.cfg.seed, f"{purpose}.{step}.{draw}")
                positions = torch.stack([random_positions(*key, at, patches, cells) for at in places])
                chosen = torch.stack([collect(maps, column) for column in positions.to(maps.device).unbind(1)], dim=1)
                if draw == "agnostic" and settings.dropout.outputs and settings.dropout.p > 0:
                    masks = [
                        channel_masks(*key, at, 1, maps.shape[1], settings.dropout.p, maps.device) for at in places
                    ]
                    chosen = chosen * torch.stack(masks)
                collected.append(chosen.flatten(0, 1))
        return [torch.cat(collected) if collected else self.pool.agnostic[:0] for collected in rows]


def unit_rows(maps: Tensor) -> Tensor:
    """[B,C,h,w] -> L2-normalised float32 rows [N,C], without gradient."""
    return F.normalize(patch_rows(maps.detach().float()), dim=1)


def check_settings(settings: Any, backbone: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    if settings.lhp.enabled and settings.lhp.attention == "backbone" and not backbone.has_attention:
        raise ConfigError(
            "method.lhp.attention=backbone: this backbone has no attention; use affinity or auto, or a ViT backbone"
        )
