"""Adapters for `hsg.*`: clustering transformers, both levels of groups, graphs and losses of HSG."""

import numpy as np
import torch
from torch import Tensor, nn

from grouping import segments
from grouping.graph import knn_graph
from lightning_modules.base.optim import schedule_factor
from losses.grouping import centroid_contrast, collapse, modularity
from losses.vmf import vmf_nca
from models import hierarchy as levels_of
from models.clustering import ClusteringTransformer
from models.hierarchy import HierarchicalGrouping, PositionTables, compose
from retrieval import voting
from tests.reference.segsort import _arrays, _size, _tensor

Case = dict[str, np.ndarray]

_LAYER = {
    "attention": "self_attn",
    "cross": "multihead_attn",
    "widen": "linear1",
    "narrow": "linear2",
    "attention_norm": "norm1.norm",
}


def _released_name(name: str) -> str:
    """The path of a weight of ClusteringTransformer in the release."""
    head, _, rest = name.partition(".")
    if head in ("encoder", "decoder"):
        number, part, rest = rest.split(".", 2)
        others = {"cross_norm": "norm2.norm", "output_norm": "norm2.norm" if head == "encoder" else "norm3.norm"}
        return f"_transformer.{head}.layers.{number}.{(_LAYER | others)[part]}.{rest}"
    if head in ("centroids", "features"):
        module = {"centroids": "centroid_fc", "features": "centroid_feat_fc"}[head]
        part, rest = rest.split(".")
        return f"{module}.{1 if part == 'linear' else 2}.{rest}"
    place = {
        "decoder_norm": "decoder.norm.norm",
        "summary": "tgt_fc.0",
        "summary_norm": "tgt_fc.1",
        "target": "tgt_fc.3",
    }
    return f"_transformer.{place[head]}.{rest}"


def _names(model: nn.Module, prefix: str = "") -> dict[str, str]:
    return {name: prefix + _released_name(name).replace(".", "__") for name in model.state_dict()}


def _transformer(case: Case, prefix: str = "") -> ClusteringTransformer:
    """The transformer of a case, with its weights; prefix: of its module path."""
    width, dim = case[f"w__{prefix}_transformer__encoder__layers__0__linear1__weight"].shape
    start = f"w__{prefix}_transformer__encoder__layers__"
    layers = len({name[len(start) :].split("__")[0] for name in case if name.startswith(start)})
    heads = int(case.get("cfg_num_heads", 4))
    model = ClusteringTransformer(dim, heads, layers, width, float(case.get("cfg_dropout", 0)), faithful=True)
    names = _names(model, prefix)
    model.load_state_dict({name: torch.from_numpy(case[f"w__{saved}"]) for name, saved in names.items()})
    return model


def _rows(array: np.ndarray) -> Tensor:
    """[B,d,M] -> [B,M,d]"""
    return _tensor(array).mT


def _columns(rows: Tensor) -> Tensor:
    return rows.mT


def transformer_clustering(case: Case) -> Case:
    return _clustering(case, training=False)


def transformer_clustering_train(case: Case) -> Case:
    """Training mode, with the gradient of the nodes.

    shared.1 lies at the edge of float32, so that whether it is ok may depend on the machine. The batch norm of the
    summary divides by the spread over three pictures, down to 0.05, so rounding errors grow. The saved numbers
    themselves are 1.4 bounds away from float64 (logits; gradient 0.7), and of 1008 orders of the same operations that
    were tried on an AMD EPYC, the release's (1.1 bounds) among them, 115 meet every bound. Products added up channel by
    channel, which MKL does there only for 16 outputs or more, give the saved encoder's output to the bit (attention not
    fused, norms over [n,d,B]); the gradient is off by up to 3 bounds even then.
    """
    return _clustering(case, training=True)


def _clustering(case: Case, training: bool) -> Case:
    model = _transformer(case).train(training)
    nodes = _rows(case["in_src"]).clone().requires_grad_()
    padding = _tensor(case["in_padding_mask"]).bool() if case["cfg_has_mask"] else None
    found = model(nodes, padding, _tensor(case["in_query"]), _rows(case["in_pos"]))
    centroids, features, logits, memory = found
    results = {
        "out_centroids": _columns(centroids),
        "out_centroid_feats": _columns(features),
        "out_logits": logits,
        "out_encoder_memory": _columns(memory),
    }
    if training:
        target = (centroids * _rows(case["in_centroid_weight"])).sum() + logits.softmax(1).square().sum()
        target.backward()
        results["out_grad_src"] = _columns(nodes.grad)
        state = model.state_dict()
        results |= {f"after__{saved}": state[name] for name, saved in _names(model).items() if "running" in name}
    return _arrays(results)


