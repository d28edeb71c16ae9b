"""Deep Spectral, TokenCut and the normalised cut: features of patches and regions, refusals, what reaches the run."""

import numpy as np
import pytest
import torch
from PIL import Image

import config
import run as entry
from common.errors import ConfigError
from common.spec import ClassMeta
from datamodules.scenes.module import ScenesDataModule
from engine import setup
from engine.stages.stage import Stage
from evaluation.foreground import ForegroundScore
from grouping import spectral
from lightning_modules.families import graph_cuts
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep
from tests.conftest import read_json, run_small, small_words

META = ClassMeta(tuple("abcd"), tuple((i, i, i) for i in range(4)))


def built(method: str, *words: str):
    cfg = config.compose(small_words(method, "method.num_clusters=4", *words))
    return setup.build_model(cfg, META).eval()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Two pictures with a bright square on noise."""
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 0.3
    images[:, :, 8:32, 16:40] += 0.6
    return images


def test_patch_features_are_the_keys_of_the_last_block(pictures):
    backbone = built("tokencut").backbone
    maps = graph_cuts.patch_features(backbone, pictures)
    found = backbone.features(pictures, qkv=True)
    assert maps.shape == (2, 160, 6, 8)
    for head in range(4):
        keys = found.qkv[1][0, head, 1:]  # behind the class token
        assert torch.equal(maps[0, head * 40 : (head + 1) * 40].flatten(1).T, keys)


def test_a_network_without_attention_gives_its_features_and_says_so(pictures, caplog):
    caplog.set_level("INFO", logger="lightning_modules")
    network = ["backbone=mobilenetv2", "backbone.weights=none", "backbone.levels=[1,4]"]
    model = built("tokencut", *network)
    maps = graph_cuts.patch_features(model.backbone, pictures)
    assert torch.equal(maps, model.backbone.features(pictures).concat())
    line = "mobilenetv2 has no attention keys: graphs are made of its features (backbone.levels)"
    assert line in " ".join(caplog.messages)
    masks, boxes = model.objects(pictures)
    assert masks.shape == (2, 12, 16)  # the finest level
    assert (boxes[:, 2:] <= torch.tensor([64, 48])).all()


def test_levels_are_what_the_codes_are_made_of(pictures):
    backbone = built("tokencut").backbone
    maps = graph_cuts.patch_features(backbone, pictures, "levels")
    assert torch.equal(maps, backbone.features(pictures).concat())
    assert graph_cuts.patch_width(backbone, "levels") == maps.shape[1] == 320
    assert graph_cuts.patch_width(backbone, "keys") == 160


def test_centred_features_lie_around_nothing(pictures):
    maps = spectral.centred(torch.rand(2, 5, 6, 8) + torch.tensor([9.0, 0, 0, 0, 0])[:, None, None])
    assert torch.allclose(maps.mean((2, 3)), torch.zeros(2, 5), atol=1e-6)
    unit = torch.nn.functional.normalize(maps.flatten(2), dim=1)
    assert (unit.mT @ unit).min() < -0.5  # cosines were all above 0.9


def test_tokencut_cuts_the_graph_of_the_keys(pictures):
    model = built("tokencut", "method.side=peak")
    masks, boxes = model.objects(pictures)
    keys = graph_cuts.patch_features(model.backbone, pictures).flatten(2).mT
    cut = spectral.token_cut(spectral.threshold_affinity(keys, 0.2, 1e-5), (6, 8))
    assert torch.equal(masks, cut.masks)
    rows, columns = masks[0].nonzero().T
    tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert boxes[0].tolist() == [8 * int(side) for side in tight]


def test_crops_of_one_shape_go_together_and_are_those_alone(pictures):
    backbone = built("deep_spectral", "backbone.class_token=true").backbone
    boxes = torch.tensor([[0, 0, 16, 24], [8, 8, 24, 32], [16, 8, 40, 32], [48, 24, 64, 48]])
    together = graph_cuts.crop_vectors(backbone, pictures[0], boxes)
    for vector, (left, top, right, bottom) in zip(together, boxes.tolist(), strict=True):
        alone = backbone.features(pictures[:1, :, top:bottom, left:right]).cls[0]
        assert torch.allclose(vector, alone, atol=1e-5)
    assert graph_cuts.crop_vectors(backbone, pictures[0], boxes[:0]).shape == (0, 320)
    untrained = built("deep_spectral").backbone  # the bundled weights have taught their patches alone
    mean = untrained.features(pictures[:1, :, :24, :16]).concat().mean((2, 3))[0]
    assert torch.allclose(graph_cuts.crop_vectors(untrained, pictures[0], boxes)[0], mean, atol=1e-5)


@pytest.mark.parametrize(("background", "features"), [(True, "keys"), (False, "levels")])
def test_means_of_regions(pictures, background, features):
    model = built("normalized_cut", f"method.graph.features={features}")
    segments = torch.zeros(6, 8, dtype=torch.int64)
    segments[2:4, 3:5], segments[5] = 1, 3
    settings = model.cfg.method
    names, _, vectors = graph_cuts.region_vectors(model.backbone, pictures[0], segments, settings, background)
    assert names.tolist() == ([1, 3] if background else [0, 1, 3])
    keys = graph_cuts.patch_features(model.backbone, pictures[:1], features)[0]
    for name, vector in zip(names, vectors, strict=True):
        assert torch.allclose(vector, keys[:, segments == name].mean(1), atol=1e-5)
    _, _, colours = graph_cuts.region_vectors(model.backbone, pictures[0], segments, settings, background, "colour")
    assert colours.shape == (len(names), 3)


def test_colour_graph_finds_the_square(pictures):
    model = built("normalized_cut", "method.graph.kind=colour")
    found, size = graph_cuts.graph_vectors(
        model.backbone, pictures, "colour", model.cfg.method.graph, model.cfg.method.eigs
    )
    side = found.vectors[0, 1].view(size) > 0
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[1:4, 2:5] = True
    assert torch.equal(side, inside) or torch.equal(side, ~inside)


OPTIONS = {
    "eigenvectors": [
        ["graph.nonnegative=false"], ["graph.scale=2"], ["graph.colour_weight=5"], ["graph.normalized=false"],
        ["eigs.k=4"], ["graph.features=keys"], ["graph.centred=false"],
    ],
    "regions": [
        ["segments.mode=adaptive"], ["segments.count=3"], ["regions.vectors=crop"], ["regions.erode=2"],
        ["regions.dilate=0"], ["background=true"],
    ],
    "clusters": [["regions.pca=3"]],
}  # fmt: skip


def digest(words: list[str]) -> dict[str, np.ndarray]:
    """What the steps of Deep Spectral give for six scenes, without a Trainer."""
    few = ["data.train_count=6", "method.num_clusters=4", *(f"method.{word}" for word in words)]
    cfg, data = setup.build_data(config.compose(small_words("deep_spectral", *few)))
    model = setup.build_model(cfg, META).eval()
    results: dict = {}
    for step in model.steps(data):
        if isinstance(step, MapStep):
            step.begin(results)
            batch = next(iter(data.batches("train", step.geometry(), [[(0, i) for i in range(6)]], "x")))
            with torch.no_grad():
                results[step.name] = Given(step.records(batch))
        else:
            results[step.name] = step.table(results, torch.device("cpu"))
    regions = results["regions"]
    return {
        "eigenvectors": results["eigenvectors"].rows("eigenvectors")[0],
        "regions": np.concatenate(
            [regions.rows(name)[0].ravel() for name in ("segments", "names", "boxes", "features")]
        ),
        "clusters": results["clusters"]["centroids"].numpy(),
    }


class Given:
    """Records in memory, as `cache.Records` reads them."""

    def __init__(self, records) -> None:
        self.records = {record.index: record for record in records}

    def read(self, index):
        return self.records[index]

    def rows(self, name):
        return np.concatenate([record.fields[name] for record in self.records.values()]), None


@pytest.fixture(scope="module")
def plain() -> dict[str, np.ndarray]:
    return digest([])


@pytest.mark.parametrize(
    ("step", "words"), [(step, words) for step, rows in OPTIONS.items() for words in rows], ids=str
)
def test_every_option_reaches_its_step(step, words, plain):
    assert not np.array_equal(digest(words)[step], plain[step])


def test_the_same_words_give_the_same_records(plain):
    again = digest([])
    assert all(np.array_equal(again[name], plain[name]) for name in plain)


def test_a_picture_without_eigenvectors_has_no_regions_either():
    cfg, data = setup.build_data(config.compose(small_words("deep_spectral", "method.num_clusters=4")))
    steps = setup.build_model(cfg, META).eval().steps(data)
    batch = next(iter(data.batches("train", steps[0].geometry(), [[(0, 0), (0, 1)]], "x")))
    lost = Record(0, batch["id"][0], (0, 0), (0, 0), drop="unreadable")
    with torch.no_grad():
        steps[1].begin({"eigenvectors": Given([lost, steps[0].records(batch)[1]])})
        found = steps[1].records(batch)
    assert [record.drop for record in found] == ["unreadable", ""]
    assert found[0].fields == {}


REFUSED = {
    ("deep_spectral", "method.graph.kind=edge"): "method.graph.kind=edge: not one of deep, colour",
    ("deep_spectral", "method.graph.features=queries"): "method.graph.features=queries: not one of keys, levels",
    ("tokencut", "method.side=left"): "method.side=left: not one of border, peak",
    ("deep_spectral", "method.graph.scale=0"): "method.graph.scale=0: must be at least 1",
    ("deep_spectral", "method.graph.radius=0"): "method.graph.radius=0: must be above 0",
    ("deep_spectral", "method.eigs.k=1"): "method.eigs.k=1: must be at least 2",
    ("deep_spectral", "method.segments.mode=all"): "method.segments.mode=all: not one of fixed, adaptive, single",
    ("deep_spectral", "method.segments.mode=single"): (
        "method.background=false: with method.segments.mode=single it is one of two; set it to true"
    ),
    ("deep_spectral", "method.regions.erode=-1"): "method.regions.erode=-1: must not be negative",
    ("deep_spectral", "method.head.norm=layer"): "method.head.norm=layer: not one of batch, group",
    ("normalized_cut", "method.segments.mode=single"): (
        "method.segments.mode=single: gives no classes; use fixed or adaptive, or method=deep_spectral"
    ),
    ("tokencut", "method.tau=1"): "method.tau=1: expected a number between -1 and 1",
    ("tokencut", "method.foreground=[7]"): (
        "method.foreground=[7]: the data has classes 0 to 3; name some of them"
    ),
    ("tokencut", "method.stage.size=0"): (
        "method.stage.size=0: must be at least 1, or null for the files' own size"
    ),
    ("tokencut", "method.stage.size=225"): (
        "method.stage.size: pictures of 225 x 225 px do not fit vit_tiny_patch16_224, whose patches are 8 px: "
        "height and width must be multiples of 8; set method.stage.size to 224 x 224 or 232 x 232"
    ),
    ("normalized_cut", "method.stage.size=50"): (
        "method.stage.size: pictures of 50 x 50 px do not fit vit_tiny_patch16_224, whose patches are 8 px: "
        "height and width must be multiples of 8; set method.stage.size to 48 x 48 or 56 x 56"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "word"), REFUSED)
def test_refusals(method, word):
    with pytest.raises(ConfigError) as caught:
        built(method, word)
    assert str(caught.value) == REFUSED[method, word]


def test_too_few_regions_are_refused():
    with pytest.raises(ConfigError) as caught:
        digest(["num_clusters=30"])
    assert str(caught.value) == (
        "method.num_clusters: the 24 regions of the training pictures do not make 30 clusters; lower it, raise "
        "method.segments.count, or give more pictures"
    )


@pytest.mark.train
def test_an_object_of_each_picture_without_self_training(tmp_path, monkeypatch):
    """segments.mode=single: two classes, and val/foreground; and training goes by what `pseudo` left."""
    words = small_words(
        "deep_spectral", "method.segments.mode=single", "method.background=true", "method.num_clusters=2",
        "method.self_training=false", f"cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path}", "run.name=x",
    )  # fmt: skip
    assert entry.main(["pseudo", *words, f"output={tmp_path / 'maps'}"]) == 0
    maps = sorted((tmp_path / "maps" / "pseudo-labels").rglob("*.png"))
    assert 1 <= len(maps) <= 22
    assert set(np.unique([np.asarray(Image.open(path)) for path in maps])) == {0, 1}
    assert np.asarray(Image.open(maps[0])).shape == (48, 48)
    folder = tmp_path / "cache" / "pseudo" / "deep_spectral-scenes"
    assert (folder / "pseudo_labels.png").is_file()
    before = sorted(folder.rglob("*.safetensors"))
    monkeypatch.setattr(graph_cuts.Eigenvectors, "records", lambda *_: pytest.fail("computed again"))
    assert entry.main(["train", *words]) == 0
    assert sorted(folder.rglob("*.safetensors")) == before
    metrics = read_json(tmp_path / "x" / "metrics.json")
    assert 0 <= metrics["val/foreground/iou"] <= 100
    assert metrics["val/foreground/objects"] >= 1
    assert 0 <= metrics["val/instances/mask_AP"] <= metrics["val/instances/mask_AP50"] <= 100
    assert metrics["val/own/miou"] is not None
    summary = read_json(tmp_path / "x" / "pseudo_labels.json")
    assert summary["regions"]["kept"] + sum(summary["regions"]["dropped"].values()) == 22
    assert (tmp_path / "x" / "panels" / "pseudo_labels.png").is_file()
    stage = setup.read_checkpoint(tmp_path / "x" / "checkpoints" / "last.ckpt")["labelfree"]["stage"]
    assert [name.rsplit("-", 1)[0] for name in stage.split()] == ["eigenvectors", "regions", "clusters"]


@pytest.mark.train
def test_the_head_learns_its_pseudo_labels(tmp_path):
    """On the training pictures themselves, more pixels agree with the pseudo-labels than the largest class has."""
    words = ["trainer.max_steps=60", "trainer.val_every=100", "evaluation.panels=0", "method.augment.scale=[0.9,1.0]"]
    run = run_small("deep_spectral", tmp_path, "x", *words, "method.num_clusters=4", f"cache.dir={tmp_path / 'c'}")
    cfg, data = setup.build_data(config.restore(run.checkpoint["labelfree"]["config"]))
    model = setup.restore_model(run.checkpoint, cfg, data.meta)
    view = model.labels(Stage(cfg, data, model).run())
    right = []
    labels = []
    for batch in data.loader("train"):
        with torch.no_grad():
            ids = model.read(batch["image"])[1]["own"].argmax(1)
        for row, index in enumerate(batch["index"].tolist()):
            wanted = torch.from_numpy(view.read(index, tuple(ids.shape[1:])))
            right.append((ids[row] == wanted).float().mean())
            labels.append(wanted)
    largest = torch.stack(labels).flatten().bincount().max() / torch.stack(labels).numel()
    assert torch.stack(right).mean() > largest + 0.15


def test_validation_scores_the_foreground_of_things():
    model = built("tokencut")
    assert model.foreground is None  # nothing says what an object is
    assert isinstance(built("tokencut", "method.foreground=[1,2]").foreground, ForegroundScore)
    assert built("deep_spectral", "method.foreground=[1]").foreground is None  # fixed segments: not read out so
    cfg = config.compose(small_words("tokencut"))
    assert setup.build_data(cfg)[1].meta.things == ScenesDataModule(cfg).build_meta().things
