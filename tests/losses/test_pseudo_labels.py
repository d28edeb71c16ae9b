"""Cross-entropy on pseudo-labels, with classes balanced and not, and the vote that makes them of masks."""

import torch
from torch.nn import functional as F

from losses.pseudo_labels import balanced_cross_entropy, majority, pseudo_label_loss


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


def by_hand(logits, labels, gamma):
    """Loss and class weights of logits that are as large as the labels."""
    probs = logits.softmax(1)
    weights = (1 - probs.mean((0, 2, 3))) ** gamma
    chosen = -logits.log_softmax(1).gather(1, labels.clamp(max=3)[:, None])[:, 0]
    return (chosen * weights.detach()[labels.clamp(max=3)])[labels != 255].sum() / labels.numel(), weights


def test_classes_that_are_predicted_much_count_less_and_the_divisor_is_every_pixel():
    logits, labels = case()
    with torch.no_grad():
        logits[:, 2] += 2
    maps = F.interpolate(logits, size=(10, 15), mode="bilinear", align_corners=False)
    for gamma in (2.0, 0.5):
        loss, weights = balanced_cross_entropy(logits, labels, gamma)
        wanted, by_class = by_hand(maps, labels, gamma)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(weights, by_class)
        assert weights.argmin() == 2
        assert not weights.requires_grad
        one, two = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, wanted))
        torch.testing.assert_close(one, two)
    plain, ones = balanced_cross_entropy(logits, labels, 0.0)
    assert (ones == 1).all()
    known = (labels != 255).sum() / labels.numel()
    torch.testing.assert_close(plain, pseudo_label_loss(logits, labels) * known)


def test_two_ranks_have_the_balanced_gradient_of_one():
    logits, labels = case()
    logits, labels = logits.detach()[:2].requires_grad_(), labels[:2]
    whole, _ = balanced_cross_entropy(logits, labels, 2.0)
    share = F.interpolate(logits.detach(), size=(10, 15), mode="bilinear").softmax(1).mean((0, 2, 3))
    parts = [balanced_cross_entropy(logits[n : n + 1], labels[n : n + 1], 2.0, lambda _: share)[0] for n in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (sum(parts) / 2, whole)))


def test_a_mask_takes_its_most_frequent_class_and_nothing_new_is_invented():
    masks = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]], [[0, 0, 7, 7], [7, 7, 255, 0]]])
    prediction = torch.tensor([[[2, 2, 1, 3], [1, 3, 0, 0]], [[1, 0, 3, 2], [2, 3, 0, 2]]])
    found = majority(masks, prediction, 4)
    assert found[0].tolist() == [[2, 2, 2, 3], [3, 3, 255, 255]]  # ids are counted for each picture by itself
    assert found[1].tolist() == [[0, 0, 2, 2], [2, 2, 255, 0]]  # of equals the lowest
    assert majority(torch.full_like(masks, 255), prediction, 4).eq(255).all()
    draw = torch.Generator().manual_seed(0)
    masks, prediction = (torch.randint(0, high, (4, 9, 9), generator=draw) for high in (6, 5))
    found = majority(masks, prediction, 5)
    for ids, classes, own in zip(masks, prediction, found, strict=True):
        for name in ids.unique():
            inside = ids == name
            counts = classes[inside].bincount(minlength=5)
            assert (own[inside] == counts.argmax()).all()