def transition_composition(case: Case) -> Case:
    fine, transition, coarse = compose(_tensor(case["in_logits_fine"]), _tensor(case["in_logits_coarse_given_fine"]))
    padding = _tensor(case["in_padding_mask"]).bool()
    labels = fine.argmax(1)
    places = levels_of.group_means(_rows(case["in_pos_prototypes"]), labels, padding, fine.shape[1])
    results = {
        "out_p_fine": fine,
        "out_labels_fine": labels,
        "out_p_coarse": coarse,
        "out_labels_coarse": coarse.argmax(1),
        "out_pos_of_fine_groups": _columns(places),
        "mid_transition": transition,
    }
    return _arrays(results)


def group_means(case: Case) -> Case:
    nodes, labels = _rows(case["in_nodes"]), _tensor(case["in_group_labels"])
    padding, groups = _tensor(case["in_padding_mask"]).bool(), int(case["cfg_num_groups"])
    plain, unit = (levels_of.group_means(nodes, labels, padding, groups, normalise) for normalise in (False, True))
    return _arrays({"out_plain": _columns(plain), "out_normalised": _columns(unit)})


def _graph(x: np.ndarray, mask: np.ndarray, views: np.ndarray, per_view: bool, case: Case, **rules) -> Tensor:
    padding = _tensor(mask).bool()
    ids, counts = segments.relabel(_tensor(views), ~padding)
    knn = int(case["cfg_knn"])
    arcs = None if knn < 0 else knn
    return knn_graph(_rows(x), padding, arcs, ids if per_view else None, int(counts.max()), **rules)


def knn_affinity(case: Case) -> Case:
    nodes = case["in_x"], case["in_padding_mask"], case["in_view_labels"], bool(case["cfg_use_view_labels"]), case
    scale = float(case["cfg_kernel_scale"])
    graphs = [_graph(*nodes, scale=scale, binary=binary) for binary in (True, False)]
    return _arrays({"out_binary": graphs[0], "out_weighted": graphs[1]})


def dmon_loss(case: Case) -> Case:
    padding = _tensor(case["in_padding_mask"]).bool()
    views = bool(case["cfg_use_view_labels"])
    graph = _graph(case["in_x"], case["in_padding_mask"], case["in_view_labels"], views, case)
    results = {"mid_adj": graph}
    for name in ("modularity", "collapse"):
        logits = _tensor(case["in_logits"]).requires_grad_()
        memberships = logits.softmax(1)
        loss = modularity(memberships, graph, padding)
        if name == "collapse":
            loss = collapse(memberships, padding, slots=True)
        loss.backward()
        results |= {f"out_{name}_loss": loss, f"out_grad_logits_{name}": logits.grad, "mid_probs": memberships}
    return _arrays(results)


def centroid_contrastive(case: Case) -> Case:
    kappa = float(case["cfg_concentration"])
    levels = [_rows(case[f"in_{name}_centroid"]).flatten(0, 1) for name in ("fine", "coarse")]
    return _arrays({"out_sum_of_levels": sum(centroid_contrast(level, kappa) for level in levels)})


def gather_prototypes(case: Case) -> Case:
    cluster, view, semantic, region = (
        _tensor(case[f"in_{name}"]) for name in ("cluster_index", "batch_index", "semantic", "instance")
    )
    # Keys of several parts are ranked part by part, so that none can overflow.
    keys = torch.zeros_like(view)
    for part in (view, cluster, semantic, region):
        keys = segments.relabel((keys * len(keys) + segments.relabel(part[None])[0][0])[None])[0][0]
    count = int(keys.max()) + 1
    results = {
        "out_cluster_index": keys,
        "out_prototypes": segments.prototypes(_tensor(case["in_embeddings"]), keys, count),
        "out_prototype_semantic": segments.segment_values(semantic, keys, count),
        "out_prototype_instance": segments.segment_values(region, keys, count),
        "out_prototype_batch": segments.segment_values(view, keys, count),
    }
    return _arrays(results)


def cluster_mapping(case: Case) -> Case:
    ids = _tensor(case["in_cluster_index"])
    return _arrays({"out_mapping": segments.segment_values(_tensor(case["in_group_index"]), ids, int(ids.max()) + 1)})


def reorder_image_indices(case: Case) -> Case:
    return _arrays({"out_image_index": segments.relabel(_tensor(case["in_image_id"])[None], order="appearance")[0][0]})


