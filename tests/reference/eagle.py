"""Adapters for the saved cases of EAGLE: correspondence, EiCue, object loss, features and whole steps."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from evaluation.probes import ClusterProbe
from grouping import eicue, eigen
from lightning_modules import eagle as method
from losses import adaptive_shift, object_contrast
from losses.correspondence import correspondence, sample
from models.features import Features
from models.heads import SegmentationHead
from models.vit.attention import key_map
from tests.reference import training as replay

Case = dict[str, np.ndarray]
RULES = ("pointwise", "zero_clamp", "stabilize")
LAYERS = {"cluster1.0": "linear", "cluster2.0": "nonlinear.0", "cluster2.2": "nonlinear.2"}
"""Layers of the head: the authors' names and ours."""
PARTS = ("weight", "bias")
NAMES = {
    **{f"net.{theirs}.{part}": f"head.{ours}.{part}" for theirs, ours in LAYERS.items() for part in PARTS},
    **{f"project_head.{part}": f"projection.linear.{part}" for part in PARTS},
    **{f"linear_probe.{part}": f"linear_probe.classifier.{part}" for part in PARTS},
    "cluster_probe.clusters": "cluster_probe.clusters",
    "train_cluster_probe_eigen.clusters": "cues.positive.clusters",
    "train_cluster_probe_eigen_aug.clusters": "cues.augmented.clusters",
}
EIGENVECTORS, MEDOIDS = eicue.eigenvectors, object_contrast.medoids
KINDS = {"prototype": "medoid", "medoid": "medoid", "mean": "mean"}
"""How the prototypes are made: the authors' words and ours."""


def _leaf(case: Case, name: str) -> Tensor:
    return replay.tensor(case[name]).requires_grad_()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def _rules(case: Case) -> dict[str, bool]:
    return {name: bool(case[f"cfg_{name}"]) for name in RULES}


def _shift(case: Case) -> adaptive_shift.ShiftRule:
    return adaptive_shift.ShiftRule(float(case["cfg_shift_value"]), float(case["cfg_shift_bias"]))


def corr_helper(case: Case) -> Case:
    features = tuple(replay.tensor(case[f"in_feats{n}"]) for n in (1, 2))
    codes = tuple(_leaf(case, f"in_code{n}") for n in (1, 2))
    found = adaptive_shift.adaptive_correspondence(
        features, codes, _shift(case), bool(case["cfg_positive"]), **_rules(case)
    )
    found.loss.backward()
    loss, similarity = correspondence(features, codes, found.shift.detach(), **_rules(case))
    return {
        "out_shift": _array(found.shift),
        "out_cd": _array(similarity),
        "out_loss": _array(loss),
        "out_grad_code1": _array(codes[0].grad),
        "out_grad_code2": _array(codes[1].grad),
    }


def corr_loss(case: Case) -> Case:
    views = {"": "1", "_pos": "2", "_aug": "3"}
    features = {view: replay.tensor(case[f"in_feats{view}"]) for view in views}
    codes = {view: _leaf(case, f"in_code{view}") for view in views}
    points = {view: replay.tensor(case[f"in_coords{number}"]) for view, number in views.items()}
    anchor, near, blurred = ((sample(features[view], at), sample(codes[view], at)) for view, at in points.items())

    def loss(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], positive: bool) -> Tensor:
        pairs = zip(one, two, strict=True)
        return adaptive_shift.adaptive_correspondence(*pairs, _shift(case), positive, **_rules(case)).loss

    positive = loss(blurred, near, positive=True)
    others = [
        tuple(sample(maps[""][rows], points["_pos"]) for maps in (features, codes))
        for rows in replay.tensor(case["in_perm_neg"])
    ]
    negative = torch.stack([loss(anchor, other, positive=False) for other in others]).mean()
    total = float(case["cfg_pos_weight"]) * positive + float(case["cfg_neg_weight"]) * negative
    total.backward()
    losses = {"out_pos_loss": positive, "out_neg_loss": negative, "out_total": total}
    gradients = {f"out_grad_code{view}": codes[view].grad for view in views}
    return {name: _array(value) for name, value in {**losses, **gradients}.items()}


@torch.no_grad()
def _graph(case: Case) -> tuple[Tensor, Tensor]:
    """The colours' part of the graph, and the graph."""
    image = replay.tensor(case["in_image"])
    size = int(case["cfg_grid_h"]), int(case["cfg_grid_w"])
    coloured = eicue.colour_affinity(eicue.colours(image, image, size, "released"))
    return coloured, eicue.affinity(replay.tensor(case["in_code"]), coloured)


