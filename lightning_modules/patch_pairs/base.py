"""What context prediction and co-occurrence share: a network is trained by telling how two patches of a picture lie.

Source: the two trained baselines of IIC (Ji et al., ICCV 2019). Features are read out by k-means when the run ends.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError
from common.precision import real
from common.spec import Photometric, ViewSpec
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.patch_pairs import places
from lightning_modules.patch_pairs.head import PairHead
from models.backbone import Features
from models.heads import own_channel_masks

LOOKED = 200
"""Training pictures whose colours are read for colour dropping."""
COLOURS = 3


class PatchPairs(UnsupervisedSegmenter):
    """Codes = features of the trained backbone, all of `backbone.levels`. Trained: the backbone and a head on pairs.

    A method says how a pair is drawn (`draw`), what its head gives (`outputs`), and what a pair costs (`losses`).
    """

    headline = "kmeans"
    trains_backbone = True
    exports = "the trained network"
    wants_features = False
    outputs: int

    def draw(self) -> places.Draw:
        """How places and targets of a pair are drawn."""
        raise TypeError(f"{type(self).__name__} has to define draw()")

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What each pair costs: logits float32 [B,outputs], targets int64 [B] -> [B]."""
        raise TypeError(f"{type(self).__name__} has to define losses()")

    def build(self) -> None:
        settings, head = self.cfg.method, self.cfg.method.head
        self.code_dim = self.backbone.dim
        self.of_features = settings.cut == "features"
        side = self._side_of_features() if self.of_features else self._side_of_crops()
        self.head = PairHead(
            self.backbone.dim, head.channels, head.hidden, self.outputs, side=side, cells=head.cells, norm=head.norm
        )
        self.register_buffer("colours", torch.zeros(2, COLOURS))

    def _side_of_features(self) -> int:
        side = self.cfg.method.side
        if side % 2 == 0:
            raise ConfigError(
                f"method.side={side}: a patch of features lies around its middle pixel, so its side is odd; set "
                f"{side + 1}, or method.cut=image"
            )
        return side

    def _side_of_crops(self) -> int:
        """Cells a side of what the network makes of a window. Raises ConfigError where that is nothing."""
        side = self.cfg.method.side
        self.backbone.check_size(side, "method.side")
        self.backbone.eval()
        try:
            with torch.no_grad(), self.backbone.training_stride():
                found = self.backbone.features(torch.zeros(1, self.backbone.in_channels, side, side)).concat().shape[-1]
        except RuntimeError:
            found = 0
        self.backbone.train()
        if not found:
            raise ConfigError(
                f"method.side={side}: {self.backbone.network} makes nothing of windows of {side} px, its convolutions "
                "need more; set a larger side, or method.cut=features"
            )
        return found

    @property
    def views(self) -> dict[str, ViewSpec]:
        """The training picture in other colours; crops and flips are those of `data.train_crop` and `data.flip_p`."""
        jitter = self.cfg.method.augment
        strengths = {name: jitter[name] for name in ("brightness", "contrast", "saturation", "hue")}
        return {"recoloured": ViewSpec(photometric=Photometric(**strengths, gray_p=0.0, blur_p=0.0))}

    def param_groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        return [{"name": "backbone", "params": trained}, {"name": "head", "params": self.head.parameters()}]

    def embed(self, features: Features) -> Tensor:
        return features.concat()

    def prepare(self, loader: Callable[..., Any]) -> None:
        """Mean and deviation of red, green and blue over some training pictures, for colour dropping."""
        if not self.cfg.method.augment.drop_p:
            return
        sums = torch.zeros(1 + 2 * COLOURS, dtype=torch.float64)
        for batch in loader("train", "train", order="shuffled", limit=LOOKED, purpose="patch_pairs.colours"):
            pixels = batch["image"][:, :COLOURS].double().permute(0, 2, 3, 1)[batch["valid"]]
            sums += torch.cat([pixels.new_tensor([len(pixels)]), pixels.sum(0), pixels.square().sum(0)])
        count, total, squares = distributed.total(sums.to(self.device)).split([1, COLOURS, COLOURS])
        mean = total / count
        self.colours.copy_(torch.stack([mean, (squares / count - mean.square()).clamp(min=0).sqrt()]))

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """The mean cost of the pairs of all ranks that do not lie in padding."""
        settings, images = self.cfg.method, self.dropped(views["recoloured"])
        size = tuple(images.shape[-2:])
        pairs = places.draw_pairs(
            self.cfg.seed, self.global_step, len(images), size, settings.side, self.draw(), settings.pair == "batch"
        )
        centre, other, target = (part.to(images.device) for part in (pairs.centre, pairs.other, pairs.target))
        maps = None
        if self.of_features:
            maps = self.backbone.features(images, grad=True).concat()
            patches = [places.cut_features(maps, place, settings.side, size) for place in (centre, other)]
        else:
            crops = torch.cat([places.cut_picture(images, place, settings.side) for place in (centre, other)])
            patches = self.backbone.features(crops, grad=True).concat().chunk(2)
        logits = real(self.head(*patches, self._mask(len(images))))
        kept = places.counted(views["valid"], centre, other)
        costs = self.losses(logits, target)
        pairs_of_all = distributed.total(kept.sum())
        loss = mean_cost(costs, kept, pairs_of_all)
        parts = {"pairs": loss.detach(), "sure": mean_cost((-costs.detach()).exp(), kept, pairs_of_all)}
        plain = maps is None or settings.augment.drop_p
        codes = {"codes": self._plain(views["image"])} if plain else {"codes": maps, "view": "recoloured"}
        return Loss(loss, parts, skip=pairs_of_all == 0, **codes)

    @torch.no_grad()
    def _plain(self, images: Tensor) -> Tensor:
        """Codes of whole pictures in their own colours, as an evaluation reads them: what probes learn on where the
        network is shown something else."""
        self.backbone.eval()
        codes = self.embed(self.backbone.features(images))
        self.backbone.train(self.training)
        return codes

    def _mask(self, pictures: int) -> Tensor | None:
        head = self.cfg.method.head
        rows = torch.empty(pictures, head.hidden, device=self.device)
        return own_channel_masks(self.cfg.seed, "patch_pairs.dropout", self.global_step, rows, head.dropout)

    def dropped(self, images: Tensor) -> Tensor:
        """Pictures [B,C,H,W] of which some keep one of their three colours; see `drop_colours`. Keyed by step and place
        in the global batch."""
        p = self.cfg.method.augment.drop_p
        if not p:
            return images
        count = len(images)
        rng = chance.numpy_generator(self.cfg.seed, "patch_pairs.colours", self.global_step)
        world, rank = distributed.world_size(), distributed.rank()
        dropped, kept = rng.random(count * world) < p, rng.integers(COLOURS, size=count * world)
        mine = slice(rank * count, (rank + 1) * count)
        noise = torch.empty(count, COLOURS, *images.shape[-2:], device=images.device)
        for row, position in zip(noise, range(mine.start, mine.stop), strict=True):
            key = self.cfg.seed, "patch_pairs.noise", self.global_step, position
            row.normal_(generator=chance.generator(*key, device=images.device))
        own = [torch.from_numpy(part[mine]).to(images.device) for part in (dropped, kept)]
        return drop_colours(images, *own, self.colours, noise)


