"""Files in the formats that the authors released, with random weights, and their evaluation in plain torch.

The networks here are written for these tests in the released order of operations: DINO's transformer, head, upsampled
codes, probes, one confusion matrix, Hungarian matching on its counts.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Draws:
    """Named random tensors. `small`: each is one stored number, expanded, so that a whole ViT makes a file of kB."""

    def __init__(self, small: bool, seed: int = 0) -> None:
        self.small, self.generator = small, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.05, mean: float = 0.0) -> Tensor:
        if self.small:
            return torch.full((1,), 0.01).expand(shape)
        return mean + scale * torch.randn(shape, generator=self.generator)


def dino(draw: Draws, dim: int, patch: int, blocks: int = 12) -> dict[str, Tensor]:
    """The names of the DINO release."""
    state = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, 1 + (224 // patch) ** 2, dim, scale=0.2),
        "patch_embed.proj.weight": draw(dim, 3, patch, patch),
        "patch_embed.proj.bias": draw(dim),
    }
    for i in range(blocks):
        state |= {
            f"blocks.{i}.norm1.weight": draw(dim, mean=1.0),
            f"blocks.{i}.norm1.bias": draw(dim),
            f"blocks.{i}.attn.qkv.weight": draw(3 * dim, dim),
            f"blocks.{i}.attn.qkv.bias": draw(3 * dim),
            f"blocks.{i}.attn.proj.weight": draw(dim, dim),
            f"blocks.{i}.attn.proj.bias": draw(dim),
            f"blocks.{i}.norm2.weight": draw(dim, mean=1.0),
            f"blocks.{i}.norm2.bias": draw(dim),
            f"blocks.{i}.mlp.fc1.weight": draw(4 * dim, dim),
            f"blocks.{i}.mlp.fc1.bias": draw(4 * dim),
            f"blocks.{i}.mlp.fc2.weight": draw(dim, 4 * dim),
            f"blocks.{i}.mlp.fc2.bias": draw(dim),
        }
    return state | {"norm.weight": draw(dim, mean=1.0), "norm.bias": draw(dim)}


def head(draw: Draws, channels: int, dim: int, first: str = "cluster1", second: str = "cluster2") -> dict[str, Tensor]:
    return {
        f"{first}.0.weight": draw(dim, channels, 1, 1),
        f"{first}.0.bias": draw(dim),
        f"{second}.0.weight": draw(channels, channels, 1, 1),
        f"{second}.0.bias": draw(channels),
        f"{second}.2.weight": draw(dim, channels, 1, 1),
        f"{second}.2.bias": draw(dim),
    }


def hp(dim: int = 16, classes: int = 27, patch: int = 16, small: bool = True, channels: int = 384) -> dict[str, Any]:
    """What HP's `save_checkpoint` writes with `model_only`."""
    draw = Draws(small)
    net = {f"model.{key}": value for key, value in dino(draw, channels, patch).items()}
    net |= head(draw, channels, dim) | head(draw, channels, dim, "ema_model1", "ema_model2")
    return {
        "epoch": 1, "iter": 700, "best_epoch": 1, "best_iter": 700,
        "net_model_state_dict": net, "net_optimizer_state_dict": None,
        "linear_model_state_dict": {"weight": draw(classes, dim, 1, 1), "bias": draw(classes)},
        "linear_optimizer_state_dict": None,
        "cluster_model_state_dict": {"clusters": draw(classes, dim, scale=1.0)},
        "cluster_optimizer_state_dict": None, "best": torch.tensor(171.5).item(),
    }  # fmt: skip


