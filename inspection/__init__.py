"""Looking into a checkpoint: what its clusters are, how many there could be, why a patch is in one, what is like it."""
