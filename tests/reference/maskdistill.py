"""Adapters for `maskdistill.*`: attention masks, whitened crops, confident masks and hard pixels of MaskDistill."""

import numpy as np
import torch
from torch import Tensor

from grouping import attention_masks

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def attention_mask(case: Case) -> Case:
    queries, keys = _tensor(case["in_q"]), _tensor(case["in_k"])
    size, heads = (int(case["cfg_h"]), int(case["cfg_w"])), range(int(case["cfg_heads"]))
    scores = attention_masks.class_scores(queries, keys, heads=heads)
    found = attention_masks.attention_masks(
        scores, keys[:, :, 1:].transpose(1, 2).flatten(2), size,
        topk=float(case["cfg_topk"]), mass=float(case["cfg_mass"]), topk_policy="released",
    )  # fmt: skip
    chosen = found.chosen[0]
    results = {
        "out_cls_scores": scores[0],
        "out_keep_mass": found.kept[0],
        "out_num_selected": torch.tensor(len(chosen)),
        "out_num_positive_scores": ((scores * found.kept)[0, chosen] > 0).sum(),
        "out_selected_ids": chosen,
        "out_source": found.sources[0],
        "out_patch_graph_row_source": found.seeds[0],
        "out_object_mask": found.masks[0],
    }
    return {name: value.numpy() for name, value in results.items()}
