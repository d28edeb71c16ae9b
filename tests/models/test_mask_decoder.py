"""The mask transformer: shapes and units, what a logit depends on, and what is refused. Values: tests/reference."""

import pytest
import torch

from common.chance import library_draws
from common.errors import ConfigError
from models.mask_decoder import MaskDecoder


def network(**more):
    with library_draws(0, "test"):
        return MaskDecoder(**({"in_dim": 10, "classes": 3, "dim": 8, "layers": 2, "heads": 2} | more))


def test_vectors_are_unit_and_masks_are_normed_over_the_classes():
    patches, classes, masks = network().eval()(torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1)))
    assert patches.shape == (2, 5, 8)
    assert classes.shape == (2, 3, 8)
    for vectors in (patches, classes):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:2]))
    torch.testing.assert_close(masks.mean(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    assert not torch.equal(classes[0], classes[1])  # they have looked at the picture


def test_class_embeddings_start_as_one_row_of_length_one():
    torch.testing.assert_close(network().cls_emb.norm(), torch.tensor(1.0))


def test_dropout_draws_in_training_alone():
    net, tokens = network(dropout=0.5), torch.ones(1, 4, 10)
    assert torch.equal(net.eval()(tokens)[2], net(tokens)[2])
    net.train()
    assert not torch.equal(net(tokens)[2], net(tokens)[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "method.decoder.layers=0: must be at least 1"),
        ({"heads": 3}, "method.decoder.dim=8: must be a multiple of method.decoder.heads=3"),
        ({"dropout": 1.0}, "method.decoder.dropout=1: expected a number from 0 to below 1"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ConfigError) as caught:
        network(**settings)
    assert str(caught.value) == message
