"""Adapters for `maskcontrast.*`: losses, queue, embeddings, scores and whole steps of MaskContrast."""

import numpy as np
import torch
from torch import Tensor

from datamodules.base.resizing import at_corners
from evaluation.metrics import SegmentationScore
from losses.objects import mask_contrast as losses
from retrieval.memory import MemoryBank
from tests.reference import maskcontrast_training

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _arrays(results: dict[str, Tensor]) -> Case:
    return {name: torch.as_tensor(value).detach().numpy() for name, value in results.items()}


def filled_queue(rows: Tensor, pointer: int) -> MemoryBank:
    """A queue that holds rows [K,D] and goes on at the pointer."""
    queue = MemoryBank(*rows.shape)
    queue.storage.copy_(rows)
    queue.filled.fill_(len(rows))
    queue.pointer.fill_(pointer)
    return queue


def contrastive(case: Case) -> Case:
    query = _tensor(case["in_query_map"]).requires_grad_()
    salience = _tensor(case["in_query_saliency_logit"]).requires_grad_()
    inside, key_inside = (_tensor(case[f"in_{name}_mask"]) > 0 for name in ("query", "key"))
    queue = filled_queue(_tensor(case["in_queue"]).T, int(case["in_queue_ptr"]))
    temperature, count = float(case["cfg_temperature"]), len(query)
    prototypes = losses.mask_prototypes(_tensor(case["in_key_map"]), key_inside)
    bank = torch.cat([prototypes, queue.rows()])
    own, pixels = torch.arange(count), inside.sum((1, 2))
    weights = losses.class_weights(torch.cat([pixels, pixels.new_zeros(queue.size)]))
    rows = torch.cat([losses.unit_pixels(one, mask) for one, mask in zip(query.detach(), inside, strict=True)])
    contrast = losses.object_contrast(query, inside, bank, weights, temperature, own=own)
    balanced = losses.balanced_salience(salience, inside)
    (contrast + balanced).backward()
    results = {
        "out_prototypes": prototypes,
        "out_logits": losses.similarities(rows, bank, temperature),
        "out_targets": own.repeat_interleave(pixels),
        "out_class_weight": weights,
        "out_loss_contrastive": contrast,
        "out_loss_saliency": balanced,
        "out_loss_total": contrast + balanced,
        "out_grad_query_map": query.grad,
        "out_grad_query_saliency_logit": salience.grad,
    }
    queue.enqueue(prototypes)
    return _arrays(results | {"out_queue_after": queue.storage.T, "out_queue_ptr_after": queue.pointer})


def balanced_bce(case: Case) -> Case:
    logits = _tensor(case["in_logits"]).requires_grad_()
    loss = losses.balanced_salience(logits, _tensor(case["in_mask"]) > 0)
    loss.backward()
    return _arrays({"out_loss": loss, "out_grad_logits": logits.grad})


def image_embedding(case: Case) -> Case:
    maps, salience = _tensor(case["in_output_map"]), _tensor(case["in_saliency_logit"])
    vectors, objects = losses.object_embedding(maps, salience, float(case["cfg_threshold"]))
    return _arrays({"out_embedding": vectors, "out_mask": objects.float()})


def cluster_eval(case: Case) -> Case:
    clusters, classes = int(case["cfg_num_clusters"]), int(case["cfg_num_classes_with_bg"])
    matching = "hungarian_iou" if clusters == classes else "many_to_one_iou"
    score = SegmentationScore(clusters, classes, matching=matching, absent="zero")
    for number in range(int(case["cfg_num_images"])):
        truth, found = case[f"in_gt_{number}"], case[f"in_pred_{number}"].astype(np.int32)
        score.update(_tensor(at_corners(found, truth.shape))[None].long(), _tensor(truth)[None].long())
    scores = score.compute()
    results = {
        "out_match_pred": np.arange(clusters),
        "out_match_class": scores.mapping,
        "out_iou": scores.iou / 100,
        "out_mean_iou": scores.miou / 100,
        "out_accuracy": scores.acc / 100,
    }
    return {name: np.asarray(value) for name, value in results.items()}


def training(case: Case) -> Case:
    return maskcontrast_training.run(case)
