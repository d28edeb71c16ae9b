"""Jobs on a SLURM cluster, and sweeps of trials. Both start `run.py`; nothing imports them."""
