"""The authors' numbers that are copied here hold, and the judging can fail."""

import json

import numpy as np
import pytest

from tests.reference import framework, rules
from tests.reference.__main__ import main

TABLE = framework.load_table()
PATHS = framework.find_cases(framework.CASES)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_case(path):
    line = framework.replay(path, TABLE)
    assert line.status == "ok", line


def test_every_kind_of_the_foundation_has_a_case():
    kinds = {path.stem.rsplit(".", 1)[0] for path in PATHS}
    wanted = {
        "hidden_positives": "ghp_contrastive backbone_head_lhp reference_pool consistency lambda_schedule training",
        "backbones": "pos_embed",
        "stego": "cluster_lookup linear_probe corr_helper corr_loss super_perm sample crf_aux_loss seg_head knn "
        "training",
        "evaluation_protocol": "unsupervised_metrics overcluster_metrics flip_predict loader_transform five_crop_boxes "
        "dense_crf",
        "segsort": "spherical_kmeans calculate_prototypes segment_mean grid_labels grid_labels_tf location_features "
        "location_features_tf segment_by_kmeans prepare_prototype_labels prepare_prototype_labels_tf majority_label "
        "segsort_loss vmf_unsupervised_tf vmf_nca_supervised_tf vmf_memory_tf topk_retrieval predict_by_retrieval "
        "knn_predict_tf extract_prototypes_tf iou",
        "deep_spectral": "laplacian_eigs color_eigs multi_region_bg_and_boxes localisation_box",
        "tokencut": "ncut",
        "comus": "saliency_to_mask spectral_clustering core_samples match_and_miou",
        "maskdistill": "attention_mask confident_selection ohem cluster_prep_and_match",
        "transfgu": "things_bootstrap_loss thingstuff_bootstrap_loss cls_emb_loss binarize_mask concept_map "
        "kmeans_centroids crop_boxes mask_decoder hungarian_metric",
        "smooseg": "pair_energy smoothness energy predictor projector train_step cluster_predict training",
        "eagle": "affinity_laplacian eigenvectors sign_rule eicue_assign obj_nce corr_helper corr_loss featurizer "
        "loss_schedule training",
        "cause": "modularity_loss grid_sample concept_contrastive bank_update tr_head mlp_head ema cluster_predict "
        "finetune_step training",
        "slotcon": "grouping inverse_augmentation self_distill center slot_contrast train_step momentum_schedule "
        "lr_schedule lars crop_boxes prototype_retrieval",
        "primaps": "principal_direction mask_stack refine_labels assign_classes focal_loss ema cluster_loss pca_init "
        "metrics training",
        "maskcontrast": "contrastive balanced_bce image_embedding cluster_eval training",
        "leopart": "attention_foreground cosine_schedule crop_boxes loss sinkhorn training cbfe cooccurrence "
        "miou_hungarian miou_manytoone",
        "autoregressive": "masked_conv orderings mi_loss residual_block decoder attention",
        "acseg": "modularity_loss",
        "position_debias": "blank_basis rasa",
        "iic": "loss_collapsed loss_uncollapsed match sobel head trunk_narrow",
        "dinosaur": "slot_attention input_mlp mlp_decoder transformer_decoder ari_mbo semantic_miou lr_schedule "
        "training",
        "classic_priors": "context_patches cooccurrence_patches patch_pair context_loss cooccurrence_loss",
        "hsg": "knn_affinity dmon_loss transition_composition group_means transformer_clustering generate_clusters "
        "end_to_end_gradient losses centroid_contrastive gather_prototypes cluster_mapping reorder_image_indices",
    }
    assert {f"{method}.{name}" for method, names in wanted.items() for name in names.split()} <= kinds
    assert all(path.stat().st_size < 1 << 20 for path in PATHS)


def holds(rule, got, ref, **saved):
    return rules.judge_array(rule, np.array(got), np.array(ref), saved).ok


