"""TransFGU: its crops and concepts, maps that go through every geometry, its schedule, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import config
from common.errors import ConfigError
from common.spec import IGNORE
from datamodules.base.transforms import Replay, replay
from engine import setup
from lightning_modules.transfgu import steps
from lightning_modules.transfgu.crops import BACKGROUND, FOREGROUND, Crops, PooledCrops
from lightning_modules.transfgu.module import TransFGU
from models.backbone import Backbone
from models.class_token import ClassPath, class_path, token_kind, tokens
from pseudo_labels.cache import Record
from tests.conftest import small_words

WORDS = small_words("transfgu")


def network(name: str = "tiny", **more) -> Backbone:
    cfg = OmegaConf.load(f"configs/backbone/{name}.yaml")
    return Backbone(OmegaConf.merge(cfg, {"weights": "none"}, more))


def built(*words: str) -> TransFGU:
    cfg, data = setup.build_data(config.compose([*WORDS, *words]))
    return setup.build_model(cfg, data.meta)


def pictures(count: int = 2, size: int = 48) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


# The class token's path.


@pytest.mark.parametrize("name", ["tiny", "dinov2_vits14_reg"])
def test_the_path_ends_in_the_class_token(name):
    """From the head outputs on, with layer scale and registers too."""
    create = {"depth": 2} if name == "dinov2_vits14_reg" else {}
    backbone = network(name, create=create)
    images = pictures(size=56)
    with torch.no_grad():
        path = class_path(backbone, images, "class")
        outputs = torch.einsum("bht,bhtd->bhd", path.attention, path.values).flatten(1)
        found, wanted = path.token(outputs), tokens(backbone, images, "class")
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(path.attention.sum(-1), torch.ones(path.attention.shape[:2]))
    assert path.prefix == backbone.prefix


def test_a_class_token_that_was_not_trained_is_not_taken_by_itself():
    """The bundled weights were taught by patches alone."""
    assert token_kind(network("tiny"), "auto") == "pooled"
    assert token_kind(network("tiny"), "class") == "class"
    assert token_kind(network("tiny", class_token=True), "auto") == "class"


def test_a_network_without_class_token_pools_its_map():
    backbone = network("resnet18")
    assert token_kind(backbone, "auto") == "pooled"
    with torch.no_grad():
        path = class_path(backbone, pictures(size=64), "pooled")
        outputs = torch.einsum("bht,bhtd->bhd", path.attention, path.values).flatten(1)
        mean = tokens(backbone, pictures(size=64), "pooled")
    torch.testing.assert_close(F.normalize(outputs, dim=1), F.normalize(mean, dim=1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError) as caught:
        token_kind(backbone, "class")
    assert str(caught.value) == (
        "method.maps.token=class: resnet18.tv_in1k has no class token behind blocks of a plain vision transformer; use "
        "method.maps.token=pooled, or another backbone"
    )


def test_pooled_maps_find_the_half_that_a_concept_looks_like():
    backbone = network("resnet18")
    images = torch.zeros(1, 3, 128, 128)
    images[:, :, :, :64] = pictures(1, 128)[..., :64]
    with torch.no_grad():
        path = class_path(backbone, images, "pooled")
        rows = path.values[0, 0, 1:].unflatten(0, path.grid)
        maps = steps.maps_of(path, rows[:, [0, -1]].mean(0), 1, 0.8)[0]
    assert maps[0, :, 0].mean() > maps[0, :, -1].mean()
    assert maps[1, :, -1].mean() > maps[1, :, 0].mean()


def test_a_pooled_token_keeps_the_concept_that_fills_the_picture():
    """Its cosine with that concept cannot grow, so that the released gradient finds it nowhere."""
    rows = F.normalize(torch.tensor([[3.0, 1.0, 0.0], [3.0, -1.0, 0.0], [3.0, 0.0, 1.0], [3.0, 0.0, -1.0]]), dim=1)
    attention = torch.cat([torch.zeros(1), torch.full((4,), 0.25)])[None, None]
    path = ClassPath(attention, F.pad(rows, (0, 0, 1, 0))[None, None], lambda outputs: outputs, 1, (2, 2))
    concept, other = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    released = steps.maps_of(path, torch.stack([concept, other]), 1, 0.8)[0]
    found = steps.maps_of(path, torch.stack([concept, other]), 1, 0.8, 0.0)[0]
    assert released.argmax(0).flatten().tolist() == [1, 0, 1, 0]
    assert found.argmax(0).flatten().tolist() == [0, 0, 0, 0]


# Crops.


def crops(banks: str = "split", *words: str) -> Crops:
    cfg = config.compose([*WORDS, *words])
    return Crops(network(), cfg, banks, "class")


def test_kinds_of_crops_follow_the_foreground():
    step = crops("split", "method.crops.max_per_image=null")
    mask = torch.zeros(step.grid, dtype=torch.bool)
    mask[:, : step.grid[1] // 2] = True
    boxes, kinds = step.chosen(mask, 0)
    pixels = F.interpolate(mask[None, None].float(), step.sides)[0, 0]
    for (y0, x0, y1, x1), kind in zip(boxes.tolist(), kinds.tolist(), strict=True):
        share = float(pixels[y0:y1, x0:x1].mean())
        assert share > 0.5 if kind == FOREGROUND else share < 0.2
    assert 0 < len(boxes) < len(step.windows)
    alone, kind = crops("foreground", "method.crops.max_per_image=null").chosen(mask, 0)
    assert torch.equal(alone, boxes[kinds == FOREGROUND])
    assert (kind == FOREGROUND).all()


def test_windows_are_bounded_by_a_keyed_choice_and_none_comes_twice():
    step = crops("all", "method.crops.scales=[0.5,0.5,0.34]")
    assert len(set(step.windows)) == len(step.windows)
    boxes, _ = step.chosen(None, 4)
    assert len(boxes) == step.most == 6
    assert torch.equal(boxes, step.chosen(None, 4)[0])
    assert not torch.equal(boxes, step.chosen(None, 5)[0])
    assert step.announce(10).startswith(f"at most 60 crops of 32 px (6 of the {len(step.windows)} windows of each of ")
    assert "-" not in step.announce(10)
    assert crops("all", "method.crops.size=null").announce(10).startswith("at most 60 crops of 48 px (")


def test_a_subset_of_pictures_is_a_keyed_choice():
    step = crops("all", "method.crops.pictures=3")
    assert len(step.pictures(9)) == 3
    assert step.pictures(9) == sorted(set(step.pictures(9)))
    assert step.pictures(2) == [0, 1]
    assert step.pictures(9) != crops("all", "method.crops.pictures=3", "seed=1").pictures(9)


def test_tokens_of_crops_are_those_of_the_cut_pictures():
    step = crops("all")
    image = pictures(1, 96)[0]
    boxes, _ = step.chosen(None, 0)
    with torch.no_grad():
        found = step.encode(image, boxes)
        y0, x0, y1, x1 = boxes[2].tolist()
        cut = F.interpolate(image[None, :, y0:y1, x0:x1], (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(found[2], tokens(step.backbone, cut, "class")[0], atol=1e-5, rtol=1e-4)


def pooled(backbone: Backbone, banks: str, *words: str) -> PooledCrops:
    cfg = config.compose([*WORDS, "method.crops.max_per_image=null", *words])
    return PooledCrops(backbone, cfg, banks, "pooled")


def test_pooled_windows_are_means_of_the_pictures_own_map():
    step = pooled(network(), "all")
    with torch.no_grad():
        maps = step.backbone.features(pictures()).concat()
        boxes, _ = step.chosen(None, 0)
        found = step.seen(pictures())[1](1, boxes)
    assert maps.shape[-2:] == (6, 6)
    assert step.geometry().size == (48, 48)
    assert boxes.max() == 96  # of the grid of a picture twice as large
    fine = maps[1].repeat_interleave(16, 1).repeat_interleave(16, 2)
    for row, (y0, x0, y1, x1) in zip(found, boxes.tolist(), strict=True):
        torch.testing.assert_close(row, fine[:, y0:y1, x0:x1].mean((1, 2)), atol=1e-5, rtol=1e-4)
    assert step.announce(10).startswith(f"at most {10 * len(boxes)} windows, {len(boxes)} of the")
    assert not {"side", "passes"} & set(step.settings())


def test_kinds_of_pooled_windows_follow_a_map_that_is_no_multiple_of_the_picture():
    """200 px and a stride of 32: the map has 7 cells, the grid of windows 13."""
    step = pooled(network("resnet18"), "split", "method.stage.size=200")
    with torch.no_grad():
        masks, tokens_of = step.seen(pictures(2, 200))
        assert masks.shape == (2, 7, 7)
        boxes, kinds = step.chosen(masks[1], 0)
        assert torch.isfinite(tokens_of(1, boxes)).all()
    assert boxes.max() == 400
    assert set(kinds.tolist()) == {FOREGROUND, BACKGROUND}
    fine = F.interpolate(masks[1][None, None].double(), (2800, 2800), mode="nearest")[0, 0]
    for (y0, x0, y1, x1), kind in zip((7 * boxes).tolist(), kinds.tolist(), strict=True):
        share = float(fine[y0:y1, x0:x1].mean())
        assert share > 0.5 - 1e-9 if kind == FOREGROUND else share < 0.2 + 1e-9


def test_a_map_of_few_cells_has_windows_too():
    """Those of the defaults: 128 px and a stride of 32."""
    step = pooled(network("resnet18"), "all", "method.stage.size=128", "method.crops.scales=[0.5,0.4,0.3,0.2]")
    boxes, _ = step.chosen(None, 0)
    assert len(boxes) == len(step.windows) == 94
    with torch.no_grad():
        assert torch.isfinite(step.seen(pictures(1, 128))[1](0, boxes)).all()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], PooledCrops),
        (["method.maps.token=class"], Crops),
        (["method.crops.tokens=encoded"], Crops),
    ],
)
def test_pooled_tokens_are_had_without_a_pass_for_each_window(words, kind):
    assert type(built(*words).steps(None)[0]) is kind


# Concepts.


class Bank:
    """Records of crops, as a reduce step reads them."""

    def __init__(self, features: np.ndarray, kinds: np.ndarray) -> None:
        self.fields = {"features": features, "kinds": kinds}

    def rows(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.fields[name], np.zeros(len(self.fields[name]), np.int64)


def test_things_and_stuff_are_clustered_apart_and_things_come_first():
    rng = np.random.default_rng(0)
    centres = np.eye(5, 6, dtype=np.float32) * 9
    features = (centres.repeat(20, 0) + 0.1 * rng.standard_normal((100, 6))).astype(np.float32)
    kinds = np.repeat([1, 1, 0, 0, 0], 20).astype(np.int8)
    step = steps.Concepts(config.compose(WORDS), {FOREGROUND: 2, BACKGROUND: 3}, "class")
    found = step.table({"crops": Bank(features, kinds)}, torch.device("cpu"))
    nearest = torch.cdist(found["centroids"], torch.from_numpy(centres)).argmin(1)
    assert set(nearest[:2].tolist()) == {0, 1}
    assert set(nearest[2:].tolist()) == {2, 3, 4}
    assert found["members"].tolist() == [20] * 5
    with pytest.raises(ConfigError) as caught:
        step.table({"crops": Bank(features[:1], kinds[:1])}, torch.device("cpu"))
    assert str(caught.value) == (
        "method.num_clusters: the 1 foreground crops do not make 2 concepts; lower it, raise "
        "method.crops.max_per_image, or give more pictures"
    )


@pytest.mark.parametrize(
    ("words", "token", "wanted"),
    [
        ([], "class", {"raw", 1.0}),
        ([], "pooled", {"unit", 0.0}),
        (["method.kmeans.length=raw", "method.maps.power=1"], "pooled", {"raw", 1.0}),
        (["method.kmeans.length=unit", "method.maps.power=0"], "class", {"unit", 0.0}),
    ],
)
def test_length_and_power_follow_the_kind_of_token(words, token, wanted):
    cfg = config.compose([*WORDS, *words])
    concepts = steps.Concepts(cfg, {FOREGROUND: 2}, token)
    maps = steps.ConceptMaps(network(), cfg, 2, token)
    assert {concepts.settings()["kmeans"]["length"], maps.settings()["power"]} == wanted
    two_lengths = np.array([[1, 0], [9, 0], [0, 1], [0, 9]], np.float32).repeat([10, 90, 10, 10], 0)
    found = concepts.table({"crops": Bank(two_lengths, np.ones(120, np.int8))}, torch.device("cpu"))
    lengths = found["centroids"].norm(dim=1).tolist()
    assert (lengths == pytest.approx([1, 1])) == ("unit" in wanted)


# Maps in a batch.


def whole(grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Places of a picture that nothing was cut from."""
    view = object.__new__(steps.Places)
    ids = view.labels(Record(0, "a", size, grid))
    return F.interpolate(torch.from_numpy(ids)[None, None].double(), size, mode="nearest")[0, 0].long()


