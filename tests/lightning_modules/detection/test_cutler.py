"""CutLER: rounds and what differs between them, relabelling, its stage killed in between, classes of objects."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
from common.errors import ConfigError
from engine import setup
from engine.stages.stage import Stage
from evaluation.instances import Detections
from lightning_modules.detection import relabel
from lightning_modules.detection.cutler import described
from lightning_modules.detection.relabel import Relabelled, resized
from lightning_modules.detection.training import DetectorTraining, Objects, Round, batch_losses, make_detector
from models.backbone import Features
from models.detection.detector import Found
from tests.conftest import read_json, run_small, small_words


def built(*words):
    cfg, data = setup.build_data(config.compose(small_words("cutler", *words)))
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    return cfg, data, model


def stage(tmp_path, *words):
    return Stage(*built(f"cache.dir={tmp_path}", *words))


def record(index, masks, scores=None):
    fields = {"masks": masks, "scores": np.ones(len(masks), np.float32) if scores is None else scores}
    return SimpleNamespace(index=index, fields=fields, keep=True)


def test_later_rounds_learn_without_drop_loss_and_slower():
    cfg, _, model = built("method.rounds.sure=[0.7,0.65]", "method.rounds.proposals=17")
    first, last = Round.of(cfg.method, 0), Round.of(cfg.method, 2)
    assert (first.drop, first.paste, first.lr) == (0.01, (0.3, 1.0), 1.0)
    assert (last.drop, last.paste, last.lr) == (None, (0.5, 1.0), 0.5)
    assert model.detector.heads.drop is None
    assert model.detector.proposals._post_nms_top_n["training"] == 17
    assert model.detector.proposals.nms_thresh == 0.7
    assert [group["lr"] for group in model.param_groups()] == [0.5 * cfg.optim.detector.lr]
    alone = built("method.rounds.sure=[]")[2]
    assert alone.detector.heads.drop == 0.01
    assert alone.param_groups()[0]["lr"] == cfg.optim.detector.lr


def test_steps_are_a_detector_and_its_masks_for_every_round(tmp_path):
    work = stage(tmp_path, "method.rounds.sure=[0.7,0.65]")
    assert list(work.steps) == ["masks_0", "detector_0", "masks_1", "detector_1", "masks_2"]
    assert work.steps["detector_1"].needs == ("masks_1", "detector_0")
    assert list(stage(tmp_path, "method.rounds.sure=[]").steps) == ["masks_0"]
    other = stage(tmp_path, "method.rounds.sure=[0.7,0.5]")
    same = [name for name, place in work.places.items() if place.path == other.places[name].path]
    assert same == ["masks_0", "detector_0", "masks_1", "detector_1"]  # a later threshold leaves what was before alone
    assert work.places["detector_0"].path != stage(tmp_path, "method.detector.drop=0.1").places["detector_0"].path


def test_maps_of_objects_have_the_surest_on_top():
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :, :4], masks[1, :, 3:] = True, True
    view = Objects.__new__(Objects)
    view.fields = ("masks", "scores")
    ids = view.labels(record(0, masks, np.array([0.1, 0.8], np.float32)))
    assert ids[0].tolist() == [2, 2, 2, 1, 1, 1]


def test_detections_take_the_place_of_masks_that_they_cover(monkeypatch):
    cfg, _, model = built("method.rounds.cell=1")
    step = Relabelled(cfg, model.backbone, 1, ["masks_0", "detector_0"])
    left, right, wide = (torch.zeros(48, 48, dtype=torch.bool) for _ in range(3))
    left[:20, :20], right[:20, 28:], wide[:20, :24] = True, True, True
    unsure = torch.ones(48, 48, dtype=torch.bool)
    boxes = torch.zeros(2, 4)
    found = Found(boxes, torch.tensor([0.9, 0.3]), torch.zeros(2).long(), torch.stack([wide, unsure]))
    monkeypatch.setattr(step.detector, "detect", lambda *_: [found])
    old = torch.stack([left, right]).numpy()
    step.before = SimpleNamespace(read=lambda index, names: record(index, old))
    batch = {
        "image": torch.zeros(1, 3, 48, 48), "valid": torch.ones(1, 48, 48) > 0, "index": torch.tensor([3]),
        "id": ["x"], "size": torch.tensor([[48, 48]]),
    }  # fmt: skip
    (made,) = step.records(batch)
    assert made.keep
    assert (made.fields["masks"] == torch.stack([wide, right]).numpy()).all()
    assert made.fields["scores"].tolist() == pytest.approx([0.9, 0.0])


def test_masks_on_another_grid():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2, :3] = True
    assert torch.equal(resized(masks, (2, 2))[0], torch.tensor([[True, True], [False, False]]))
    assert torch.equal(resized(resized(masks, (8, 8)), (4, 4)), masks)
    assert resized(masks[:0], (7, 5)).shape == (0, 7, 5)


def test_a_picture_without_masks_takes_no_part():
    model = built()[2]
    ids = torch.zeros(2, 48, 48, dtype=torch.int64)
    ids[0, 4:20, 4:24] = 1
    ids[1] = 255
    batch = {
        "index": torch.tensor([4, 5]), "augmented": torch.rand(2, 3, 48, 48), "augmented.pseudo": ids,
        "augmented.valid": torch.ones(2, 48, 48, dtype=torch.bool),
    }  # fmt: skip
    own = Round(0.01, None, 32, 0.65, 1.0)
    both = batch_losses(model.detector, model.features, dict(batch), 0, 3, own)
    alone = {key: value[:1] for key, value in batch.items()}
    one = batch_losses(model.detector, model.features, alone, 0, 3, own)
    for name, value in one.items():
        assert both[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_a_round_goes_on_with_the_weights_of_the_one_before(tmp_path):
    work = stage(tmp_path, "method.rounds.sure=[0.0,0.0]", "data.train_count=8", "method.rounds.steps=1")
    results = work.run()
    step = work.steps["detector_1"]
    module = step.module({name: results[name] for name in step.needs})
    for name, value in results["detector_0"].state().items():
        assert torch.equal(module.state_dict()[name], value)
    assert not [name for name in results["detector_1"].state() if name.startswith("backbone")]
    assert (results["masks_1"].counts("masks") > 0).any()


@pytest.mark.train
def test_a_trained_backbone_is_part_of_a_round(tmp_path):
    words = ("backbone.frozen=false", "data.train_count=8", "method.rounds.steps=1", f"cache.dir={tmp_path}")
    cfg, data, model = built(*words)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    results = Stage(cfg, data, model).run()
    state = results["detector_0"].state()
    changed = [name for name, value in before.items() if not torch.equal(state[f"backbone.{name}"], value)]
    assert changed
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    model.staged(results, data)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in model.backbone.state_dict().items())
    assert {group["name"] for group in model.param_groups()} == {"detector", "backbone"}


@pytest.mark.train
def test_a_stage_killed_in_a_round_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    words = ["method.rounds.sure=[0.5]", "method.rounds.steps=6", "data.train_count=12"]
    whole = stage(tmp_path / "whole", *words).run()

    class StopError(Exception):
        pass

    step = DetectorTraining.training_step

    def dies(self, batch, number):
        if self.global_step == 4:
            raise StopError
        return step(self, batch, number)

    killed = stage(tmp_path / "killed", *words)
    with monkeypatch.context() as patch:
        patch.setattr(DetectorTraining, "training_step", dies)
        with pytest.raises(StopError):
            killed.run()
    assert list(killed.places["detector_0"].path.glob("*.ckpt"))
    looked = []
    records = relabel.Relabelled.records
    monkeypatch.setattr(relabel.Relabelled, "records", lambda *args: looked.append(1) or records(*args))
    again = stage(tmp_path / "killed", *words).run()
    assert looked
    for name, value in whole["detector_0"].state().items():
        assert torch.equal(again["detector_0"].state()[name], value), name
    for one, two in zip(whole["masks_1"].each(), again["masks_1"].each(), strict=True):
        assert (one.fields["masks"] == two.fields["masks"]).all()


@pytest.mark.train
@pytest.mark.parametrize("word", ["method.detector.kind=cascade", "method.masks.provider=spectral"])
def test_other_heads_and_other_masks_end_in_scores(word, tmp_path):
    metrics = run_small(
        "cutler", tmp_path, "x", word, "trainer.max_steps=2", "evaluation.panels=0", "method.rounds.steps=1"
    ).metrics
    assert 0 <= metrics["val/instances/mask_AP"] <= metrics["val/instances/mask_AP50"] <= 100
    assert metrics["val/own/miou"] is not None


@pytest.mark.train
def test_classes_of_objects_are_fitted_and_kept(small_run):
    run = small_run("cutler")
    assert bool(run.weights["own_ready"])
    assert run.weights["centroids_own"].shape == (11, 320)
    metrics = read_json(run.folder / "metrics.json")
    assert metrics["headline"] == "instances"
    assert "class-agnostic AP" in metrics["protocol/instances"]


def test_objects_are_painted_with_the_class_of_their_features():
    _, _, model = built("method.num_clusters=3")
    maps = torch.zeros(1, model.backbone.dim, 6, 6)
    maps[0, 0], maps[0, 1, :, 3:] = 1, 5
    masks = torch.zeros(2, 48, 48, dtype=torch.bool)
    masks[0, :16, :16], masks[1, 16:, 32:] = True, True
    found = Found(torch.zeros(2, 4), torch.tensor([0.9, 0.8]), torch.zeros(2).long(), masks)
    model._found = lambda features: [found]
    model.centroids_own[0, 0], model.centroids_own[1, 1] = 1, 1
    classes = model.scores(Features([maps])).argmax(1)[0]
    assert classes.shape == (12, 12)
    assert classes[1, 1] == 1
    assert classes[9, 9] == 2
    assert classes[9, 1] == 0
    assert [type(one) for one in model.detections(torch.zeros(1, 3, 48, 48), torch.ones(1, 48, 48) > 0)] == [Detections]
    assert model.newest is None


def test_an_object_is_described_by_what_is_inside():
    maps = torch.zeros(2, 4, 4)
    maps[0, :, :2], maps[1, :, 2:] = 3, 1
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4], masks[1] = True, True
    found = described(maps, masks)
    assert found[0].tolist() == pytest.approx([1, 0])
    assert found[1].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert described(maps, masks[:0]).shape == (0, 2)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"method\.num_clusters=1: the background is one of them"):
        built("method.num_clusters=1")
    with pytest.raises(ConfigError, match=r"data\.train_crop=keep"):
        built("data.train_crop=keep")


def test_a_new_detector_is_that_of_the_seed():
    cfg, _, model = built()
    assert make_detector(cfg, model.backbone).heads.detections_per_img == cfg.method.detector.most
