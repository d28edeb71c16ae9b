"""HSG: its loss against the formulas of the release, padding and slots, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import config
from common.chance import library_draws
from common.errors import ConfigError
from engine import setup
from evaluation.hierarchy import Nesting
from lightning_modules.families.pixel_sorting import adjacent
from lightning_modules.hsg import GOODNESS, HSG
from models.hierarchy import Hierarchy
from run import main
from tests.conftest import small_words
from tests.datamodules.pictures import noise, save
from tests.lightning_modules import test_segsort as segsort

SMALL = ["method.dim=16", "method.kmeans.cells=[2,2]", "method.groups=[3,2]"]
PLAIN = [f"method.weights.{name}=0" for name in ("fine", "coarse", *GOODNESS)]


def build(*words: str) -> HSG:
    cfg, data = setup.build_data(config.compose(small_words("hsg", *SMALL, *words)))
    return setup.build_model(cfg, data.meta).train()


def observed(model: HSG, monkeypatch) -> list:
    """The groups that the transformers give, and what they were given."""
    seen, forward = [], model.hierarchy.forward

    def spy(*given):
        seen.append((given, forward(*given)))
        return seen[-1][1]

    monkeypatch.setattr(model.hierarchy, "forward", spy)
    return seen


def by_hand(model: HSG, views: dict, codes: torch.Tensor, seen: list) -> dict[str, float]:
    """Every term, segment by segment."""
    regions = adjacent(views, list(model.views), ".regions")[:, 1::2, 1::2]
    found, _ = model.sort(codes, regions, torch.ones_like(regions, dtype=torch.bool))
    ids, unit = found.ids.flatten(), found.unit.flatten(0, 1).detach()
    rows = [(ids == s).nonzero().flatten().tolist() for s in range(int(ids.max()) + 1)]
    bank = torch.stack([F.normalize(unit[row].sum(0), dim=0) for row in rows])
    owner = [row[0] // 32 for row in rows]  # two views of 16 cells a picture
    (nodes, _, _), groups = seen[-1]
    place = [owner[:s].count(owner[s]) for s in range(len(rows))]
    for s in range(len(rows)):
        assert torch.allclose(nodes[owner[s], place[s]], bank[s], atol=1e-6)
    labels = {"image": [(owner[s], int(regions.flatten()[rows[s][0]])) for s in range(len(rows))]}
    for name, level in zip(("fine", "coarse"), groups.labels, strict=True):
        labels[name] = [(owner[s], int(level[owner[s], place[s]])) for s in range(len(rows))]
    terms = {name: segsort.nca(unit, rows, bank, own, 16.0) for name, own in labels.items()}
    terms |= dict.fromkeys(("modularity", "collapse"), 0.0)
    for picture in range(2):
        own = [s for s in range(len(rows)) if owner[s] == picture]
        x, view = bank[own], torch.tensor([rows[s][0] // 16 % 2 for s in own])
        graph = torch.zeros(len(own), len(own))
        for i in range(len(own)):
            for kind in (0, 1):
                others = [j for j in range(len(own)) if view[j] == kind]
                weight = {j: float(x[i] @ x[j]) if j != i else -9.0 for j in others}
                for j in sorted(others, key=lambda j: -weight[j])[:2]:
                    graph[i, j] = float(j != i)
        degrees, total = graph.sum(1), 2 * graph.sum()
        for level in (groups.fine, groups.coarse):
            s = level[picture, :, : len(own)].detach()
            inside = torch.trace(s @ graph @ s.T) - (s @ degrees).square().sum() / total
            terms["modularity"] += float(1 - inside / total) / 2
            terms["collapse"] += float(len(s) ** 0.5 * s.sum(1).norm() / len(own)) / 2
    terms["centroid"] = 0.0
    for centroids in (groups.fine_centroids, groups.coarse_centroids):
        c = F.normalize(centroids.flatten(0, 1).detach(), dim=1)
        terms["centroid"] += float(F.cross_entropy(16 * c @ c.T, torch.arange(len(c))))
    return terms


def test_the_loss_is_that_of_the_document(monkeypatch):
    """Sections 5 and 6: regions, both levels, modularity, collapse and centroids, each with its weight."""
    model = build()
    views, codes = segsort.made(model, monkeypatch)
    seen = observed(model, monkeypatch)
    found = model.loss(views, None)
    expected = by_hand(model, views, codes, seen)
    for name, value in expected.items():
        assert float(found.parts[name]) == pytest.approx(value, rel=1e-4), name
    weights = model.cfg.method.weights
    assert float(found.total.detach()) == pytest.approx(
        sum(weights[name] * value for name, value in expected.items()), rel=1e-4
    )
    found.total.backward()
    assert codes.grad.abs().sum() > 0
    for name, weight in (*model.hierarchy.named_parameters(), *model.positions.named_parameters()):
        assert weight.grad is not None, name


def test_without_its_hierarchy_it_is_segsort(monkeypatch):
    """As the authors trained their baseline again; the transformers are left alone."""
    model, other = build(*PLAIN), segsort.build("method.kmeans.cells=[2,2]", "method.kmeans.iterations=15")
    other.cfg = config.changed(other.cfg, {"method.kappa": 16.0})
    results = [part.loss(segsort.made(part, monkeypatch)[0], None).total for part in (model, other)]
    assert torch.equal(*results)
    assert {group["name"] for group in model.param_groups()} == {"backbone", "head"}
    assert not any(weight.requires_grad for weight in model.hierarchy.parameters())
    assert {group["name"] for group in build().param_groups()} == {"backbone", "head", "grouping"}


@pytest.mark.parametrize("faithful", [False, True])
def test_more_segments_than_slots(faithful, monkeypatch):
    """The largest are grouped, the others take part in the image term alone; the release fails here."""
    model = build("method.slots=3", f"method.faithful={faithful}")
    views, _ = segsort.made(model, monkeypatch)
    seen = observed(model, monkeypatch)
    found = model.loss(views, None)
    assert seen[0][0][0].shape[:2] == (2, 3)
    assert found.total.isfinite()
    full = build()
    views, _ = segsort.made(full, monkeypatch)
    every = full.loss(views, None)
    assert float(found.parts["image"]) == float(every.parts["image"])
    assert float(found.parts["fine"]) != float(every.parts["fine"])


def test_padded_slots_change_nothing_unless_faithful(monkeypatch):
    values = {}
    for faithful in (False, True):
        for slots in (40, 80):
            model = build(f"method.slots={slots}", f"method.faithful={faithful}", "method.weights.collapse=1")
            views, _ = segsort.made(model, monkeypatch)
            seen = observed(model, monkeypatch)
            values[faithful, slots] = float(model.loss(views, None).total.detach())
            assert (seen[0][0][0].shape[1] == slots) == faithful
    assert values[False, 40] == values[False, 80]
    assert abs(values[True, 40] - values[True, 80]) > 1e-2


def test_pictures_without_a_region_take_no_part(monkeypatch):
    model = build()
    views, codes = segsort.made(model, monkeypatch)
    for name in model.views:
        views[f"{name}.regions"][1] = -1
    found = model.loss(views, None)
    (grad,) = torch.autograd.grad(found.total, codes)
    assert grad.isfinite().all()
    assert grad[2:].abs().max() == 0
    assert not found.skip
    for name in model.views:
        views[f"{name}.regions"].fill_(-1)
    empty = model.loss(views, None)
    assert empty.skip
    assert empty.total.isfinite()


@pytest.mark.parametrize(
    "word",
    ["graph.knn=1", "graph.per_view=false", "kappa.image=10", "kappa.fine=10", "kappa.coarse=10", "kappa.centroid=10",
     "groups=[3,3]", "transformer.heads=2", "transformer.layers=1", "transformer.hidden=32", "weights.fine=1"],
)  # fmt: skip
def test_every_option_changes_the_loss(word, monkeypatch):
    """On the same cells; the layers start from the same keyed draw, so nothing else differs."""
    losses = []
    for model in (build(), build(f"method.{word}")):
        views, _ = segsort.made(model, monkeypatch)
        losses.append(float(model.loss(views, None).total.detach()))
    assert losses[0] != losses[1]


def picture_levels(model: HSG, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return model.levels(torch.rand(2, 3, 48, 48, generator=draw), torch.ones(2, 48, 48, dtype=torch.bool))


def test_the_levels_are_what_the_trained_transformers_say(monkeypatch):
    """Other weights of the transformers alone group the same segments otherwise, and a given answer is what is shown:
    no clustering of codes or segments after training could do so."""
    model = build("method.groups=[4,2]").eval()
    segments, fine, coarse = picture_levels(model)
    assert fine.max() < 4
    assert coarse.max() < 2
    nesting = Nesting()
    nesting.update([segments, fine, coarse])
    assert float(nesting.compute()) == 100
    others = []
    for seed in range(5):  # a draw may put all segments into one group, as the weights of before may
        with torch.no_grad(), library_draws(seed, "test"):
            for name, weight in model.hierarchy.named_parameters():
                if "weight" in name and weight.dim() > 1:
                    weight.copy_(0.1 * torch.randn_like(weight))
        same, other, _ = picture_levels(model)
        assert torch.equal(same, segments)
        others.append(other)
    assert not all(torch.equal(other, fine) for other in others)

    def answer(nodes, hidden, positions):
        number = torch.arange(nodes.shape[1]) % 4
        fine = F.one_hot(number, 4).T.float().expand(len(nodes), -1, -1)
        transition = torch.tensor([[0.9, 0.2, 0.9, 0.2], [0.1, 0.8, 0.1, 0.8]]).expand(len(nodes), -1, -1)
        flipped = 1 - transition @ fine  # as if the memberships of segments said the opposite
        return Hierarchy(fine, flipped, transition, torch.zeros(2, 4, 16), torch.zeros(2, 2, 16))

    monkeypatch.setattr(model.hierarchy, "forward", answer)
    _, given, upper = picture_levels(model)
    assert torch.equal(given, segments % 4)
    assert torch.equal(upper, segments % 2)
    model.cfg = config.changed(model.cfg, {"method.levels.nested": False})
    assert torch.equal(picture_levels(model)[2], 1 - segments % 2)


def test_padding_has_no_group():
    model = build().eval()
    valid = torch.ones(1, 48, 48, dtype=torch.bool)
    valid[:, 25:] = False
    for level in model.levels(torch.rand(1, 3, 48, 48), valid):
        cells = level.shape[-1]
        rows = -(-25 * cells // 48)
        assert (level[:, :rows] >= 0).all()
        assert (level[:, rows:] == -1).all()


@pytest.mark.train
def test_a_run_scores_its_levels_and_predict_writes_them(small_run, tmp_path):
    run = small_run("hsg")
    assert run.metrics["val/hierarchy/nested"] == 100
    for name in ("segments", "fine", "coarse"):
        assert 0 < run.metrics[f"val/hierarchy/{name}_iou"] <= 100
    assert run.metrics["val/hierarchy/segments_iou"] != run.metrics["val/hierarchy/coarse_iou"]
    assert "8 fine and 4 coarse groups, nested" in run.metrics["protocol/hierarchy"]
    save(tmp_path / "in" / "a.png", noise(50, 70, seed=0))
    words = [f"ckpt={run.folder}/checkpoints/last.ckpt", f"input={tmp_path}/in", f"output={tmp_path}/out"]
    assert main(["predict", *words, "levels=all"]) == 0
    maps = []
    for name in ("segments", "fine", "coarse"):
        maps.append(torch.from_numpy(np.array(Image.open(tmp_path / "out" / "levels" / name / "a.png"))).long()[None])
        assert (tmp_path / "out" / "levels" / f"{name}_overlay" / "a.png").is_file()
    assert maps[0].shape == (1, 50, 70)
    nesting = Nesting()
    nesting.update(maps)
    assert float(nesting.compute()) == 100
    assert (tmp_path / "out" / "index" / "a.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["method.regions.source=none"],
            "method.regions.source=none: cells are drawn to their contour region; choose felzenszwalb, watershed, slic "
            "or folder",
        ),
        (
            ["method.groups=[8]"],
            "method.groups=[8]: expected a list of 2 whole numbers from 2 to 65536, as in [8,4]",
        ),
        (["method.transformer.heads=3"], "method.transformer.heads=3: must divide method.dim=16"),
        (["method.slots=0"], "method.slots=0: must be at least 1, or null for no limit"),
        (["method.transformer.layers=0"], "method.transformer.layers=0: must be at least 1"),
        (["method.transformer.dropout=1"], "method.transformer.dropout=1: expected a number from 0 to below 1"),
        (["method.graph.knn=0"], "method.graph.knn=0: must be at least 1"),
        (["method.kappa.fine=70"], "method.kappa.fine=70: must be at most 60"),
        (["method.weights.image=-1"], "method.weights.image=-1: must not be negative"),
        (
            [*PLAIN, "method.weights.image=0"],
            "method.weights: all are 0, so there is nothing to learn; set method.weights.image=1",
        ),
        (
            [*PLAIN, "method.weights.fine=0.1"],
            "method.weights.fine=0.1: groups are learned by modularity, collapse and centroid alone, whose weights are "
            "0; set one of them, or method.weights.fine=0",
        ),
        (["method.kmeans.grid=hex"], "method.kmeans.grid=hex: not one of linspace, ceil"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        build(*words)
    assert str(caught.value) == message
