"""Adapters for the saved cases of STEGO: correspondence, negatives, neighbours, head, probes and whole steps."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from datamodules.base.transforms import Geometry
from evaluation import readout
from evaluation.probes import ClusterProbe, LinearProbe
from lightning_modules import stego as method
from lightning_modules.base import near
from losses import correspondence as stego
from losses.crf import crf_matrix
from models.heads import SegmentationHead
from retrieval import neighbours
from tests.reference import training as replay

RULES = ("pointwise", "zero_clamp", "stabilize")
KINDS = {"self": "pos_intra", "knn": "pos_inter", "random": "neg_inter"}


def _leaves(case: dict[str, np.ndarray], *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(case[name]).requires_grad_() for name in names]


def _rules(case: dict[str, np.ndarray]) -> dict[str, bool]:
    return {name: bool(case[f"cfg_{name}"]) for name in RULES}


def corr_helper(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    features = tuple(torch.from_numpy(case[name]) for name in ("in_feats1", "in_feats2"))
    codes = _leaves(case, "in_code1", "in_code2")
    loss, similarity = stego.correspondence(features, tuple(codes), float(case["cfg_shift"]), **_rules(case))
    loss.mean().backward()
    return {
        "out_loss": loss.detach().numpy(),
        "out_cd": similarity.detach().numpy(),
        "out_grad_code1": codes[0].grad.numpy(),
        "out_grad_code2": codes[1].grad.numpy(),
    }


def corr_loss(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    features, near = (torch.from_numpy(case[name]) for name in ("in_feats", "in_feats_pos"))
    codes, near_codes = _leaves(case, "in_code", "in_code_pos")
    terms = {
        kind: stego.Term(float(case[f"cfg_{name}_weight"]), float(case[f"cfg_{name}_shift"]))
        for kind, name in KINDS.items()
    }
    result = stego.correspondence_loss(
        features,
        codes,
        (near, near_codes),
        (features, codes),
        tuple(torch.from_numpy(case[name]) for name in ("in_coords1", "in_coords2")),
        torch.from_numpy(case["in_perm_neg"]),
        terms,
        **_rules(case),
    )
    result.total.backward()
    results = {
        "out_total": result.total.detach().numpy(),
        "out_grad_code": codes.grad.numpy(),
        "out_grad_code_pos": near_codes.grad.numpy(),
    }
    for kind, name in KINDS.items():
        results[f"out_{name}_loss"] = result.losses[kind].detach().numpy()
        results[f"out_{name}_cd_mean"] = result.similarities[kind].numpy()
    return results


def super_perm(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"out_index": stego.shifted(torch.from_numpy(case["in_randperm"])).numpy()}


def sample(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    (maps,) = _leaves(case, "in_map")
    samples = stego.sample(maps, torch.from_numpy(case["in_coords"]))
    samples.square().sum().backward()
    return {"out_samples": samples.detach().numpy(), "out_grad_map_of_sum_of_squares": maps.grad.numpy()}


def crf_aux_loss(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {
        "alpha": "alpha",
        "beta": "beta",
        "gamma": "gamma",
        "w1": "appearance",
        "w2": "smoothness",
        "shift": "shift",
    }
    matrix = crf_matrix(
        *(torch.from_numpy(case[name]) for name in ("in_guidance", "in_code_normed", "in_rows", "in_cols")),
        **{ours: float(case[f"cfg_{name}"]) for name, ours in names.items()},
    )
    return {"out_matrix": matrix.numpy(), "out_loss": matrix.mean().numpy()}


@torch.no_grad()
def seg_head(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tokens = torch.from_numpy(case["in_tokens"])
    grid = int(case["cfg_feat_h"]), int(case["cfg_feat_w"])
    features = tokens[:, tokens.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid).contiguous()
    head = SegmentationHead(features.shape[1], len(case["in_lin_weight"]))
    inner, _, outer = head.nonlinear
    for name, layer in (("lin", head.linear), ("nl1", inner), ("nl2", outer)):
        values = {part: torch.from_numpy(case[f"in_{name}_{part}"]) for part in ("weight", "bias")}
        layer.load_state_dict(values)
    return {"out_image_feat": features.numpy(), "out_code": head(features).numpy()}


def knn(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pooled = neighbours.pooled(torch.from_numpy(case["in_feats"]))
    similarity, ids = neighbours.nearest_pictures(pooled, int(case["cfg_k"]))
    return {
        "out_pooled_normed": pooled.numpy(),
        "out_neighbours": ids.numpy(),
        "out_similarity": similarity.numpy(),
    }


def cluster_lookup(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    codes = torch.from_numpy(case["in_x"]).requires_grad_()
    centroids = torch.from_numpy(case["in_clusters"])
    probe = ClusterProbe(dim=centroids.shape[1], k=centroids.shape[0])
    with torch.no_grad():
        probe.clusters.copy_(centroids)
    alpha = None if np.isnan(case["cfg_alpha"]) else float(case["cfg_alpha"])
    loss, probs = probe(codes, alpha=alpha)
    loss.backward()
    with torch.no_grad():
        return {
            "out_loss": loss.detach().numpy(),
            "out_probs": probs.detach().numpy(),
            "out_grad_clusters": probe.clusters.grad.numpy(),
            "out_grad_x": codes.grad.numpy(),
            "out_log_probs": probe(codes, alpha=float(case["cfg_log_alpha"]), log_probs=True).numpy(),
            "out_argmax": probe.scores(codes).argmax(1).numpy(),
        }


def linear_probe(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    codes, label = torch.from_numpy(case["in_code"]), torch.from_numpy(case["in_label"])
    probe = filled_linear_probe(case["in_weight"], case["in_bias"])
    loss = probe.loss(codes, label)
    loss.backward()
    with torch.no_grad():
        logits = probe(codes)
        return {
            "out_loss": loss.detach().numpy(),
            "out_logits_up": readout.upsample(logits, label.shape[-2:]).numpy(),
            "out_pred": readout.predict(logits, label.shape[-2:]).numpy(),
            "out_grad_weight": probe.classifier.weight.grad.numpy(),
            "out_grad_bias": probe.classifier.bias.grad.numpy(),
        }


def filled_linear_probe(weight: np.ndarray, bias: np.ndarray) -> LinearProbe:
    """A LinearProbe with weight [C,D,1,1] and bias [C]."""
    probe = LinearProbe(dim=weight.shape[1], classes=weight.shape[0])
    probe.classifier.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return probe


# Whole steps.


STORED = 30
"""Columns of the released table of near pictures, the picture itself first."""


def training(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The table of near pictures, whole steps of the released loop and its final evaluation, by the real method."""
    images, near_images = (replay.pictures(case[f"in_{name}"]) for name in ("images", "near_images"))
    batches = [
        replay.batch(images[step], case["in_labels"][step], neighbour=near_images[step]) for step in range(len(images))
    ]
    data = WithTable(case, batches)
    draws = Draws(case)
    with (
        tempfile.TemporaryDirectory() as name,
        patch.multiple(method, **draws.functions()),
        patch.object(near, "dropout_mask", draws.dropout_mask),
    ):
        folder = Path(name)
        model = replay.method(
            case, _words(case, data, folder), folder, len(case["in_initial__linear_probe.classifier.weight"])
        )
        steps = replay.train(model, data, folder, len(batches))
        results = {}
        if "in_val_images" in case:
            found = replay.scores(model, steps, replay.pictures(case["in_val_images"]), case["in_val_labels"])
            pairs = [(found[probe].miou, found[probe].acc) for probe in ("linear", "cluster")]
            results["out_scores"] = np.array(pairs).ravel()
    if data.neighbours is not None:
        itself = np.arange(len(data.neighbours))[:, None]
        results["out_table"] = np.concatenate([itself, data.neighbours], axis=1)
    logged = steps.logged
    terms = {"linear": "linear_probe", "cluster": "cluster_probe", "total": "total"}
    terms |= {name: name for kind in KINDS for name in (kind, f"similarity_{kind}")}
    results |= {f"out_{name}": logged[ours] for name, ours in terms.items() if ours in logged}
    return results | steps.first_gradients() | steps.after()


