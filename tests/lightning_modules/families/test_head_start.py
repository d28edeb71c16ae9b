"""`method.head_start=principal`: the codes of the first step are the features along their principal directions."""

import pytest
import torch

import config
from common.errors import ConfigError
from engine import setup
from tests.conftest import run_small, small_words
from tests.test_ddp import expect_equal, run_two

METHODS = ("stego", "smooseg", "eagle", "cause", "hidden_positives", "picie", "mdc")
START = ("method.head_start=principal", "method.dim=6")
STILL = ("optim.head.lr=0", "trainer.max_steps=1", "evaluation.panels=0", "evaluation.kmeans.pictures=4")
TRAINED = ("picie", "mdc")
"""Methods that train the network, and whose decoder reads levels."""


def begun(folder, method, *words):
    """A restored model whose head no step has moved; features [n,C] and codes [n,6] of all training pictures."""
    run = run_small(method, folder, "start", *START, *STILL, *words)
    checkpoint = setup.read_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    cfg, data = setup.build_data(config.restore(checkpoint["labelfree"]["config"]))
    made = setup.restore_model(checkpoint, cfg, data.meta, True)
    with torch.no_grad():
        found = [made.features(batch["image"]) for batch in data.loader("train", "train")]
        read = [made.head(f.levels if method in TRAINED else f.concat()) for f in found]
        maps = [torch.cat([f.concat(), codes], dim=1) for f, codes in zip(found, read, strict=True)]
    rows = torch.cat([both.transpose(0, 1).flatten(1).T for both in maps]).double()
    return made, rows[:, :-6], rows[:, -6:]


@pytest.mark.train
@pytest.mark.parametrize("method", METHODS)
def test_codes_keep_the_variance_that_six_directions_can(method, tmp_path):
    words = ["phases=[{share: 1, method.phase: head}]"] if method == "cause" else []
    words += ["optim.backbone.lr=0"] if method in TRAINED else []
    made, features, codes = begun(tmp_path, method, *words)
    kept = torch.linalg.eigvalsh(features.T.cov())[-6:].flip(0)
    covariance = codes.T.cov()
    torch.testing.assert_close(covariance.diagonal(), kept, rtol=1e-3, atol=1e-4 * float(kept[0]))
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3 * kept[0]  # and each is a direction's own
    assert codes.mean(0).abs().max() < 1e-3 * kept[0].sqrt()
    copy = {"cause": "teacher", "hidden_positives": "momentum_head"}.get(method)
    if copy is not None:
        torch.testing.assert_close(getattr(made, copy).copy.linear.weight, made.head.linear.weight)


@pytest.mark.ddp
def test_two_processes_begin_alike(tmp_path):
    one = run_small("smooseg", tmp_path / "one", "one", *START)
    expect_equal(run_two("smooseg", tmp_path, *START), one)


def test_the_transformer_of_cause_has_no_such_start():
    words = small_words("cause", "method.head=tr", "method.head_start=principal")
    cfg, data = setup.build_data(config.compose(words))
    with pytest.raises(ConfigError) as error:
        setup.build_model(cfg, data.meta)
    assert str(error.value) == (
        "method.head_start=principal: is a start of the MLP head; set random, or method.head=mlp"
    )
