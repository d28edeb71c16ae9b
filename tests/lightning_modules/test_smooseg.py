"""SmooSeg: its options reach the training, each term trains its own part, the teacher follows as released."""

import pytest
import torch

import config
from common.errors import ConfigError
from engine import setup
from tests.conftest import run_small, small_words

TWO_STEPS = ["trainer.max_steps=2", "evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]
OPTIONS = [
    ["projection=linear"], ["terms.within.weight=0"], ["terms.across.weight=0"], ["terms.within.shift=0.3"],
    ["terms.across.shift=0.3"], ["terms.within.quantile=0.9"], ["terms.across.quantile=0.3"], ["temperature=0.5"],
    ["pointwise=false"], ["partners=cycle"], ["dropout.p=0"], ["dropout.signal=false"], ["dim=32"],
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_small("smooseg", tmp_path_factory.mktemp("plain"), "plain", *TWO_STEPS)


@pytest.mark.train
@pytest.mark.parametrize("words", OPTIONS, ids=",".join)
def test_every_option_changes_the_training(words, plain, tmp_path):
    other = run_small("smooseg", tmp_path, "with", *TWO_STEPS, *(f"method.{word}" for word in words))
    weights = [run.weights["head.linear.weight"] for run in (other, plain)]
    assert torch.isfinite(weights[0]).all()
    assert weights[0].shape != weights[1].shape or not torch.equal(*weights)


def model(*words: str):
    cfg, data = setup.build_data(config.compose(small_words("smooseg", "method.dropout.p=0", *words)))
    return setup.build_model(cfg, data.meta), next(iter(data.train_dataloader()))


def stepped(made, batch):
    return made.loss({"image": batch["image"]}, made.features(batch["image"]))


def test_smoothness_trains_the_projector_alone_and_the_data_term_the_student_alone():
    made, batch = model()
    loss = stepped(made, batch)
    energies = [made.cfg.method.terms[kind].weight * loss.parts[kind] for kind in ("within", "across")]
    torch.testing.assert_close(loss.total.detach(), sum(energies) + loss.parts["data"])
    loss.total.backward()
    assert made.student.grad.abs().sum() > 0
    assert made.head.linear.weight.grad.abs().sum() > 0
    assert not made.teacher.requires_grad
    student = made.student.grad.clone()

    without, batch = model("method.terms.within.weight=0", "method.terms.across.weight=1e-12")
    stepped(without, batch).total.backward()
    assert without.head.linear.weight.grad.abs().max() < 1e-9
    torch.testing.assert_close(without.student.grad, student)


def test_a_longer_student_changes_no_loss():
    values = []
    for factor in (1.0, 2.0):
        made, batch = model()
        with torch.no_grad():
            made.student.mul_(factor)
        values.append(stepped(made, batch).total.detach())
    torch.testing.assert_close(*values)


def test_the_teacher_follows_the_student_of_before_the_step():
    """After n steps it is the closed form of the mean over the students that the steps began with."""
    made, batch = model("method.ema=0.7")
    adam = torch.optim.Adam(made.parameters(), lr=0.1)
    students, first = [], made.teacher.clone()
    for _ in range(3):
        students.append(made.student.detach().clone())
        adam.zero_grad()
        stepped(made, batch).total.backward()
        adam.step()
    wanted = 0.7**3 * first + 0.3 * sum(0.7 ** (2 - t) * student for t, student in enumerate(students))
    torch.testing.assert_close(made.teacher, wanted)
    assert not torch.equal(students[0], students[1])


def test_prototypes_start_as_unit_rows_and_equal():
    made, _ = model()
    assert torch.equal(made.student, made.teacher)
    torch.testing.assert_close(made.teacher.norm(dim=1), torch.ones(len(made.teacher)))


def test_one_picture_is_its_own_partner():
    made, batch = model("method.terms.within.shift=0.3", "method.terms.across.shift=0.3")
    found = stepped(made, {"image": batch["image"][:1]}).parts
    torch.testing.assert_close(found["within"], found["across"])


REFUSED = {
    "method.terms.within.quantile=1": "method.terms.within.quantile=1: expected a number between 0 and 1",
    "method.projection=none": "method.projection=none: not one of nonlinear, linear; did you mean nonlinear?",
    "method.partners=any": "method.partners=any: not one of shifted, cycle",
    "method.ema=2": "method.ema=2: expected a number from 0 to 1",
    "method.terms.across.weight=-1": "method.terms.across.weight=-1: must not be negative",
    "method.dropout.p=1": "method.dropout.p=1: expected a number from 0 to below 1",
    "data.train_crop=keep": "data.train_crop=keep: padding would become patches of the loss; use random or center",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refusals(word, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small("smooseg", tmp_path, "x", word)
    assert str(caught.value) == REFUSED[word]
    assert not (tmp_path / "x").exists()


def test_nothing_to_learn_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small("smooseg", tmp_path, "x", *(f"method.terms.{kind}.weight=0" for kind in ("within", "across")))
    assert str(caught.value) == (
        "method.terms: both weights are 0, so the projector would learn nothing; set one above 0"
    )
