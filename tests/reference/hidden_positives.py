"""Adapters for `hidden_positives.*`: the released functions of HP, replayed by ours."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from lightning_modules import hidden_positives
from losses import contrastive
from losses.consistency import consistency as consistency_loss
from losses.local_positives import attention_weights, neighbour_mix, neighbourhood, row_attention
from models.heads import ProjectionHead, SegmentationHead
from models.momentum import Momentum
from retrieval.memory import REFILL_ROWS, pool_from_maps
from tests.reference import training as replay

Case = dict[str, np.ndarray]
TERMS = ("linear", "nonlinear")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def ghp_contrastive(case: Case) -> Case:
    """Thresholds, masks, loss and gradients; faithful results are left out where the release has no finite value."""
    names = ("in_z", "in_z_mix", "in_f", "in_s_ema", "in_pool_ag", "in_pool_sp")
    z, z_mix, f, s_ema, pool_ag, pool_sp = (_tensor(case[name]) for name in names)
    rho = case["cfg_rho"]
    uniform = _tensor(case["in_uniform"])
    cells = int(case["cfg_spatial_size"]) ** 2
    pictures = len(z) // cells
    threshold_ag, threshold_sp = contrastive.thresholds(f, pool_ag), contrastive.thresholds(s_ema, pool_sp)
    candidates = uniform < _tensor(rho)
    rows = [slice(number * cells, (number + 1) * cells) for number in range(pictures)]
    mask_ag = [contrastive.positive_mask(f, threshold_ag, part) for part in rows]
    mask_sp = [contrastive.positive_mask(s_ema, threshold_sp, part) for part in rows]
    inside = [contrastive.denominator_mask(mask, candidates, n * cells) for n, mask in enumerate(mask_ag)]

    def run(guarded: bool, only: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        sides = [side.clone().requires_grad_() for side in (z, z_mix)]
        loss = contrastive.ghp_contrastive(
            *sides,
            f,
            s_ema,
            threshold_ag,
            threshold_sp,
            cells=cells,
            temperature=float(case["cfg_temperature"]),
            lam=float(case["cfg_lambda"]),
            candidates=None if rho >= 1 else candidates,
            reweighting=bool(case["cfg_reweighting"]),
            version=int(case["cfg_loss_version"]),
            pictures=only,
            guarded=guarded,
        )
        loss.backward()
        return loss.detach(), *[torch.zeros_like(side) if side.grad is None else side.grad for side in sides]

    results = {
        "out_threshold_ag": threshold_ag,
        "out_threshold_sp": threshold_sp,
        "out_mask_ag": torch.cat(mask_ag),
        "out_mask_sp": torch.cat(mask_sp),
        "out_denominator_mask": torch.cat(inside),
    }
    loss, grad, grad_mix = run(guarded=True)
    results |= {"out_guarded_loss": loss, "out_guarded_grad_z": grad, "out_guarded_grad_z_mix": grad_mix}
    loss, grad, grad_mix = run(guarded=False)
    single = torch.stack([run(guarded=False, only=(number, 1))[0] for number in range(pictures)])
    faithful = {
        "out_loss": loss,
        "out_running_loss_before_scaling": 2 * single.cumsum(0),
        "out_grad_z": grad,
        "out_grad_z_mix": grad_mix,
    }
    results |= {name: value for name, value in faithful.items() if value.isfinite().all()}
    return {name: value.numpy() for name, value in results.items()}


def backbone_head_lhp(case: Case) -> Case:
    """Head, momentum head, local-positive weights, mixing and the momentum update, without dropout."""
    tokens, logits, qkv = (_tensor(case[name]) for name in ("in_tokens", "in_attn_logits", "in_qkv"))
    side = int(case["cfg_spatial_size"])
    prefix = tokens.shape[1] - side * side
    if str(case["cfg_feat_type"]) == "KK":  # the keys of the last block, heads side by side
        tokens = qkv[1].transpose(1, 2).flatten(2)
    features = tokens[:, prefix:].transpose(1, 2).unflatten(2, (side, side)).contiguous()
    head = SegmentationHead(features.shape[1], len(case["in_lin_weight"]))
    momentum = Momentum(head)
    _load(head, case, "in_")
    _load(momentum.copy, case, "in_ema_")

    codes, momentum_codes = head(features), momentum(features)
    sigma = float(case["cfg_sigma"])
    attention = torch.stack([row_attention(picture, sigma) for picture in logits[:, :, prefix:, prefix:].mean(1)])
    index, valid = neighbourhood(side, side)
    mixed = neighbour_mix(codes, attention_weights(logits, prefix, (side, side), sigma))
    mixed.square().sum().backward()
    momentum.update(float(case["cfg_ema_m"]))
    mask = torch.zeros(len(index), len(index) + 1, dtype=torch.bool)
    mask.scatter_(1, index.where(valid, len(index)), True)
    results = {
        "out_image_feat": features,
        "out_code": codes,
        "out_code_ema": momentum_codes,
        "out_attention": attention,
        "out_neighbour_mask": mask[:, :-1],
        "out_neighbour_count": valid.sum(1),
        "out_code_mix": mixed,
        "out_grad_lin_weight_of_sum_sq_mix": head.linear.weight.grad,
    }
    inner, _, outer = momentum.copy.nonlinear
    for name, layer in (("lin", momentum.copy.linear), ("nl1", inner), ("nl2", outer)):
        results |= {f"out_ema_{name}_weight": layer.weight, f"out_ema_{name}_bias": layer.bias}
    return {name: value.detach().numpy() for name, value in results.items()}


@torch.no_grad()
def _load(head: SegmentationHead, case: Case, prefix: str) -> None:
    inner, _, outer = head.nonlinear
    for name, layer in (("lin", head.linear), ("nl1", inner), ("nl2", outer)):
        layer.weight.copy_(_tensor(case[f"{prefix}{name}_weight"]))
        layer.bias.copy_(_tensor(case[f"{prefix}{name}_bias"]))


def reference_pool(case: Case) -> Case:
    """Both pools, and the renewed one, from recorded network outputs and positions."""
    size = int(case["cfg_pool_size"])
    maps = {"ag": "in_f_maps", "sp": "in_s_maps", "sp_renew": "in_s_maps"}
    pools = {
        name: pool_from_maps(_tensor(case[source]), _tensor(case[f"in_index_{name}"]), size, half=True)
        for name, source in maps.items()
    }
    results = {f"out_pool_{name}": pool.numpy() for name, pool in pools.items()}
    results["out_batches_used"] = np.array(-(-len(pools["ag"]) // int(case["cfg_batch_size"])))
    return results


def consistency(case: Case) -> Case:
    """The loss of two sets of codes through one projection head, and the head's gradients."""
    codes, augmented = _tensor(case["in_s"]), _tensor(case["in_s_aug"])
    head = ProjectionHead(codes.shape[1])
    with torch.no_grad():
        head.linear.weight.copy_(_tensor(case["in_proj_weight"]))
        head.linear.bias.copy_(_tensor(case["in_proj_bias"]))
    z, z_aug = head(codes), head(augmented)
    loss = consistency_loss(z, z_aug)
    loss.backward()
    results = {
        "out_z": z,
        "out_z_aug": z_aug,
        "out_loss": loss,
        "out_grad_proj_weight": head.linear.weight.grad,
        "out_grad_proj_bias": head.linear.bias.grad,
    }
    return {name: value.detach().numpy() for name, value in results.items()}