def test_maps_of_the_whole_picture_stay_as_they_are():
    maps = torch.arange(24.0).reshape(1, 4, 6)
    smooth = F.interpolate(maps[None], (32, 48), mode="bilinear", align_corners=False)[0]
    wanted = F.avg_pool2d(smooth, 8)
    torch.testing.assert_close(steps.maps_at(maps, whole((4, 6), (32, 48)), (4, 6)), wanted)


def test_maps_follow_a_crop_and_a_flip():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 6, 6, generator=generator)
    places = whole((6, 6), (48, 48))
    params = Replay(torch.tensor([[8.0, 16.0, 32.0, 32.0]]), torch.tensor([True]), (48, 48), (32, 32))
    cut = replay(places[None], params, "nearest")[0]
    smooth = F.interpolate(maps[None], (48, 48), mode="bilinear", align_corners=False)
    wanted = F.avg_pool2d(smooth[:, :, 8:40, 16:48].flip(-1), 8)[0]
    torch.testing.assert_close(steps.maps_at(maps, cut, (4, 4)), wanted, atol=1e-5, rtol=1e-4)


def test_places_outside_a_map_count_for_nothing():
    maps = torch.ones(2, 3, 3)
    places = whole((3, 3), (24, 24))
    places[:8] = IGNORE
    places[8:12] = IGNORE
    found = steps.maps_at(maps, places, (3, 3))
    assert (found[:, 0] == 0).all()
    torch.testing.assert_close(found[:, 1:], torch.ones(2, 2, 3))