def drop_colours(images: Tensor, dropped: Tensor, kept: Tensor, colours: Tensor, noise: Tensor) -> Tensor:
    """Two of the three colours of a picture become noise around the mean of the third, of a hundredth of its deviation:
    the shift of colours at a lens' rim then tells no place (Doersch et al., ICCV 2015).

    Args:
        images: [B,C,H,W], red, green and blue first; further channels stay.
        dropped: bool [B], the pictures that this happens to.
        kept: int64 [B], the colour that stays.
        colours: [2,3], mean and deviation of each colour over the training pictures.
        noise: standard normal [B,3,H,W].
    """
    mean, deviation = colours[:, kept, None, None, None]
    stays = (torch.arange(COLOURS, device=images.device) == kept[:, None]) | ~dropped[:, None]
    flat = mean + deviation / 100 * noise
    shown = torch.where(stays[:, :, None, None], images[:, :COLOURS], flat)
    return torch.cat([shown, images[:, COLOURS:]], dim=1)


def mean_cost(costs: Tensor, kept: Tensor, of_all: Tensor) -> Tensor:
    """The sum of costs [B] of this rank's kept pairs (bool [B]) over the number of them on a rank, of `of_all` on all
    ranks: its mean over ranks is what one process gives. 0, with a graph, where there are none."""
    return torch.where(kept, costs, 0.0).sum() * (distributed.world_size() / of_all.clamp(min=1).to(costs.dtype))
