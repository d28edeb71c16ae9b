"""IIC: whose turn it is, what moves, which sub-head is read, where copies are found, and whose labels are read."""

import itertools

import pytest
import torch

import config
from common.errors import ConfigError
from common.spec import ClassMeta
from datamodules.base import affine
from datamodules.base.views import make_views
from engine import setup
from lightning_modules.base.segmenter import split_labels
from lightning_modules.information.iic import to_first
from tests.conftest import run_small
from tests.reference import training as replay

NET = ["backbone=net10a", "backbone.create.widths=[4,4,6,6,8,8]"]
CLASSES = ClassMeta(("a", "b", "c"), ((0, 0, 0),) * 3)


def build(*words, meta=CLASSES):
    setup.begin()
    words = ["trainer=cpu", "trainer.progress=none", "method=iic", "method.num_clusters=3", *NET, *words]
    return setup.build_model(config.compose(words), meta)


def batch(step=0, count=3, side=24):
    draws = torch.Generator().manual_seed(step)
    images = torch.rand(count, 3, 4, 4, generator=draws).repeat_interleave(6, 2).repeat_interleave(6, 3)
    labels = torch.randint(3, (count, side, side), generator=draws)
    return replay.batch(images, labels.numpy())


class Viewed(replay.Recorded):
    """Makes views where a run makes them, after the batch is on its device."""

    def __init__(self, model, steps):
        super().__init__([batch(step) for step in range(steps)], 2)
        self.model = model

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return make_views(batch, self.model.views, 0, self.model.global_step)


def trained(tmp_path, steps, *words, meta=CLASSES):
    """The model after some steps of passes of 2, and what `Steps` saw of its heads."""
    model = build("method.pass_steps=2", *words, meta=meta)
    return model, replay.train(model, Viewed(model, steps), tmp_path, steps)


def moved(seen, head):
    """Whether the weights of a head changed in each step after the first."""
    key = f"{head}.heads.0.weight"
    weights = [step[key] for step in seen.weights]
    return [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]


@pytest.mark.parametrize("b_first", [False, True])
@pytest.mark.parametrize("idle", ["rests", "moves"])
def test_heads_take_turns_and_the_idle_one_rests_or_drifts(tmp_path, idle, b_first):
    _, seen = trained(tmp_path, 6, f"method.idle_head={idle}", f"method.head_b_first={b_first}")
    first, second = ("head_b", "head_a") if b_first else ("head_a", "head_b")
    drifts = idle == "moves"
    assert moved(seen, first) == [True, drifts, drifts, True, True]
    assert moved(seen, second) == [False, True, True, drifts, drifts]  # never trained before its first turn
    assert seen.logged["head_b"].tolist() == [float(step // 2 % 2 != b_first) for step in range(6)]


def test_the_network_and_both_heads_have_one_optimiser():
    model = build()
    (group,) = model.param_groups()
    owned = {id(value) for value in group["params"]}
    parts = (model.backbone, model.head_a, model.head_b)
    assert owned == {id(value) for part in parts for value in part.parameters()}
    assert model.head_a.heads[0].weight.shape[0] == 9
    assert build("method.over_clusters=5").head_a.heads[0].weight.shape[0] == 5


@pytest.mark.parametrize("words", [[], ["rotation=30", "shear=10", "scale=[0.8,1.2]", "sides=[0.7,1.0]"]])
def test_a_copy_is_found_again(words):
    """Brought back by `to_first`, what is seen of a copy without colour changes lies where it was."""
    plain = [f"method.augment.{name}=0" for name in ("brightness", "contrast", "saturation", "hue")]
    model = build(*plain, *(f"method.augment.{word}" for word in words))
    rows = torch.arange(32.0)
    image = torch.stack([rows.expand(32, 32), rows.expand(32, 32).T, torch.full((32, 32), 32.0)]) / 32
    views = make_views(replay.batch(image.expand(4, -1, -1, -1), None), model.views, 0, 3)
    assert not torch.allclose(views["copy"], views["image"], atol=0.05)
    back = affine.warped(views["copy"], to_first(views))
    seen = back[:, 2] > 0.99  # the constant channel says what the copy shows
    assert seen.float().mean() > 0.3
    difference = (back - views["image"]).abs().amax(1)
    assert difference[seen].quantile(0.95) < 0.03


def test_own_classes_are_the_resized_probabilities_of_head_b():
    model = build("method.head_padding=true").eval()
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        codes, scores = model.read(images)
        features = model.features(images)
        wanted = model.head_b(features.concat(), (24, 24))[0]
    assert scores["own"].shape == (2, 3, 10, 10)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, 8, 8))
    found = model.log_probs(codes, {"own": scores["own"]}, (24, 24))["own"]
    torch.testing.assert_close(found.exp(), wanted)


def test_the_sub_head_with_the_least_loss_of_the_last_pass_of_head_b_is_read(tmp_path):
    model, seen = trained(tmp_path, 8, "method.sub_heads=3")
    losses = sum(torch.tensor([seen.logged[f"sub_head_{n}"][step] for n in range(3)]) for step in (6, 7))
    torch.testing.assert_close(model.sub_losses, losses)
    assert model.chosen == losses.argmin()
    mean = sum(seen.logged[f"sub_head_{n}"] for n in range(3)) / 3
    assert seen.logged["loss"] == pytest.approx(mean, abs=1e-6)


def test_labels_mask_the_loss_only_where_they_are_asked_for(tmp_path):
    def losses(*words, unlabelled):
        model = build(*words)
        made = make_views(batch(), model.views, 0, 0)
        made["label"][:, :, :8] = 255 if unlabelled else 0
        views = made if model.uses_labels else split_labels(made)[0]
        with torch.no_grad():
            return model.uses_labels, model.loss(views, model.features(made["image"])).total.item()

    def loss(*words, unlabelled):
        return losses("method.pass_steps=2", *words, unlabelled=unlabelled)

    assert loss(unlabelled=True) == loss(unlabelled=False)
    (reads, masked), (_, whole) = (loss("method.mask=labels", unlabelled=part) for part in (True, False))
    assert reads
    assert masked != whole
    with pytest.raises(ConfigError, match=r"^method\.mask=labels: the data has none; set method\.mask=none$"):
        build("method.mask=labels", meta=ClassMeta())


def test_a_batch_without_any_labelled_pixel_is_skipped(tmp_path):
    model = build("method.pass_steps=2", "method.mask=labels")
    made = make_views(batch(), model.views, 0, 0)
    made["label"].fill_(255)
    found = model.loss(made, model.features(made["image"]))
    assert bool(found.skip)
    assert found.total.item() == 0


def test_sparse_shifts_are_keyed_and_within_their_range():
    model = build("method.sparse_shift=[2,4]")
    drawn = {model._sparse_shift(sub) for sub in range(40)}
    assert len(drawn) > 8
    assert {abs(value) for shift in drawn for value in shift} == {2, 3, 4}
    assert model._sparse_shift(7) == model._sparse_shift(7)
    assert build()._sparse_shift(0) == (0, 0)


@pytest.mark.train
def test_edges_and_the_released_borders_train_and_predict(tmp_path):
    words = [
        "backbone.create.sobel=true",
        "method.head_padding=true",
        "evaluation.window.size=24",
        "trainer.max_steps=4",
    ]
    run = run_small("iic", tmp_path, "a", *NET, *words)
    assert 0 <= run.metrics["val/own/miou"] <= 100
    assert (run.folder / "backbone.safetensors").is_file()
