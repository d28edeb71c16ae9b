"""Read-outs of Leopart (Ziegler and Asano, CVPR 2022), for the codes of every method: over-clusters, cluster-based
foreground extraction, communities of clusters."""
