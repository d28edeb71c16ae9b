"""DropLoss by hand, and means over the boxes of all ranks."""

import pytest
import torch
from torch.nn import functional as F

from models.detection import losses

BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [30.0, 30.0, 40.0, 40.0]])
TRUE = torch.tensor([[0.0, 0.0, 10.0, 10.0], [90.0, 90.0, 95.0, 95.0]])


def test_boxes_far_from_every_object_do_not_count():
    overlaps = losses.best_overlap(BOXES, TRUE)
    assert overlaps.tolist() == pytest.approx([1.0, 1 / 3, 0.0])
    assert losses.drop_weights(overlaps, 0.01).tolist() == [1, 1, 0]
    assert losses.drop_weights(overlaps, 1 / 3 + 1e-6).tolist() == [1, 0, 0]
    assert losses.drop_weights(overlaps, None).tolist() == [1, 1, 1]


def test_a_picture_without_objects_drops_all():
    assert losses.best_overlap(BOXES, TRUE[:0]).tolist() == [0, 0, 0]


def test_the_mean_is_over_dropped_boxes_too():
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    classes = torch.tensor([1, 0, 0])
    loss = losses.class_loss(logits, classes, torch.tensor([1.0, 1.0, 0.0]))
    single = F.cross_entropy(logits, classes, reduction="none")
    assert loss.item() == pytest.approx((single[0] + single[1]).item() / 3)
    loss.backward()
    assert logits.grad[2].abs().sum() == 0
    assert losses.class_loss(logits, classes, torch.ones(3)).item() == pytest.approx(
        F.cross_entropy(logits, classes).item()
    )


def test_counts_are_shared_between_ranks(monkeypatch):
    monkeypatch.setattr(losses.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(losses.distributed, "total", lambda own: own + 10)
    assert float(losses.shared_count(6, torch.zeros(()))) == 8