# One step.


class Maps:
    """Concept maps of pictures by index."""

    def __init__(self, maps: torch.Tensor) -> None:
        self.maps = maps

    def read(self, index: int, names: list[str]) -> Record:
        return Record(index, "a", (48, 48), (6, 6), fields={"class_map": self.maps[index].numpy()})


def batch(count: int = 2) -> dict:
    return {
        "index": torch.arange(count),
        "augmented": pictures(count),
        "augmented.pseudo": whole((6, 6), (48, 48)).expand(count, -1, -1),
    }


def ready(*words: str) -> TransFGU:
    model = built(*words)
    model.maps = Maps(torch.rand(2, len(model.concepts), 6, 6, generator=torch.Generator().manual_seed(5)))
    return model


def test_a_batch_without_evidence_is_skipped_and_one_picture_alone_is_left_out():
    model = ready()
    model.maps.maps[0] = 0.0
    loss = model.loss(batch(), None)
    assert not bool(loss.skip)
    assert float(loss.parts["without_evidence"]) == 0.5
    one = {key: value[1:] for key, value in batch().items()}
    torch.testing.assert_close(loss.parts["cross_entropy"], model.loss(one, None).parts["cross_entropy"])
    model.maps.maps[:] = 0.0
    none = model.loss(batch(), None)
    assert bool(none.skip)
    assert float(none.total) == 0
    assert all(np.isfinite(float(value)) for value in none.parts.values())


