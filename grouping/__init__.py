"""Grouping inside a picture: segments, graphs over them, hierarchies of them. Dense tensor work, no learned weights."""
