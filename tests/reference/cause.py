"""Adapters for the saved cases of CAUSE: modularity, contrast, bank, both heads, read-out and single steps."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from evaluation import readout
from evaluation.probes import ClusterProbe, LinearProbe
from losses import concept_contrast as contrast
from losses import modularity as graph
from losses.grid_sampling import grid_places, sampled
from models.concept_head import ConceptTransformer
from models.heads import SegmentationHead
from models.momentum import Momentum
from retrieval.concept_bank import ConceptBank
from tests.reference import cause_training
from tests.reference import training as replay

Case = dict[str, np.ndarray]
CELL = 4
"""Side of a cell where a case names none."""

training = cause_training.training


def _leaf(case: Case, name: str) -> Tensor:
    return replay.tensor(case[name]).requires_grad_()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def _maps(rows: Tensor) -> Tensor:
    """[B,P,C], square -> [B,C,h,w]."""
    side = math.isqrt(rows.shape[1])
    return rows.mT.unflatten(2, (side, side))


def _rows(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


def _sampled(rows: Tensor, order: np.ndarray, cell: int) -> Tensor:
    maps = _maps(rows)
    drawn = replay.tensor(order).reshape(len(rows), -1)
    return sampled(maps, grid_places(drawn, *maps.shape[2:], cell))


def grid_sample(case: Case) -> Case:
    return {"out_samples": _array(_sampled(replay.tensor(case["in_x"]), case["in_order"], int(case["cfg_k"])))}


def modularity_loss(case: Case) -> Case:
    features, temperature = replay.tensor(case["in_feats"]), float(case["cfg_temp"])
    if case["cfg_grid"]:
        features = _sampled(features, case["in_order"], CELL)
    results: Case = {}
    for prefix, guarded in (("", False), ("guarded_", True)):
        book = _leaf(case, "in_codebook")
        loss = graph.modularity_loss(features, book, temperature, guarded=guarded)
        loss.backward()
        results |= {f"out_{prefix}loss": _array(loss), f"out_{prefix}grad_codebook": _array(book.grad)}
    unit = nn.functional.normalize(features, dim=2)
    weights, edges = graph.modularity(unit, guarded=False)
    likeness = graph.assignment(unit, replay.tensor(case["in_codebook"]))
    return results | {
        "out_edges": _array(edges),
        "out_modularity": _array(weights * edges[:, None, None]),
        "out_assignment": _array(likeness),
        "out_same_cluster": _array(graph.together(likeness, temperature)),
    }


def concept_contrastive(case: Case) -> Case:
    features, book = replay.tensor(case["in_feats"]), replay.tensor(case["in_codebook"])
    student, teacher = _leaf(case, "in_proj"), replay.tensor(case["in_proj_ema"])
    concepts = contrast.nearest(features, book)
    likeness = contrast.Likeness.of(book, float(case["cfg_pos"]), float(case["cfg_neg"]))
    rows, of = replay.tensor(case["in_bank_feats"]), replay.tensor(case["in_bank_codes"])
    sides = [(teacher.flatten(0, 1), concepts.flatten(), 0), *([(rows, of, None)] if len(of) else [])]
    found = [
        contrast.concept_contrast(student, concepts, *side[:2], likeness, float(case["cfg_temp"]), first=side[2])
        for side in sides
    ]
    # The saved terms are by picture, that of the batch first.
    terms, pairs = (torch.stack(values, dim=1).flatten() for values in zip(*found, strict=True))
    guarded = terms.sum() / (pairs > 0).sum()
    guarded.backward()
    official = terms.where(pairs > 0, torch.nan)
    results = {
        "out_code_index": concepts.numpy(),
        "out_terms": _array(official),
        "out_loss": _array(official.mean()),
        "out_guarded_loss": _array(guarded),
        "out_guarded_grad_proj": _array(student.grad),
    }
    return results | ({"out_grad_proj": _array(student.grad)} if (pairs > 0).all() else {})


def bank_update(case: Case) -> Case:
    book, rows = replay.tensor(case["in_codebook"]), replay.tensor(case["in_proj_ema"])
    bank = ConceptBank(len(book), int(case["cfg_max_num"]), rows.shape[-1])
    parts = iter(replay.tensor(case["in_perm"]).split(case["in_perm_len"].tolist()))
    counts = []
    for features, projections in zip(replay.tensor(case["in_feats"]), rows, strict=True):
        concepts = contrast.nearest(features, book).flatten()
        bank.enqueue(concepts, projections.flatten(0, 1), cause_training.arrivals(concepts, parts))
        counts.append(bank.counts)
    held, of = bank.rows()
    return {
        "out_counts": _array(torch.stack(counts)),
        "out_bank_codes": _array(of),
        "out_bank_feats": _array(held),
        "out_bank_feats_normed": _array(nn.functional.normalize(held, dim=1)),
        "out_bank_concepts_normed": _array(nn.functional.normalize(book[of], dim=1)),
    }


def _loaded(module: nn.Module, case: Case, prefix: str, layers: dict[str, str]) -> nn.Module:
    """The module with the weights `w__<prefix>...`; layers: theirs -> ours."""
    weights = {}
    for theirs, ours in layers.items():
        start = f"w__{prefix}{theirs.replace('.', '_')}"
        for name in (name for name in case if name == start or name.startswith(f"{start}_")):
            rest = name.removeprefix(start).removeprefix("_")
            rest = rest.replace("out_proj_", "out_proj.") if "attn" in theirs else rest
            weights[ours + (f".{rest}" if rest else "")] = replay.tensor(case[name])
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    module.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()})
    return module


def _mlp(case: Case) -> SegmentationHead:
    dim, channels = case["w__f1_weight"].shape[:2]
    return _loaded(SegmentationHead(channels, dim), case, "", cause_training.MLP)


def _projection(case: Case) -> nn.Linear:
    out, dim = case["w__proj_f_weight"].shape[:2]
    layer = nn.Linear(dim, out)
    layer.load_state_dict(
        {
            "weight": replay.tensor(case["w__proj_f_weight"]).reshape(out, dim),
            "bias": replay.tensor(case["w__proj_f_bias"]),
        }
    )
    return layer


def mlp_head(case: Case) -> Case:
    features = _leaf(case, "in_feats")
    code = _rows(_mlp(case)(features.mT[..., None]))  # a map of one column, so that any number of patches will do
    projected = _projection(case)(code)
    projected.square().sum().backward()
    return {"out_code": _array(code), "out_proj": _array(projected), "out_grad_feats": _array(features.grad)}


def tr_head(case: Case) -> Case:
    features, book = _leaf(case, "in_feats"), replay.tensor(case["in_codebook"])
    dim, channels = case["w__tr_f1_weight"].shape[:2]
    maps = _maps(features)
    head = ConceptTransformer(channels, dim, tuple(maps.shape[2:]), len(case["w__tr_linear1_bias"]))
    _loaded(head, case, "", cause_training.TR)
    index = contrast.nearest(features, book)
    code = _rows(head(maps, book[index]))
    code.square().sum().backward()
    ours = {
        "query_pos": head.positions,
        "tr_self_attn_in_proj_weight": head.self_attention.in_proj_weight,
        "tr_linear1_weight": head.hidden.weight,
        "tr_norm3_weight": head.norms[2].weight,
        "tr_f1_weight": head.head.linear.weight,
    }
    return {
        "out_query_index": index.numpy(),
        "out_code": _array(code),
        "out_proj": _array(_projection(case)(code)),
        "out_grad_feats": _array(features.grad),
        **{f"out_grad_{name}": _array(value.grad) for name, value in ours.items()},
    }


def ema(case: Case) -> Case:
    students = replay.tensor(case["in_student"])
    module = nn.Linear(1, students.shape[1], bias=False)
    module.weight.data[:, 0] = students[0]
    teacher, found = Momentum(module), []
    for number, student in enumerate(students[1:]):
        module.weight.data[:, 0] = student
        teacher.update(float(case["cfg_lambda"]) if number else 0.0)
        found.append(teacher.copy.weight[:, 0].clone())
    return {"out_teacher": _array(torch.stack(found))}


def cluster_predict(case: Case) -> Case:
    codes = (_maps(replay.tensor(case[name])) for name in ("in_code", "in_code_of_flipped"))
    code, prototypes = readout.flip_average(*codes), replay.tensor(case["in_probe"])
    size = int(case["cfg_height"]), int(case["cfg_width"])
    probe = ClusterProbe(prototypes.shape[1], len(prototypes))
    probe.clusters.data = prototypes.clone()
    loss = probe.loss(readout.upsample(code, size))
    loss.backward()
    return {
        "out_code_mean": _array(_rows(code)),
        "out_log_probs": _array(readout.cluster_log_probs(code, prototypes, size, float(case["cfg_alpha"]))),
        "out_argmax": _array(readout.predict(readout.dot_products(code, prototypes), size)),
        "out_hard_loss": _array(loss),
        "out_grad_probe_of_hard_loss": _array(probe.clusters.grad),
    }


def finetune_step(case: Case) -> Case:
    head, prototypes, label = _mlp(case), _leaf(case, "in_probe"), replay.tensor(case["in_label"])
    code = head(_maps(replay.tensor(case["in_feats"])))
    rows = _rows(code)
    x = _sampled(rows, case["in_order"], CELL) if case["cfg_grid"] else rows
    loss = graph.modularity_loss(x, prototypes, float(case["cfg_temp"]))
    linear = LinearProbe(rows.shape[2], len(case["w__linear_f_bias"]))
    weights = {part: replay.tensor(case[f"w__linear_f_{part}"]) for part in ("weight", "bias")}
    linear.classifier.load_state_dict(weights)
    entropy = linear.loss(code, label)
    (loss + entropy).backward()
    if any(value.grad is not None for value in head.parameters()):
        raise AssertionError("labels reached the head")
    linear.loss(code, label, leaks=True).backward()
    layers = {"f1": head.linear, "f2_0": head.nonlinear[0], "f2_2": head.nonlinear[2]}
    gradients = {
        f"out_released_grad_head_{name}_{part}": _array(getattr(layer, part).grad)
        for name, layer in layers.items()
        for part in ("weight", "bias")
    }
    return gradients | {
        "out_code": _array(rows),
        "out_loss_modularity": _array(loss),
        "out_loss_linear": _array(entropy),
        "out_grad_probe": _array(prototypes.grad),
        "out_grad_linear_weight": _array(linear.classifier.weight.grad),
        "out_grad_linear_bias": _array(linear.classifier.bias.grad),
        "out_released_grad_norm": _array(
            torch.stack([p.grad.norm() for p in (*head.parameters(), *linear.parameters())]).norm()
        ),
    }