def test_the_released_rule_makes_pictures_without_evidence_class_zero():
    model = ready("method.empty=first")
    model.maps.maps[:] = 0.0
    assert not bool(model.loss(batch(), None).skip)


def test_a_class_of_the_background_comes_first():
    model = ready("method.background=true")
    assert len(model.concepts) == model.decoder.classes - 1
    loss = model.loss(batch(), None)
    assert not bool(loss.skip)
    loss.total.backward()
    assert all(value.grad is not None for value in model.decoder.parameters())


def test_a_restart_makes_the_student_the_teacher():
    model = ready()
    start = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    with torch.no_grad():
        for value in model.decoder.parameters():
            value += 0.1
    trained = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    untaught = model.loss(batch(), None).parts
    model.since_restart += 3
    model.restart()
    for name, value in start.items():
        assert torch.equal(model.decoder.state_dict()[name], value)
        assert torch.equal(model.teacher.state_dict()[name], trained[name])
    assert (int(model.restarts), int(model.since_restart)) == (1, 0)
    assert untaught["negative_weight"] == 0
    assert model.loss(batch(), None).parts["negative_weight"] == pytest.approx(0.03)
    assert not model.train().teacher.training
    assert not any(value.requires_grad for part in (model.teacher, model.initial) for value in part.parameters())
    assert {name.split(".")[0] for name in model.state_dict()} >= {"teacher", "initial", "concepts", "restarts"}