def _forward(case: Case, embeddings: Tensor) -> dict[str, object]:
    """Segments, nodes and groups of a batch of views."""
    divisor = int(case["cfg_label_divisor"])
    semantic, region, images = (_tensor(case[f"in_{name}"]) for name in ("semantic", "instance", "image_index"))
    keys, valid = semantic * divisor + region, semantic != 255
    cells = _size(case["cfg_num_clusters"])
    found = segments.sort_pixels(
        embeddings, cells, int(case["cfg_iterations"]), regions=keys, valid=valid, empty="zero"
    )
    ids, total = found.ids.flatten(), int(found.counts.sum())
    view = torch.arange(len(images))[:, None].expand_as(found.ids).flatten()
    unit = found.unit.flatten(0, 1)
    bank, views = segments.prototypes(unit, ids, total), segments.segment_values(view, ids, total)
    image, pictures = segments.relabel(images[None])
    owners = image[0][views]
    slots = int(case["cfg_max_nodes"]) or int(segments.segment_sizes(owners, int(pictures)).max())
    table = segments.slot_table(owners, int(pictures), slots)

    dim = embeddings.shape[1]
    tables = PositionTables(dim)
    groups = tuple(int(count) for count in case["cfg_groups"])
    model = HierarchicalGrouping(dim, groups, hidden=2 * dim, dropout=0.0, faithful=True)
    with torch.no_grad():
        tables.rows.copy_(_tensor(case["w__pos_embed__row_embed__weight"]))
        tables.columns.copy_(_tensor(case["w__pos_embed__col_embed__weight"]))
        model.fine_queries.copy_(_tensor(case["w__fine_query_embed___query_embedding__weight"]))
        model.coarse_queries.copy_(_tensor(case["w__coarse_query_embed___query_embedding__weight"]))
    model.fine, model.coarse = (_transformer(case, f"{level}_hrchy_transformer__") for level in ("fine", "coarse"))
    places = tables(embeddings.shape[-2:]).flatten(0, 1).repeat(len(images), 1)
    nodes, padding = segments.take(bank, table), table < 0
    positions = segments.take(segments.segment_means(places, ids, total), table)
    hierarchy = model.eval()(nodes, padding, positions)

    slot = torch.arange(slots).expand_as(table)
    slot_of = torch.zeros(total + 1, dtype=torch.int64).scatter_(
        0, table.where(~padding, total).flatten(), slot.flatten()
    )
    levels = [labels[owners, slot_of[:-1]] for labels in hierarchy.labels]
    return {
        "inside": ids >= 0, "ids": ids, "unit": unit, "view": view, "bank": bank, "views": views, "owners": owners,
        "keys": segments.segment_values(keys.flatten(), ids, total), "table": table, "nodes": nodes,
        "padding": padding, "hierarchy": hierarchy, "slot_of": slot_of[:-1], "levels": levels,
        "semantic": semantic.flatten(), "region": region.flatten(), "divisor": divisor,
    }  # fmt: skip


def generate_clusters(case: Case) -> Case:
    found = _forward(case, _tensor(case["in_embeddings"]))
    inside, table, hierarchy = found["inside"], found["table"], found["hierarchy"]
    ids = found["ids"][inside]
    fine, coarse = hierarchy.labels
    results = {
        "out_cluster_embedding": found["unit"][inside],
        "out_cluster_semantic_label": found["semantic"][inside],
        "out_cluster_instance_label": found["region"][inside],
        "out_cluster_index": ids,
        "out_cluster_batch_index": found["view"][inside],
        "out_cluster_index_by_image": found["slot_of"][ids],
        "out_finehrchy_cluster_index": found["levels"][0][ids],
        "out_coarsehrchy_cluster_index": found["levels"][1][ids],
        "out_nd_prototype": _columns(found["nodes"]),
        "out_nd_prototype_padding_mask": found["padding"],
        "out_nd_prototype_batch_index": segments.take(found["views"], table, -1),
        # As in the release, the key of padding is -1.
        "out_nd_prototype_instance_label": segments.take(found["keys"], table, -1) % found["divisor"],
    }
    levels = {
        "fine": (fine, hierarchy.fine_centroids, hierarchy.fine),
        "coarse": (coarse, hierarchy.coarse_centroids, hierarchy.coarse),
    }
    for name, (labels, centroids, probabilities) in levels.items():
        results[f"out_{name}hrchy_nd_prototype_grouping_label"] = labels
        results[f"out_{name}hrchy_nd_prototype_grouping_centroid"] = _columns(centroids)
        results[f"out_{name}hrchy_nd_prototype_grouping_logit"] = probabilities
    return _arrays(results)


