"""What every method shares; a method needs no more than the names here for its first version."""

from lightning_modules.base.segmenter import Loss, UnsupervisedSegmenter

__all__ = ["Loss", "UnsupervisedSegmenter"]
