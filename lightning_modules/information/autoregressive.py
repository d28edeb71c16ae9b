"""AC, autoregressive clustering (Ouali et al., ECCV 2020), a reconstruction: two raster orders are two views.

No code of the authors is known: architecture, loss and settings are those of a third party's reproduction, and what
that does by mistake is an option. A network of masked convolutions reads a picture in one of eight raster orders, so
that a pixel sees its past in the order alone. Read in two orders, a pixel and its neighbours shall get classes that say
much about each other: their mutual information is trained. Scores are of order 0, in which nothing is masked.
"""

import math
from typing import Any

import torch
from torch import Tensor

from common import chance
from common.errors import ConfigError
from lightning_modules.base import Loss, UnsupervisedSegmenter
from losses.information import information, information_of_counts, joint_of_box
from models.backbone import Features
from models.scratch.ordered import Decoder, OrderedNetwork, reading
from models.scratch.orders import ORDERS


class Autoregressive(UnsupervisedSegmenter):
    """Codes = the network's features in order 0. Trained: network and decoder, together."""

    title = "AC"
    trains_backbone = True
    wants_features = False

    def build(self) -> None:
        settings, backbone = self.cfg.method, self.backbone
        if not isinstance(backbone.net, OrderedNetwork):
            raise ConfigError(
                f"backbone={backbone.name}: method=autoregressive reads pictures in raster orders, which "
                f"{backbone.network} cannot; set backbone=ordered"
            )
        self.refuse_padding()
        self.code_dim = backbone.dim
        self.decoder = Decoder(backbone.dim, settings.num_clusters)
        self.over_decoder = Decoder(backbone.dim, settings.over_clusters) if settings.over_clusters else None

    def param_groups(self) -> list[dict[str, Any]]:
        parts = [self.backbone.net, self.decoder, self.over_decoder]
        return [{"name": "network", "params": [p for part in parts if part is not None for p in part.parameters()]}]

    def embed(self, features: Features) -> Tensor:
        return features.concat()

    def classify(self, codes: Tensor) -> Tensor:
        return self.decoder(codes)

    def orders(self) -> tuple[int, int]:
        """The two orders of this step, for the pictures of all ranks."""
        draw = chance.generator(self.cfg.seed, "autoregressive.orders", self.global_step)
        if self.cfg.method.orders == "different":
            found = torch.randperm(len(ORDERS), generator=draw)[:2]
        else:
            found = torch.randint(len(ORDERS), (2,), generator=draw)
        return tuple((found + 1).tolist())

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """Negative mutual information of the classes of both orders, of all shifts and all ranks together; with a
        second decoder the sum of both. `information` is a share of log K, `used` the effective number of classes."""
        images = views["image"]
        with reading(self.backbone.net, *self.orders()):
            codes = self.embed(self.backbone.features(images, grad=True))
        total, parts = self._information(self.decoder, codes, images)
        if self.over_decoder is not None:
            more, found = self._information(self.over_decoder, codes, images)
            total, parts = total + more, parts | {f"over_{name}": value for name, value in found.items()}
        with torch.no_grad():  # what probes read is order 0
            seen = self.embed(self.backbone.features(images))
        return Loss(total, parts, codes=seen)

    def _information(self, decoder: Decoder, codes: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one decoder, from codes [2B,D,h,w] of both orders, and what is logged of it."""
        settings = self.cfg.method
        first, second = decoder.probabilities(codes, images.shape[-2:]).chunk(2)
        joint = self.reach.summed(joint_of_box(first, second, settings.shift))
        found = information(joint[None], collapsed=True).loss
        marginal = (joint.sum(0) + joint.sum(1)).detach() / (2 * joint.detach().sum())
        parts = {
            "information": -found.detach() / math.log(max(2, decoder.out_channels)),
            "used": torch.special.entr(marginal).sum().exp(),
        }
        if settings.normalised:
            return found, parts
        pairs = len(images) * self.reach.ranks() * (2 * settings.shift + 1) ** 2
        return information_of_counts(joint, pairs), parts
