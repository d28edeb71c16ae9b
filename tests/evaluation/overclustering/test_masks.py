"""The noisy foreground: by the class token's attention where it was trained, else by the graph of features."""

import torch

import config
from engine import setup
from engine.overclustering import OverclusterFit
from evaluation.overclustering import masks
from grouping.attention_masks import attention_foreground
from models.backbone import Features
from tests.conftest import small_words


class Halves:
    """A backbone whose features tell an object in the middle from its surroundings, which fill the border."""

    has_attention = class_token = False

    def features(self, images, attention=False):
        maps = torch.zeros(len(images), 3, 6, 6)
        maps[:, 0] = 1.0
        maps[:, :, 2:5, 1:4] = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None]
        return Features([maps + 0.01 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))])


def test_the_spectral_foreground_has_less_of_the_border():
    found = masks.noisy_foreground(Halves(), torch.zeros(2, 3, 48, 48), "spectral", 0.65)
    wanted = torch.zeros(2, 6, 6, dtype=torch.bool)
    wanted[:, 2:5, 1:4] = True
    assert torch.equal(found, wanted)


def test_attention_is_that_of_the_class_token_without_itself_heads_averaged():
    logits = torch.randn(2, 4, 1 + 36, 1 + 36, generator=torch.Generator().manual_seed(0))
    seen = Features([torch.zeros(2, 3, 6, 6)], prefix=1)
    seen.attention = logits
    weights = logits.softmax(-1)[:, :, 0, 1:].mean(1).view(2, 6, 6)
    assert torch.equal(masks.by_attention(seen, 0.5), attention_foreground(weights, 0.5))


def test_auto_takes_what_the_backbone_has():
    other = type("Token", (), {"has_attention": True, "class_token": True})
    untrained = type("Untrained", (), {"has_attention": True, "class_token": False})
    assert [masks.kind_for("auto", kind) for kind in (Halves, other, untrained)] == [
        "spectral",
        "attention",
        "spectral",
    ]
    assert masks.kind_for("spectral", other) == "spectral"


def test_one_pass_gives_attention_and_the_codes_of_the_evaluation(tmp_path):
    words = ["evaluation.cbfe.clusters=8", "evaluation.cbfe.masks=attention", "backbone.class_token=true"]
    cfg, data = setup.build_data(config.compose(small_words("kmeans_baseline", *words)))
    model = setup.build_model(cfg, data.meta).eval()
    setup.connect(model, data)
    trainer = setup.build_trainer(cfg, 1, [], [], tmp_path)
    fit = OverclusterFit(cfg, data)
    fit.check(model)
    batch, codes, found = next(fit.seen(trainer, model, "val", "attention"))
    assert torch.equal(codes, model.read(batch["image"], model.features_of(batch))[0])
    assert torch.equal(found, masks.noisy_foreground(model.backbone, batch["image"], "attention", 0.65))
