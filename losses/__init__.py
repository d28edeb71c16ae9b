"""Losses: pure functions, tensors in and tensors out, no state and no config objects."""