@torch.no_grad()
def affinity_laplacian(case: Case) -> Case:
    coloured, graph = _graph(case)
    degree = eigen.degrees(graph)
    identity = torch.eye(graph.shape[1]).expand_as(graph)
    return {
        "out_color_affinity": _array(coloured),
        "out_affinity": _array(graph),
        "out_degree": _array(degree),
        "out_laplacian": _array(identity - eigen._Graph(graph, graph.sum(2), normalized=True).apply(identity)),
    }


def eigenvectors(case: Case) -> Case:
    _, graph = _graph(case)
    count = int(case["cfg_num_vectors"])
    return {
        "out_eigenvalues": _array(eigen.smallest(graph, count).values),
        "out_vector_rows": _array(eicue.eigenvectors(graph, count).flatten(0, 1)),
        "out_next_eigenvalue": _array(eigen.smallest(graph, count + 1).values[:, -1]),
    }


def sign_rule(case: Case) -> Case:
    vectors = replay.tensor(case["in_eigenvectors"]).mT
    found = eicue.signed(vectors, "picture")
    return {"out_eigenvectors": _array(found.mT), "out_flipped": _array((found != vectors).any(2).any(1))}


def eicue_assign(case: Case) -> Case:
    vectors, centroids = (replay.tensor(case[name]) for name in ("in_eigenvectors", "in_centroids"))
    probe = ClusterProbe(centroids.shape[1], len(centroids))
    with torch.no_grad():
        probe.clusters.copy_(centroids)
    alpha = float(case["cfg_alpha"])
    loss, _ = probe(vectors, alpha=alpha)
    loss.backward()
    with torch.no_grad():
        return {
            "out_log_probs": _array(probe(vectors, alpha=alpha, log_probs=True)),
            "out_labels": _array(probe.scores(vectors).argmax(1)),
            "out_loss": _array(loss),
            "out_grad_centroids": _array(probe.clusters.grad),
        }


def obj_nce(case: Case) -> Case:
    own, other = _leaf(case, "in_z1"), _leaf(case, "in_z2")
    labels = replay.tensor(case["in_labels"]).flatten()
    weights = object_contrast.patch_weights(replay.tensor(case["in_feats"])).flatten()
    mode, count = str(case["cfg_mode"]), int(labels.max()) + 1
    learned = None
    if mode == "learned":  # a table in place of prototypes that come from the rows
        learned = _leaf(case, "in_learned_centroids")
        table = learned[None, :count], F.one_hot(labels, count).amax(0)[None] > 0
    else:
        table = object_contrast.prototypes(own[None], labels[None], count, KINDS[mode])
    found = object_contrast.object_loss(
        own[None],
        other[None],
        labels[None],
        weights[None],
        table,
        temperature=float(case["cfg_temperature"]),
        across=float(case["cfg_global_weight"]),
        smoothing=float(case["cfg_label_smoothing"]),
    )
    found.total.backward()
    present = table[1][0]
    results = {
        "out_present_labels": present.nonzero()[:, 0],
        "out_weights": weights,
        "out_centroids": table[0][0][present],
        "out_local_loss": found.local,
        "out_global_loss": found.across,
        "out_loss": found.total,
        "out_grad_z1": own.grad,
        "out_grad_z2": other.grad,
    }
    if KINDS.get(mode) == "medoid":
        results["out_medoid_index"] = object_contrast.medoids(own[None], labels[None], count)[0][present]
    if learned is not None:
        results["out_grad_learned_centroids"] = learned.grad
    return {name: _array(value) for name, value in results.items()}


@torch.no_grad()
def featurizer(case: Case) -> Case:
    grid = int(case["cfg_grid_h"]), int(case["cfg_grid_w"])
    tokens, projections = replay.tensor(case["in_block_tokens"]), replay.tensor(case["in_block_qkv"])
    prefix = tokens.shape[2] - grid[0] * grid[1]
    maps = Features([block[:, prefix:].mT.unflatten(2, grid) for block in tokens[-3:]]).concat()
    keys = Features([key_map(block, prefix, grid) for block in projections[-3:]]).concat()
    head = SegmentationHead(keys.shape[1], len(case["in_lin_weight"]))
    for name, ours in zip(("lin", "nl1", "nl2"), LAYERS.values(), strict=True):
        head.get_submodule(ours).load_state_dict({part: replay.tensor(case[f"in_{name}_{part}"]) for part in PARTS})
    found = {"image_feat": maps, "image_kk": keys, "code": head(maps), "code_kk": head(keys)}
    return {f"out_{name}": _array(value) for name, value in found.items()}


