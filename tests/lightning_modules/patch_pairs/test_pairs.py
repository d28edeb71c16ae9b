"""Context prediction and co-occurrence: heads, colours, what the released slips do, and settings that cannot be."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import config
from common.errors import ConfigError
from common.spec import ClassMeta
from lightning_modules import registry
from lightning_modules.patch_pairs.base import drop_colours, mean_cost
from lightning_modules.patch_pairs.cooccurrence import log_loss
from lightning_modules.patch_pairs.head import PairHead
from models.backbone import Features
from tests.conftest import run_small, small_words

METHODS = ("context_prediction", "cooccurrence")
NET10A = ["backbone=net10a", "backbone.create.widths=[4,4,8,8,8,8]", "method.num_clusters=2"]
META = ClassMeta(names=("a", "b"), palette=((0, 0, 0), (9, 9, 9)))


def model_of(method: str, *words: str):
    cfg = config.compose([word for word in small_words(method) if not word.startswith("backbone")] + [*NET10A, *words])
    return registry.method_class(method)(cfg, META)


def views_of(count: int = 4, side: int = 48) -> dict:
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"image": images, "recoloured": images.flip(1), "valid": torch.ones(count, side, side, dtype=torch.bool)}


def test_the_released_head_has_254_million_weights_in_one_layer():
    with torch.device("meta"):
        released = PairHead(512, 1024, 1024, 9, side=11, cells=None, norm="batch")
        small = PairHead(512, 1024, 1024, 9, side=11, cells=1, norm="batch")
    assert released.first.weight.numel() == 2 * 1024 * 11 * 11 * 1024
    assert small.first.weight.numel() == 2 * 1024 * 1024
    assert [type(layer) for layer in released.block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_a_head_tells_the_two_patches_apart_but_shares_its_convolution():
    head = PairHead(4, 8, 8, 2, side=5, cells=2, norm="none")
    one, other = torch.rand(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    both = [F.adaptive_avg_pool2d(head.block(part), 2).flatten(1) for part in (one, other)]
    wanted = head.last(F.relu(head.first(torch.cat(both, dim=1))))
    assert torch.allclose(head(one, other), wanted, atol=1e-6)
    assert not torch.allclose(head(one, other), head(other, one))
    mask = torch.zeros(3, 8)
    assert torch.allclose(head(one, other, mask), head.last.bias.expand(3, 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("words", [
    ["method.pair=batch"], ["method.cut=image", "method.side=12"], ["method.head.cells=3"], ["method.head.cells=null"],
    ["method.head.norm=batch"], ["method.head.dropout=0"], ["method.augment.drop_p=0"], ["method.side=9"],
], ids=str)  # fmt: skip
def test_every_option_reaches_the_loss(method, words):
    """Each gives another loss of the same pictures, and a gradient of every weight that is trained."""
    plain, other = model_of(method), model_of(method, *words)
    loss = other.loss(views_of(), None).total
    assert loss.isfinite()
    assert loss != plain.loss(views_of(), None).total
    loss.backward()
    trained = [p for group in other.param_groups() for p in group["params"]]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained if p.dim() > 1)


@pytest.mark.parametrize(("method", "word"), [
    ("context_prediction", "method.directions=9"), ("cooccurrence", "method.log_loss=probabilities"),
])  # fmt: skip
def test_released_slips_are_there_by_name(method, word):
    plain, slip = model_of(method), model_of(method, word)
    assert slip.outputs == (9 if "directions" in word else 1)
    found = [model.loss(views_of(), None).total for model in (plain, slip)]
    assert (found[0] - found[1]).abs() < 1e-6 if method == "cooccurrence" else found[0] != found[1]


def test_a_saturated_pair_costs_nothing_in_the_release():
    logits, targets = torch.tensor([50.0, 2.0, -50.0]).requires_grad_(), torch.tensor([0, 0, 1])
    sane, released = log_loss(logits, targets), log_loss(logits, targets, "probabilities")
    assert sane.tolist() == pytest.approx([50, 2.1269, 50], abs=1e-3)
    assert released.tolist() == pytest.approx([0, 2.1269, 50], abs=1e-3) or released[2] == 0
    assert torch.autograd.grad(released.sum(), logits)[0].isfinite().all()


def test_pairs_in_padding_teach_nothing():
    model, views = model_of("cooccurrence", "method.augment.drop_p=0"), views_of()
    views["valid"][:] = False
    found = model.loss(views, None)
    assert bool(found.skip)
    assert float(found.total.detach()) == 0
    views["valid"][1] = True
    alone = model.loss(views, None)
    assert not bool(alone.skip)
    costs, kept = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])
    assert float(mean_cost(costs, kept, kept.sum())) == 2.5


def test_colours_are_dropped_to_noise_around_the_mean_of_the_one_that_stays():
    images = torch.rand(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    colours = torch.tensor([[0.2, 0.5, 0.7], [0.1, 0.2, 0.3]])
    found = drop_colours(images, torch.tensor([True, True, False]), torch.tensor([0, 2, 1]), colours, noise)
    assert torch.equal(found[2], images[2])
    assert torch.equal(found[:, 3], images[:, 3])
    assert torch.equal(found[0, 0], images[0, 0])
    assert torch.equal(found[1, 2], images[1, 2])
    assert torch.allclose(found[0, 1:3], 0.2 + 0.001 * noise[0, 1:])
    assert torch.allclose(found[1, :2], 0.7 + 0.003 * noise[1, :2])


def test_colours_are_those_of_the_training_pictures():
    model = model_of("context_prediction")
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(6, 8, 8, dtype=torch.bool)
    valid[:, :, 5:] = False
    batches = [{"image": images[rows], "valid": valid[rows]} for rows in (slice(4), slice(4, 6))]
    model.prepare(lambda *_, **__: batches)
    seen = images[..., :5].transpose(0, 1).flatten(1)
    assert torch.allclose(model.colours, torch.stack([seen.mean(1), seen.std(1, unbiased=False)]), atol=1e-5)


@pytest.mark.parametrize("words", [[], ["method.cut=image", "method.side=12", "method.augment.drop_p=0"]], ids=str)
def test_probes_learn_on_whole_pictures_in_their_colours(words):
    model, views = model_of("cooccurrence", *words), views_of()
    found = model.loss(views, None)
    model.backbone.eval()
    assert found.view == "image"
    assert torch.allclose(found.codes, model.embed(model.backbone.features(views["image"])), atol=1e-5)


def test_the_codes_of_a_step_are_the_features_of_its_own_pass_where_it_saw_whole_pictures():
    found = model_of("cooccurrence", "method.augment.drop_p=0").loss(views_of(), None)
    assert found.view == "recoloured"
    assert replace(found, skip=False).codes.shape == (4, 8, 20, 20)
    assert isinstance(Features([found.codes]).map, torch.Tensor)


@pytest.mark.parametrize(("words", "said"), [
    (["method.side=10"], "method.side=10: a patch of features lies around its middle pixel, so its side is odd; set "
                         "11, or method.cut=image"),
    (["method.cut=image", "method.side=8"], "method.side=8: net10a makes nothing of windows of 8 px, its convolutions "
                                            "need more; set a larger side, or method.cut=features"),
    (["backbone=tiny", "method.cut=image"], "method.side: pictures of 11 x 11 px do not fit vit_tiny_patch16_224"),
    (["backbone.frozen=true"], "backbone.frozen=true: method=context_prediction trains the backbone"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(words, said):
    if "backbone=tiny" in words:
        cfg = config.compose([*small_words("context_prediction"), *words, "method.num_clusters=2"])
        with pytest.raises(ConfigError) as caught:
            registry.method_class("context_prediction")(cfg, META)
    else:
        with pytest.raises(ConfigError) as caught:
            model_of("context_prediction", *words)
    assert str(caught.value).startswith(said)


@pytest.mark.train
def test_k_means_on_one_code_a_batch_is_there_by_name(tmp_path, monkeypatch):
    from retrieval import kmeans

    seen, fit = [], kmeans.fit_distributed
    monkeypatch.setattr(
        kmeans, "fit_distributed", lambda codes, *a, **k: seen.append(len(codes)) or fit(codes, *a, **k)
    )
    words = ["trainer.max_steps=1", "evaluation.panels=0", "evaluation.kmeans.sample=batch"]
    run_small("kmeans_baseline", tmp_path, "one", *words, "data.eval_batch_size=1", "method.features=colour")
    assert seen == [22]
    with pytest.raises(ConfigError, match=r"evaluation\.kmeans\.sample=batch: .* 22 pictures give one of each of 6 b"):
        run_small("kmeans_baseline", tmp_path, "two", *words)
