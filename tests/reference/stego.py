"""Adapters for the saved cases of STEGO: the two probes."""

import numpy as np
import torch

from evaluation import readout
from evaluation.probes import ClusterProbe, LinearProbe


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