def loss_schedule(case: Case) -> Case:
    start, limit = int(case["cfg_start_step"]), float(case["cfg_limit"])
    share = np.array([object_contrast.object_share(int(step), start, limit) for step in case["in_step"]])
    return {"out_object_factor": share, "out_correspondence_factor": 1 - share}


# Whole steps.


def training(case: Case) -> Case:
    """Whole steps of the released loop, its validations and its final evaluation, by the real method."""
    images = replay.pictures(case["in_images"])
    mean, std = (replay.tensor(case[name])[:, None, None] for name in ("in_mean", "in_std"))
    blurred = replay.tensor(case["in_augmented"]) * std + mean
    batches = [
        replay.batch(part, label, augmented=view)
        for part, label, view in zip(images, case["in_labels"], blurred, strict=True)
    ]
    renamed = {name: value for name, value in case.items() if not name.startswith(replay.INITIAL)}
    for theirs, ours in NAMES.items():
        renamed[replay.INITIAL + ours] = case[replay.INITIAL + theirs]
    draws = Draws(case)
    kept: list[dict[str, Tensor]] = []

    def watch(model: Any) -> dict[str, Tensor]:
        kept.append(replay.copied(dict(model.state_dict())))
        return {}

    with tempfile.TemporaryDirectory() as name, draws:
        folder = Path(name)
        model = replay.method(renamed, _words(case), folder, int(case["cfg_classes"]))
        steps = replay.train(model, replay.Recorded(batches, len(batches)), folder, len(batches), watch)
        results = _scored(case, model, steps, kept)
    logged, theirs = steps.logged, {ours: name for name, ours in NAMES.items()}
    terms = {"factor": "object_share", "linear": "linear_probe", "cluster": "cluster_probe", "total": "total"}
    terms |= {name: name for name in ("positive", "negative", "similarity_positive", "similarity_negative")}
    terms |= {name: name for view in method.ANCHORS for name in (f"cue_{view}", f"object_{view}")}
    results |= {f"out_{name}": logged[ours] for name, ours in terms.items()}
    results |= draws.results(len(batches))
    later = steps.gradients[int(case["cfg_object_gradient_step"])]
    gradients = {
        **steps.first_gradients(),
        **{f"out_grad_object__{name}": value.numpy() for name, value in later.items()},
        **steps.after(),
    }
    for name, value in gradients.items():
        prefix, part = name.split("__")
        if part in theirs:
            results[f"{prefix}__{theirs[part]}"] = value
    return results


def _scored(case: Case, model: Any, steps: replay.Steps, kept: list[dict[str, Tensor]]) -> Case:
    """Validations after the recorded steps, and the final evaluation, which averages with the mirrored picture."""

    def scores(step: int, images: str, flip: bool = False) -> list[float]:
        model.load_state_dict(kept[step - 1])
        OmegaConf.set_readonly(model.cfg, False)
        OmegaConf.update(model.cfg, "evaluation.flip", flip)
        found = replay.scores(model, steps, replay.pictures(case[f"in_{images}_images"]), case[f"in_{images}_labels"])
        return [value for probe in ("linear", "cluster") for value in (found[probe].miou, found[probe].acc)]

    return {
        "out_val_scores": np.array([scores(int(step), "val") for step in case["cfg_val_steps"]]),
        "out_scores": np.array(scores(len(kept), "test", flip=True)),
    }


def _words(case: Case) -> list[str]:
    names = {
        "method.dim": "dim",
        "method.samples": "feature_samples",
        "method.negatives.repeats": "neg_samples",
        "method.pointwise": "pointwise",
        "method.zero_clamp": "zero_clamp",
        "method.stabilize": "stabalize",
        "method.shift.scale": "shift_value",
        "method.shift.bias": "shift_bias",
        "method.cue.vectors": "eigen_cluster",
        "method.cue.clusters": "eigen_cluster_out",
        "method.objects.start": "step_schedulers",
        "method.objects.share": "momentum_limit",
        "method.objects.weights.positive": "local_pos_weight",
        "method.objects.weights.augmented": "local_pos_aug_weight",
        "method.objects.across": "global_loss_weight",
        "method.objects.temperature": "contrastive_temp",
        "method.objects.smoothing": "label_smoothing",
        "method.dropout.p": "dropout_p",
        "method.dropout.signal": "dropout",
        "optim.head.lr": "lr",
        "optim.projection.lr": "lr",
        "optim.cue.lr": "lr_cluster_eigen",
        "optim.linear_probe.lr": "lr_linear",
        "optim.cluster_probe.lr": "lr_cluster",
    }
    weights = {kind: case[f"cfg_{name}_inter_weight"] for kind, name in (("positive", "pos"), ("negative", "neg"))}
    return [
        "method=eagle",
        f"method.num_clusters={int(case['cfg_classes']) + int(case['cfg_extra_clusters'])}",
        *(f"{key}={str(case[f'cfg_{name}'].item()).lower()}" for key, name in names.items()),
        *(f"method.terms.{kind}={float(case['cfg_correspondence_weight'] * weights[kind])}" for kind in weights),
        f"method.objects.prototypes={KINDS[str(case['cfg_centroid_mode'])]}",
        "method.cue.colour=released",
        "method.cue.sign=picture",
        "method.cue.scope=batch",
        "evaluation.cluster_init=normal",
        "evaluation.extra=stego_compat",
    ]


