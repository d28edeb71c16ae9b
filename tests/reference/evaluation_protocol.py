"""Adapters for the saved cases of the shared evaluation protocol."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from common.spec import IGNORE
from datamodules import cityscapes27, cocostuff27, potsdam3
from datamodules.base import coco_files, transforms
from evaluation import matching, readout
from evaluation.crf import Constants, DenseCRF, as_bytes, unary
from evaluation.metrics import SegmentationScore
from evaluation.probes import ClusterProbe
from models.backbone import Backbone
from tests.reference.stego import filled_linear_probe


def counted(case: dict[str, np.ndarray], clusters: int, classes: int, policy: str, extra: str) -> SegmentationScore:
    """The metric after the batches of a case, one update each."""
    metric = SegmentationScore(clusters, classes, matching=policy, extra=extra)
    for pred, label in zip(case["in_preds"], case["in_labels"], strict=True):
        metric.update(torch.from_numpy(pred), torch.from_numpy(label))
    return metric


def unsupervised_metrics(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    classes, more = int(case["cfg_n_classes"]), int(case["cfg_extra_clusters"])
    hungarian = bool(case["cfg_hungarian"])
    metric = counted(case, classes + more, classes, "hungarian" if hungarian else "identity", "stego_compat")
    scores = metric.compute()
    table = matching.with_extra_row(scores.histogram) if more else scores.histogram[:classes]
    kept = scores.counts.copy()
    kept[classes:] = 0
    results = {
        "out_stats": kept,
        "out_histogram": table,
        "out_miou_percent": scores.miou,
        "out_accuracy_percent": scores.acc,
        "out_iou_per_row": matching.jaccard(table),
    }
    if hungarian:
        rows = np.flatnonzero(scores.mapping != matching.UNMATCHED)
        results |= {
            "out_stats_all_clusters": scores.counts,
            "out_assign_rows": rows,
            "out_assign_cols": scores.mapping[rows],
            "out_map_clusters_official": matching.released_map(scores.mapping),
            "out_map_clusters_corrected": scores.mapping,
        }
    return results


def overcluster_metrics(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    classes = int(case["cfg_n_classes"])
    metric = counted(case, classes + int(case["cfg_extra_clusters"]), classes, "hungarian", "merge")
    merged = metric.compute()
    dropped = matching.score(merged.counts, extra="drop")
    rows = np.flatnonzero(dropped.mapping != matching.UNMATCHED)
    table = matching.with_extra_row(dropped.histogram)
    return {
        "out_stats": merged.counts,
        "out_assign_rows": rows,
        "out_assign_cols": dropped.mapping[rows],
        "out_extra_row_histogram": table,
        "out_extra_row_miou_percent": 100 * matching.mean(matching.jaccard(table)),
        "out_extra_row_accuracy_percent": 100 * matching.accuracy(table),
        "out_merge_histogram": merged.histogram[:classes],
        "out_merge_miou_percent": merged.miou,
        "out_merge_accuracy_percent": merged.acc,
        "out_merge_class_iou_percent": merged.iou,
        "out_map_official_buggy": matching.released_map(dropped.mapping),
        "out_map_corrected": dropped.mapping,
        "out_map_merge": merged.mapping,
    }


@torch.no_grad()
def flip_predict(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    size = int(case["cfg_out_h"]), int(case["cfg_out_w"])
    flipped = torch.from_numpy(case["in_code_of_flipped_image"])
    code = readout.flip_average(torch.from_numpy(case["in_code"]), flipped)
    linear = filled_linear_probe(case["in_linear_weight"], case["in_linear_bias"])
    centroids = torch.from_numpy(case["in_clusters"])
    probe = ClusterProbe(dim=centroids.shape[1], k=centroids.shape[0])
    probe.clusters.copy_(centroids)
    return {
        "out_code_avg": code.numpy(),
        "out_linear_log_probs": readout.log_probs(linear(code), size).numpy(),
        "out_cluster_log_probs": probe.log_probs(code, size, alpha=float(case["cfg_alpha"])).numpy(),
        "out_linear_pred": readout.predict(linear(code), size).numpy(),
        "out_cluster_pred": readout.predict(probe.scores(code), size).numpy(),
    }


def dense_crf(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean field of a normalised picture and log-probabilities, after one and after all iterations."""
    mean, std = network().mean, network().std
    image = as_bytes(torch.from_numpy(case["in_image_normalised"])[None] * std + mean)
    log_probs = torch.from_numpy(case["in_log_probs"])[None]
    energy = unary(log_probs, tuple(image.shape[-2:]))[0]
    constants = {
        "gauss_sxy": "gauss_sxy",
        "gauss_weight": "gauss_compat",
        "bilateral_sxy": "bilateral_sxy",
        "bilateral_srgb": "bilateral_srgb",
        "bilateral_weight": "bilateral_compat",
    }
    settings = {name: float(case[f"cfg_{key}"]) for name, key in constants.items()}
    beliefs = {
        count: DenseCRF(Constants(iterations=count, **settings))(image, [log_probs])[0][0].numpy()
        for count in (1, int(case["cfg_iterations"]))
    }
    final = beliefs[int(case["cfg_iterations"])]
    return {
        "out_image_uint8_rgb": image[0].permute(1, 2, 0).numpy(),
        "out_probs_unary": readout.upsample(log_probs, tuple(image.shape[-2:])).softmax(1)[0].numpy(),
        "out_unary_energy": energy.flatten(1).numpy(),
        "out_q_1_iteration": beliefs[1],
        "out_q": final,
        "out_argmax": final.argmax(0),
    }


