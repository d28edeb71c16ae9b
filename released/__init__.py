"""Checkpoint files that the authors of methods released: read as inert data, and imported."""
