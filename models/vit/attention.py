"""Queries, keys, values and attention logits of a transformer's layer while the layer itself stays fused.

timm's layers call a fused kernel that never forms the attention matrix. So the projection of a layer is recorded by a
hook and only what was asked for is formed from it, in float32; the forward pass itself is not touched. Works for timm's
`Attention` (DINO, DINOv2, MoCo, MAE), `EvaAttention` (EVA, DINOv3) and `AttentionRope`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def watching(attn: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the next pass through an attention layer: its `input`, its `qkv` projection, its rotation `rope`.

    Eva's layers with separate biases use the weight of the projection directly, or add to its output in place; for them
    `qkv` and for layers without rotation `rope` are absent, and `project` repeats the projection (about 2 % of a pass).
    """
    seen: dict[str, Tensor] = {}

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["input"] = args[0]
        if kwargs.get("rope") is not None:
            seen["rope"] = kwargs["rope"]

    def after(_: nn.Module, args: tuple, output: Tensor) -> None:
        seen["qkv"] = output

    with ExitStack() as stack:
        stack.callback(attn.register_forward_pre_hook(before, with_kwargs=True).remove)
        if attn.qkv is not None and getattr(attn, "q_bias", None) is None:
            stack.callback(attn.qkv.register_forward_hook(after).remove)
        yield seen


@contextmanager
def hiding(patch_embed: nn.Module, mask: Tensor, token: Tensor) -> Iterator[None]:
    """While open, patches under mask [B,h,w] leave the embedding as `token` [C]; gradient reaches the token."""

    def replace(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        where = mask.to(output.device).reshape(*output.shape[:-1], 1)
        return torch.where(where, token.to(output.dtype), output)

    handle = patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def unfused(net: nn.Module) -> Iterator[None]:
    """While open, timm's attention layers form the attention matrix; equal to the fused kernel up to rounding.

    For training in bfloat16 on a CPU, where the fused kernel's backward takes longer than all the rest of the step.
    """
    layers = [layer for layer in net.modules() if getattr(layer, "fused_attn", False)]
    for layer in layers:
        layer.fused_attn = False
    try:
        yield
    finally:
        for layer in layers:
            layer.fused_attn = True


def project(attn: nn.Module, seen: dict[str, Tensor]) -> Tensor:
    """What `watching` saw -> queries, keys, values [3,B,heads,T,d] in float32, before any norm and rotation.

    Key and value heads that several query heads share are repeated.
    """
    if "qkv" in seen:
        return _split_heads(attn, seen["qkv"].float())
    tokens = seen["input"].float()
    if attn.qkv is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return _split_heads(attn, F.linear(tokens, attn.qkv.weight, bias))
    parts = [layer(tokens).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
    parts = [part.repeat_interleave(attn.num_heads // part.shape[2], dim=2).transpose(1, 2) for part in parts]
    return torch.stack(parts)


def _split_heads(attn: nn.Module, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)


def key_map(qkv: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """[3,B,heads,T,d] -> the keys of the patches as a map [B,heads*d,h,w], heads side by side; `grid` is (h, w)."""
    return qkv[1][:, :, prefix:].permute(0, 1, 3, 2).flatten(1, 2).unflatten(2, grid)


def logits(attn: nn.Module, qkv: Tensor, rope: Tensor | None) -> Tensor:
    """[3,B,heads,T,d] -> q k^T / sqrt(d) [B,heads,T,T], float32, after the query and key norms and the rotation."""
    queries, keys = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
    if rope is not None:
        half = getattr(attn, "rotate_half", False)
        queries, keys = (rotate(vectors, rope, attn.num_prefix_tokens, half) for vectors in (queries, keys))
    return (queries * attn.scale) @ keys.transpose(-2, -1)


def rotate(vectors: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotary position embedding of the patch tokens; the first `prefix` tokens stay as they are.

    Args:
        vectors: [B,heads,T,d].
        rope: sines and cosines side by side [..., T - prefix, 2d].
        half: pairs are (x_i, x_{i + d/2}) as in DINOv3, else neighbours (x_2i, x_2i+1) as in EVA.
    """
    kept, patches = vectors[:, :, :prefix], vectors[:, :, prefix:]
    sine, cosine = rope.float().chunk(2, dim=-1)
    if half:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([kept, patches * cosine + turned * sine], dim=2)
