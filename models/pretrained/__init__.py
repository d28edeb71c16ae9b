"""Weights of backbones: where they come from, reading them without running code, and those that are bundled."""
