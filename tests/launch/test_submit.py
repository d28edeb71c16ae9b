"""What `make slurm` would submit, and the one line that ends it; a job whose shape is not that of the run."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from engine import slurm
from launch import submit

HERE = "launch/site.yaml"


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        submit.plan(words)
    return str(caught.value)


def test_the_command_of_two_nodes_with_eight_gpus(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: long\ntime: '2-00:00:00'\nmem: 500G\ngpu_option: --gres=gpu:{gpus}\nnotice: 300\n"
        "python: /env/bin/python\nsetup: [module load cuda, export A=b]\nextra: [--exclude=n7]\n"
    )
    words = ["method=stego", "data.batch_size=64", "run.name=mine"]
    plan = submit.plan(["nodes=2", "gpus=8", f"site={site}", *words])
    assert plan.command == [
        "sbatch", "--parsable", "--job-name=mine", f"--chdir={submit.ROOT}", "--export=ALL", "--nodes=2",
        "--ntasks-per-node=8", "--cpus-per-task=8", "--time=2-00:00:00", "--signal=USR1@300",
        "--output=runs/slurm/%x-%j.out", "--partition=long", "--mem=500G", "--gres=gpu:8", "--exclude=n7",
        "launch/slurm.sbatch", *words, "trainer=ddp",
        "trainer.num_nodes=2", "trainer.devices=8", "trainer.strategy=ddp",
    ]  # fmt: skip
    assert plan.variables == {
        "LABELFREE_PYTHON": "/env/bin/python",
        "LABELFREE_OUTPUT": "runs/slurm",
        "LABELFREE_SETUP": "module load cuda\nexport A=b",
    }
    assert (plan.cfg.trainer.num_nodes, plan.cfg.trainer.devices, plan.cfg.trainer.precision) == (2, 8, "bf16-mixed")


def test_a_dry_run_prints_the_command_and_submits_nothing(capsys, monkeypatch):
    monkeypatch.setattr(submit.subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert submit.main(["dry=true", "gpus=2", "method=kmeans_baseline", "data=folder", "data.root=/my pictures"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LABELFREE_PYTHON=")
    assert "--gpus-per-node=2 launch/slurm.sbatch method=kmeans_baseline data=folder 'data.root=/my pictures'" in out


def test_nodes_without_gpus_train_on_the_cpu():
    plan = submit.plan(["nodes=2", "gpus=0", "data.batch_size=8"])
    assert not any("gpus" in word or "gres" in word for word in plan.command)
    assert (plan.cfg.trainer.accelerator, plan.cfg.trainer.devices, plan.cfg.trainer.precision) == ("cpu", 1, "32-true")


def test_a_recipe_keeps_its_trainer():
    words = submit.plan(["gpus=4", "experiment=stego_cocostuff27_vits8"]).command
    assert not any(word.startswith("trainer=") for word in words)


def test_words_that_cannot_be_submitted_end_in_one_line():
    assert refused("nodes=0") == "nodes=0: expected a whole number of at least 1"
    assert refused(f"nodes={'9' * 5000}").endswith(": expected a whole number of at least 1")
    assert refused("nodes=³") == "nodes=³: expected a whole number of at least 1"
    assert refused("gpus=two") == "gpus=two: expected a whole number of at least 0"
    assert refused("trainer.devices=4") == ("trainer.devices=4: follows from nodes= and gpus=; leave it out, set those")
    assert refused("nodes=3", "gpus=4", "data.batch_size=64") == (
        "data.batch_size=64: the global batch is split evenly over 3 x 4 devices, so it must be a multiple of 12; "
        "set data.batch_size=60"
    )
    assert refused("method=steggo") == "method=steggo: no such method; did you mean stego?"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("partiton: long", "partiton: no such key; did you mean partition?"),
        ("time: 24:00:00", "time=86400: expected a text, in quotes (yaml reads 24:00:00 as a number of seconds)"),
        ("notice: 0", "notice=0: must be at least 1"),
        ("setup: module load", "setup=module load: expected a list like [1,2]"),
        ("gpu_option: --gres=gpu:8", "gpu_option=--gres=gpu:8: must hold {gpus}, as in --gres=gpu:{gpus}"),
    ],
)
def test_a_wrong_site_ends_in_one_line(text, line, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(text)
    assert refused(f"site={site}") == f"{site}: {line}"


def test_sites_that_are_no_files_of_keys(tmp_path):
    site = tmp_path / "site.yaml"
    assert refused(f"site={site}") == (
        f"site={site}: no such file; copy launch/site.yaml and change what differs on your cluster"
    )
    site.write_text("- a\n")
    assert refused(f"site={site}") == f"{site}: holds no keys; compare it with launch/site.yaml"


def test_sbatch_that_is_missing_or_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "site.yaml").write_text((Path(__file__).parents[2] / HERE).read_text())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(["gpus=1"]) == 2
    assert capsys.readouterr().err == (
        "error: sbatch: not found on this machine; submit on a login node of the cluster, or look at the command with "
        "dry=true (DRY=1 of make slurm)\n"
    )
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    mine = tmp_path / "mine.yaml"
    mine.write_text("partition: x\n")
    assert submit.main(["gpus=1", f"site={mine}"]) == 2
    assert capsys.readouterr().err == (
        "error: sbatch refused the job (sbatch: error: invalid partition specified: x); "
        f"mend {mine}, or nodes= and gpus= (make slurm NODES=… GPUS=…)\n"
    )
    assert (tmp_path / "runs" / "slurm").is_dir()


def test_a_job_whose_shape_is_not_that_of_the_run(monkeypatch):
    assert slurm.environment(1, "auto") is None
    for name, value in {"NTASKS": "16", "NNODES": "2", "NTASKS_PER_NODE": "8", "JOB_NAME": "x", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert slurm.environment(2, 8).auto_requeue is False
    with pytest.raises(ConfigError) as caught:
        slurm.environment(1, 8)
    assert str(caught.value) == (
        "trainer.num_nodes=1: SLURM gave this job 2 nodes; set trainer.num_nodes=2, or submit with `make slurm NODES=…`"
    )
    with pytest.raises(ConfigError) as caught:
        slurm.environment(2, "auto")
    assert str(caught.value) == (
        "trainer.devices=auto: SLURM started 8 tasks on each node, and each task drives one device; "
        "set trainer.devices=8, or submit with `make slurm GPUS=…`"
    )
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError) as caught:
        slurm.environment(2, 8)
    assert str(caught.value) == (
        "SLURM_NTASKS=16: the job was started with --ntasks; Lightning needs --ntasks-per-node, "
        "as launch/slurm.sbatch has it"
    )
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert slurm.environment(1, 1) is None
