"""`make slurm`: submit a training to SLURM, or show the command (`dry=true`).

`python -m launch.submit nodes=2 gpus=8 [dry=true] [site=launch/site.yaml] method=… key=value …`. The words of
`run.py train` are checked here, so that a wrong key ends on the login node and not after hours in the queue.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

import config
from common.ending import ended
from common.errors import ConfigError, did_you_mean
from common.files import no_file
from common.rules import type_names
from launch.space import read_keys

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "launch/slurm.sbatch"
SITE_TYPES: dict[str, tuple[type, ...]] = {
    "partition": (str, type(None)),
    "account": (str, type(None)),
    "qos": (str, type(None)),
    "constraint": (str, type(None)),
    "time": (str,),
    "cpus_per_task": (int,),
    "mem": (str, type(None)),
    "gpu_option": (str,),
    "notice": (int,),
    "output": (str,),
    "python": (str, type(None)),
    "setup": (list,),
    "extra": (list,),
}
"""Keys of site.yaml and their types; a key that a file leaves out is that of launch/site.yaml."""

MOST = 1_000_000
"""Cores of a task and seconds of notice, at most."""

SET_HERE = ("trainer.num_nodes", "trainer.devices", "trainer.strategy")
"""Words that follow from nodes= and gpus=."""


@dataclass(frozen=True)
class Submission:
    """A command of sbatch, the variables it needs beside the present ones, the configuration of the run, and the file
    of the site."""

    command: list[str]
    variables: dict[str, str]
    cfg: DictConfig
    site: Path

    def __str__(self) -> str:
        """As it would be typed."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])


def read_site(path: Path) -> dict[str, Any]:
    """The settings of a site over those of launch/site.yaml. Raises ConfigError with one line."""
    if not path.is_file():
        raise ConfigError(
            f"site={path}: {no_file(path)}; copy launch/site.yaml and change what differs on your cluster"
        )
    own = read_keys(path, "launch/site.yaml", empty=True)
    for key, value in own.items():
        if key not in SITE_TYPES:
            raise ConfigError(f"{path}: {key}: no such key; {did_you_mean(str(key), SITE_TYPES)}")
        if isinstance(value, bool) or not isinstance(value, SITE_TYPES[key]):
            wanted = type_names(tuple(kind for kind in SITE_TYPES[key] if kind is not type(None)))
            hint = ", in quotes (yaml reads 24:00:00 as a number of seconds)" if key == "time" else ""
            raise ConfigError(f"{path}: {key}={config.shown(value)}: expected {wanted}{hint}")
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict | list | None) and entry is not value:
                raise ConfigError(
                    f"{path}: {key}={config.shown(value)}: expected a list of texts, as in setup: [module load cuda]"
                )
            if not str(entry).isprintable():
                raise ConfigError(f"{path}: {key}={entry!a}: must not hold control characters; write it on one line")
    for key in ("cpus_per_task", "notice"):
        if not 1 <= own.get(key, 1) <= MOST:
            raise ConfigError(
                f"{path}: {key}={own[key]}: must be {'at least 1' if own[key] < 1 else f'at most {MOST}'}"
            )
    option = own.get("gpu_option", "{gpus}")
    if "{gpus}" not in option:
        raise ConfigError(f"{path}: gpu_option={option}: must hold {{gpus}}, as in --gres=gpu:{{gpus}}")
    if "{" in (other := option.replace("{gpus}", "")) or "}" in other:
        raise ConfigError(f"{path}: gpu_option={option}: {{gpus}} is the only part in braces that is known")
    return {**yaml.safe_load((ROOT / "launch" / "site.yaml").read_text()), **own}


def count(name: str, raw: str, least: int) -> int:
    """A whole number of at least `least`. Raises ConfigError."""
    if not re.fullmatch("[0-9]{1,9}", raw) or int(raw) < least:
        raise ConfigError(f"{name}={raw}: expected a whole number of at least {least}")
    return int(raw)


