"""The detector between objects and segmenter: what it learns from, what is painted, and how a killed one goes on."""

import numpy as np
import pytest
import torch

import config
from engine import setup
from engine.stages.stage import Stage
from lightning_modules.objects import detecting
from models.detection.detector import Found
from pseudo_labels.views import confident, paint
from tests.conftest import Run, run_small, small_words
from tests.test_ddp import expect_equal, run_two

SMALL = [
    "method.detector.kind=mask_rcnn", "method.detector.steps=4", "method.detector.width=16",
    "method.detector.hidden=32", "method.detector.mask_width=16", "method.detector.mask_layers=1",
    "method.detector.proposals=32", "method.detector.test_proposals=24", "method.detector.boxes=16",
    "method.detector.anchors=32", "method.detector.most=5", "method.detector.least_score=0", "method.num_clusters=4",
]  # fmt: skip


def built(*words: str):
    cfg, data = setup.build_data(config.compose(small_words("maskdistill", *SMALL, *words)))
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    return cfg, data, model


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.train
def test_what_is_painted_is_what_the_detector_is_sure_of(tmp_path):
    cfg, data, model = built(f"cache.dir={tmp_path}", "method.detector.threshold=0.3")
    results = Stage(cfg, data, model).run()
    detector = detecting.new_detector(cfg, model.backbone)
    detector.load_state_dict({key.removeprefix("detector."): v for key, v in results["detector"].state().items()})
    detector.eval()
    view = model.first_labels(results)
    for index in range(3):
        image = torch.from_numpy(data.source("train").read(index)[0]).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            seen = detector.detect(model.backbone.features(image).levels, (48, 48))[0]
        sure = confident(seen.scores.numpy(), 0.3)
        wanted = paint(seen.masks.numpy()[sure], seen.classes.numpy()[sure], cfg.method.overlap)
        found = view.read(index, (48, 48))
        assert np.array_equal(found, wanted if wanted.any() else np.full((48, 48), 255))
    assert set(model.shown(results)) == {"objects", "named", "pseudo-labels"}


@pytest.mark.train
def test_it_learns_the_classes_of_the_objects_that_a_crop_shows(tmp_path, monkeypatch):
    cfg, data, model = built(f"cache.dir={tmp_path}")
    stage = Stage(cfg, data, model)
    stage.steps = {name: stage.steps[name] for name in ("masks", "objects", "clusters")}
    results = stage.run()
    training = detecting.DetectorTraining(cfg, model.backbone, results)
    view, looked = detecting.numbered(results["objects"]), []
    monkeypatch.setattr(training.detector, "losses", lambda *words: looked.append(words) or {"all": torch.zeros(())})
    monkeypatch.setattr(type(training), "global_step", 7)
    ids = torch.stack([torch.from_numpy(view.read(index, (48, 48))) for index in (4, 9)]).long()
    ids[1] = 255
    batch = {"valid": torch.ones(2, 48, 48, dtype=torch.bool), "pseudo": ids, "index": torch.tensor([4, 9])}
    training.training_step(batch | {"image": torch.rand(2, 3, 48, 48)}, 0)
    _, size, targets, keys = looked[0]
    assert size == (48, 48)
    assert keys == [(0, 7, 4), None]
    own = results["objects"].rows("masks")[1] == 4
    shown = ids[0].unique()[1:] - 1
    assert torch.equal(targets[0]["labels"], torch.from_numpy(results["clusters"]["assignment"][own])[shown] + 1)
    assert torch.equal(targets[0]["masks"][0].bool(), ids[0] == shown[0] + 1)


def test_a_picture_without_detections_teaches_nothing():
    cfg, _, model = built()
    step = detecting.Confident(cfg, model.backbone)
    nothing = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 48, 48) > 0)
    step.detector.detect = lambda *_: [nothing]
    images = torch.rand(1, 3, 48, 48)
    batch = {"image": images, "valid": torch.ones(1, 48, 48, dtype=torch.bool), "size": torch.tensor([[48, 48]])}
    assert step.records(batch | {"index": torch.tensor([0]), "id": ["a"]})[0].drop == "no_object"


@pytest.mark.train
def test_a_run_killed_while_the_detector_learns_goes_on(tmp_path, monkeypatch):
    words = [*SMALL, "trainer.max_steps=2", "trainer.checkpoint_every=1", "evaluation.panels=0", "trainer.val_every=99"]
    plain = run_small("maskdistill", tmp_path, "plain", *words, f"cache.dir={tmp_path / 'a'}")
    own, step = [*words, f"cache.dir={tmp_path / 'b'}"], detecting.DetectorTraining.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 3:
            raise StopError
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(detecting.DetectorTraining, "training_step", dies)
        with pytest.raises(StopError):
            run_small("maskdistill", tmp_path, "killed", *own)
    resumed: Run = run_small("maskdistill", tmp_path, "killed", *own)
    assert [name for name, value in plain.weights.items() if not torch.equal(value, resumed.weights[name])] == []


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_paint_what_one_does(tmp_path):
    words = [*SMALL, "trainer.max_steps=2", "evaluation.panels=0", "trainer.val_every=99"]
    one = run_small("maskdistill", tmp_path, "one", *words, f"cache.dir={tmp_path / 'a'}")
    expect_equal(run_two("maskdistill", tmp_path, *words, f"cache.dir={tmp_path / 'b'}"), one)
