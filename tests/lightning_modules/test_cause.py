"""CAUSE: every phase trains its own part, labels stay out unless the release is asked for, options reach a run."""

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import config
from common.errors import ConfigError
from engine import evaluating, setup
from models.heads import own_element_masks, patch_rows
from models.pretrained import origins
from retrieval import kmeans
from tests.conftest import Run, read_json, run_small, small_words
from tests.test_ddp import expect_equal, run_two

FEW = ["evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]
TR = ["method.head=tr", "method.hidden=24"]


def model(*words: str):
    cfg, data = setup.build_data(config.compose(small_words("cause", "method.dropout=0", *words)))
    return setup.build_model(cfg, data.meta), next(iter(data.train_dataloader()))


def stepped(made, batch, with_labels=False):
    made.started.fill_(True)  # the prototypes' start reads pictures, which only a run has
    views = batch if with_labels else {"image": batch["image"]}
    return made.loss(views, made.features(batch["image"]))


def trained(made):
    return {name for name, value in made.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}


@pytest.mark.parametrize("head", ["mlp", "tr"])
@pytest.mark.parametrize(
    ("phase", "parts"), [("book", {"book"}), ("head", {"head", "projection"}), ("prototypes", {"own"})]
)
def test_a_phase_trains_its_own_part(phase, parts, head):
    made, batch = model(f"method.phase={phase}", f"method.head={head}")
    stepped(made, batch).total.backward()
    own = {name for name, value in made.named_parameters() if value.requires_grad and "probe" not in name}
    assert {name.partition(".")[0] for name in own} == parts
    silent = {name for name in own - trained(made) if not name.endswith("in_proj_bias")}
    assert not silent


def test_the_teacher_is_the_student_after_the_first_step_and_then_follows():
    made, batch = model("method.phase=head", "method.ema=0.9")
    adam = torch.optim.Adam([p for group in made.param_groups() for p in group["params"]], lr=0.01)
    weights = []
    for _ in range(3):
        adam.zero_grad()
        stepped(made, batch).total.backward()
        adam.step()
        made.after_step()
        weights.append(made.head.linear.weight.detach().clone())
    slow = 0.9 * (0.9 * weights[0] + 0.1 * weights[1]) + 0.1 * weights[2]
    torch.testing.assert_close(made.teacher.copy.linear.weight, slow)
    assert made.bank.counts.sum() > 0


def test_labels_train_the_teacher_only_where_the_release_is_asked_for():
    made, batch = model("method.phase=prototypes", "method.prototypes=labels")
    assert made.uses_labels
    loss = stepped(made, batch, with_labels=True)
    loss.total.backward()
    assert any(name.startswith("teacher.") for name in trained(made))
    assert not any(name.startswith("linear_probe.") for name in trained(made))  # it has its own loss
    assert loss.parts["leaked"] > 0
    assert [group["name"] for group in made.param_groups()] == ["prototypes", "head"]


@pytest.mark.train
def test_the_release_says_that_it_trains_with_labels(tmp_path):
    run = run_small("cause", tmp_path, "r", *FEW, "method.prototypes=labels", "method.clipping=joint")
    assert run.metrics["uses_labels"] is True


def test_joint_clipping_is_one_norm_of_head_projection_and_probe():
    made, _ = model("method.phase=head", "method.clipping=joint", "optim.head.clip_norm=0.5")
    optimizer = made.configure_optimizers()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    made.configure_gradient_clipping(optimizer)
    groups = {group["name"]: [p.grad for p in group["params"]] for group in optimizer.param_groups}
    joint = torch.cat([g.flatten() for name in ("head", "linear_probe") for g in groups[name]])
    torch.testing.assert_close(joint.norm(), torch.tensor(0.5), rtol=1e-3, atol=0)
    assert all((gradient == 1).all() for gradient in groups["cluster_probe"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_small("cause", tmp_path_factory.mktemp("plain"), "plain", *FEW)


OPTIONS = {
    "dim=8": "head.linear.weight", "projection_dim=8": "projection.weight", "concepts=7": "book",
    "start=uniform": "book", "centre=false": "book", "cell=3": "book", "modularity_temperature=1": "book",
    "temperature=0.5": "head.linear.weight", "near=0.2": "head.linear.weight", "far=-0.9": "head.linear.weight",
    "bank=2": "head.linear.weight", "ema=0.5": "teacher.copy.linear.weight", "dropout=0": "head.linear.weight",
    "clipping=joint": "head.linear.weight", "prototypes=labels": "teacher.copy.linear.weight",
}  # fmt: skip


@pytest.mark.train
@pytest.mark.parametrize("word", OPTIONS)
def test_every_option_changes_the_training(word, plain, tmp_path):
    name = OPTIONS[word]
    tight = ["optim.head.clip_norm=0.01"] if "clipping" in word else []
    other = run_small("cause", tmp_path, "with", *FEW, f"method.{word}", *tight)
    one = run_small("cause", tmp_path, "tight", *FEW, *tight) if tight else plain
    weights = [run.weights[name] for run in (other, one)]
    assert torch.isfinite(weights[0]).all()
    assert weights[0].shape != weights[1].shape or not torch.equal(*weights)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    return run_small("cause", tmp_path_factory.mktemp("tr"), "tr", *TR)


@pytest.mark.train
def test_the_transformer_sees_maps_of_other_sizes(transformer):
    metrics = evaluating.evaluate(transformer.folder / "checkpoints" / "last.ckpt", ["data.eval_size=[64,80]"])
    assert metrics["val/own/miou"] > 0


@pytest.mark.train
def test_the_prototypes_begin_with_the_codes_of_all_pictures(tmp_path):
    """They divide all training codes as well as k-means does that has seen them all; k-means of a step's does not."""
    run = run_small("cause", tmp_path, "start", *FEW, "optim.prototypes.lr=0", "data.batch_size=2")
    checkpoint = setup.read_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    cfg, data = setup.build_data(config.restore(checkpoint["labelfree"]["config"]))
    made = setup.restore_model(checkpoint, cfg, data.meta, True)
    with torch.no_grad():
        maps = [made.embed(made.features(batch["image"])) for batch in data.loader("train", "train")]
    points = F.normalize(torch.cat([patch_rows(codes) for codes in maps]), dim=1)

    def fit_of(centroids):
        return float((points @ F.normalize(centroids, dim=1).T).amax(1).mean())

    few = patch_rows(maps[0][:2])
    bound, of_two = (
        fit_of(kmeans.fit(F.normalize(rows, dim=1), len(made.own), seed=0, iterations=20, restarts=10).centroids)
        for rows in (points, few)
    )
    assert fit_of(made.own.detach()) > bound - 0.2 * (bound - of_two)


@pytest.mark.ddp
def test_two_processes_with_the_transformer_equal_one(tmp_path):
    """Without the biases that get rounding alone (of the keys), whose packed tensor Adam moves."""
    one = run_two("cause", tmp_path / "one", *TR, processes=1)
    two = run_two("cause", tmp_path, *TR)
    alone = Run(one, read_json(one / "metrics.json"))
    weights = alone.checkpoint
    for name in [name for name in weights["state_dict"] if name.endswith("in_proj_bias")]:
        del weights["state_dict"][name]
    saved = two / "checkpoints" / "last.ckpt"
    other = torch.load(saved, weights_only=True)
    for name in [name for name in other["state_dict"] if name.endswith("in_proj_bias")]:
        del other["state_dict"][name]
    torch.save(weights, one / "checkpoints" / "last.ckpt")
    torch.save(other, saved)
    expect_equal(two, alone)


def test_the_book_has_a_fiftieth_of_the_patches_that_its_phase_samples():
    words = [word for word in small_words("cause") if not word.startswith("method.concepts")]
    cfg, _ = setup.build_data(config.compose([*words, "trainer.max_steps=500", "method.num_clusters=3"]))
    # 100 steps of 4 pictures sample 9 of the 36 patches of each; there are 22 pictures, so 792 patches.
    assert cfg.method.concepts == 15
    cfg, _ = setup.build_data(config.compose([*words, "trainer.max_steps=10", "method.num_clusters=3"]))
    assert cfg.method.concepts == 3
    cfg, _ = setup.build_data(config.compose([*words, "trainer.max_steps=500", "phases=[]", "method.concepts=9"]))
    assert cfg.method.concepts == 9


def test_looking_for_the_size_of_the_book_says_nothing_of_random_weights(caplog):
    origins.log_once.cache_clear()
    setup.build_data(config.compose(small_words("cause", "backbone.weights=bundled", "method.concepts=null")))
    assert "random weights" not in caplog.text


def test_masks_of_elements_belong_to_a_picture_and_keep_the_mean():
    masks = own_element_masks(0, "x", 3, (4, 5, 50), 0.2, torch.device("cpu"))
    assert torch.equal(masks, own_element_masks(0, "x", 3, (4, 5, 50), 0.2, torch.device("cpu")))
    assert torch.equal(masks[:2], own_element_masks(0, "x", 3, (2, 5, 50), 0.2, torch.device("cpu")))
    assert not torch.equal(masks, own_element_masks(0, "x", 4, (4, 5, 50), 0.2, torch.device("cpu")))
    assert sorted(masks.unique().tolist()) == pytest.approx([0, 1.25])
    assert masks.mean() == pytest.approx(1, abs=0.1)
    assert own_element_masks(0, "x", 3, (4, 5), 0.0, torch.device("cpu")) is None


def test_the_prototypes_are_read_three_times_as_sharp():
    made, _ = model()
    assert made.sharpness == 3.0
    assert OmegaConf.to_container(made.cfg)["phases"][0] == {"share": 1, "method.phase": "book"}


REFUSED = {
    "method.cell=7": "method.cell=7: pictures have 6 x 6 patches, so there is no whole cell; make it smaller",
    "method.phase=both": "method.phase=both: not one of book, head, prototypes",
    "method.head=cnn": "method.head=cnn: not one of mlp, tr",
    "method.near=0.05": (
        "method.near=0.05: lies below method.far=0.1, so concepts would be both alike and not; raise it"
    ),
    "data.train_crop=keep": "data.train_crop=keep: padding would become patches of the loss; use random or center",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refusals(word, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small("cause", tmp_path, "x", word)
    assert str(caught.value) == REFUSED[word]
    assert not (tmp_path / "x").exists()
