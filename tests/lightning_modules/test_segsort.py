"""SegSort: its loss against the formulas of the release, the memory, variants, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import config
from common.errors import ConfigError
from engine import setup
from lightning_modules.families.pixel_sorting import adjacent
from lightning_modules.segsort import SegSort
from tests.conftest import Run, run_small, small_words
from tests.test_ddp import expect_equal, run_two

SHORT = ["evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]
LABELS = ["method.labels.enabled=true", "method.regions.source=none", "method.kmeans.cells=[3,3]"]


def build(*words: str) -> SegSort:
    cfg, data = setup.build_data(config.compose(small_words("segsort", *words)))
    return setup.build_model(cfg, data.meta).train()


def made(model: SegSort, monkeypatch, seed: int = 0, cells: int = 4) -> tuple[dict, torch.Tensor]:
    """A batch of two pictures in the views that the method asks for, and the codes that its network shall give."""
    draw = torch.Generator().manual_seed(seed)
    views, side = {"index": torch.tensor([7, 3])}, 2 * cells
    for name in model.views:
        views[name] = torch.rand(2, 3, side, side, generator=draw)
        rows = torch.arange(side) // 4
        views[f"{name}.regions"] = (rows[:, None] * 2 + rows).repeat(2, 1, 1)
        views[f"{name}.label"] = torch.randint(3, (2, side, side), generator=draw)
        views[f"{name}.valid"] = torch.ones(2, side, side, dtype=torch.bool)
    codes = torch.randn(2 * len(model.views), model.code_dim, cells, cells, generator=draw, requires_grad=True)
    monkeypatch.setattr(model, "features", lambda images: images)
    monkeypatch.setattr(model, "embed", lambda features: codes)
    return views, codes


def segments_of(codes: torch.Tensor, *keys: torch.Tensor) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """Unit rows, the rows of every distinct (picture, keys…) triple, and their prototypes."""
    unit = F.normalize(codes.flatten(2).mT, dim=2).flatten(0, 1)
    pictures = torch.arange(len(codes))[:, None].expand(-1, codes[0, 0].numel()).flatten().tolist()
    members: dict[tuple, list[int]] = {}
    for row, key in enumerate(zip(pictures, *[key.flatten().tolist() for key in keys], strict=True)):
        members.setdefault(key, []).append(row)
    rows = list(members.values())
    return unit, rows, torch.stack([F.normalize(unit[row].sum(0), dim=0) for row in rows])


@pytest.mark.parametrize(
    ("words", "row"),
    [
        (["backbone=resnet18", "backbone.weights=none"], 0),
        (["backbone=mobilenetv2_coral", "backbone.weights=none"], 1),
        ([], 1),
        (["method.cell_pixel=corner"], 0),
        (["backbone=resnet18", "backbone.weights=none", "method.cell_pixel=centre"], 1),
    ],
    ids=["convolutions", "padded on one side", "patches", "corner", "centre"],
)
def test_a_cell_gets_the_region_of_the_pixel_that_it_looks_at(words, row, monkeypatch):
    """Cells of two pixels: convolutions look at the first of them (as the release samples), patches around both."""
    model = build("method.views=1", "method.labels.enabled=true", *words)
    views, _ = made(model, monkeypatch)
    pixels = torch.arange(2 * 8 * 8).view(2, 8, 8)
    views |= {"view0.regions": pixels, "view0.label": pixels, "view0.valid": pixels % 2 == row}
    cells = model.cells(views)
    assert torch.equal(cells.regions, pixels[:, row::2, row::2])
    assert torch.equal(model.at_cells(views, ".label", (4, 4)), cells.regions)
    assert cells.valid.all()


def test_the_unsupervised_loss_is_the_formula_of_the_document(monkeypatch):
    """4.1: minus log softmax over all segments of the batch of kappa mu.v at the own one, a mean over cells."""
    model = build("method.loss=vmf", "method.views=1")
    views, codes = made(model, monkeypatch)
    found = model.loss(views, None)
    unit, rows, prototypes = segments_of(codes, views["view0.regions"][:, 1::2, 1::2])
    assert len(rows) == 2 * 4
    own = torch.empty(len(unit), dtype=torch.long)
    for number, members in enumerate(rows):
        own[members] = number
    expected = F.cross_entropy(10.0 * unit @ prototypes.T, own)
    assert torch.allclose(found.total, expected, atol=1e-6)
    assert found.parts["segments"] == 4
    ours, theirs = (torch.autograd.grad(value, codes, retain_graph=True)[0] for value in (found.total, expected))
    assert torch.allclose(ours, theirs, atol=1e-7)


def nca(unit, rows, prototypes, labels, kappa, memory=None) -> float:
    """4.2, cell by cell: positives are the other segments of the own label, or the own one where it is alone."""
    bank, kinds = prototypes, list(labels)
    if memory is not None:
        bank, kinds = torch.cat([prototypes, F.normalize(memory[0], dim=1)]), kinds + memory[1].tolist()
    losses = []
    for own, members in enumerate(rows):
        for member in members:
            power = (kappa * bank @ unit[member]).exp()
            positive = sum(float(power[s]) for s in range(len(bank)) if kinds[s] == kinds[own] and s != own)
            negative = sum(float(power[s]) for s in range(len(bank)) if kinds[s] != kinds[own])
            positive = positive or float(power[own])
            losses.append(-math.log(positive / (positive + negative)))
    return sum(losses) / len(losses)


def test_regions_of_one_picture_are_positives_in_both_views(monkeypatch):
    model = build()
    views, codes = made(model, monkeypatch)
    regions = adjacent(views, list(model.views), ".regions")[:, 1::2, 1::2]
    unit, rows, prototypes = segments_of(codes, regions)
    labels = [(row[0] // 32, int(regions.flatten()[row[0]])) for row in rows]  # the two views of a picture: 32 cells
    expected = nca(unit.detach(), rows, prototypes.detach(), labels, 10.0)
    assert float(model.loss(views, None).total.detach()) == pytest.approx(expected, abs=2e-6)
    assert len(set(labels)) == 8
    assert len(rows) == 16


def test_the_supervised_loss_compares_with_classes_and_memory(monkeypatch):
    model = build(*LABELS, "method.views=1", "method.kmeans.cells=[1,1]", "method.labels.banks=4")
    views, codes = made(model, monkeypatch)
    labels = views["view0.label"][:, 1::2, 1::2]
    unit, rows, prototypes = segments_of(codes, labels)
    classes = [int(labels.flatten()[row[0]]) for row in rows]
    without = float(model.loss(views, None).total.detach())
    assert without == pytest.approx(nca(unit.detach(), rows, prototypes.detach(), classes, 10.0), abs=2e-6)
    memory = torch.randn(5, 16), torch.tensor([0, 1, 1, 2, 0])
    model.memory.enqueue(memory[0], label=memory[1])
    expected = nca(unit.detach(), rows, prototypes.detach(), classes, 10.0, memory)
    assert float(model.loss(views, None).total.detach()) == pytest.approx(expected, abs=2e-6)
    assert abs(expected - without) > 1e-2
    # A skipped step leaves the memory as it is; another one appends its own prototypes, detached.
    for skipped, filled in ((True, 5), (False, 5 + len(rows))):
        model.loss(views, None)
        optimizer = SimpleNamespace(optimizer=SimpleNamespace(skip_method=skipped))
        monkeypatch.setattr(model, "optimizers", lambda optimizer=optimizer: optimizer)
        model.after_step()
        assert int(model.memory.filled) == filled
    order = sorted(range(len(rows)), key=lambda s: (rows[s][0] // 16, classes[s]))
    assert torch.allclose(model.memory.rows()[5:], prototypes.detach()[order], atol=1e-6)
    assert model.memory.rows("label")[5:].tolist() == [classes[s] for s in order]


def test_cells_without_region_or_class_do_not_count(monkeypatch):
    """Padding: whatever the network gives there changes nothing; where nothing is left the step is skipped."""
    model = build("method.loss=vmf", "method.views=1")
    views, codes = made(model, monkeypatch)
    views["view0.regions"][0, :, 4:] = -1
    views["view0.valid"][1, :4] = False
    found = model.loss(views, None)
    (grad,) = torch.autograd.grad(found.total, codes)
    assert grad[0, :, :, 2:].abs().max() == 0
    assert grad[1, :, :2].abs().max() == 0
    assert grad[1, :, 2:].abs().max() > 0
    assert not found.skip
    views["view0.regions"].fill_(-1)
    empty = model.loss(views, None)
    assert empty.skip
    assert float(empty.total.detach()) == 0
    supervised = build(*LABELS, "method.views=1")
    views, codes = made(supervised, monkeypatch)
    views["view0.label"].fill_(255)
    assert supervised.loss(views, None).skip


@pytest.mark.train
def test_the_supervised_variant_says_so_and_keeps_its_memory(tmp_path):
    run = run_small("segsort", tmp_path, "x", *LABELS, *SHORT)
    assert run.metrics["uses_labels"] is True
    assert run.weights["memory.storage"].shape == (2 * 9 * 4 * 2, 16)
    assert int(run.weights["memory.filled"]) == 144
    assert set(run.weights["memory.extra_label"].tolist()) <= set(range(12))
    lengths = run.weights["memory.storage"].norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)


@pytest.mark.train
def test_the_plain_variant_uses_no_labels(small_run):
    run = small_run("segsort")
    assert run.metrics["uses_labels"] is False
    assert (run.folder / "backbone.safetensors").is_file()
    assert "- Weights: the weights at the last step" in (run.folder / "backbone.md").read_text()


@pytest.mark.ddp
def test_two_processes_keep_the_memory_of_one(tmp_path):
    one = run_small("segsort", tmp_path, "one", *LABELS)
    expect_equal(run_two("segsort", tmp_path, *LABELS), one)


THREE = ["trainer.max_steps=3", *SHORT]


@pytest.fixture(scope="module")
def plain_three(tmp_path_factory) -> Run:
    return run_small("segsort", tmp_path_factory.mktemp("three"), "plain", *THREE)


@pytest.mark.train
@pytest.mark.parametrize(
    "words",
    [
        ["method.loss=vmf"],
        ["method.views=1"],
        ["method.kmeans.cells=[3,3]"],
        ["method.regions.source=slic", "method.regions.most=12"],
        ["method.head.norm=batch"],
        ["method.kappa=16"],
        ["method.bias_lr=2"],
        ["method.crop.size=32"],
        ["optim.head.schedule=step"],
    ],
    ids=lambda words: ",".join(word.removeprefix("method.") for word in words),
)
def test_every_option_changes_the_training(words, plain_three, tmp_path):
    other = run_small("segsort", tmp_path, "with", *THREE, *words)
    weights = {key: value for key, value in other.weights.items() if key.startswith("head.")}
    assert all(torch.isfinite(value.double()).all() for value in weights.values())
    assert any(not torch.equal(value, plain_three.weights.get(key, value + 1)) for key, value in weights.items())


@pytest.mark.train
@pytest.mark.parametrize("key", ["iterations=1", "location=none", "location_scale=3", "grid=ceil", "empty=zero"])
def test_every_option_of_pixel_sorting_reaches_it(key, monkeypatch):
    model = build("method.kmeans.cells=[4,4]")
    other = build("method.kmeans.cells=[4,4]", f"method.kmeans.{key}")
    changed = {name for name, value in other.sorting.items() if model.sorting[name] != value}
    assert changed == {key.split("=")[0]}


@pytest.mark.train
def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    run = run_small("segsort", tmp_path, "x", "backbone.frozen=true", *THREE)
    assert not [name for name in run.weights if name.startswith("backbone.")]
    assert not (run.folder / "backbone.safetensors").exists()


@pytest.mark.train
def test_a_convolutional_network_from_random_weights(tmp_path):
    """The released way: trained at output stride 16, evaluated at 8, batch norms, the pyramid head, SGD."""
    words = ["backbone=resnet18", "backbone.weights=none", "backbone.create={layers: [1, 1, 1, 1]}"]
    words += ["backbone.output_stride=16", "backbone.eval_output_stride=8", "method.head.norm=batch"]
    words += [
        "method.head.kind=pyramid",
        "optim.backbone.optimizer=sgd",
        "optim.head.optimizer=sgd",
        "data.train_size=64",
    ]
    run = run_small("segsort", tmp_path, "x", *words, "data.eval_size=64", *THREE)
    assert run.metrics["val/kmeans/miou"] is not None
    start = setup.build_model(config.restore(run.checkpoint["labelfree"]["config"]), setup.stored_meta(run.checkpoint))
    moved = [name for name, value in start.backbone.state_dict().items() if "running_mean" in name]
    assert moved
    for name in moved:
        assert not torch.equal(start.backbone.state_dict()[name], run.weights[f"backbone.{name}"]), name


@pytest.mark.train
def test_bf16_follows_float32(plain_three, tmp_path):
    """The loss of the first steps within two percent: k-means and vMF are computed in float32."""
    half = run_small("segsort", tmp_path, "half", *THREE, "trainer.precision=bf16-mixed")
    losses = []
    for run in (plain_three, half):
        rows = (run.folder / "metrics.csv").read_text().splitlines()
        place = rows[0].split(",").index("train/vmf")
        losses.append([float(row.split(",")[place]) for row in rows[1:] if row.split(",")[place]])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.loss=nca"], "method.loss=nca: not one of vmf, vmf_nca; did you mean vmf_nca?"),
        (
            ["method.loss=vmf", "method.labels.enabled=true"],
            "method.loss=vmf: draws nothing by class, so method.labels.enabled=true would change nothing but the "
            "segments; set method.loss=vmf_nca",
        ),
        (
            ["method.regions.source=none"],
            "method.regions.source=none: method.loss=vmf_nca needs a label of each segment; choose a source of "
            "regions, method.loss=vmf, or method.labels.enabled=true",
        ),
        (
            ["method.regions.source=none", "method.loss=vmf"],
            "method.kmeans.cells=[1, 1]: without regions a picture would be one segment; set "
            "method.kmeans.cells=[5,5] or choose a source of regions",
        ),
        (
            ["method.kmeans.cells=[5]"],
            "method.kmeans.cells=[5]: expected a list of 2 whole numbers from 1 to 256, as in [1,1]",
        ),
        (["method.kmeans.grid=hex"], "method.kmeans.grid=hex: not one of linspace, ceil"),
        (["method.kappa=80"], "method.kappa=80: must be at most 60"),
        (["method.views=0"], "method.views=0: must be at least 1"),
        (
            ["method.crop.zoom=[2.0,0.5]"],
            "method.crop.zoom=[2, 0.5]: expected a list of 2 numbers above 0, at most 100, in ascending "
            "order, as in [0.5,1.5]",
        ),
        (["method.labels.banks=-1"], "method.labels.banks=-1: must not be negative"),
        (["method.augment.hue=0.7"], "method.augment.hue=0.7: expected a number from 0 to 0.5"),
        (["method.crop.flip_p=2"], "method.crop.flip_p=2: expected a number from 0 to 1"),
        (["method.cell_pixel=top"], "method.cell_pixel=top: not one of auto, corner, centre"),
        (["method.head.kind=aspp"], "method.head.kind=aspp: not one of pointwise, pyramid"),
        (["method.head.norm=layer"], "method.head.norm=layer: not one of batch, group, none"),
        (
            ["method.regions.source=hed"],
            "method.regions.source=hed: not one of felzenszwalb, watershed, slic, folder, none",
        ),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        build(*words)
    assert str(caught.value) == message
