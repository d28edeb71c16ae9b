"""Losses of methods that find objects first and name them afterwards."""
