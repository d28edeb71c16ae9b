"""Objects of training pictures: what each provider finds, what is kept of it, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import config
from common.errors import ConfigError
from engine import setup
from engine.stages.stage import Stage, summary_text
from grouping import attention_masks, maskcut, spectral
from lightning_modules.families import graph_cuts
from lightning_modules.families.mask_crf import MaskCRF
from lightning_modules.families.mask_providers import PROVIDERS, ProvidedMasks, check_masks, mask_provider, refined
from models.backbone import Backbone
from pseudo_labels.views import Saliency
from tests.conftest import small_words

MASKS = {"provider": "spectral", "root": None, "options": {}, "objects": "union", "least": 0.01, "fill": True}


def composed(*words: str, size: int | None = 48, **masks):
    cfg = config.compose(small_words("kmeans_baseline", *words))
    stage = {"size": size, "batch_size": 4, "shard": 8}
    return config.changed(cfg, {"method.stage": stage, "method.masks": MASKS | masks})


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return Backbone(config.compose(small_words("kmeans_baseline", "backbone.class_token=true")).backbone)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Two pictures with a bright square on noise."""
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 0.3
    images[:, :, 8:32, 16:40] += 0.6
    return images


def found(backbone: Backbone, images: torch.Tensor, provider: str, **options) -> list[torch.Tensor]:
    masks = SimpleNamespace(**(MASKS | {"provider": provider, "options": options}))
    with torch.no_grad():
        return [one.masks for one in mask_provider(masks, backbone).find(images, {})]


def test_attention_keeps_its_mass(tiny, pictures):
    seen = tiny.features(pictures, attention=True)
    weights = seen.attention[:, :, 0].softmax(-1)[:, :, seen.prefix :].mean(1)
    for share in (0.3, 0.9):
        for mask, weight in zip(found(tiny, pictures, "attention", mass=share), weights, strict=True):
            inside, outside = weight[mask[0].flatten()], weight[~mask[0].flatten()]
            assert mask.shape == (1, 6, 8)
            assert inside.sum() / weight.sum() >= share > (inside.sum() - inside.min()) / weight.sum() - 1e-6
            assert inside.min() >= outside.max()
    one = found(tiny, pictures, "attention", heads=[2])
    alone = seen.attention[:, 2, 0].softmax(-1)[:, seen.prefix :]
    assert alone[0][one[0].flatten()].min() >= alone[0][~one[0].flatten()].max()


def test_attention_by_the_votes_of_maskdistill(tiny, pictures):
    seen = tiny.features(pictures, qkv=True, keys=[-1])
    queries, keys, _ = seen.qkv
    scores = torch.einsum("bld,blnd->bln", queries[:, :3, 0], keys[:, :3, 1:]).mean(1)
    wanted = attention_masks.attention_masks(scores, seen.keys[0].flatten(2).mT, (6, 8), topk=0.2, mass=0.5)
    voted = found(tiny, pictures, "attention", rule="votes", mass=0.5, heads=[0, 1, 2], topk=0.2)
    assert torch.equal(torch.cat(voted), wanted.masks)
    assert wanted.masks.any()


@pytest.mark.parametrize(
    ("words", "lacking"),
    [([], "no trained class token"), (["backbone=mobilenetv2", "backbone.weights=none"], "no attention")],
)
def test_without_attention_the_foreground_is_spectral_and_the_run_says_so(pictures, caplog, words, lacking):
    caplog.set_level("INFO", logger="lightning_modules")
    cfg = composed(*words, provider="attention")
    backbone = Backbone(cfg.backbone)
    check_masks(cfg.method, backbone)
    assert f"method.masks.provider=attention: {backbone.name} has {lacking}; masks are the spectral" in caplog.text
    for own, other in zip(found(backbone, pictures, "attention"), found(backbone, pictures, "spectral"), strict=True):
        assert torch.equal(own, other)


def test_spectral_foreground_is_the_side_with_less_border(tiny, pictures):
    masks = found(tiny, pictures, "spectral", vectors=2)
    assert [mask.shape for mask in masks] == [(2, 6, 8)] * 2
    for mask in torch.cat(masks):
        assert 0 < mask.sum() < mask.numel()
        assert spectral.border_share(mask[None]) <= spectral.border_share(~mask[None])
    for mask in found(tiny, pictures, "spectral", side="smaller", features="keys", centred=False):
        assert 0 < mask.sum() <= mask.numel() / 2


def test_token_cut_is_that_of_the_method(tiny, pictures):
    keys = graph_cuts.patch_features(tiny, pictures).flatten(2).mT
    cut = spectral.token_cut(spectral.threshold_affinity(keys, 0.3), (6, 8), side="peak")
    assert torch.equal(torch.cat(found(tiny, pictures, "token_cut", tau=0.3, side="peak")), cut.masks)


