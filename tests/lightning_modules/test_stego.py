"""STEGO: its options reach the training, near pictures come with the batch, refusals are one line."""

import csv

import numpy as np
import pytest
import torch

import config
from common.errors import ConfigError
from engine import setup
from lightning_modules import stego
from lightning_modules.base.segmenter import split_labels
from tests.conftest import run_small, small_words
from tests.datamodules.pictures import labelled_folder, save

pytestmark = pytest.mark.train

TWO_STEPS = ["trainer.max_steps=2", "evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]
OPTIONS = [
    ["projection=linear"], ["terms.self.weight=0"], ["terms.knn.weight=0"], ["terms.random.weight=0"],
    ["terms.self.shift=0.3"], ["terms.knn.shift=0.3"], ["terms.random.shift=0.3"], ["samples=5"],
    ["terms.self.quantile=0.3"], ["terms.knn.quantile=0.3"], ["terms.random.quantile=0.3"],
    ["pointwise=false"], ["zero_clamp=false"], ["stabilize=true"], ["negatives.repeats=2"], ["negatives.draw=cycle"],
    ["neighbours.drawn=1"], ["neighbours.stored=7", "neighbours.drawn=4"], ["neighbours.dropout=0.9"],
    ["dropout.p=0"], ["dropout.signal=false"], ["crf.weight=1", "crf.pixels=100"],
    ["reconstruction.weight=1"], ["alignment.weight=1"],
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_small("stego", tmp_path_factory.mktemp("plain"), "plain", *TWO_STEPS)


@pytest.mark.parametrize("words", OPTIONS, ids=",".join)
def test_every_option_changes_the_training(words, plain, tmp_path):
    other = run_small("stego", tmp_path, "with", *TWO_STEPS, *(f"method.{word}" for word in words))
    name = "head.linear.weight"
    assert torch.isfinite(other.weights[name]).all()
    assert not torch.equal(other.weights[name], plain.weights[name])


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (["crf.weight=1", "crf.pixels=50"], ["crf.size=40"]),
        (["crf.weight=1", "crf.pixels=50"], ["crf.appearance=1"]),
        (["crf.weight=1", "crf.pixels=50"], ["crf.smoothness=1"]),
        (["crf.weight=1", "crf.pixels=50"], ["crf.shift=1"]),
        (["crf.weight=1", "crf.pixels=50"], ["crf.alpha=5"]),
        (["crf.weight=1", "crf.pixels=50"], ["crf.beta=5"]),
        (["crf.weight=1", "crf.pixels=50"], ["crf.gamma=5"]),
        (["alignment.weight=1"], ["alignment.faithful=true"]),
    ],
    ids=str,
)
def test_options_of_the_further_terms_change_them(base, words, tmp_path):
    runs = [
        run_small("stego", tmp_path, str(i), *TWO_STEPS, *(f"method.{word}" for word in chosen))
        for i, chosen in enumerate((base, base + words))
    ]
    weights = [run.weights["head.linear.weight"] for run in runs]
    assert not torch.equal(*weights)


def test_the_checkpoint_names_the_table_and_a_second_run_reads_it(tmp_path, monkeypatch):
    words = [*TWO_STEPS, f"cache.dir={tmp_path / 'cache'}"]
    first = run_small("stego", tmp_path, "first", *words)
    name = first.checkpoint["labelfree"]["neighbours"]
    assert (tmp_path / "cache" / "neighbours" / f"{name}.npz").is_file()
    monkeypatch.setattr("retrieval.neighbours.table", lambda *_: pytest.fail("made the table again"))
    second = run_small("stego", tmp_path, "second", *words)
    assert torch.equal(first.weights["head.linear.weight"], second.weights["head.linear.weight"])


def test_other_methods_get_no_table(small_run):
    assert small_run("kmeans_baseline").checkpoint["labelfree"]["neighbours"] is None


def batches(words: list[str]) -> list[dict]:
    _, data = setup.build_data(config.compose(small_words("stego", *words)))
    data.neighbours = torch.stack([(torch.arange(22) + 1) % 22, (torch.arange(22) + 2) % 22], 1).numpy()
    return list(data.train_dataloader())


def test_a_batch_carries_a_near_picture_of_each_and_no_method_its_label():
    found = batches(["data.flip_p=0"])
    ahead = torch.cat([(batch["neighbour.index"] - batch["index"]) % 22 for batch in found])
    assert set(ahead.tolist()) == {1, 2}
    assert "neighbour.label" in found[0]
    assert not [key for key in split_labels(found[0])[0] if "label" in key]
    pictures = {int(i): image for batch in found for i, image in zip(batch["index"], batch["image"], strict=True)}
    for batch in found:
        assert batch["neighbour.valid"].all()
        for i, image in zip(batch["neighbour.index"].tolist(), batch["neighbour"], strict=True):
            if i in pictures:
                assert torch.equal(image, pictures[i])


def test_the_draw_belongs_to_seed_and_epoch():
    one, two, other = batches([]), batches([]), batches(["seed=1"])
    key = "neighbour.index"
    assert all(
        torch.equal(a[key], b[key]) and torch.equal(a["neighbour"], b["neighbour"])
        for a, b in zip(one, two, strict=True)
    )
    assert not all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True))