@pytest.mark.parametrize(
    ("rule", "good", "bad", "ref"),
    [
        ("exact", [1, 2], [1, 3], [1, 2]),
        ("exact", [True, False], [True, True], [True, False]),
        ({"rtol": 0.1}, [1.09, -10.9], [1.0, -11.2], [1.0, -10.0]),
        ({"atol": 0.1}, [1.09, 2.0], [1.11, 2.0], [1.0, 2.0]),
        ({"atol_of_max": 0.01}, [0.09, 10.0], [0.11, 10.0], [0.0, 10.0]),
        ({"share_equal": 0.75}, [1, 2, 3, 9], [1, 2, 9, 9], [1, 2, 3, 4]),
        ({"share_equal": 0.5, "atol": 0.1}, [1.05, 5.0], [1.2, 5.0], [1.0, 2.0]),
        ({"mean_abs": 0.5}, [1.0, 0.0], [1.1, 0.0], [0.0, 0.0]),
        ({"argmax_axis": 0, "share_equal": 1.0}, [[5.0, 0.0], [1.0, 3.0]], [[1, 0], [5, 3]], [[2.0, 0.0], [1.0, 9.0]]),
        ({"argmax_axis": 0, "share_equal": 0.5, "mean_abs": 1.0}, [[2.0], [1.0]], [[9.0], [1.0]], [[2.0], [1.0]]),
        ({"partition": True}, [5, 5, 7, 7], [5, 5, 5, 7], [0, 0, 1, 1]),
        ({"partition": True, "share_equal": 0.75}, [5, 5, 5, 7], [5, 5, 5, 5], [0, 0, 1, 1]),
        ({"up_to_sign": True, "axis": 0, "atol": 0.1}, [[-1.0, 0.05]], [[-1.0, 0.2]], [[1.0, 0.0]]),
        ({"up_to_sign": True, "axis": 1, "min_abs_cosine": 0.9}, [[-3.0], [0.1]], [[1.0], [1.0]], [[1.0], [0.0]]),
        ({"as_set": True}, [3, 1, 2], [3, 1, 1], [1, 2, 3]),
        ({"nan_ok": True, "atol": 0.1}, [np.nan, 1.0], [1.0, 1.0], [np.nan, 1.0]),
        ({"nan_skip": True, "atol": 0.1}, [7.0, 1.0], [7.0, np.nan], [np.nan, 1.0]),
        ({"rtol": 0.1}, [np.nan, 1.0], [0.0, 1.0], [np.nan, 1.0]),
        ({"rtol": 1e9}, [1.0], [np.inf], [1.0]),
        ({"rtol": 1e9}, [1.0], [1.0, 1.0], [1.0]),
    ],
    ids=str,
)
def test_each_rule_passes_and_fails(rule, good, bad, ref):
    assert holds(rule, good, ref)
    assert not holds(rule, bad, ref)


def test_leading_entries_of_a_set():
    rule = {"as_set": True, "first": "cfg_k"}
    assert holds(rule, [2, 1, 9], [1, 2, 3], cfg_k=np.array(2))
    assert not holds(rule, [2, 9, 1], [1, 2, 3], cfg_k=np.array(2))


def test_missing_rows_at_the_end_pass_only_where_all_is_nan():
    rule = {"nan_skip": True, "atol": 0.1}
    assert holds(rule, [[1.0]], [[1.0], [np.nan]])
    assert not holds(rule, [[1.0]], [[1.0], [2.0]])


def test_eigenvectors_of_close_eigenvalues_need_only_solve_the_problem():
    weights = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    saved = {"v": np.array([0.0, 1.5, 1.5]), "W": weights, "D": weights.sum(1), "n": np.array(True)}
    ref = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    gap = {"values": "v", "gap": 0.01, "residual": {"W": "W", "D": "D", "lapnorm": "n", "max": 1e-3}}
    rule = {"up_to_sign": True, "axis": 0, "min_abs_cosine": 0.999, "min_gap": gap}
    turned = np.array([[-1.0, -1.0, -1.0], [0.0, 1.0, -1.0], [2.0, -1.0, -1.0]])
    assert rules.judge_array(rule, turned, ref, saved).ok
    assert not rules.judge_array(rule, turned[[1, 1, 2]], ref, saved).ok
    wrong = turned.copy()
    wrong[1, 0] = 0.1
    assert not rules.judge_array(rule, wrong, ref, saved).ok


def test_one_element_arrays_and_scalars_are_interchangeable():
    assert holds({"atol": 0.1}, [1.0], 1.0)
    assert holds("exact", 3, [3])


def test_the_first_rule_that_matches_counts():
    default = {"float": "f", "int": "i", "bool": "b"}
    kind = {"arrays": {"out_*": 1, "out_b": 2}, "cases": {"held.1": {"out_b": 3}}, "variants": {"v": {"out_?": 4}}}
    table = {"default": default, "kinds": {"m.f": kind}}
    real = np.dtype("float32")
    assert rules.rule_for(table, "m.f", "shared.1", "out_a", real) == 1
    assert rules.rule_for(table, "m.f", "shared.1", "out_b", real) == 2
    assert rules.rule_for(table, "m.f", "held.1", "out_b", real) == 3
    assert rules.rule_for(table, "m.f", "held.1", "out_b", real, "v") == 4
    assert rules.rule_for(table, "m.f", "shared.1", "after__x", np.dtype("int8")) == "i"
    assert rules.rule_for(table, "m.g", "shared.1", "out_b", np.dtype("bool")) == "b"


