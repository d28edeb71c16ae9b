"""What every data set shares: sources, batches, orders, geometry, caches."""

from datamodules.base.module import SegmentationDataModule

__all__ = ["SegmentationDataModule"]
