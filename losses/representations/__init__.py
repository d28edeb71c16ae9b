"""Losses of dense representations: of clusters and of slots that two crops of a picture share."""
