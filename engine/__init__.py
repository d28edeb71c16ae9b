"""Runs: folders, checkpoints, callbacks, offline stages; training and evaluating, and what `list` and `doctor` say."""
