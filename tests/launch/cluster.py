"""A real SLURM of two nodes on this machine: two `slurmd` of one host on ports of their own, all in one folder."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
"""Debian's; they bring sbatch, srun, slurmctld, slurmd and munged."""

PROGRAMS = ("sbatch", "srun", "scontrol", "scancel", "sinfo", "slurmctld", "slurmd", "munged")
NODES = ("n1", "n2")


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def obstacle() -> str | None:
    """Installs what is missing where that may be done; the reason why there can be no SLURM here, or None."""
    if getpass.getuser() != "root":
        return "the daemons of a SLURM of two nodes on one machine are started as root"
    if all(find(program) for program in PROGRAMS):
        return None
    if find("apt-get") is None:
        return "no SLURM here, and no apt-get to install slurm-wlm and munge with"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *words], env=quiet, capture_output=True, text=True, timeout=300)
        if done.returncode:
            return f"apt-get {words[0]} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    missing = [program for program in PROGRAMS if find(program) is None]
    return f"installed, but not found: {', '.join(missing)}" if missing else None


class Cluster:
    """Brings the daemons up on entry and takes them down on exit, also after a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.pid_files = [folder / f"{name}.pid" for name in ("munged", "slurmctld", *NODES)]

    def __enter__(self) -> "Cluster":
        try:
            self.configure()
            munge = [f"--pid-file={self.folder / 'munged.pid'}", f"--log-file={self.folder / 'munged.log'}"]
            munge += [f"--socket={self.folder / 'munge.socket'}", f"--key-file={self.folder / 'munge.key'}"]
            munge += [f"--seed-file={self.folder / 'munge.seed'}", "--force"]  # --force: the folder may be in /tmp
            self.start("munged", *munge)
            self.start("slurmctld", "-c")
            for node in NODES:
                self.start("slurmd", "-N", node)
            self.expect(lambda: self.ask("sinfo", "-h", "-o", "%t %D") == f"idle {len(NODES)}", "two idle nodes", 60)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def configure(self) -> None:
        """Write slurm.conf, on ports that are free now, and a key of munge that nothing else knows."""
        host, folder = socket.gethostname().split(".")[0], self.folder
        control, *ports = free_ports(1 + len(NODES))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        lines = [
            "ClusterName=labelfree", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root", f"SlurmctldPort={control}",
            "AuthType=auth/munge", f"AuthInfo=socket={folder / 'munge.socket'},cred_expire=5",
            f"StateSaveLocation={folder / 'state'}", f"SlurmdSpoolDir={folder}/spool.%n",
            f"SlurmdPidFile={folder}/%n.pid", f"SlurmdLogFile={folder}/%n.log",
            f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmctldLogFile={folder}/slurmctld.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SchedulerType=sched/backfill",
            "SelectType=select/linear", "ReturnToService=2", "MpiDefault=none", "SlurmdParameters=config_overrides",
            "KillWait=5", "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE",
            *(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=2000"
              for name, port in zip(NODES, ports, strict=True)),
            f"PartitionName=debug Nodes={','.join(NODES)} Default=YES PriorityTier=1 GraceTime=60 State=UP",
            f"PartitionName=urgent Nodes={','.join(NODES)} PriorityTier=9 State=UP",
        ]  # fmt: skip
        (folder / "state").mkdir()
        self.conf.write_text("\n".join(lines) + "\n")

    def start(self, program: str, *words: str) -> None:
        done = subprocess.run(
            [find(program), *words], env=self.environment, capture_output=True, text=True, timeout=60, cwd=self.folder
        )
        assert done.returncode == 0, f"{program}: {done.stderr}{done.stdout}\n{self.logs()}"

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.ask("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def expect(self, condition, what: str, seconds: float) -> None:
        """Wait for a condition; AssertionError with the logs of the daemons where it does not come."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds} s\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def stop(self) -> None:
        """End the jobs, then the daemons by their pid files, the last one first."""
        if self.conf.is_file():
            subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=60)
        running = [int(file.read_text()) for file in reversed(self.pid_files) if file.is_file()]
        for pid in running:
            send(pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while any(alive(pid) for pid in running) and time.monotonic() < end:
            time.sleep(0.1)
        for pid in running:
            send(pid, signal.SIGKILL)


def send(pid: int, signum: int) -> bool:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True


def alive(pid: int) -> bool:
    return send(pid, 0)


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
