"""Inside a vision transformer: its attention, class token, positions, and masks of patches."""