def plan(tokens: Sequence[str]) -> Submission:
    """The submission that these words ask for. Raises ConfigError with one line."""
    words = config.parse_words(tokens)
    nodes = count("nodes", words.pop("nodes", "1"), 1)
    gpus = count("gpus", words.pop("gpus", "1"), 0)
    path = Path(words.pop("site", None) or ROOT / "launch" / "site.yaml")
    site = read_site(path)
    for key in SET_HERE:
        if key in words:
            raise ConfigError(f"{key}={words[key]}: follows from nodes= and gpus=; leave it out, set those")
    tasks = max(1, gpus)
    if "trainer" not in words and "experiment" not in words:
        words["trainer"] = "ddp" if gpus else "cpu"
    if not gpus:  # nodes without GPUS: one process each
        words["trainer.accelerator"] = "cpu"
    words |= {"trainer.num_nodes": str(nodes), "trainer.devices": str(tasks), "trainer.strategy": "ddp"}
    run_words = [f"{key}={value}" for key, value in words.items()]
    cfg = config.compose(run_words)
    if cfg.data.batch_size % (nodes * tasks):
        size = max(1, round(cfg.data.batch_size / (nodes * tasks))) * nodes * tasks
        raise ConfigError(
            f"data.batch_size={cfg.data.batch_size}: the global batch is split evenly over {nodes} x {tasks} devices, "
            f"so it must be a multiple of {nodes * tasks}; set data.batch_size={size}"
        )
    options = {
        "job-name": cfg.run.name or f"{cfg.method.name}-{cfg.data.name}",
        "chdir": str(ROOT),
        "export": "ALL",
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": site["cpus_per_task"],
        "time": site["time"],
        "signal": f"USR1@{site['notice']}",
        "output": f"{site['output']}/%x-%j.out",
        **{key: site[key] for key in ("partition", "account", "qos", "constraint", "mem") if site[key] is not None},
    }
    command = ["sbatch", "--parsable", *(f"--{key}={value}" for key, value in options.items())]
    command += [site["gpu_option"].replace("{gpus}", str(gpus))] if gpus else []
    command += [*map(str, site["extra"]), SCRIPT, *run_words]
    variables = {"LABELFREE_PYTHON": site["python"] or sys.executable, "LABELFREE_OUTPUT": site["output"]}
    if site["setup"]:
        variables["LABELFREE_SETUP"] = "\n".join(map(str, site["setup"]))
    return Submission(command, variables, cfg, path)


def submit(submission: Submission) -> str:
    """Hand the job to SLURM; returns its id. Raises ConfigError where SLURM is not there or refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: not found on this machine; submit on a login node of the cluster, or look at the command with "
            "dry=true (DRY=1 of make slurm)"
        )
    (ROOT / submission.variables["LABELFREE_OUTPUT"]).mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    done = subprocess.run(
        submission.command, cwd=ROOT, env={**os.environ, **submission.variables}, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(
            f"sbatch refused the job ({said}); mend {submission.site}, or nodes= and gpus= (make slurm NODES=… GPUS=…)"
        )
    return done.stdout.strip().split(";")[0]


def main(argv: list[str] | None = None) -> int:
    """Submit or show; 0: done, 2: something for the user to mend (one line on stderr)."""
    return ended(lambda: submitted(sys.argv[1:] if argv is None else argv))


def submitted(words: list[str]) -> None:
    """Submit the job that these words ask for, or show it. Raises LabelfreeError."""
    dry = config.flag(config.parse_words(words), "dry")
    submission = plan([word for word in words if not word.startswith("dry=")])
    if dry:
        print(submission)
        return
    job = submit(submission)
    name = next(word for word in submission.command if word.startswith("--job-name=")).partition("=")[2]
    print(f"job {job}; its log is {submission.variables['LABELFREE_OUTPUT']}/{name}-{job}.out")


if __name__ == "__main__":
    sys.exit(main())
