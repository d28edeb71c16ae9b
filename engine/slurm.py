"""Processes that SLURM started: one task a device, as many tasks on every node."""

import os

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from common.errors import ConfigError


def environment(num_nodes: int, devices: int | str) -> SLURMEnvironment | None:
    """Where SLURM started this process: its environment, without Lightning's own requeueing; else None.

    Raises ConfigError where the tasks that SLURM started are not the devices that were asked for.
    """
    if "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    nodes, tasks = int(os.environ.get("SLURM_NNODES", "1")), int(os.environ["SLURM_NTASKS"])
    if nodes != num_nodes:
        raise ConfigError(
            f"trainer.num_nodes={num_nodes}: SLURM gave this job {nodes} nodes; set trainer.num_nodes={nodes}, "
            "or submit with `make slurm NODES=…`"
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(
            f"SLURM_NTASKS={tasks}: the job was started with --ntasks; Lightning needs --ntasks-per-node, "
            "as launch/slurm.sbatch has it"
        )
    each = tasks // nodes
    if devices != each and not (devices == "auto" and each == 1 and torch.cuda.device_count() <= 1):
        raise ConfigError(
            f"trainer.devices={devices}: SLURM started {each} tasks on each node, and each task drives one device; "
            f"set trainer.devices={each}, or submit with `make slurm GPUS=…`"
        )
    return SLURMEnvironment(auto_requeue=False)