def test_mask_cut_gives_the_masks_that_it_accepts(tiny, pictures):
    maps = graph_cuts.patch_features(tiny, pictures, "levels")
    cut = maskcut.mask_cut(spectral.centred(maps).flatten(2).mT, (6, 8), tau=0.25, count=4)
    masks = found(tiny, pictures, "mask_cut", tau=0.25, count=4)
    assert max(map(len, masks)) > 1
    for own, all_of_it in zip(masks, cut.masks, strict=True):
        assert torch.equal(own, all_of_it[all_of_it.any((1, 2))])
    released = found(tiny, pictures, "mask_cut", features="keys", centred=False, tau=0.15)
    keys = maskcut.mask_cut(graph_cuts.patch_features(tiny, pictures).flatten(2).mT, (6, 8)).masks
    for own, all_of_it in zip(released, keys, strict=True):
        assert torch.equal(own, all_of_it[all_of_it.any((1, 2))])


def test_masks_of_a_cut_can_be_refined_on_the_pixels(tiny, pictures):
    plain = found(tiny, pictures, "mask_cut", tau=0.25, count=4)
    for image, before, after in zip(
        pictures, plain, found(tiny, pictures, "mask_cut", tau=0.25, count=4, crf="dense"), strict=True
    ):
        assert torch.equal(after, MaskCRF()(image, before))
        assert after.shape[1:] == (48, 64)


# ---- what is kept ----


def shape(*rows: str) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


RING = shape("###..", "#.#.#", "###..", ".....")
BAR = shape(".....", ".....", ".....", "####.")
SCORES = torch.tensor([0.5, 0.9])


@pytest.mark.parametrize(
    ("objects", "expected", "scores"),
    [
        ("union", [RING | BAR], [0.9]),
        ("best", [BAR], [0.9]),
        ("each", [BAR, RING], [0.9, 0.5]),
        ("components", [BAR, RING & (torch.arange(5) < 3), RING & (torch.arange(5) > 3)], [0.9, 0.5 * 8 / 9, 0.5 / 9]),
    ],
)
def test_masks_and_pieces(objects, expected, scores):
    masks, values = refined(torch.stack([RING, BAR]), SCORES, objects, least=0.0, fill=False)
    assert torch.equal(masks, torch.stack(expected))
    assert torch.allclose(values, torch.tensor(scores))


def test_small_pieces_go_and_holes_are_filled():
    masks, _ = refined(RING[None], SCORES[:1], "union", least=0.1, fill=True)  # 2 of 20 cells and more
    assert torch.equal(masks, shape("###..", "###..", "###..", ".....")[None])
    for objects in ("union", "each", "components"):
        kept, values = refined(torch.stack([RING, BAR]), SCORES, objects, least=0.9, fill=True)
        assert kept.shape == (0, 4, 5)
        assert values.shape == (0,)
    corner = shape("##...", "..##.", ".....", ".....")
    assert (
        len(refined(corner[None], SCORES[:1], "components", least=0.15, fill=False)[0]) == 1
    )  # one piece, by a corner
    assert refined(torch.zeros(0, 4, 5, dtype=torch.bool), SCORES[:0], "best", 0.1, True)[0].shape == (0, 4, 5)


# ---- the step, and a user's folder ----


def ran(folder, cfg):
    """The records of the step on six scenes, and its folder's summary."""
    cfg, data = setup.build_data(config.changed(cfg, {"cache.dir": str(folder), "data.train_count": 6}))
    method = SimpleNamespace(cfg=cfg, backbone=Backbone(cfg.backbone))
    work = Stage(cfg, data, SimpleNamespace(steps=lambda _: [ProvidedMasks(method, data.source("train"))]))
    return work.run()["masks"], work


def written(folder, maps: dict[int, np.ndarray]):
    for index, ids in maps.items():
        path = folder / "train" / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(np.uint8)).save(path)
    return folder


@pytest.mark.train
def test_the_step_keeps_masks_with_their_boxes(tmp_path):
    records, _ = ran(tmp_path, composed("data.train_size=[48,64]", size=None))
    assert records.manifest["kept"] == 6
    for record in records.each():
        (mask,), (box,) = record.fields["masks"], record.fields["boxes"]
        assert mask.shape == (6, 8)
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        assert box.tolist() == [8 * columns[0], 8 * rows[0], 8 * columns[-1] + 8, 8 * rows[-1] + 8]
        labels = Saliency(records).read(record.index, record.size)
        assert set(np.unique(labels)) == {0, 1}
        assert labels.mean() == pytest.approx(mask.mean())


