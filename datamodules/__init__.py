"""Data sets: pictures in, batches out. One file a data set; base.py is what they share."""