class Draws:
    """While open: the draws of a case in place of the method's own, and what the method hides is kept.

    Signs of eigenvectors are a draw too: those of the case have to be eigenvectors of the method's graph, and are used.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.p = case, float(case["cfg_dropout_p"])
        self.shifts: list[Tensor] = []
        self.values: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.medoids: list[Tensor] = []
        names = ("own_channel_masks", "random_points", "random_negatives", "adaptive_correspondence", "prototypes")
        self.patches = [
            patch.multiple(method, **{name: getattr(self, name) for name in names}),
            patch.object(eicue, "eigenvectors", self.eigenvectors),
            patch.object(eicue, "signed", lambda rows, rule: rows),
            patch.object(object_contrast, "medoids", self.found_medoids),
        ]

    def __enter__(self) -> "Draws":
        for item in self.patches:
            item.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for item in self.patches:
            item.stop()

    def own_channel_masks(self, seed: int, purpose: str, step: int, maps: Tensor, p: float) -> Tensor | None:
        """purpose: eagle.dropout.<view>.<use>."""
        _, _, view, use = purpose.split(".")
        return replay.kept(self.case, f"in_keep_{view}_{use}", self.p)[step] if p > 0 else None

    def random_points(self, seed: int, purpose: str, step: int, count: int, side: int) -> Tensor:
        """purpose: eagle.points.1 to 3."""
        return replay.tensor(self.case[f"in_points_{purpose[-1]}"])[step]

    def random_negatives(self, seed: int, step: int, *args: Any, **keys: Any) -> Tensor:
        return replay.tensor(self.case["in_perm"])[step]

    def eigenvectors(self, graph: Tensor, k: int, solver: str) -> Tensor:
        """Those of the views in turn, as the method asks for them."""
        given = replay.tensor(self.case["in_eigenvectors"]).mT.flatten(0, 1)[len(self.values)]
        self.values.append(eigen.smallest(graph, k + 1).values)
        operator = eigen._Graph(graph, graph.sum(2), normalized=True)
        residuals = operator.residuals(1 - self.values[-1][:, 1:k], given)
        if not bool((residuals < 1e-4).all()):
            raise ValueError(f"eigenvectors are not those of the method's graph: residual {float(residuals.max()):.2g}")
        return torch.cat([EIGENVECTORS(graph, k, solver)[:, :1], given], dim=1)

    def adaptive_correspondence(self, *args: Any, **keys: Any) -> adaptive_shift.Pair:
        found = adaptive_shift.adaptive_correspondence(*args, **keys)
        self.shifts.append(found.shift.detach())
        return found

    def prototypes(self, rows: Tensor, labels: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        self.labels.append(labels.flatten())
        return object_contrast.prototypes(rows, labels, *args)

    def found_medoids(self, *args: Any) -> Tensor:
        self.medoids.append(MEDOIDS(*args))
        return self.medoids[-1]

    def results(self, count: int) -> Case:
        """What was kept of `count` steps."""
        shifts = torch.stack(self.shifts).view(count, -1)
        size = [side // int(self.case["cfg_dino_patch_size"]) for side in self.case["in_images"].shape[-2:]]
        pictures = self.case["in_images"].shape[1]
        found = {
            "out_shift_positive": shifts[:, 0],
            "out_shift_negative": shifts[:, 1:],
            "out_eigenvalues": torch.stack(self.values).unflatten(0, (count, -1)),
            "out_cue_labels": torch.stack(self.labels).view(count, -1, pictures, *size),
        }
        if self.medoids:
            found["out_medoids"] = torch.stack(self.medoids).view(count, len(method.ANCHORS), -1)
        return {name: _array(value) for name, value in found.items()}
