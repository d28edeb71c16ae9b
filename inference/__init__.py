"""A checkpoint at work: cluster maps of any pictures, large ones by windows, levels, names of clusters, export."""
