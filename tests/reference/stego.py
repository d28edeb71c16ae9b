"""Adapters for the saved cases of STEGO: correspondence, negatives, neighbours, head and probes."""

import numpy as np
import torch

from evaluation import readout
from evaluation.probes import ClusterProbe, LinearProbe
from losses import correspondence as stego
from losses.crf import crf_matrix
from models.heads import SegmentationHead
from retrieval import neighbours

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