@pytest.mark.parametrize(
    ("words", "taught"),
    [
        (["method.restarts.start=2", "method.restarts.intervals=[2]"], [2, 4, 6]),
        (["method.restarts.start=1", "method.restarts.intervals=[3,2]"], [3, 6]),
        (["method.restarts.start=1", "method.restarts.intervals=[1]", "method.restarts.repeat=3"], [3, 6]),
        (["method.restarts.start=1", "method.restarts.intervals=[2]", "method.restarts.epoch=10"], [4]),
    ],
)
def test_epochs_in_which_students_start_anew(words, taught, monkeypatch):
    model, found = ready(*words), []
    loop = dataclasses.make_dataclass("Trainer", ["datamodule", "global_step"])
    data = dataclasses.make_dataclass("Data", ["steps_per_epoch"])
    monkeypatch.setattr(TransFGU, "restart", lambda self: found.append(self.global_step // 5))
    for step in range(0, 40, 5):
        monkeypatch.setattr(TransFGU, "trainer", loop(data(5), step))
        monkeypatch.setattr(TransFGU, "global_step", step)
        if step % model.epoch_steps == 0:
            model.on_epoch(None)
    assert found == taught


def test_masks_and_codes_of_one_picture_come_from_one_pass(monkeypatch):
    model, calls = ready().eval(), []
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda rows: calls.append(1) or forward(rows))
    with torch.no_grad():
        features = model.features(pictures())
        codes, masks = model.embed(features), model.scores(features)
        model.embed(model.features(pictures()))
    assert codes.shape == (2, 16, 6, 6)
    assert masks.shape == (2, 12, 6, 6)
    assert len(calls) == 2


def test_crops_and_stage_are_drawn_and_resized_as_named():
    model = built("method.augment.draw=tenths", "method.augment.sides=[0.4,0.9]")
    spec = model.views["augmented"].geometric
    assert (spec.sides, spec.side_step) == ((0.4, 0.9), 0.1)
    assert built("method.augment.draw=side").views["augmented"].geometric.side_step is None
    area = built("method.augment.sides=[0.4,0.9]").views["augmented"].geometric
    assert area.sides is None
    assert area.scale == pytest.approx((0.16, 0.81))
    for words, expected in ((["method.stage.interpolation=nearest_corner"], "nearest_corner"), ([], "bilinear")):
        model = built(*words)
        data = setup.build_data(model.cfg)[1]
        found = {step.geometry().interpolation for step in model.steps(data) if hasattr(step, "geometry")}
        assert found == {expected}
        assert model.cfg.data.interpolation == "bilinear"
