"""Pieces of the methods that train a network from nothing."""