def write(folder, name, **arrays):
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)


def schedule(change=0.0):
    steps = np.arange(5)
    return {
        "in_iteration": steps,
        "cfg_warmup": np.array(2),
        "cfg_max_iterations": np.array(4),
        "out_lambda": np.maximum(steps - 2, 0) / 2 + change,
    }


def test_the_command_reports_each_status_and_the_exit_code(tmp_path, capsys):
    cases, dump = tmp_path / "cases", tmp_path / "dump"
    name = "hidden_positives.lambda_schedule"
    write(cases, f"{name}.0", **schedule())
    write(cases, f"{name}.1", **{key: value for key, value in schedule().items() if key != "out_lambda"})
    write(cases, "nobody.nothing.0", in_x=np.zeros(1))
    write(dump, "older.case.0", out_x=np.zeros(1))
    assert main([str(cases), "--dump", str(dump)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["ok", f"{name}.0"],
        ["unjudged", f"{name}.1"],
        ["missing", "nobody.nothing.0"],
    ]
    assert lines[3] == "1 ok, 0 FAIL, 1 missing, 1 unjudged"
    assert {path.name for path in dump.iterdir()} == {f"{name}.0.npz", f"{name}.1.npz", "older.case.0.npz"}
    assert framework.load_case(dump / f"{name}.1.npz")["out_lambda"].tolist() == [0.0, 0.0, 0.0, 0.5, 1.0]

    write(cases, f"{name}.2", **schedule(1e-3))
    assert main([str(cases)]) == 1
    assert f"FAIL      {name}.2  out_lambda  0.001" in capsys.readouterr().out.splitlines()
    assert main([str(cases), "--only", "*.0"]) == 0
    assert main([str(cases), "--only", "x*"]) == 2


def test_adapters_see_inputs_only_and_their_errors_are_failures(tmp_path, monkeypatch):
    seen = {}

    def adapter(case):
        seen.update(case)
        raise ValueError("no such\nsetting")

    monkeypatch.setattr(framework, "find_adapter", lambda method, function: (adapter, None))
    write(tmp_path, "m.f.0", in_x=np.zeros(1), out_y=np.ones(1), after__z=np.ones(1), mid_w=np.ones(1))
    line = framework.replay(tmp_path / "m.f.0.npz", TABLE)
    assert (line.status, line.error) == ("FAIL", "ValueError: no such setting")
    assert set(seen) == {"in_x"}


@pytest.mark.parametrize(
    "path",
    [path for path in PATHS if path.stem.startswith(("segsort.segsort_loss", "hsg.transition", "stego.knn"))],
    ids=lambda path: path.stem,
)
def test_a_case_without_results_gives_the_same_ones(path, tmp_path):
    """Cases that are kept back have none: shapes and settings come from what went in."""
    saved = framework.load_case(path)
    write(tmp_path / "bare", path.stem, **{name: array for name, array in saved.items() if name[:3] in ("in_", "cfg")})
    lines = [
        framework.replay(source, TABLE, dump=tmp_path / name)
        for name, source in (("whole", path), ("stripped", tmp_path / "bare" / path.name))
    ]
    assert [line.status for line in lines] == ["ok", "unjudged"], lines
    whole, stripped = (framework.load_case(tmp_path / name / path.name) for name in ("whole", "stripped"))
    assert whole.keys() == stripped.keys()
    assert all(np.array_equal(whole[name], stripped[name], equal_nan=True) for name in whole)


def test_a_result_may_be_left_out_only_where_it_is_optional():
    table = {
        "default": {"float": "exact"},
        "kinds": {"m.f": {"arrays": {"out_c": {"skip": "no target"}}, "optional": [{"array": "out_b*"}]}},
    }
    saved = {name: np.ones(2) for name in ("in_x", "out_a", "out_b1", "out_c")}

    def status(**results):
        return framework.judge("m.f.0", "m.f", "shared.0", saved, results, table, None).status

    assert status(out_a=np.ones(2)) == "ok"
    assert status(out_b1=np.ones(2)) == "FAIL"
    assert status(out_a=np.ones(2), out_b1=np.zeros(2)) == "FAIL"
    assert status(out_a=np.ones(2), out_c=np.zeros(2), out_new=np.zeros(2)) == "ok"


def test_the_table_is_whole():
    text = (framework.HERE / "tolerances.json").read_text()
    assert json.loads(text) == TABLE
    assert {path.stem.rsplit(".", 1)[0] for path in PATHS} <= set(TABLE["kinds"])
