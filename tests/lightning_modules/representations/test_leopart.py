"""Leopart: order of a step, what is trained, foreground, queue, options, networks without a class token, the export."""

import logging

import pytest
import torch
from safetensors.torch import load_file

import config
from common.errors import ConfigError
from common.spec import ClassMeta
from datamodules.base.views import make_views
from engine import setup
from lightning_modules.representations import leopart
from lightning_modules.representations.crops import GLOBALS
from tests.conftest import run_small, small_words
from tests.support.ranks import on_two_ranks

NARROW = 1
"""A step some of whose crops share no whole cell of the corner of a large one."""
META = ClassMeta(tuple("abcd"), tuple((i, i, i) for i in range(4)))
FOREGROUND = ("method.attention.tokens=fg", "method.attention.by=class")


def built(*words: str) -> leopart.Leopart:
    small = ["method.num_clusters=4", "method.prototypes=12", "method.head.dim=8", "method.queue.size=80"]
    model = setup.build_model(config.compose(small_words("leopart", *small, *words)), META)
    model.head.mlp[-1].weight.data.mul_(30)  # so that prototypes are told apart from the start
    if model.teacher is not None and model.cfg.method.teacher.head == "same":
        model.teacher_head.copy.load_state_dict(model.head.state_dict())
    model.total_steps = 100
    return model.train()


