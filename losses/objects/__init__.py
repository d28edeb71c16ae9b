"""Losses of methods that begin with objects: contrast of masks, hard pixels."""
