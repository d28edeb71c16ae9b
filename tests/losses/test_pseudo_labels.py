"""Cross-entropy on pseudo-labels."""

import torch
from torch.nn import functional as F

from losses.pseudo_labels import pseudo_label_loss


def case() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (3, 10, 15), generator=draw)
    labels[0] = 255
    return logits, labels


def test_the_mean_over_labelled_pixels():
    logits, labels = case()
    maps = F.interpolate(logits, size=(10, 15), mode="bilinear", align_corners=False)
    chosen = maps.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0]
    loss = pseudo_label_loss(logits, labels)
    assert torch.allclose(loss, -chosen[labels != 255].mean())
    assert not torch.autograd.grad(loss, logits)[0][0].any()  # a picture without a label teaches nothing


def test_two_ranks_have_the_gradient_of_one():
    logits, labels = case()
    labels[1, :3] = 255
    whole = torch.autograd.grad(pseudo_label_loss(logits, labels), logits)[0]
    total = (labels != 255).sum()
    parts = [pseudo_label_loss(logits[rows], labels[rows], total) * 2 for rows in (slice(0, 2), slice(2, 3))]
    assert torch.allclose(torch.autograd.grad(sum(parts) / 2, logits)[0], whole)


def test_nothing_labelled_gives_zero_with_a_graph():
    logits, labels = case()
    loss = pseudo_label_loss(logits, torch.full_like(labels, 255))
    assert float(loss) == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_it_is_float32_inside_autocast():
    logits, labels = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pseudo_label_loss(logits.float(), labels), pseudo_label_loss(logits.float(), labels).float())
        assert pseudo_label_loss(logits.bfloat16(), labels).dtype == torch.float32
