"""Settings of a detector so small that tests train it."""

from types import SimpleNamespace

SMALL = {
    "kind": "mask_rcnn", "width": 32, "hidden": 64, "mask_width": 32, "mask_layers": 1, "anchor": 8, "proposals": 64,
    "test_proposals": 48, "proposal_nms": 0.65, "boxes": 32, "positive": 0.25, "anchors": 64, "drop": 0.01,
    "least_score": 0.0, "nms": 0.5, "most": 10,
}  # fmt: skip


def settings(**changed):
    return SimpleNamespace(**SMALL | changed)
