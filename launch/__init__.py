"""The words of the commands, and what starts many runs: comparisons, sweeps, SLURM jobs. Only run.py imports it."""
