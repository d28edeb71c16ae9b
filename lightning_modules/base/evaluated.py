"""The evaluation of every method: its probes and further read-outs, validation, and what they log."""

import math
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.spec import ClassMeta
from evaluation import fcn_probe, readout, sliding
from evaluation.crf import Constants, DenseCRF
from evaluation.instances import InstanceScore
from evaluation.matching import Scores, told_apart
from evaluation.metrics import ClusterUsage, SegmentationScore
from evaluation.overclustering import readout as overclustering
from evaluation.probes import (
    LABEL_PROBES,
    UNLABELLED,
    ClusterProbe,
    KMeansProbe,
    LinearProbe,
    clusters_of,
    components_of,
)
from evaluation.retrieval import configured
from models.backbone import Features
from reporting import report

FCN = "further.fcn.probe."
"""Of the weights of the FCN probe in the state dict."""


class Evaluated(L.LightningModule):
    """A part of UnsupervisedSegmenter, which gives `cfg`, `meta`, `code_dim`, and what a method writes."""

    cfg: DictConfig
    meta: ClassMeta
    has_own_scores: bool
    has_prototypes: bool
    classifies: bool
    headline: str
    trains: bool
    sure: float = 0.5
    """Score from which an object that the method finds is shown to people."""
    sharpness: float = 2.0
    """What cosines to `prototypes` are multiplied by before the softmax that the dense CRF starts from."""

    def build_evaluation(self, linear_probe: bool) -> None:
        """Probes, read-outs and metrics; once, after the method's `build`."""
        cfg, meta, rules = self.cfg, self.meta, self.cfg.evaluation
        clusters = cfg.method.num_clusters
        self.cluster_probe = ClusterProbe(
            self.code_dim, clusters, cfg.seed, init=rules.cluster_init, reseed=rules.cluster_reseed
        )
        self.kmeans_probe = KMeansProbe(self.code_dim, clusters_of(cfg, "kmeans"), components_of(cfg, self.code_dim))
        self.linear_probe = (
            LinearProbe(self.code_dim, meta.num_classes, cfg.seed, rules.linear_mean)
            if meta.has_labels and linear_probe
            else None
        )
        self.posthoc_probe: LinearProbe | None = None  # `set_posthoc` gives one, after training
        self.confusion = nn.ModuleDict(
            {probe: self._confusion(probe) for probe in self.probe_names()} if meta.has_labels else {}
        )
        sliding.check(rules.window.size, rules.window.stride, self.backbone.unit, cfg.backbone.cache_features)
        asked = (*configured(rules, meta), *fcn_probe.configured(cfg, meta), *overclustering.configured(cfg, meta))
        self.further = nn.ModuleDict({item.name: item for item in (*asked, *self.readouts)})
        self.usage = nn.ModuleDict({probe: ClusterUsage(clusters_of(cfg, probe)) for probe in UNLABELLED})
        constants = Constants(**rules.crf_constants)
        constants.check("evaluation.crf_constants")
        self.crf = DenseCRF(constants) if rules.crf == "dense" else None
        self.refining = False
        self.validated: dict[str, Scores] = {}

    @property
    def wants_instances(self) -> bool:
        """Whether validation wants objects one by one beside the labels."""
        return any(item.instances for item in self.further.values())

    @property
    def scores_instances(self) -> bool:
        """Whether the method finds objects one by one."""
        return any(isinstance(item, InstanceScore) for item in self.further.values())

    @property
    def main_probe(self) -> str:
        """The clusters that figures and panels speak of: the headline's, where that gives any, else `centroids`."""
        return self.headline if self.headline in self.probe_names() else self.centroids

    @property
    def centroids(self) -> str:
        """The probe whose centroids codes are compared with: k-means where the method itself trains nothing."""
        return "cluster" if self.trains else "kmeans"

    def probe_names(self) -> list[str]:
        """Read-outs that exist, in the order of tables."""
        own = ["own"] if self.has_own_scores else []
        learned = {"linear": self.linear_probe, "linear_posthoc": self.posthoc_probe}
        return ["cluster", "kmeans", *own, *(name for name, probe in learned.items() if probe is not None)]

    def label_free(self) -> list[str]:
        """Read-outs that are scored without labels and are ready: k-means is once it is fitted, when a run ends."""
        return [probe for probe in UNLABELLED if probe != "kmeans" or self.kmeans_probe.fitted]

    def _confusion(self, probe: str) -> SegmentationScore:
        rows = self.meta.num_classes if probe in LABEL_PROBES else clusters_of(self.cfg, probe)
        rules = self.cfg.evaluation
        matching = "identity" if probe in LABEL_PROBES else rules.matching
        return SegmentationScore(
            rows, self.meta.num_classes, matching, rules.extra, rules.absent, background=rules.background
        )

    @property
    def window(self) -> tuple[int, int] | None:
        """Side and stride of `evaluation.window`, px; None: pictures are seen as a whole."""
        own = self.cfg.evaluation.window
        return None if own.size is None else (own.size, own.stride or max(1, own.size // 2))

    @property
    def pad_multiple(self) -> int:
        """Pixels to multiples of which pictures are padded: whole cells at every level of the backbone."""
        return self.backbone.unit

    def seen(self, images: Tensor, features: Features | None = None, own: bool = False) -> dict[str, Tensor]:
        """`codes` [B,D,h,w] of pictures [B,3,H,W] in 0..1; with `own` the method's score maps [B,K,h,w] as well.

        By windows where `evaluation.window` asks for them. `features` are those of the pictures, where they are known.
        """

        def whole(part: Tensor) -> dict[str, Tensor]:
            known = self.features(part) if features is None else features
            return {"codes": self.embed(known), **({"own": self.scores(known)} if own else {})}

        if self.window is None:
            return whole(images)
        return sliding.averaged(images, whole, *self.window, self.backbone.unit)

    @property
    def fitting(self) -> bool:
        """True in the validations of a training, which do without what is for the closing evaluation alone."""
        return self._trainer is not None and self._trainer.state.fn == "fit"

    def read(self, images: Tensor, features: Features | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes [B,D,h,w], and score maps [B,K,h,w] of every read-out that is ready, for pictures [B,3,H,W] in 0..1.

        `features` are those of the pictures, where they are known.
        """
        from_codes = self.has_prototypes or self.classifies
        found = self.seen(images, features, own=self.has_own_scores and not from_codes)
        codes = found["codes"]
        if self.cfg.evaluation.flip and not self.fitting:
            codes = readout.flip_average(codes, self.seen(images.flip(-1))["codes"])
        scores = {"cluster": self.cluster_probe.scores(codes)}
        if self.kmeans_probe.fitted:
            scores["kmeans"] = self.kmeans_probe.scores(codes)
        if self.has_own_scores:
            scores["own"] = self._own(codes) if from_codes else found["own"]
        if self.linear_probe is not None:
            scores["linear"] = self.linear_probe(codes)
        if self.posthoc_probe is not None:
            scores["linear_posthoc"] = self.posthoc_probe(codes)
        return codes, scores

    def _own(self, codes: Tensor) -> Tensor:
        return self.classify(codes) if self.classifies else readout.dot_products(codes, self.prototypes())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Update the metrics; returns the id maps [B,H,W] of every read-out, and as `confidence` the cosines
        [B,H,W] of the codes to their centroids (of `centroids`, before they are fitted of the cluster probe)."""
        codes, scores = self.read(batch["image"], None if self.window else self.features_of(batch))
        maps = {probe: readout.predict(values, batch["image"].shape[-2:]) for probe, values in scores.items()}
        for probe in self.label_free():
            self.usage[probe].update(scores[probe], codes, batch["valid"])
        further = self._further(batch, codes)
        if self.refining:
            maps |= self.refined(batch["image"], batch["valid"], codes, scores)
        if "label" in batch:
            for probe in maps:
                self.confusion[probe].update(maps[probe], batch["label"])
        _, cosine = readout.winners(scores.get(self.centroids, scores["cluster"]), codes)
        return maps | further | {"confidence": readout.upsample(cosine[:, None], batch["image"].shape[-2:])[:, 0]}

    def _further(self, batch: dict[str, Any], codes: Tensor) -> dict[str, Tensor]:
        """The id maps of the further read-outs that are ready, after they have looked at the batch."""
        found: dict[str, Tensor] = {}
        for item in self.further.values():
            if item.ready:
                found |= item.see(self, batch, codes)
        return found

    def log_probs(self, codes: Tensor, scores: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Log-probabilities [B,K,H,W] of each read-out: softmax of logits, or of cosines to centroids, sharpened."""
        probes = {"cluster": self.cluster_probe, "kmeans": self.kmeans_probe}

        def of(name: str, values: Tensor) -> Tensor:
            if name in probes:
                return probes[name].log_probs(codes, size)
            if name == "own" and self.has_prototypes:
                return readout.cluster_log_probs(codes, self.prototypes(), size, alpha=self.sharpness)
            return readout.log_probs(values, size)

        return {name: of(name, values) for name, values in scores.items()}

    def refined(self, images: Tensor, valid: Tensor, codes: Tensor, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Id maps [B,H,W] of every read-out after the dense CRF, as `<probe>_crf`; one lattice serves all read-outs."""
        parts: list[list[Tensor]] = []
        step = self.crf.at_once(images)
        for first in range(0, len(images), step):  # so that no more upsampled probabilities are held than needed
            rows = slice(first, first + step)
            own = {probe: values[rows] for probe, values in scores.items()}
            probs = self.log_probs(codes[rows], own, tuple(images.shape[-2:]))
            parts.append(self.crf.predict(images[rows, :3], valid[rows], list(probs.values())))
        return {f"{probe}_crf": torch.cat(maps) for probe, maps in zip(scores, zip(*parts, strict=True), strict=True)}

    def on_validation_epoch_start(self) -> None:
        self.refining = self.crf is not None and not self.fitting  # it takes long
        for probe in [name for name in self.confusion if self.refining and not name.endswith("_crf")]:
            self.confusion[f"{probe}_crf"] = self._confusion(probe).to(self.device)
        for metric in (*self.confusion.values(), *self.usage.values(), *self.further.values()):
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        self.trainer.datamodule.sync_broken()
        fitted = bool(self.kmeans_probe.fitted)
        ready = [probe for probe in self.confusion if fitted or not probe.startswith("kmeans")]
        scores = {probe: self.confusion[probe].compute() for probe in ready}
        others = {row: found for item in self.further.values() if item.ready for row, found in item.results().items()}
        scores |= {name: found for name, found in others.items() if isinstance(found, Scores)}
        self.validated = {probe: told_apart(found) for probe, found in scores.items() if found.counts.any()}
        values: dict[str, float | None] = {}
        for probe in self.label_free():
            values |= report.flatten("val", probe, self.usage[probe].compute())
        for name in (name for name in others if name not in scores):
            values |= report.flatten("val", name, others[name])
        partition = self.cfg.evaluation.partition
        groups = {} if partition == "none" else self.meta.groups
        for probe, scores in self.validated.items():
            parts = {} if math.isnan(scores.acc) else groups
            values |= report.flatten("val", probe, scores, parts, restricted=partition == "within")
        known = {name: value for name, value in values.items() if value is not None}
        self.log_dict(known, rank_zero_only=True)
        shown = (f"{self.headline}/miou", "linear/miou") if self.validated else ("cluster/entropy",)
        for name in shown:
            if f"val/{name}" in known:
                self.log(name, known[f"val/{name}"], prog_bar=True, logger=False, rank_zero_only=True)

    def set_posthoc(self, probe: LinearProbe) -> None:
        """Take a linear probe that was trained after the network; it is scored as val/linear_posthoc/*."""
        self.posthoc_probe = probe.to(self.device).requires_grad_(False)
        if self.meta.has_labels:
            self.confusion["linear_posthoc"] = self._confusion("linear_posthoc").to(self.device)

    def offline_state(self) -> dict[str, Tensor]:
        """The part of the state dict that is fitted after training: k-means centroids, post-hoc probes."""
        fitted = ("kmeans_probe.", "posthoc_probe.", FCN)
        return {name: value for name, value in self.state_dict().items() if name.startswith(fitted)}
