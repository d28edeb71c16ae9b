"""Mask transformer: class vectors that attend to a picture's patches, and masks as their products with the patches.

Sources: Strudel et al., Segmenter (ICCV 2021); TransFGU (ECCV 2022).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError


class MaskDecoder(nn.Module):
    """Patch tokens -> unit patch and class vectors, and the logits of all classes.

    Args:
        in_dim: channels of the patch tokens.
        classes: K.
        dim: D of the vectors; layers, heads: of the transformer blocks; mlp_ratio: width of their perceptrons / dim.
        dropout: in attention, projections and perceptrons; drawn by torch.

    Weights: linear layers truncated normal (0.02), projections D^-0.5 N(0,1), and class embeddings an orthogonal
    initialisation of the whole [1,K,D] tensor, which makes them one row of length 1 as released: embeddings are not
    orthogonal to each other, and each has a length of about K^-0.5.
    """

    def __init__(
        self, in_dim: int, classes: int, dim: int, layers: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("layers", layers), ("heads", heads)):
            if value < 1:
                raise ConfigError(f"method.decoder.{name}={value}: must be at least 1")
        if dim % heads:
            raise ConfigError(f"method.decoder.dim={dim}: must be a multiple of method.decoder.heads={heads}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"method.decoder.dropout={dropout:g}: expected a number from 0 to below 1")
        self.classes = classes
        self.proj_dec = nn.Linear(in_dim, dim)
        self.cls_emb = nn.Parameter(torch.empty(1, classes, dim))
        self.blocks = nn.ModuleList(MaskBlock(dim, heads, int(dim * mlp_ratio), dropout) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.mask_norm = nn.LayerNorm(classes)
        nn.init.orthogonal_(self.cls_emb)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B,N,in_dim] -> unit patch vectors [B,N,D], unit class vectors [B,K,D] (of this picture), float32
        logits [B,N,K]: their cosines, normed over the classes, so a logit depends on all of them."""
        x = self.proj_dec(tokens).float()
        x = torch.cat([x, self.cls_emb.expand(len(x), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        # The norm over the classes enlarges what little their cosines differ by, so nothing is rounded before it.
        with torch.autocast(tokens.device.type, enabled=False):
            x = self.decoder_norm(x.float())
            patches = F.normalize(x[:, : -self.classes] @ self.proj_patch, dim=-1)
            classes = F.normalize(x[:, -self.classes :] @ self.proj_classes, dim=-1)
            return patches, classes, self.mask_norm(patches @ classes.mT)


class MaskBlock(nn.Module):
    """Attention and perceptron, each behind a layer norm and with a residual."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MaskAttention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Perceptron(dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MaskAttention(nn.Module):
    """Self-attention over patches and classes; queries, keys and values have no bias."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=rate)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), rate)


class Perceptron(nn.Module):
    """Two linear layers with a GELU."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout

    def forward(self, x: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        return F.dropout(self.fc2(F.dropout(F.gelu(self.fc1(x)), rate)), rate)
