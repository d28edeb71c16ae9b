"""SlotCon: what the crops share, who learns and who follows, classes out of more prototypes, what a run leaves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import config
from common.errors import ConfigError
from datamodules.base.transforms import Replay
from datamodules.base.views import make_views
from engine import setup
from lightning_modules.base.optim import cosine
from lightning_modules.representations import slotcon
from tests.conftest import run_small, small_words
from tests.reference import training as replay

NAMES = slotcon.CROPS
QUICK = ["evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]
NET = ["backbone=net10a", "backbone.create.widths=[4,4,6,6,8,8]", "backbone.frozen=false"]


def build(*words, classes=3):
    setup.begin()
    cfg = config.compose(small_words("slotcon", f"method.num_clusters={classes}", "backbone.frozen=true", *words))
    return setup.build_model(cfg, replay.classes(classes))


class Viewed(replay.Recorded):
    """Makes views where a run makes them."""

    def __init__(self, model, steps):
        batches = [
            replay.batch(torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(n)), None)
            for n in range(steps)
        ]
        super().__init__(batches, 2)
        self.model = model

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return make_views(batch, self.model.views, 0, self.model.global_step)


def trained(folder: Path, steps: int, *words: str):
    model = build(*words)
    before = replay.copied(model.state_dict())
    return model, before, replay.train(model, Viewed(model, steps), folder, steps)


def moved(model, before):
    """The first part of the names of what has changed."""
    state = model.state_dict()
    return {name.split(".")[0] for name, value in before.items() if not torch.equal(state[name], value)}


# ---- crops


def test_the_second_crop_has_to_meet_the_first():
    views = build().views
    assert [views[name].geometric.size for name in NAMES] == [32, 32]
    assert views[NAMES[0]].meets is None
    meets = views[NAMES[1]].meets
    assert (meets.views, meets.share, meets.of_own, meets.tries, meets.whole) == (NAMES[:1], 0.01, True, 11, False)
    assert [views[name].photometric.blur_p for name in NAMES] == [1.0, 0.1]
    assert [views[name].photometric.solarize_p for name in NAMES] == [0.0, 0.2]


def test_both_parts_show_the_same_place_of_the_picture():
    """Of a picture whose value is its place, whatever the crops and their mirroring."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    batch = replay.batch(torch.stack([x, y, x + y])[None].repeat(16, 1, 1, 1) / 100, None)
    views = {name: spec.__class__(geometric=spec.geometric, meets=spec.meets) for name, spec in build().views.items()}
    seen = make_views(batch, views, 3, 0)
    shared = slotcon.shares(seen)
    one, two = (slotcon.part(seen[name], *where) for name, where in zip(NAMES, shared, strict=True))
    meet = (shared[0][0][:, 2:] > shared[0][0][:, :2]).all(1)
    mirrored = [where[1] for where in shared]
    assert meet.sum() > 8
    assert (mirrored[0] != mirrored[1]).any()
    inside = slice(4, -4)
    apart = (one - two)[meet][:, :, inside, inside].abs() * 100
    assert apart.max() < 1.5  # px


def test_the_whole_crop_is_the_identity():
    scores, whole = torch.randn(2, 3, 5, 6), torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(2, 1)
    mirrored = torch.tensor([False, True])
    found = slotcon.part(scores, whole, mirrored)
    assert torch.allclose(found[0], scores[0], atol=1e-5)
    assert torch.allclose(found[1], scores[1].flip(-1), atol=1e-5)


def test_crops_that_do_not_meet_share_nothing():
    boxes = [torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[20.0, 0.0, 10.0, 10.0]])]
    views = {
        f"{name}.params": Replay(box, torch.tensor([False]), (48, 48), (8, 8))
        for name, box in zip(NAMES, boxes, strict=True)
    }
    for box, mirrored in slotcon.shares(views):
        assert torch.equal(slotcon.part(torch.ones(1, 2, 4, 4), box, mirrored), torch.zeros(1, 2, 4, 4))


def test_exchanged_crops_have_the_same_loss():
    model = build("method.head.norm=batch").train()
    model.backbone.eval()
    batch = make_views(replay.batch(torch.rand(4, 3, 48, 48), None), model.views, 0, 0)
    one = _parts(model, batch)
    swapped = {**batch}
    for own, other in (NAMES, NAMES[::-1]):
        swapped[own], swapped[f"{own}.params"] = batch[other], batch[f"{other}.params"]
    assert one == pytest.approx(_parts(model, swapped), rel=1e-5)


def _parts(model, batch):
    maps = [model.backbone.features(batch[name]).concat() for name in NAMES]
    learnt, taught = ([model._slots(net(one), net.prototypes) for one in maps] for net in (model.head, model.teacher))
    return [model._grouping(learnt, taught, batch).item(), model._contrast(learnt, taught)["contrast"].item()]


# ---- who learns


@pytest.mark.train
def test_a_light_head_learns_on_a_frozen_backbone(tmp_path):
    model, before, steps = trained(tmp_path, 2)
    assert model.student is None
    assert moved(model, before) == {"head", "teacher", "predictor", "centre", "cluster_probe"}
    assert set(steps.gradients[0]) >= {"head.prototypes", "predictor.6.weight", "head.projector.0.weight"}
    assert not any(name.startswith("teacher.") for name in steps.gradients[0])