def batch(model: leopart.Leopart, count: int = 4, step: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    image = torch.rand(count, 3, 6, 6, generator=draw).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return make_views({"image": image}, model.views, 0, step)


def three_steps(*words: str) -> list[float]:
    """Losses of steps that another hand than an optimiser's makes: later ones see the queue and the teacher that the
    earlier ones left."""
    model, found = built("method.queue.size=24", "method.queue.per_picture=6", *FOREGROUND, *words), []
    for step in range(3):
        found.append(model.loss(batch(model, step=step), None).total.item())
        model.head.prototypes.data.add_(0.3 * torch.ones(12, 8).tril())
        model.head.mlp[-1].bias.data.add_(0.1 * torch.arange(8))
        model.after_step()
    return found


def test_the_teacher_follows_by_the_weights_that_the_loss_was_computed_with():
    model = built("method.teacher.momentum=0.5", "method.train_blocks=null")
    with torch.no_grad():
        for value in (*model.head.parameters(), *model.backbone.parameters()):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    before = model.teacher_head.copy.mlp[0].weight.clone()
    prototypes = torch.nn.functional.normalize(model.teacher_head.copy.prototypes, dim=1)
    found = model.loss(batch(model), None)
    assert torch.allclose(model.head.prototypes.norm(dim=1), torch.ones(12), atol=1e-6)
    assert torch.allclose(model.teacher_head.copy.mlp[0].weight, (before + model.head.mlp[0].weight) / 2)
    assert torch.allclose(model.teacher_head.copy.prototypes, (prototypes + model.head.prototypes) / 2, atol=1e-6)
    assert not model.teacher.training
    assert model.backbone.training
    found.total.backward()
    assert all(value.grad is not None for value in model.head.parameters())
    assert all(value.grad is not None for value in model.backbone.parameters() if value.requires_grad)
    assert all(value.grad is None for part in (model.teacher, model.teacher_head) for value in part.parameters())
    assert found.view == "global0"
    assert tuple(found.codes.shape) == (4, model.code_dim, 4, 4)
    assert not found.codes.requires_grad


def test_the_momentum_of_the_teacher_goes_to_its_end(monkeypatch):
    model, seen = built("method.teacher.momentum=0.5", "method.teacher.momentum_end=0.9"), []
    monkeypatch.setattr(leopart.Momentum, "update", lambda _, m: seen.append(m))
    for model.total_steps in (100, 0):  # at the beginning of a run, and behind its end
        monkeypatch.setattr(type(model), "global_step", 100 - model.total_steps)
        model._follow()
    assert seen == pytest.approx([0.5, 0.5, 0.9, 0.9])


def test_four_groups_of_parameters_and_what_is_decayed():
    model = built("method.train_blocks=null")
    groups = model.param_groups()
    assert [group["name"] for group in groups] == ["backbone", "backbone", "head", "head"]
    assert [group.get("weight_decay") for group in groups] == [None, 0.0, None, 0.0]
    assert {value.dim() > 1 for value in groups[0]["params"]} == {True}
    assert {value.dim() > 1 for value in groups[1]["params"]} == {False}
    assert any(value is model.backbone.net.pos_embed for value in groups[0]["params"])
    assert any(value is model.head.prototypes for value in groups[2]["params"])


@pytest.mark.parametrize(
    "words",
    [
        ["method.teacher.enabled=false"], ["method.teacher.head=own"], ["method.teacher.momentum=0"],
        ["method.attention.tokens=all"], ["method.attention.tokens=bg"], ["method.attention.by=features"],
        ["method.attention.mass=0.8"], ["method.attention.blur=3"], ["method.attention.smallest=9"],
        ["method.attention.kernel=3", "method.attention.blur=3"], ["method.attention.tolerance=0.5"],
        ["method.queue.size=0"], ["method.queue.size=60"], ["method.queue.per_picture=3"],
        ["method.queue.prototypes=student"], ["method.sinkhorn.epsilon=0.2"], ["method.sinkhorn.iterations=1"],
        ["method.temperature=0.3"], ["method.cells=3"], ["method.crops.local_count=0"], ["method.crops.overlap=0.05"],
    ],
    ids=lambda words: words[-1],
)  # fmt: skip
def test_every_option_changes_the_loss(words, plain):
    assert three_steps(*words) != plain


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return three_steps()


def test_a_pair_without_a_cell_that_counts(monkeypatch):
    """Left out of the mean, or a 0 as released; where no pair has one there is no gradient, and no error."""
    corner = torch.zeros(8, 4, 4, dtype=torch.bool)
    corner[[0, 4], :2, :2] = True  # of one picture
    monkeypatch.setattr(leopart, "attention_foreground", lambda *_, **__: corner)
    one, two = (built(*FOREGROUND, f"method.skipped={rule}") for rule in ("leave_out", "count"))
    left, counted = (model.loss(batch(model, step=NARROW), None) for model in (one, two))
    assert 0 < left.parts["pairs"] == counted.parts["pairs"] < 1
    assert 0 < counted.total < left.total
    corner[:] = False
    nothing = one.loss(batch(one), None)
    nothing.total.backward()
    assert not nothing.total
    assert not one.head.prototypes.grad.any()


def test_the_background_is_what_is_not_foreground():
    fore, back = (built(*FOREGROUND, f"method.attention.tokens={kind}") for kind in ("fg", "bg"))
    images = torch.cat([batch(fore)[name] for name in GLOBALS])
    told = fore.teacher(images, attention=True)
    masks = fore._masks(told)
    assert torch.equal(masks, ~back._masks(told))
    assert 0.2 < masks.float().mean() < 0.8
    weights = told.attention.softmax(-1)[:, :, 0, told.prefix :].mean(1).unflatten(1, (4, 4))
    share = (weights * masks).sum((1, 2)) / weights.sum((1, 2))
    assert (share > masks.float().mean((1, 2)))[share > 0].all()


def test_the_queue_holds_codes_of_the_foreground_newest_first_and_is_in_the_checkpoint(monkeypatch):
    model = built(*FOREGROUND, "method.queue.size=60", "method.queue.per_picture=5")
    seen = []
    plain = leopart.sinkhorn_targets
    monkeypatch.setattr(
        leopart, "sinkhorn_targets", lambda rows, *rules: (seen.append(len(rows)), plain(rows, *rules))[1]
    )
    for step in range(4):
        model.loss(batch(model, step=step), None)
        fresh = [rows.clone() for rows in model.fresh]
        assert int(model.banks[0].filled) == min(60, 20 * step)  # it is written after the step
        model.after_step()
        newest = model.banks[1].ordered().flip(0)[:20]
        assert torch.equal(newest, fresh[1])
    assert seen == [64] * 6 + [124] * 2  # it takes part once it is full
    assert torch.allclose(model.banks[0].rows().norm(dim=1), torch.ones(60), atol=1e-5)
    assert "banks.1.storage" in model.state_dict()


def test_picks_are_of_all_ranks_without_repetition():
    found = leopart.queue_picks(50, 20, 0, "leopart.queue", 3, 1)
    assert len(set(found.tolist())) == 20
    assert found.tolist() == sorted(found.tolist(), reverse=True)
    assert leopart.queue_picks(5, 20, 0, "leopart.queue", 3, 1).tolist() == [4, 3, 2, 1, 0]
    assert not torch.equal(found, leopart.queue_picks(50, 20, 0, "leopart.queue", 4, 1))


def _steps(rank: int, words: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Two steps of this rank's half; alone (rank -1) of the whole batch."""
    model, losses = built(*words), []
    for step in range(3):
        whole = batch(model, step=step)
        own = whole if rank < 0 else make_views({"image": whole["image"].chunk(2)[rank]}, model.views, 0, step)
        losses.append(model.loss(own, None).total.detach())
        model.after_step()
    return {"loss": torch.stack(losses), "queue": model.banks[0].storage}


@pytest.mark.ddp
def test_two_ranks_have_the_loss_and_the_queue_of_one():
    words = (*FOREGROUND, "method.queue.size=70")
    alone, ranks = _steps(-1, words), on_two_ranks(_steps, words)
    assert torch.allclose(torch.stack([rank["loss"] for rank in ranks]).mean(0), alone["loss"], rtol=1e-4)
    for rank in ranks:
        assert torch.allclose(rank["queue"], alone["queue"], atol=1e-5)


def test_the_last_blocks_alone_are_trained():
    model = built()
    model.loss(batch(model), None).total.backward()
    blocks = model.backbone.net.blocks
    trained = [any(value.grad is not None for value in block.parameters()) for block in blocks]
    assert trained == [False] * 4 + [True] * 2
    assert model.backbone.net.norm.weight.grad is not None
    for value in (
        model.backbone.net.cls_token,
        model.backbone.net.pos_embed,
        model.backbone.net.patch_embed.proj.weight,
    ):
        assert not value.requires_grad
    assert len(model.param_groups()[0]["params"]) == 8


def test_a_network_without_attention_looks_by_its_features_and_says_so(caplog):
    words = ["backbone=mobilenetv2", "backbone.weights=none", "backbone.levels=[2]", "method.attention.kernel=1"]
    with caplog.at_level(logging.INFO, logger="lightning_modules.representations.leopart"):
        model = built(*words, "method.attention.tokens=fg")
    assert "mobilenetv2_100.ra_in1k has no trained class token, so the lengths" in caplog.text
    found = model.loss(batch(model), None)
    found.total.backward()
    assert 0 < float(found.parts["foreground"]) < 1
    moved = {name for name, value in model.backbone.net.named_parameters() if value.grad is not None}
    assert moved
    assert not any(name.startswith(("conv_stem", "bn1")) for name in moved)  # two of its parts are trained
    assert not model.backbone.net.bn1.training
    whole = built(*words, "method.train_blocks=null")
    whole.loss(batch(whole), None).total.backward()
    assert whole.backbone.net.conv_stem.weight.grad.any()


@pytest.mark.train
def test_the_run_exports_a_network_that_others_take(small_run, tmp_path):
    run = small_run("leopart")
    path = run.folder / "backbone.safetensors"
    for name, value in load_file(path).items():
        assert torch.equal(value, run.weights[f"backbone.net.{name}"]), name
    assert "# tiny, trained with leopart" in (run.folder / "backbone.md").read_text()
    few = ["trainer.max_steps=1", "evaluation.panels=0", "evaluation.kmeans.pictures=4"]
    other = run_small("kmeans_baseline", tmp_path, "x", f"backbone.weights={path}", *few)
    plain = run_small("kmeans_baseline", tmp_path, "y", *few)
    assert other.checkpoint["labelfree"]["backbone"] != plain.checkpoint["labelfree"]["backbone"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["backbone.frozen=true"],
            "backbone.frozen=true: method=leopart trains the backbone; set backbone.frozen=false",
        ),
        (
            ["method.train_blocks=7"],
            "method.train_blocks=7: vit_tiny_patch16_224 has 6 blocks up to the last of backbone.levels; set 6 at "
            "most, or null for the whole network",
        ),
        (
            ["backbone=mobilenetv2", "backbone.weights=none", "method.attention.by=class"],
            "method.attention.by=class: mobilenetv2_100.ra_in1k has no class token that looks at patches; set "
            "method.attention.by=features, or method.attention.tokens=all",
        ),
        (["method.attention.tokens=none"], "method.attention.tokens=none: not one of all, fg, bg"),
    ],
)  # fmt: skip
def test_errors_have_one_clear_line(words, line):
    with pytest.raises(ConfigError) as caught:
        built("backbone.frozen=false", *words)
    assert str(caught.value) == line
