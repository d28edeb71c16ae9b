"""The last steps of a class token: from its head outputs in the last block to the token, and what enters them.

TransFGU differentiates them alone (Yin et al., ECCV 2022). A network without a class token,
or with other blocks, has a pooled token in its place: the mean of its map, written as the attention of one head whose
weight is a patch's length (lengths of activations tell objects from background: SCDA, Wei et al., TIP 2017).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError, one_of
from common.precision import exact
from models.backbone import Backbone

KINDS = ("auto", "class", "pooled")
"""Of the token of a picture; auto: the class token where it was trained and its path is known, else the pooled map."""


@dataclass
class ClassPath:
    """All float32 and without graph; B pictures, H heads, T = P + h w tokens, d channels of a head."""

    attention: Tensor
    """[B,H,T] attention of the class token, after the softmax."""
    values: Tensor
    """[B,H,T,d]"""
    token: Callable[[Tensor], Tensor]
    """Head outputs [B,H*d] -> token [B,D]; rows do not depend on each other."""
    prefix: int
    """P: the class token and registers, or 1 for a pooled token, whose own entry is zero."""
    grid: tuple[int, int]

    @property
    def patch_attention(self) -> Tensor:
        """The mean of the heads on the patches, [B,h,w]."""
        return self.attention.mean(1)[:, self.prefix :].unflatten(1, self.grid)


def token_kind(backbone: Backbone, wanted: str) -> str:
    """`class` or `pooled`. Raises ConfigError where a class token is asked for that the network does not have."""
    one_of("method.maps.token", wanted, KINDS)
    known = _has_path(backbone)
    usable = known and backbone.class_token
    if wanted == "class" and not known:
        raise ConfigError(
            f"method.maps.token=class: {backbone.network} has no class token behind blocks of a plain vision "
            "transformer; use method.maps.token=pooled, or another backbone"
        )
    return "class" if wanted == "class" or (wanted == "auto" and usable) else "pooled"


def _has_path(backbone: Backbone) -> bool:
    if not backbone.transformer or not backbone.has_attention or getattr(backbone.net, "cls_token", None) is None:
        return False
    block = backbone.net.blocks[backbone.order[-1]]
    plain = all(hasattr(block, part) for part in ("ls1", "ls2", "norm2", "mlp")) and hasattr(block.attn, "norm")
    return plain and getattr(block.attn, "gate", None) is None and not hasattr(block.attn, "rotate_half")


def token_width(backbone: Backbone, kind: str) -> int:
    """D of the tokens."""
    return backbone.channels[-1] if kind == "class" else backbone.dim


def tokens(backbone: Backbone, images: Tensor, kind: str) -> Tensor:
    """One vector a picture [B,D], float32, not normalised; pictures [B,3,H,W] in 0..1."""
    found = backbone.features(images)
    return found.cls if kind == "class" else found.concat().mean((2, 3))


def class_path(backbone: Backbone, images: Tensor, kind: str) -> ClassPath:
    """One forward pass: what the class token's row of the last block (of the last of `backbone.levels`) sees."""
    return _class(backbone, images) if kind == "class" else pooled_path(backbone.features(images).concat())


def _class(backbone: Backbone, images: Tensor) -> ClassPath:
    number = backbone.order[-1]
    block = backbone.net.blocks[number]
    entered: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, args: entered.append(args[0][:, 0].detach().float()))
    try:
        found = backbone.features(images, qkv=True, block=number)
    finally:
        hook.remove()
    residual, attn = entered[-1], block.attn

    def token(outputs: Tensor) -> Tensor:
        x = residual + block.ls1(attn.proj(attn.norm(outputs)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        return backbone.net.norm(x) if backbone.level_norm else x

    queries, keys, values = found.qkv
    with exact(images.device):
        row = (attn.q_norm(queries[:, :, :1]) * attn.scale) @ attn.k_norm(keys).mT  # blocks like this have no rotation
    return ClassPath(row[:, :, 0].softmax(-1), values, token, found.prefix, tuple(found.map.shape[-2:]))


def pooled_path(maps: Tensor) -> ClassPath:
    """What the mean of a map [B,C,h,w] sees."""
    rows = maps.flatten(2).mT  # [B,N,C]
    lengths = rows.norm(dim=2)
    shares = lengths / lengths.sum(1, keepdim=True).clamp(min=1e-12)
    attention, values = F.pad(shares, (1, 0))[:, None], F.pad(F.normalize(rows, dim=2), (0, 0, 1, 0))[:, None]
    return ClassPath(attention, values, lambda outputs: outputs, 1, tuple(maps.shape[-2:]))
