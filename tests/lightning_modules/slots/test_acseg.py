"""ACSeg: its options reach the loss, regions are those of the concepts, classes those of the regions."""

import logging

import pytest
import torch
from torch.nn import functional as F

import config
from common.errors import ConfigError
from engine import setup
from lightning_modules.slots import concept_regions as found_in
from lightning_modules.slots.concept_regions import RegionClasses, Regions
from models.backbone import Features
from tests.conftest import small_words

OPTIONS = [
    "centred=false", "generator.concepts=3", "generator.layers=2", "generator.heads=1", "generator.hidden=64",
    "generator.norm=output", "generator.inputs=raw", "generator.start=1",
]  # fmt: skip


def model(*words: str):
    small = ["generator.layers=1", "generator.hidden=32"]
    words = [f"method.{word}" if "=" in word and not word.startswith("backbone") else word for word in (*small, *words)]
    cfg, data = setup.build_data(config.compose(small_words("acseg", *words)))
    return setup.build_model(cfg, data.meta), next(iter(data.train_dataloader()))


@pytest.fixture(scope="module")
def plain():
    made, batch = model()
    return made, batch, made.features(batch["image"])


@pytest.mark.parametrize("word", OPTIONS)
def test_every_option_of_the_generator_changes_the_loss(word, plain):
    before, batch, features = plain
    made, _ = model(word)
    losses = [one.loss({"image": batch["image"]}, features).total for one in (before, made)]
    assert torch.isfinite(losses[1])
    assert losses[0] != losses[1]


def test_gradient_reaches_all_of_the_generator_and_nothing_else(plain):
    made, batch, features = plain
    made.zero_grad()
    made.loss({"image": batch["image"]}, features).total.backward()
    trained = {id(p) for group in made.param_groups() for p in group["params"]}
    for name, value in made.named_parameters():
        assert (id(value) in trained) == name.startswith("generator."), name
        moved = value.grad is not None and bool(value.grad.abs().sum() > 0)
        assert moved == name.startswith("generator."), name


def painted(ids):
    """Regions of ids int64 [B,h,w] of four concepts."""
    masks = F.one_hot(ids, 4).permute(0, 3, 1, 2).bool()
    return Regions(masks.float(), ids, masks)


def test_a_patch_is_of_the_concept_that_is_most_alike_and_padding_of_no_region(plain):
    made, _, _ = plain
    maps = torch.randn(2, made.code_dim, 4, 6, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 32, 48, dtype=torch.bool)
    valid[1, :, 24:] = False
    padded = made._with(Features([maps]), torch.zeros(2, 3, 32, 48), valid)
    regions = made.regions(padded)
    assert regions.masks[0].sum() == 24
    assert not regions.masks[1, :, :, 3:].any()
    assert torch.equal(regions.ids, regions.likeness.argmax(1))
    alone = made.regions(made._with(Features([maps[1:, :, :, :3]]), torch.zeros(1, 3, 32, 24), None))
    torch.testing.assert_close(regions.likeness[1, :, :, :3], alone.likeness[0])
    codes = made.embed(padded)
    for mask in regions.masks[0][regions.there[0]]:
        rows = codes[0, :, mask]
        torch.testing.assert_close(rows, F.normalize(F.normalize(maps[0], dim=0)[:, mask].mean(1), dim=0)[:, None]
                                   .expand_as(rows))  # fmt: skip


def test_scores_give_a_patch_the_class_of_its_region(plain):
    made, _, features = plain
    regions = made.regions(features)
    assert made.scores(features).argmax(1).sum() == 0  # before a fit there is one class
    vectors = regions.means(F.normalize(features.concat(), dim=1))[regions.there]
    assert len(vectors) > len(features.levels[0])
    own = RegionClasses(made.cfg.method.num_clusters, made.code_dim, spherical=True)
    own.centroids.copy_(F.normalize(vectors[torch.arange(len(own.centroids)) % len(vectors)], dim=1))
    own.fitted.fill_(True)
    made.own, kept = own, made.own
    try:
        found = made.scores(features)
    finally:
        made.own = kept
    classes = torch.full(regions.there.shape, -1)
    classes[regions.there] = own.assign(vectors)
    wanted = classes.gather(1, regions.ids.flatten(1)).unflatten(1, regions.ids.shape[1:])
    assert torch.equal(found.argmax(1), wanted)
    assert len(wanted.unique()) > 1


