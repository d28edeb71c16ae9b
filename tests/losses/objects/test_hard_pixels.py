"""Cross-entropy of the hardest pixels: by hand, over ranks, and where nothing is labelled."""

import pytest
import torch
from torch.nn import functional as F

from losses.objects.hard_pixels import hard_pixel_loss


def case():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (4, 10, 15), generator=draw)
    labels[0, :4] = 255
    return logits, labels


def by_hand(logits, labels, share):
    maps = F.interpolate(logits, size=(10, 15), mode="bilinear", align_corners=False)
    losses = -maps.log_softmax(1).gather(1, labels.clamp(max=2)[:, None])[:, 0][labels != 255]
    count = min(int(share * labels.numel()), len(losses))
    return losses.sort(descending=True).values[:count].mean(), count


@pytest.mark.parametrize("share", [0.2, 0.01, 1.0])
def test_mean_of_the_hardest_share_of_all_pixels(share):
    logits, labels = case()
    loss, count = hard_pixel_loss(logits, labels, share)
    wanted, pixels = by_hand(logits, labels, share)
    assert int(count) == pixels
    assert torch.allclose(loss, wanted)
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(wanted, logits)[0])


def test_two_ranks_have_the_gradient_of_one():
    logits, labels = case()
    whole, count = hard_pixel_loss(logits, labels, 0.3)
    rows = (slice(0, 2), slice(2, 4))
    sent = []
    for part in rows:  # what each rank would send
        hard_pixel_loss(logits[part], labels[part], 0.3, lambda own: sent.append(own) or own)
    found = [hard_pixel_loss(logits[p], labels[p], 0.3, lambda _: torch.cat(sent), i) for i, p in enumerate(rows)]
    assert all(pixels == count for _, pixels in found)
    joined = sum(loss for loss, _ in found) / 2
    assert torch.allclose(joined, whole)
    assert torch.allclose(torch.autograd.grad(joined, logits)[0], torch.autograd.grad(whole, logits)[0])


def test_nothing_labelled_gives_zero_with_a_graph():
    logits, labels = case()
    loss, count = hard_pixel_loss(logits, torch.full_like(labels, 255), 0.2)
    assert float(loss) == 0
    assert int(count) == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_few_labelled_pixels_all_count():
    logits, labels = case()
    labels[:] = 255
    labels[2, 3, :5] = 1
    loss, count = hard_pixel_loss(logits, labels, 0.2)
    assert int(count) == 5
    assert torch.allclose(loss, by_hand(logits, labels, 1.0)[0])


def test_it_is_float32_inside_autocast():
    logits, labels = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hard_pixel_loss(logits.bfloat16(), labels, 0.2)[0].dtype == torch.float32
