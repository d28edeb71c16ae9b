"""DINO: which views meet which, what is trained, schedules at their ends, a collapsed teacher, the exported weights."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import config
from common.errors import ConfigError, WeightsError
from engine import setup
from lightning_modules import dino
from lightning_modules.base.optim import CompositeOptimizer, clip_gradients, cosine, scheduled
from models.dino_head import DinoHead
from models.momentum import follow
from tests.conftest import run_small, small_words

ONE = ["evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]


def build(*words: str) -> dino.Dino:
    cfg, data = setup.build_data(config.compose(small_words("dino", *words)))
    return setup.build_model(cfg, data.meta)


@pytest.fixture(scope="module")
def model() -> dino.Dino:
    return build()


def test_views_of_a_batch(model):
    views = model.views
    assert list(views) == ["global0", "global1", "local0", "local1"]
    assert [views[name].geometric.size for name in views] == [32, 32, 16, 16]
    assert [views[name].photometric.blur_p for name in views] == [1.0, 0.1, 0.5, 0.5]
    assert [views[name].photometric.solarize_p for name in views] == [0.0, 0.2, 0.0, 0.0]
    assert views["global0"].geometric.scale == (0.2, 0.6)
    assert views["local1"].geometric.scale == (0.05, 0.15)


@pytest.mark.train
def test_the_teacher_sees_large_crops_and_the_student_all(monkeypatch, tmp_path):
    """And the loss gets logits [V,B,K] in the order of the views, targets [2,B,K]."""
    seen = {"teacher": [], "student": [], "shapes": None}
    plain = dino.distil.multi_crop_loss

    def loss(student, targets, temperature):
        seen["shapes"] = tuple(student.shape), tuple(targets.shape), targets.requires_grad
        return plain(student, targets, temperature)

    started = dino.Dino.on_train_start

    def watch(self):
        for name, network in (("teacher", self.backbone), ("student", self.student)):
            features = network.features
            network.features = lambda x, *a, _f=features, _n=name, **k: (
                seen[_n].append(tuple(x.shape)),
                _f(x, *a, **k),
            )[1]
        started(self)

    monkeypatch.setattr(dino.distil, "multi_crop_loss", loss)
    monkeypatch.setattr(dino.Dino, "on_train_start", watch)
    run_small("dino", tmp_path, "x", "trainer.max_steps=1", *ONE)
    assert seen["student"] == [(8, 3, 32, 32), (8, 3, 16, 16)]
    assert seen["teacher"][0] == (8, 3, 32, 32)
    assert seen["shapes"] == ((4, 4, 48), (2, 4, 48), False)


def test_only_the_student_its_head_and_the_token_are_trained(model):
    groups = model.param_groups()
    assert [group["name"] for group in groups] == ["student", "student"]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() <= 1 for p in groups[1]["params"])
    assert groups[1]["weight_decay"] == 0
    trained = {id(p) for group in groups for p in group["params"]}
    assert id(model.mask_token) in trained
    assert id(model.head.direction) in trained
    assert id(model.head.length) not in trained  # norm_last
    assert not trained & {id(p) for p in (*model.backbone.parameters(), *model.teacher_head.parameters())}
    assert not any(p.requires_grad for p in model.backbone.parameters())
    for one, two in zip(model.backbone.parameters(), model.student.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.train
def test_the_last_layer_stands_still_in_the_first_epoch(tmp_path):
    """5 steps an epoch: after five steps the prototypes are as they were, after six they are not."""
    start = build().head.direction
    frozen = ["method.freeze_last_epochs=1", *ONE]
    five = run_small("dino", tmp_path, "five", "trainer.max_steps=5", *frozen).weights
    six = run_small("dino", tmp_path, "six", "trainer.max_steps=6", *frozen).weights
    assert torch.equal(five["head.direction"], start)
    assert not torch.equal(five["head.mlp.0.weight"], build().head.mlp[0].weight)
    assert not torch.equal(six["head.direction"], start)


def test_schedules_at_their_ends():
    group = {
        "schedule": "cosine", "warmup": 10, "base_lr": 1.0, "lr_end": 0.1,
        "base_weight_decay": 0.04, "weight_decay_end": 0.4,
    }  # fmt: skip
    assert scheduled(group, 0, 100) == {"lr": 0.1, "weight_decay": 0.04}
    assert scheduled(group, 9, 100)["lr"] == 1.0
    assert scheduled(group, 10, 100)["lr"] == 1.0
    assert scheduled(group, 55, 100)["lr"] == pytest.approx(0.55)
    assert scheduled(group, 100, 100) == {"lr": pytest.approx(0.1), "weight_decay": pytest.approx(0.4)}
    assert "weight_decay" not in scheduled(group | {"weight_decay_end": None}, 50, 100)
    assert [cosine(0.996, 1.0, step, 10) for step in (0, 10, 11)] == [0.996, 1.0, 1.0]


def test_the_temperature_rises_to_its_end():
    model = build("method.temperature.warmup=10", "method.temperature.teacher=0.07")
    assert [round(model._temperature(step), 4) for step in (0, 5, 10, 99)] == [0.04, 0.055, 0.07, 0.07]
    assert build("method.temperature.teacher=0.06")._temperature(0) == 0.06


def test_every_parameter_is_clipped_by_itself():
    large, small = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    large.grad, small.grad = torch.full((4,), 10.0), torch.full((4,), 0.1)
    clip_gradients({"params": [large, small], "clip_each": 3.0, "clip_norm": None, "clip_value": None})
    assert large.grad.norm() == pytest.approx(3.0, rel=1e-4)
    assert torch.equal(small.grad, torch.full((4,), 0.1))


def test_decay_of_the_groups_moves_with_the_schedule(model):
    settings = config.plain(model.cfg.optim.student)
    groups = [{**settings, **group, "owner": "method"} for group in model.param_groups()]
    optimizer = CompositeOptimizer(groups)
    for group in optimizer.param_groups:
        group |= scheduled(group, 8, 8)
    assert [round(group["weight_decay"], 4) for group in optimizer.param_groups] == [0.2, 0.0]


def test_the_teacher_follows():
    slow, fast = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = slow.weight.detach().clone()
    follow(slow, fast, 0.9)
    assert torch.allclose(slow.weight, 0.9 * before + 0.1 * fast.weight)
    with pytest.raises(ConfigError, match=r"momentum m = 1\.5"):
        follow(slow, fast, 1.5)


def test_logits_of_the_head_are_cosines():
    head = DinoHead(8, 16, 4, 6, norm_last=True)
    logits = head(torch.randn(20, 8))
    assert logits.abs().max() <= 1 + 1e-5
    assert not head.length.requires_grad
    assert DinoHead(8, 16, 4, 6, norm_last=False).length.requires_grad


@pytest.mark.train
@pytest.mark.parametrize(
    "words",
    [
        ["method.centring=mean"],
        ["method.patch_centring=picture"],
        ["method.place.weight=0"],
        ["method.picture_weight=0"],
        ["method.dense.weight=0"],
        ["method.dense.mask_p=1"],
        ["method.crops.local_count=0"],
        ["method.head.norm_last=false"],
        ["method.freeze_last_epochs=1"],
        ["method.momentum=0.5"],
        ["method.temperature.teacher=0.06"],
        ["method.temperature.warmup=2", "method.temperature.teacher_start=0.06"],
        ["method.drop_path=0.3"],
        ["method.augment.solarize_p=1"],
        ["optim.student.clip_each=0.001"],
        ["optim.student.weight_decay_end=null"],
    ],
    ids=lambda words: words[0],
)
def test_every_option_changes_the_training(words, plain_three, tmp_path):
    other = run_small("dino", tmp_path, "with", "trainer.max_steps=3", *ONE, *words).weights
    name = "backbone.net.blocks.0.attn.qkv.weight"
    assert torch.isfinite(other[name]).all()
    assert not torch.equal(other[name], plain_three[name])


@pytest.fixture(scope="module")
def plain_three(tmp_path_factory) -> dict[str, torch.Tensor]:
    return run_small("dino", tmp_path_factory.mktemp("three"), "plain", "trainer.max_steps=3", *ONE).weights


@pytest.mark.train
def test_a_convolutional_network_learns_without_the_dense_term(tmp_path):
    words = ["backbone=resnet18", "backbone.levels=[-1]", "method.crops.local_size=32", "trainer.max_steps=2", *ONE]
    with pytest.raises(ConfigError) as caught:
        run_small("dino", tmp_path, "x", *words)
    assert str(caught.value) == (
        "method.dense.weight=1: masked patches need a transformer, and resnet18.tv_in1k is none; set "
        "method.dense.weight=0"
    )
    run = run_small("dino", tmp_path, "x", *words, "method.dense.weight=0")
    statistics = [name for name in run.weights if name.startswith("backbone.") and name.endswith("running_mean")]
    assert any(run.weights[name].abs().sum() > 0 for name in statistics)  # the teacher's batch norms saw batches
    again = ["backbone=resnet18", "backbone.levels=[-1]", "trainer.max_steps=1", *ONE]
    run_small("kmeans_baseline", tmp_path, "y", *again, f"backbone.weights={run.folder / 'backbone.safetensors'}")


@pytest.mark.train
def test_a_collapsed_teacher_is_noticed(monkeypatch, tmp_path, caplog):
    """A real run whose teacher gives one answer for everything ends with one warning."""
    monkeypatch.setattr(dino, "LOOK_EVERY", 1)
    monkeypatch.setattr(dino.Dino, "_teacher", constant_teacher(dino.Dino._teacher))
    monkeypatch.setattr(dino.CollapseWatch, "__init__", no_grace(dino.CollapseWatch.__init__))
    with caplog.at_level(logging.WARNING, logger="evaluation.collapse"):
        run_small("dino", tmp_path, "x", *ONE)
    said = [record.getMessage() for record in caplog.records if record.name == "evaluation.collapse"]
    assert len(said) == 1
    assert said[0].startswith("the teacher has collapsed: train/teacher_")


def constant_teacher(plain):
    def teacher(self, large):
        features = plain(self, large)
        features.cls = features.cls[:1].expand_as(features.cls)
        return features

    return teacher


def no_grace(plain):
    return lambda self, grace: plain(self, 0)


@pytest.mark.train
def test_a_healthy_small_run_is_not_called_collapsed(small_run, caplog):
    small_run("dino")
    assert not [record for record in caplog.records if record.name == "evaluation.collapse"]


@pytest.mark.train
def test_the_run_exports_its_teacher_with_a_card(small_run, tmp_path):
    run = small_run("dino")
    path = run.folder / "backbone.safetensors"
    exported = load_file(path)
    for name, value in exported.items():
        assert torch.equal(value, run.weights[f"backbone.net.{name}"]), name
    card = (run.folder / "backbone.md").read_text()
    for line in (
        "# tiny, trained with dino",
        "- Trained on: `scenes`, 22 pictures without labels, 8 steps of 4 (1.5 passes), from random weights, seed 0.",
        "- Licence of the weights: yours to state (method.licence); mind the terms of the training pictures.",
        f"| `val/kmeans/miou` | {run.metrics['val/kmeans/miou']:.1f} |",
    ):
        assert line in card.splitlines(), line
    assert str(run.folder) not in card
    other = run_small("hidden_positives", tmp_path, "hp", f"backbone.weights={path}", "trainer.max_steps=1", *ONE)
    assert (
        other.checkpoint["labelfree"]["backbone"] != small_run("hidden_positives").checkpoint["labelfree"]["backbone"]
    )


@pytest.mark.train
def test_a_foreign_or_cut_file_is_refused(small_run, tmp_path):
    path = small_run("dino").folder / "backbone.safetensors"
    state = load_file(path)
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:, :-8].contiguous()
    save_file(state, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match=r"first differing key blocks\.0\.attn\.qkv\.weight: expected \[480, 160\]"):
        build(f"backbone.weights={tmp_path / 'foreign.safetensors'}")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cut"):
        build(f"backbone.weights={tmp_path / 'cut.safetensors'}")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("backbone.frozen=true", "backbone.frozen=true: method=dino trains the backbone; set backbone.frozen=false"),
        ("method.centring=none", "method.centring=none: not one of mean, sinkhorn"),
        ("method.patch_centring=mean", "method.patch_centring=mean: not one of batch, picture"),
        (
            "method.crops.global_size=30",
            "method.crops.global_size: pictures of 30 x 30 px do not fit vit_tiny_patch16_224, whose patches are 8 px: "
            "height and width must be multiples of 8; set method.crops.global_size to 24 x 24 or 32 x 32",
        ),
        (
            "method.crops.local_scale=[0.5]",
            "method.crops.local_scale=[0.5]: expected a list of 2 numbers above 0, at most 1, in ascending "
            "order, as in [0.05,0.15]",
        ),
        (
            "method.crops.global_scale=[0,1]",
            "method.crops.global_scale=[0, 1]: expected a list of 2 numbers above 0, at most 1, in ascending "
            "order, as in [0.2,0.6]",
        ),
        (
            "method.augment.blur_p=[1]",
            "method.augment.blur_p=[1]: expected a list of 3 numbers from 0 to 1, as in [1.0,0.1,0.5]",
        ),
        ("method.momentum=1.5", "method.momentum=1.5: expected a number from 0 to 1"),
        ("method.temperature.student=0", "method.temperature.student=0: must be above 0"),
        ("method.head.out_dim=1", "method.head.out_dim=1: must be at least 2"),
        ("method.crops.local_count=-1", "method.crops.local_count=-1: must not be negative"),
    ],
)
def test_errors_have_one_clear_line(word, line):
    with pytest.raises(ConfigError) as caught:
        build(word)
    assert str(caught.value) == line