def test_the_background_is_class_0_and_objects_have_the_others(caplog):
    caplog.set_level(logging.INFO)
    made, batch = model("background.score=auto")
    line = "tiny: background is told from objects by the attention of all tokens (no class token was trained)"
    assert line in caplog.messages
    assert len(made.own.centroids) == made.cfg.method.num_clusters - 1
    features = made.features(batch["image"])
    regions = made.regions(features)
    objects = made._objects(features, regions)
    assert 0 < objects.sum() < regions.there.sum()
    found = made.scores(features).argmax(1)
    wanted = objects.long().gather(1, regions.ids.flatten(1)).unflatten(1, regions.ids.shape[1:])
    assert torch.equal(found, wanted)  # 1: the only class before a fit


def test_salience_of_patches(plain):
    made, batch, features = plain
    images, maps = batch["image"], features.concat()
    attention = made.backbone.features(images, attention=True).attention.softmax(3)

    def looked(kind, heads="mean"):
        return found_in.patch_salience(made.backbone, images, maps, kind, heads).flatten(1)

    torch.testing.assert_close(looked("class"), attention[:, :, 0, 1:].mean(1))
    torch.testing.assert_close(looked("all"), attention[..., 1:].sum(2).mean(1))
    torch.testing.assert_close(looked("all", "min"), attention[..., 1:].sum(2).amin(1))
    torch.testing.assert_close(looked("lengths"), maps.flatten(2).norm(dim=1))


def test_a_score_of_a_region_is_the_sum_or_the_mean():
    ids = torch.tensor([[[0, 0, 0, 0, 1, 2]]])
    looked = torch.tensor([[[1.0, 1.0, 1.0, 1.0, 3.0, 0.5]]])
    assert found_in.foreground(painted(ids), looked, "sum")[0].tolist() == [True, True, False, False]
    assert found_in.foreground(painted(ids), looked, "mean")[0].tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["background.score=class"],
         "method.background.score=class: backbone=tiny has no trained class token behind attention; use auto, lengths "
         "or none"),
        (["background.score=all", "num_clusters=1"],
         "method.num_clusters=1: one of them is the background; set 2 or more, or method.background.score=none"),
        (["generator.heads=3"],
         "method.generator.heads=3: must divide the 320 channels of the features; choose a divisor, or null for the "
         "largest up to 6"),
        (["regions.vectors=crop", "regions.size=30"],
         "method.regions.size: pictures of 30 x 30 px do not fit vit_tiny_patch16_224, whose patches are 8 px: height "
         "and width must be multiples of 8; set method.regions.size to 24 x 24 or 32 x 32"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(words, said):
    with pytest.raises(ConfigError) as caught:
        model(*words)
    assert str(caught.value) == said


def test_crops_are_of_the_boxes_of_regions_and_masked_ones_do_not_see_the_rest(plain):
    made, batch, _ = plain
    image = batch["image"][:1]
    ids = torch.zeros(1, 6, 6, dtype=torch.int64)
    ids[0, 1:4, 2:5] = 1
    ids[0, 2, 3] = 2
    regions = painted(ids)
    chosen = torch.tensor([[False, True, False, False]])

    def vectors(picture, masked):
        return found_in.crops_of(made.backbone, picture, regions, chosen, masked, None)

    alone = made.backbone.features(image[:, :, 8:32, 16:40]).concat().mean((2, 3))
    torch.testing.assert_close(vectors(image, False), alone)
    hidden = image.clone()
    hidden[:, :, 16:24, 24:32] = 0.9  # the other region inside the box
    torch.testing.assert_close(vectors(hidden, True), vectors(image, True))
    assert not torch.allclose(vectors(hidden, False), vectors(image, False), atol=1e-3)
    assert found_in.crops_of(made.backbone, image, regions, chosen & False, True, 16).shape == (0, made.code_dim)


def test_classes_of_too_few_regions_are_one_and_a_line_says_so(caplog):
    own = RegionClasses(5, 3, spherical=True)
    settings = config.compose(["method=acseg"]).method.classes
    own.fit(torch.randn(4, 3), settings, 0)
    assert caplog.messages == ["the training pictures have 4 regions for 5 classes: all of them are one class"]
    assert own.fitted
    assert own.assign(torch.randn(6, 3)).sum() == 0
    own.fit(torch.eye(3).repeat(4, 1), settings, 0)
    assert len(own.assign(torch.eye(3)).unique()) == 3