def stego(
    dim: int = 12,
    classes: int = 3,
    patch: int = 8,
    small: bool = True,
    extra: int = 0,
    **saved: Any,
) -> dict[str, Any]:
    """What Lightning writes of the released module: tensors, and the saved configuration as OmegaConf objects."""
    draw, channels = Draws(small), 384
    state = {f"net.model.{key}": value for key, value in dino(draw, channels, patch).items()}
    state |= {f"net.{key}": value for key, value in head(draw, channels, dim).items()}
    state |= {
        "train_cluster_probe.clusters": draw(classes, dim),
        "cluster_probe.clusters": draw(classes + extra, dim, scale=1.0),
        "linear_probe.weight": draw(classes, dim, 1, 1),
        "linear_probe.bias": draw(classes),
        "decoder.weight": draw(channels, dim, 1, 1),
        "decoder.bias": draw(channels),
    }
    cfg = {
        "dataset_name": "potsdam", "arch": "dino", "model_type": "vit_small", "dino_feat_type": "feat",
        "projection_type": "nonlinear", "dim": dim, "pointwise": True, "zero_clamp": True, "stabalize": False,
        "pos_intra_weight": 0.67, "pos_intra_shift": 0.08, "pos_inter_weight": 0.25, "pos_inter_shift": 0.02,
        "neg_inter_weight": 0.5, "neg_inter_shift": 0.46, "feature_samples": 11, "neg_samples": 5, "num_neighbors": 7,
        "dropout": True, "batch_size": 16, "max_steps": 5000, "extra_clusters": extra, "crop_type": None, "res": 224,
    }  # fmt: skip
    return {
        "epoch": 3, "global_step": 4400, "pytorch-lightning_version": "1.2.10", "state_dict": state,
        "callbacks": {Draws: {"best_model_score": draw(1)}}, "optimizer_states": [defaultdict(dict)],
        "lr_schedulers": [],
        "hyper_parameters": {"n_classes": classes, "cfg": OmegaConf.create(cfg | saved)},
    }  # fmt: skip


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# ---- the released evaluation ---------------------------------------------------------------------------------------


def transformer(state: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """DINO's transformer: normalised patch tokens of the last block, [B,C,h,w]."""
    weight = state["patch_embed.proj.weight"]
    dim, patch = weight.shape[0], weight.shape[-1]
    x = F.conv2d(
        (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1), weight, state["patch_embed.proj.bias"], stride=patch
    )
    count, _, h, w = x.shape
    x = torch.cat([state["cls_token"].expand(count, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + positions(state["pos_embed"], h, w)

    def norm(tokens: Tensor, name: str) -> Tensor:
        return F.layer_norm(tokens, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(tokens: Tensor, name: str) -> Tensor:
        return F.linear(tokens, state[f"{name}.weight"], state[f"{name}.bias"])

    for i in range(12):
        name = f"blocks.{i}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").reshape(count, -1, 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 1:].transpose(1, 2).reshape(count, dim, h, w)


def positions(embedding: Tensor, h: int, w: int) -> Tensor:
    """DINO's interpolation: by the factor (h + 0.1) / n, bicubic."""
    side = round((embedding.shape[1] - 1) ** 0.5)
    if (h, w) == (side, side):
        return embedding
    grid = embedding[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((h + 0.1) / side, (w + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([embedding[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def codes(net: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    """cluster1(f) + cluster2(f) with dropout off, [B,D,h,w]."""
    features = transformer(inside(net, "model."), images, heads)

    def layer(maps: Tensor, name: str) -> Tensor:
        return F.conv2d(maps, net[f"{name}.weight"], net[f"{name}.bias"])

    return layer(features, "cluster1.0") + layer(F.relu(layer(features, "cluster2.0")), "cluster2.2")


def inside(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@torch.no_grad()
def scores(
    net: dict[str, Tensor], linear: dict[str, Tensor], clusters: Tensor, batches: list[dict], heads: int, flip: bool
) -> dict[str, float]:
    """Accuracy and mIoU of both probes in percent, in the released order: codes upsampled first, one matrix a probe."""
    classes = len(linear["bias"])
    matrices = {name: np.zeros((classes, classes), np.int64) for name in ("cluster", "linear")}
    for batch in batches:
        code = codes(net, batch["image"], heads)
        if flip:
            code = (code + codes(net, batch["image"].flip(-1), heads).flip(-1)) / 2
        label = batch["label"]
        code = F.interpolate(code, label.shape[-2:], mode="bilinear", align_corners=False)
        cosines = torch.einsum("bchw,nc->bnhw", F.normalize(code, dim=1), F.normalize(clusters, dim=1))
        found = {"cluster": cosines, "linear": F.conv2d(code, linear["weight"], linear["bias"])}
        for name, values in found.items():
            kept = label < classes
            pairs = values.argmax(1)[kept] * classes + label[kept]
            matrices[name] += np.bincount(pairs.numpy(), minlength=classes**2).reshape(classes, classes)
    rows, columns = linear_sum_assignment(matrices["cluster"], maximize=True)
    matrices["cluster"] = matrices["cluster"][rows[np.argsort(columns)]]
    return {f"val/{name}/{key}": value for name, matrix in matrices.items() for key, value in figures(matrix).items()}


def figures(matrix: np.ndarray) -> dict[str, float]:
    hit = np.diag(matrix).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - hit
    return {"acc": 100 * hit.sum() / matrix.sum(), "miou": 100 * np.mean(hit[union > 0] / union[union > 0])}