def loader_transform(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    image, label = transforms.loader_transform(
        case["in_image"], case["in_label"], int(case["cfg_res"]), str(case["cfg_crop"])
    )
    return {"out_image": seen_by_network(image), "out_label": label.numpy()}


@lru_cache(maxsize=1)
def network() -> Backbone:
    """A backbone with ImageNet constants that takes pictures of any size; its weights do not matter here."""
    path = Path(__file__).parents[2] / "configs" / "backbone" / "resnet18.yaml"
    return Backbone(OmegaConf.merge(OmegaConf.load(path), {"weights": "none"}), seed=0)


def seen_by_network(image: torch.Tensor) -> np.ndarray:
    """What the first layer gets when a backbone is given a picture [3,H,W] in 0..1: the normalised picture."""
    seen = []
    handle = network().net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    network().features(image[None])
    handle.remove()
    return seen[0].numpy()


def released(label: np.ndarray) -> np.ndarray:
    """Class ids with the released void: -1 where ours is 255."""
    return np.where(label == IGNORE, -1, label.astype(np.int64))


def cocostuff_labels(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    fine = case["in_fine_label"]
    coarse, stuff, three = (released(cocostuff27.coarse_map(classes)(fine)[0]) for classes in (27, 15, 3))
    # the release shifts the coarse ids by twelve and lets things and void go negative; ours are all ignored
    return {
        "out_coarse27": coarse,
        "out_stuff15": np.where(stuff >= 0, stuff, coarse - coco_files.FIRST_STUFF),
        "out_stuff15_valid": stuff >= 0,
        "out_cocostuff3": three,
    }


def cityscapes_labels(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    label = released(cityscapes27.label_map(27)(case["in_label_id"])[0])
    return {"out_label27": label, "out_void_mask": label == -1}


def potsdam_labels(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"out_label3": released(potsdam3.label_map(3)(case["in_label6"])[0])}


def five_crop_boxes(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    boxes = transforms.five_crop_boxes(int(case["cfg_height"]), int(case["cfg_width"]), float(case["cfg_ratio"]))
    return {"out_boxes_top_left_h_w": np.asarray(boxes)}
