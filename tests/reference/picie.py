"""Adapters for `picie.*`: labels, losses, k-means, geometry, scores and two whole epochs of PiCIE."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.base.transforms import Replay, cell_boxes, replay
from evaluation import readout
from evaluation.metrics import SegmentationScore
from losses import clusters
from retrieval.minibatch import MiniBatchKMeans
from tests.reference import clustered
from tests.reference import training as steps

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _arrays(results: dict[str, Tensor]) -> Case:
    return {name: torch.as_tensor(value).detach().numpy() for name, value in results.items()}


def assign_labels(case: Case) -> Case:
    codes = F.normalize(_tensor(case["in_featmap"]), dim=1)
    centroids = _tensor(case["in_centroids"])
    labels = clusters.nearest_centroids(codes, centroids)
    counts = torch.bincount(labels.flatten(), minlength=len(centroids))
    return _arrays(
        {
            "out_featmap_normalised": codes,
            "out_scores": clusters.similarities(codes, centroids),
            "out_labels": labels.flatten(1),
            "out_counts": counts,
            "out_ce_weight": clusters.class_weights(counts, "proportional"),
        }
    )


def train_losses(case: Case) -> Case:
    raw = [_tensor(case[f"in_featmap{view}"]).requires_grad_() for view in (1, 2)]
    codes = [F.normalize(maps, dim=1) for maps in raw]
    targets = []
    for view in (1, 2):
        weight = _tensor(case[f"in_ce_weight{view}"])
        weight = weight if case["cfg_use_balance"] else torch.ones_like(weight)
        targets.append(
            clusters.Targets(*(_tensor(case[f"in_{name}{view}"]) for name in ("centroids", "labels")), weight)
        )
    found = clusters.cross_views(codes, targets)
    square = clusters.mean_square(*codes) if case["cfg_mse"] else torch.zeros(())
    total = (found.total + square) / 2 if case["cfg_mse"] else found.total
    total.backward()
    results = {f"out_loss{i + 1}{j + 1}": found.terms[i][j] for i in range(2) for j in range(2)}
    results |= {"out_within": found.within, "out_across": found.across, "out_ce": found.total, "out_mse": square}
    return _arrays(
        results | {"out_total": total} | {f"out_grad_featmap{i + 1}": maps.grad for i, maps in enumerate(raw)}
    )


class _Started(MiniBatchKMeans):
    """Whose first fit is given."""

    def _fit(self) -> None:
        points = torch.cat(self.waiting)
        self.centroids, self.counts, self.waiting = self.fitted, torch.zeros(self.k, dtype=torch.float64), []
        gaps = torch.cdist(points, self.centroids).square().min(1)
        self.counts += torch.bincount(gaps.indices, minlength=self.k)
        self.distances = [float(gaps.values.mean())]


def minibatch_kmeans(case: Case) -> Case:
    start = _tensor(case["in_init_centroids"])
    made = _Started(
        len(start), first=int(case["cfg_num_init_batches"]), group=int(case["cfg_num_batches"]), iterations=1,
        init="random", seed=0,
    )  # fmt: skip
    made.fitted = start
    for batch in _tensor(case["in_featmaps"]):
        made.add(F.normalize(batch, dim=1).flatten(2).mT.flatten(0, 1))
    found = made.finish()
    return _arrays({"out_centroids": found.centroids, "out_mean_kmeans_loss": torch.tensor(found.distance)})


def equivariance(case: Case) -> Case:
    rows, res = case["in_indices"], int(case["cfg_res"])
    shares = _tensor(np.column_stack([case["in_scale"], case["in_crop"]])[rows])
    picture, maps = _tensor(case["in_image_view1"]), _tensor(case["in_feat_view2"])
    frame = tuple(picture.shape[-2:])
    flip = _tensor(case["in_flip_draw"][rows] < 0.5)
    params = Replay(cell_boxes(shares, frame).float(), flip, frame, (res, res), shares=shares)
    cropped = replay(maps, params, size=tuple(maps.shape[-2:]))
    return _arrays({"out_image_view1": replay(picture, params), "out_feat_view2": cropped})


def evaluate(case: Case) -> Case:
    k, labels = int(case["cfg_k"]), _tensor(case["in_labels"])
    codes = F.normalize(_tensor(case["in_featmap"]), dim=1)
    found = readout.predict(clusters.logits(codes, _tensor(case["in_centroids"])), tuple(labels.shape[-2:]))
    score = SegmentationScore(k, k)
    score.update(found, torch.where(labels < 0, 255, labels))
    scores = score.compute()
    counts = torch.as_tensor(scores.counts).T.double()  # rows: labels, columns: clusters
    match = torch.as_tensor(scores.mapping)
    place = torch.empty(k, dtype=torch.int64)
    place[match] = torch.arange(k)  # the cluster of each class
    results = {
        "out_preds": found,
        "out_histogram": counts,
        "out_match_cluster": place,
        "out_match_gt": torch.arange(k),
        "out_histogram_reordered": counts[match],
        "out_pixel_accuracy": torch.tensor(scores.acc),
        "out_mean_iou": torch.tensor(scores.miou),
        "out_iou_by_cluster": torch.as_tensor(scores.iou)[match],
    }
    return _arrays(results)


def training(case: Case) -> Case:
    views = {name: steps.pictures(case[f"in_{name}"]) for name in ("view1", "view2")}
    words = [
        "method=picie",
        f"method.mse={str(bool(case['cfg_mse'])).lower()}",
        f"method.weights={'proportional' if case['cfg_balance'] else 'none'}",
    ]
    run = clustered.Followed(case, clustered.build(case, words), clustered.Pictures(case, views))
    run.train()
    logged = run.steps.logged
    names = ["within", "across", *(f"loss{pair}" for pair in (11, 22, 12, 21)), *(["mse"] if case["cfg_mse"] else [])]
    return run.results | {f"out_{name}": logged[name] for name in names} | {"out_total": logged["loss"]}
