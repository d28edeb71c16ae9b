"""Objects as boxes and masks: Mask R-CNN of torchvision on the levels of any backbone, and its cascade."""