def _terms(case: Case, pixels: Tensor, own: Tensor, bank: Tensor, labels: list[Tensor], nodes: Tensor, levels) -> dict:
    """All terms with their weights.

    labels: of the prototypes by region, fine and coarse group; nodes: x, padding, views as saved; levels: probabilities
    [B,K,M] and centroids [B,K,d] of both.
    """
    kappa = float(case["cfg_concentration"])
    x, mask, views = nodes
    graph = _graph(x, mask, views, bool(case["cfg_knn_per_view"]), case)
    padding = _tensor(mask).bool()
    image, fine, coarse = (vmf_nca(pixels, bank, label, own, kappa) for label in labels)
    clustering = sum(modularity(p, graph, padding) + collapse(p, padding, slots=True) for p, _ in levels)
    contrast = sum(centroid_contrast(c.flatten(0, 1), kappa) for _, c in levels)
    weight, level = float(case["cfg_weight_grouping"]), float(case.get("cfg_weight_level", 0.1))
    return {
        "image_similarity_loss": float(case.get("cfg_weight_image", 1.0)) * image,
        "fine_loss": level * fine,
        "coarse_loss": level * coarse,
        "modularity_and_collapse": weight * clustering,
        "centroid_contrastive": weight * contrast,
    }


def losses(case: Case) -> Case:
    bank = _tensor(case["in_prototype"])
    image = _tensor(case["in_image_index"])[_tensor(case["in_prototype_batch_index"])]
    region = _tensor(case["in_prototype_instance_label"]) + image * int(case["cfg_label_divisor"])
    labels = [region, _tensor(case["in_fine_mapping"]), _tensor(case["in_coarse_mapping"])]
    levels = [(_tensor(case[f"in_{n}_probs"]), _rows(case[f"in_{n}_centroid"])) for n in ("fine", "coarse")]
    pixels, own = _tensor(case["in_cluster_embedding"]), _tensor(case["in_cluster_index"])
    nodes = case["in_nd_prototype"], case["in_nd_padding_mask"], case["in_nd_view"]
    terms = _terms(case, pixels, own, bank, labels, nodes, levels)
    found = voting.nearest_labels(bank, bank, region, 5)
    results = {f"out_{name}": value for name, value in terms.items()} | {
        "out_level_loss_sum": terms["fine_loss"] + terms["coarse_loss"],
        "out_grouping_loss_sum": terms["modularity_and_collapse"] + terms["centroid_contrastive"],
        "out_total": sum(terms.values()),
        "out_top5_accuracy": voting.agreement(found, region),
    }
    return _arrays(results)


def end_to_end_gradient(case: Case) -> Case:
    embeddings = _tensor(case["in_embeddings"]).requires_grad_()
    found = _forward(case, embeddings)
    owners, hierarchy = found["owners"], found["hierarchy"]
    region = found["keys"] % found["divisor"] + owners * found["divisor"]
    labels = [
        region,
        *(owners * count + level for level, count in zip(found["levels"], case["cfg_groups"], strict=True)),
    ]
    levels = [(hierarchy.fine, hierarchy.fine_centroids), (hierarchy.coarse, hierarchy.coarse_centroids)]
    views = segments.take(found["views"], found["table"], -1)
    nodes = _columns(found["nodes"]).detach().numpy(), found["padding"].numpy(), views.numpy()
    inside = found["inside"]
    pixels, own = found["unit"][inside], found["ids"][inside]
    terms = _terms(case, pixels, own, found["bank"], labels, nodes, levels)
    total = sum(terms.values())
    grad_total, grad_image = (
        torch.autograd.grad(value, embeddings, retain_graph=True)[0]
        for value in (total, terms["image_similarity_loss"])
    )
    results = {
        "out_total": total,
        "out_grad_embeddings_total": grad_total,
        "out_grad_embeddings_image_similarity": grad_image,
    }
    return _arrays(results)


def lr_schedule(case: Case) -> Case:
    base, total, warmup = float(case["cfg_base_lr"]), int(case["cfg_max_iter"]), int(case["cfg_warmup"])

    def rates(schedule: str) -> np.ndarray:
        factors = [schedule_factor(schedule, int(at), total, warmup, warmup_from=0.1) for at in case["in_iter"]]
        return np.array([base * factor for factor in factors], np.float32)

    return {"out_step": rates("step"), "out_poly": rates("poly")}