def _words(case: dict[str, np.ndarray], data: "WithTable", folder: Path) -> list[str]:
    """`neighbours.drawn`: near pictures of the steps are in the case, so that all of the table is looked at instead."""
    names = {
        "method.dim": "dim",
        "method.samples": "feature_samples",
        "method.negatives.repeats": "neg_samples",
        "method.pointwise": "pointwise",
        "method.zero_clamp": "zero_clamp",
        "method.stabilize": "stabalize",
        "method.dropout.p": "dropout_p",
        "optim.head.lr": "lr",
        "optim.linear_probe.lr": "lr_probes",
        "optim.cluster_probe.lr": "lr_probes",
    }
    for kind, released in KINDS.items():
        names |= {f"method.terms.{kind}.{part}": f"{released}_{part}" for part in ("weight", "shift")}
    nonlinear = "in_initial__head.nonlinear.0.weight" in case
    columns = min(STORED, data.train_items) - 1
    return [
        "method=stego",
        f"method.num_clusters={len(case['in_initial__cluster_probe.clusters'])}",
        *(f"{key}={str(case[f'cfg_{name}'].item()).lower()}" for key, name in names.items()),
        f"method.projection={'nonlinear' if nonlinear else 'linear'}",
        f"method.dropout.signal={str('in_keep_image_signal' in case).lower()}",
        *(f"method.neighbours.{name}={columns}" for name in ("drawn", "stored")),
        "method.neighbours.same_picture=true",
        f"cache.dir={folder}",
        "evaluation.cluster_init=normal",
        "evaluation.flip=true",
    ]