REFUSED = {
    "method.signal=any": "method.signal=any: not one of features, labels",
    "method.salience.share=0": "method.salience.share=0: expected a number above 0, at most 1",
    "method.terms.knn.quantile=1": "method.terms.knn.quantile=1: expected a number between 0 and 1",
    "method.projection=none": "method.projection=none: not one of nonlinear, linear; did you mean nonlinear?",
    "method.negatives.draw=any": "method.negatives.draw=any: not one of shifted, cycle",
    "method.samples=0": "method.samples=0: must be at least 1",
    "method.neighbours.stored=6": "method.neighbours.stored=6: must be at least neighbours.drawn=7",
    "method.terms.knn.weight=-1": "method.terms.knn.weight=-1: must not be negative",
    "method.crf.weight=-1": "method.crf.weight=-1: must not be negative",
    "method.crf.beta=0": "method.crf.beta=0: must be above 0",
    "method.dropout.p=1": "method.dropout.p=1: expected a number from 0 to below 1",
    "data.train_crop=keep": "data.train_crop=keep: padding would become patches of the loss; use random or center",
    "evaluation.crf=yes": "evaluation.crf=yes: not one of none, dense",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refusals(word, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small("stego", tmp_path, "x", word)
    assert str(caught.value) == REFUSED[word]
    assert not (tmp_path / "x").exists()


def test_nothing_to_learn_is_refused(tmp_path):
    words = [f"method.terms.{kind}.weight=0" for kind in ("self", "knn", "random")]
    with pytest.raises(ConfigError) as caught:
        run_small("stego", tmp_path, "x", *words)
    assert str(caught.value) == "method.terms: every weight is 0, so nothing would be learned; set one above 0"


def test_the_oracle_copies_labels_and_says_so(plain, tmp_path, monkeypatch):
    """What codes copy is the one-hot label of the picture and of its near one."""
    seen = []
    real = stego.correspondence_loss
    monkeypatch.setattr(stego, "correspondence_loss", lambda *args, **kw: seen.append(args) or real(*args, **kw))
    run = run_small("stego", tmp_path, "x", "method.signal=labels", *TWO_STEPS)
    assert run.metrics["uses_labels"] is True
    assert plain.metrics["uses_labels"] is False
    for signal, _, near, pool, *_ in seen:
        for maps in (signal, near[0], pool[0]):
            assert maps.shape[1:] == (13, 48, 48)  # twelve classes, and pixels without one
            assert set(maps.unique().tolist()) == {0, 1}
            assert (maps.sum(1) == 1).all()
    assert not torch.equal(seen[0][0], seen[0][2][0])
    name = "head.linear.weight"
    assert not torch.equal(run.weights[name], plain.weights[name])


def test_an_oracle_without_labels_is_refused(tmp_path):
    root = labelled_folder(tmp_path / "pictures") / "images" / "train"
    with pytest.raises(ConfigError) as caught:
        run_small("stego", tmp_path, "x", "data=folder", f"data.root={root}", "method.signal=labels")
    assert str(caught.value) == (
        "method.signal=labels: the oracle copies correspondences of labels and the data has none; "
        "set method.signal=features"
    )


def test_salience_masks_come_with_the_picture_and_its_near_one(tmp_path, monkeypatch):
    """Left halves are salient: nine in ten points lie there, the others anywhere."""
    root = labelled_folder(tmp_path / "pictures", train=12)
    for path in sorted((root / "images" / "train").iterdir()):
        ids = np.zeros((24, 32), np.uint8)
        ids[:, :16] = 9
        save(tmp_path / "masks" / path.name, ids)
    seen = []
    real = stego.correspondence_loss
    monkeypatch.setattr(stego, "correspondence_loss", lambda *args, **kw: seen.append(args[4]) or real(*args, **kw))
    words = ["data=folder", f"data.root={root}", "data.flip_p=0", "data.train_crop=center", *TWO_STEPS]
    words += ["data.train_size=24", "data.eval_size=24"]
    shares = []
    for name, more in (("with", [f"method.salience.root={tmp_path / 'masks'}"]), ("without", [])):
        seen.clear()
        run_small("stego", tmp_path, name, *words, *more)
        for kind in (0, 1):
            shares.append(torch.cat([pair[kind][..., 0].flatten() < 0 for pair in seen]).float().mean())
    assert all(0.9 < share < 1 for share in shares[:2])
    assert all(0.35 < share < 0.65 for share in shares[2:])


def test_a_shift_without_a_number_is_the_mean_quantile_so_far(tmp_path):
    words = ["method.terms.self.quantile=0.6", "method.terms.random.shift=0.3", *TWO_STEPS]
    run = run_small("stego", tmp_path, "x", *words)
    steps, sums = run.weights["shift_steps"], run.weights["shift_sums"]
    assert steps.tolist() == [2, 2, 0]
    shown = [float(value) for value in column(run, "train/shift_self")]
    assert shown[-1] == pytest.approx(float(sums[0] / 2), rel=1e-5)
    assert not column(run, "train/shift_random")


def test_shifts_by_quantile_keep_codes_from_collapsing(tmp_path):
    """Features of the small set are all alike: with the shifts of the release everything is drawn together."""
    words = ["trainer.max_steps=30", "optim.head.lr=5e-3", *TWO_STEPS[1:]]
    fixed = ["method.terms.self.shift=0.18", "method.terms.knn.shift=0.12", "method.terms.random.shift=0.46"]
    alike = [
        float(column(run_small("stego", tmp_path, name, *words, *more), "train/similarity_random")[-1])
        for name, more in (("fixed", fixed), ("quantile", []))
    ]
    assert alike[0] > 0.9
    assert alike[1] < 0.7


def column(run, name: str) -> list[str]:
    with (run.folder / "metrics.csv").open() as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]
