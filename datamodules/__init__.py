"""Data sets: pictures in, batches out. One file a data set; base/ is what they share."""