class WithTable(replay.Recorded):
    """Recorded steps, and the pictures that the table of near pictures is made of."""

    def __init__(self, case: dict[str, np.ndarray], batches: list[dict[str, Any]]) -> None:
        name = "in_table_images" if "in_table_images" in case else "in_images"
        items = replay.pictures(case[name]).reshape(-1, *case[name].shape[-3:])
        super().__init__(batches, len(batches), lambda purpose: items, size=len(batches[0]["image"]))
        self.train_items = len(items)
        self.fixed_geometry = Geometry(tuple(items.shape[-2:]), "none")
        self.neighbours: np.ndarray | None = None

    def fingerprint(self, split: str, geometry: Geometry) -> str:
        return "pictures of a saved case"


class Draws:
    """The draws of a case under the names and arguments of the functions that draw them in the method."""

    def __init__(self, case: dict[str, np.ndarray]) -> None:
        self.case, self.p = case, float(case["cfg_dropout_p"])

    def functions(self) -> dict[str, Any]:
        """The method's functions that draw, by name."""
        names = ("own_channel_masks", "random_points", "random_negatives")
        return {name: getattr(self, name) for name in names}

    def own_channel_masks(
        self, seed: int, purpose: str, step: int, maps: torch.Tensor, p: float
    ) -> torch.Tensor | None:
        """purpose: stego.dropout.<view>.<use>."""
        _, _, view, use = purpose.split(".")
        return replay.kept(self.case, f"in_keep_{view}_{use}", self.p)[step] if p > 0 else None

    def random_points(self, seed: int, purpose: str, step: int, count: int, side: int) -> torch.Tensor:
        """purpose: stego.points.1 or 2."""
        return replay.tensor(self.case[f"in_points_{purpose[-1]}"])[step]

    def random_negatives(self, seed: int, step: int, *args: Any) -> torch.Tensor:
        return replay.tensor(self.case["in_negatives"])[step]

    def dropout_mask(self, seed: int, items: torch.Tensor, channels: int, p: float) -> torch.Tensor | None:
        return replay.kept(self.case, "in_table_keep", self.p)[items] if "in_table_keep" in self.case else None