def lambda_schedule(case: Case) -> Case:
    """The weight of the task-specific positives at the recorded steps."""
    warmup, maximum = int(case["cfg_warmup"]), int(case["cfg_max_iterations"])
    values = [contrastive.lambda_schedule(int(step), warmup, maximum) for step in case["in_iteration"]]
    return {"out_lambda": np.array(values, np.float64)}


def training(case: Case) -> Case:
    """Whole steps of the released loop, its renewals of the pools and its evaluation, by the real method."""
    classes = len(case["in_initial__linear_probe.classifier.weight"])
    images = replay.pictures(case["in_images"])
    batches = [
        replay.batch(images[step], case["in_labels"][step], augmented=_tensor(case["in_augmented"][step]))
        for step in range(len(images))
    ]
    draws = Draws(case)
    steps_per_epoch = int(case["cfg_steps_per_epoch"])
    data = replay.Recorded(batches, steps_per_epoch, draws.pass_of, images.shape[1])
    total_steps = int(case["cfg_epochs"]) * steps_per_epoch
    with tempfile.TemporaryDirectory() as name, patch.multiple(hidden_positives, **draws.functions()):
        folder = Path(name)
        model = replay.method(case, _words(case), folder, classes)
        model.momentum_head.copy.load_state_dict(model.head.state_dict())
        # Where alpha is 0 the release looks at the second view all the same and its loss is recorded.
        aside = None if model.cfg.method.alpha > 0 else lambda model: {"consistency": _consistency(model, batches)}
        steps = replay.train(model, data, folder, total_steps, watch=_pool, before=aside)
        found = _scores(case, model, steps)

    logged, seen = steps.logged, steps.seen
    terms = {"linear": "linear_probe", "cluster": "cluster_probe"} | {
        name: name for name in ("lambda", "contrastive", "consistency", "total")
    }
    results = {f"out_{name}": logged.get(ours, seen.get(ours)) for name, ours in terms.items()}
    norms = [
        torch.stack([rows[name].norm() for name in rows if name.startswith("head.")]).norm() for rows in steps.gradients
    ]
    results |= {
        "out_grad_norm": torch.stack(norms).numpy(),
        "out_pool_ag": model.pool.agnostic_rows().numpy(),
        "out_pool_sp": seen["pool"],
    }
    return results | found | steps.first_gradients() | steps.after()