@pytest.mark.train
def test_a_backbone_is_trained_as_a_student_that_the_teacher_follows(tmp_path):
    """Running statistics of the teacher are of its own passes in training mode."""
    words = [*NET, "method.head.norm=batch", "method.momentum=0.9", "backbone.freeze_norms=false"]
    model, before, steps = trained(tmp_path, 3, *words)
    assert {"student", "backbone", "head", "teacher"} <= moved(model, before)
    m = [cosine(0.9, 1.0, step, 3) for step in range(3)]
    name = next(key.removeprefix("student.") for key in before if key.startswith("student.") and key.endswith("weight"))
    slow = before[f"backbone.{name}"].clone()
    fast = [before[f"student.{name}"], *(weights[f"student.{name}"] for weights in steps.weights)]
    for step, own in enumerate(m):
        slow = own * slow + (1 - own) * fast[step]
    state = model.state_dict()
    assert torch.allclose(state[f"backbone.{name}"], slow, atol=1e-6)
    means = [key for key in before if key.startswith("backbone.") and key.endswith("running_mean")]
    assert means
    for key in means:
        assert not torch.equal(state[key], before[key])
        assert not torch.equal(state[key], state[key.replace("backbone.", "student.", 1)])
    assert not model.backbone.training


def test_matrices_are_decayed_and_vectors_are_not():
    model = build(*NET)
    groups = model.param_groups()
    assert [group["name"] for group in groups] == ["head", "head", "backbone", "backbone"]
    for own, group in enumerate(groups):
        assert all((weight.dim() > 1) == (own % 2 == 0) for weight in group["params"])
        assert group.get("weight_decay") == (None if own % 2 == 0 else 0.0)
    assert any(weight is model.head.prototypes for weight in groups[0]["params"])
    assert not any(weight.requires_grad for weight in model.backbone.parameters())


@pytest.mark.train
def test_a_run_that_trains_the_backbone_leaves_the_teacher_as_one(tmp_path):
    run = run_small("slotcon", tmp_path, "x", "trainer.max_steps=2", *QUICK, *NET)
    saved, weights = load_file(run.folder / "backbone.safetensors"), run.weights
    assert saved
    kept = {
        name.removeprefix("backbone.net."): value for name, value in weights.items() if name.startswith("backbone.net.")
    }
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in kept.values())
    assert any(not torch.equal(weights[f"student.net.{name}"], value) for name, value in kept.items())
    assert "momentum teacher" in (run.folder / "backbone.md").read_text()


# ---- what is logged, and classes of its own


@pytest.mark.train
def test_signs_of_collapse_are_logged(tmp_path):
    _, _, steps = trained(tmp_path, 2)
    logged = steps.logged
    assert ((logged["prototypes"] >= 1) & (logged["prototypes"] <= 3)).all()
    for name in ("usage", "entropy"):
        assert ((logged[name] > 0) & (logged[name] <= 1)).all()
    assert ((logged["anchors"] > 0) & (logged["anchors"] <= 3)).all()


def test_a_teacher_that_says_one_thing_shows_it():
    model = build()
    scores = torch.zeros(4, 5, 5, 3)
    scores[..., 1] = 5
    found = model._watched(scores)
    assert found["prototypes"] == 1
    assert found["usage"] < 1e-3
    assert found["entropy"] < 1e-3
    assert model._watched(torch.rand(4, 5, 5, 3))["prototypes"] == 3


def test_each_prototype_is_a_class_where_there_are_as_many():
    model = build()
    codes = torch.randn(2, model.code_dim, 3, 3)
    found = model.classify(codes)
    wanted = torch.cosine_similarity(codes[:, None], model.teacher.prototypes[None, :, :, None, None], dim=2)
    assert torch.allclose(found * 0.07, wanted, atol=1e-5)
    assert model.own_fitted


@pytest.mark.parametrize("codes", ["projected", "features"])
def test_more_prototypes_than_classes_are_clustered(codes):
    model = build("method.prototypes=9", f"method.codes={codes}").eval()
    directions = torch.eye(model.cfg.method.dim)[:3].repeat_interleave(3, 0)
    with torch.no_grad():
        model.teacher.prototypes.copy_(directions + 0.05 * torch.randn_like(directions))
    assert not model.own_fitted
    model.fit_own()
    assert model.own_fitted
    groups = model.owner.reshape(3, 3)
    assert torch.equal(groups, groups[:, :1].expand(3, 3))
    assert len(groups[:, 0].unique()) == 3
    maps = torch.randn(2, model.code_dim, 4, 4)
    projected = maps if codes == "projected" else model.teacher(maps)
    best = torch.cosine_similarity(projected[:, None], model.teacher.prototypes[None, :, :, None, None], dim=2).argmax(
        1
    )
    assert torch.equal(model.classify(maps).argmax(1), model.owner[best])
    model.owner.zero_()  # all in one class: the others win nothing, and stay finite where maps are enlarged
    assert torch.equal(model.classify(maps).argmax(1).unique(), torch.tensor([0]))
    assert torch.isfinite(torch.nn.functional.interpolate(model.classify(maps), scale_factor=3, mode="bilinear")).all()
    model.after_step()
    assert not model.own_fitted


@pytest.mark.train
def test_the_classes_of_more_prototypes_are_in_the_checkpoint(tmp_path):
    run = run_small("slotcon", tmp_path, "x", "method.prototypes=30", "trainer.max_steps=2", *QUICK)
    assert bool(run.weights["grouped"])
    assert run.weights["owner"].unique().tolist() == list(range(12))


def test_crops_that_would_be_a_blur_are_refused():
    with pytest.raises(ConfigError) as caught:
        build("method.crops.size=800")
    assert str(caught.value) == (
        "method.crops.size=800: training pictures are 48 px (data.train_size), and a crop of them would be enlarged "
        "more than 4 times; set 192 at most"
    )


def test_fewer_prototypes_than_classes_are_refused():
    with pytest.raises(ConfigError) as caught:
        build("method.prototypes=2")
    assert str(caught.value) == (
        "method.prototypes=2: method.num_clusters=3 classes need at least as many; set method.prototypes=3 or more, or "
        "null for exactly one each"
    )
