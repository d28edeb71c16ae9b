"""What a configuration sets for the whole process."""

import pytest
import torch

import config
from common.errors import ConfigError
from common.precision import exact
from common.spec import ClassMeta
from engine import setup


@pytest.fixture
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("words", "wanted"), [([], "highest"), (["trainer.matmul=high"], "high")])
def test_products_have_the_precision_that_is_asked_for(words, wanted, restored):
    torch.set_float32_matmul_precision("medium")
    setup.build_model(config.compose(["method.num_clusters=2", *words]), ClassMeta())
    assert torch.get_float32_matmul_precision() == wanted
    with exact(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == wanted


def test_another_precision_of_products_is_refused():
    with pytest.raises(ConfigError, match=r"^trainer.matmul=medium: .*highest.*high"):
        config.compose(["trainer.matmul=medium"])