def _words(case: Case) -> list[str]:
    names = {
        "method.dim": "dim",
        "method.temperature": "tau",
        "method.alpha": "alpha",
        "method.rho": "rho",
        "method.ema": "ema_m",
        "method.lambda_warmup": "warmup",
        "method.lhp.sigma": "sigma",
        "method.pool.size": "pool_size",
        "method.pool.renew_every": "renew_interval",
        "method.dropout.p": "dropout_p",
        "optim.head.lr": "lr_net",
        "optim.head.weight_decay": "weight_decay_net",
        "optim.head.clip_norm": "grad_norm",
        "optim.projection.lr": "lr_projection",
        "optim.linear_probe.lr": "lr_linear",
        "optim.cluster_probe.lr": "lr_cluster",
    }
    return [
        "method=hidden_positives",
        f"method.num_clusters={len(case['in_initial__cluster_probe.clusters'])}",
        *(f"{key}={case[f'cfg_{name}'].item()}" for key, name in names.items()),
        f'method.loss_version="{int(case["cfg_loss_version"])}"',
        f"method.reweighting={bool(case['cfg_reweighting'])}",
        f"method.dropout.outputs={'in_keep_features_out' in case}",
        "method.denominator=agnostic",
        "method.lhp.attention=backbone",
        "method.pool.refill=release",
        "method.pool.half=true",
        "evaluation.cluster_init=normal",
        "evaluation.extra=stego_compat",
    ]


class Draws:
    """The draws of a case under the names and arguments of the functions that draw them in the method."""

    USES = {
        f"hp.dropout.{ours}": name
        for ours, name in (
            *((f"{part}.{term}", f"{part}_{term}") for part in ("head", "momentum", "augmented") for term in TERMS),
            ("features", "features_out"),
            ("momentum_out", "momentum_out"),
            ("mixed_out", "mixed_out"),
        )
    }

    def __init__(self, case: Case) -> None:
        self.case, self.p = case, float(case["cfg_dropout_p"])
        self.fillings = {0: 0} | {int(step): n + 1 for n, step in enumerate(case["in_renewal_steps"])}

    def functions(self) -> dict:
        """The method's functions that draw, by name."""
        return {
            "own_channel_masks": self.own_channel_masks,
            "channel_masks": self.channel_masks,
            "random_positions": self.random_positions,
            "random_candidates": self.random_candidates,
        }

    def pass_of(self, purpose: str) -> Tensor:
        """The pictures that a pool is filled from; purposes are hp.pool.0 and hp.pool.renewal.<step>."""
        return replay.pictures(self.case["in_pool_images"][self.fillings[int(purpose.rsplit(".", 1)[1])]])

    def own_channel_masks(self, seed: int, purpose: str, step: int, maps: Tensor, p: float) -> Tensor | None:
        return replay.kept(self.case, f"in_keep_{self.USES[purpose]}", self.p)[step] if self.p > 0 else None

    def channel_masks(
        self, seed: int, purpose: str, step: int, rows: int, channels: int, p: float, device: str = "cpu"
    ) -> Tensor:
        """In a pool: of the momentum head's inputs and codes (hp.pool.<use>.<block>, at a step), or of the features of
        picture `step` in the task-agnostic pool (hp.pool.0.agnostic)."""
        _, _, use, place = purpose.split(".")
        if place == "agnostic":
            return replay.kept(self.case, "in_pool_keep_ag", self.p)[step : step + 1]
        first = int(place) * REFILL_ROWS
        return replay.kept(self.case, f"in_pool_keep_sp_{use}", self.p)[self.fillings[step], first : first + rows]

    def random_positions(self, seed: int, purpose: str, step: int, count: int, cells: int) -> Tensor:
        """Of picture `step` of a pass. No released pool is made of the ring of recent patches: it gets any."""
        if purpose == "hp.ring":
            return torch.zeros(count, dtype=torch.int64)
        *_, at, kind = purpose.split(".")
        if kind == "agnostic":
            return _tensor(self.case["in_pool_position_ag"])[step : step + 1]
        return _tensor(self.case["in_pool_position_sp"])[self.fillings[int(at)], step : step + 1]

    def random_candidates(
        self, seed: int, step: int, cells: int, total: int, rho: float, device: str = "cpu", part: int = 0
    ) -> Tensor | None:
        return None if rho >= 1 else _tensor(self.case["in_candidates"])[step]


def _pool(model: hidden_positives.HiddenPositives) -> dict[str, Tensor]:
    """The task-specific pool of a step: it is renewed before anything is compared with it."""
    return {"pool": model.pool.specific_rows()}


@torch.no_grad()
def _consistency(model: hidden_positives.HiddenPositives, batches: list[dict]) -> Tensor:
    """What the consistency term of the step to come would be."""
    views = batches[model.global_step]
    codes = []
    for view, use in (("image", "head"), ("augmented", "augmented")):
        features = model.backbone.features(views[view]).concat()
        codes.append(model.projection(model.head(features, model._head_masks(use, features))))
    return consistency_loss(*codes)


def _scores(case: Case, model: hidden_positives.HiddenPositives, steps: replay.Steps) -> Case:
    """Nothing where a case was cut before its evaluation."""
    if "in_val_images" not in case:
        return {}
    found = replay.scores(model, steps, replay.pictures(case["in_val_images"]), case["in_val_labels"])
    return {
        "out_scores": np.array([x for probe in ("cluster", "linear") for x in (found[probe].miou, found[probe].acc)])
    }