@pytest.mark.train
def test_refined_masks_have_the_size_of_the_picture(tmp_path):
    words = {"provider": "mask_cut", "options": {"crf": "dense"}, "objects": "each", "least": 0.0}
    records, _ = ran(tmp_path, composed("data.train_size=[48,64]", size=None, **words))
    assert records.counts("masks").sum() > 0
    for record in records.each():
        for mask, box in zip(record.fields["masks"], record.fields["boxes"], strict=True):
            assert mask.shape == (48, 64)
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.train
def test_a_folder_of_pngs(tmp_path, caplog):
    caplog.set_level("INFO", logger="engine")
    ids = np.zeros((48, 48), np.uint8)
    ids[4:20, 8:24], ids[30:40, 30:46] = 7, 255
    maps = {0: ids, 1: ids * 0 + 255, 2: ids * 0, 3: np.zeros((10, 12)), 5: ids}
    root = written(tmp_path / "masks", maps)
    (root / "train" / "000005.png").write_bytes(b"no png")
    cfg = composed(provider="folder", root=str(root), objects="each")
    records, work = ran(tmp_path / "cache", cfg)
    reasons = ["", "whole_picture", "no_object", "wrong_size", "no_file", "unreadable"]
    assert [record.drop for record in records.each()] == reasons
    first = records.read(0)
    assert np.array_equal(first.fields["masks"], [ids == 7, ids == 255])
    assert first.fields["boxes"].tolist() == [[8, 4, 24, 20], [30, 30, 46, 40]]
    line = (
        f"masks: of 6 pictures no file in {root} for 1 (train/000004.png); another size than its picture: "
        "1 (train/000003.png 10 x 12, not 48 x 48); these pictures are left out"
    )
    assert line in caplog.text
    dropped = "1 of 6 pictures kept; dropped: 1 no_file, 1 no_object, 1 unreadable, 1 whole_picture, 1 wrong_size"
    assert dropped in summary_text(records.manifest)
    written(root, {1: ids})
    assert (
        ran(tmp_path / "cache", cfg)[1].places["masks"].path != work.places["masks"].path
    )  # other files, other folder


@pytest.mark.train
def test_a_folder_of_salience_is_cut_at_its_threshold(tmp_path):
    soft = np.tile(np.arange(48) * 5, (48, 1))
    root = written(tmp_path / "masks", dict.fromkeys(range(6), soft))
    for norm, bound in (("none", 127.5), ("image", 117.5)):
        cfg = composed(provider="folder", root=str(root), options={"threshold": 0.5, "norm": norm})
        records, _ = ran(tmp_path / norm, cfg)
        assert np.array_equal(records.read(3).fields["masks"], soft[None] > bound)


def test_a_folder_that_holds_no_mask_is_refused(tmp_path):
    cfg, data = setup.build_data(composed(provider="folder", root=str(tmp_path)))
    step = ProvidedMasks(SimpleNamespace(cfg=cfg, backbone=Backbone(cfg.backbone)), data.source("train"))
    with pytest.raises(ConfigError) as caught:
        step.announce(22)
    assert str(caught.value) == (
        f"method.masks.root={tmp_path}: no picture has a mask there; expected {tmp_path}/train/000000.png for picture "
        "'train/000000', a grey png as large as the picture"
    )


REFUSED = {
    "provider": ({"provider": "sam"}, f"method.masks.provider=sam: not one of {', '.join(PROVIDERS)}"),
    "objects": ({"objects": "all"}, "method.masks.objects=all: not one of union, best, each, components"),
    "no root": (
        {"provider": "folder"}, "method.masks.root=null: with method.masks.provider=folder name the folder of pngs",
    ),
    "root": (
        {"provider": "folder", "root": "/nowhere"}, "method.masks.root=/nowhere: there is no such folder",
    ),
    "no option": (
        {"provider": "token_cut", "options": {"taus": 1}},
        "method.masks.options.taus=1: method.masks.provider=token_cut has no such option; did you mean tau?",
    ),
    "value": (
        {"provider": "token_cut", "options": {"tau": 1}},
        "method.masks.options.tau=1: expected a number between -1 and 1",
    ),
    "type": (
        {"options": {"centred": "yes"}}, "method.masks.options.centred=yes: expected true or false, got a text",
    ),
    "heads": (
        {"provider": "attention", "options": {"heads": [4]}},
        "method.masks.options.heads=[4]: tiny has heads 0 to 3; name some of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tiny):
    masks, line = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        check_masks(SimpleNamespace(masks=SimpleNamespace(**(MASKS | masks))), tiny)
    assert str(caught.value) == line
