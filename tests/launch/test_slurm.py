"""Our launcher and its batch scripts on a real SLURM of two nodes: a training that is signalled, put back into the
queue and finished; a more urgent job, a cancelled one, and a sweep as a job array."""

import csv
import re
import sys
import time

import pytest
import yaml

from launch import submit
from tests.conftest import read_json, run_small, small_words
from tests.launch.cluster import Cluster, obstacle
from tests.test_ddp import expect_equal

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = obstacle()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


STAND_IN = """#!/bin/bash
# in the place of Python: asked to stop, it says so as the engine does
stop() { touch "$LABELFREE_REQUEUE"; echo "rank $SLURM_PROCID stopped"; exit 143; }
trap stop TERM
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] && for _ in $(seq 300); do sleep 0.2; done
echo "rank $SLURM_PROCID of $SLURM_NTASKS done: $*"
"""
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")


@pytest.fixture
def site(tmp_path, cluster, monkeypatch):
    """Writes the site settings of this machine: loopback alone, where the names of the nodes do not resolve."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    setup_lines = ["export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]

    def write(**more):
        settings = {"cpus_per_task": 1, "time": "30:00", "output": str(tmp_path / "logs"), "setup": setup_lines, **more}
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def submitted(capsys, site, *words: str) -> str:
    """Submit to two nodes without GPUS; the number of the job."""
    assert submit.main(["nodes=2", "gpus=0", f"site={site}", *words]) == 0
    return re.match(r"job (\d+); its log is .*\n", capsys.readouterr().out).group(1)


def test_a_job_of_two_nodes_is_preempted_and_ends_as_one_process(cluster, site, tmp_path, capsys):
    one = run_small("hidden_positives", tmp_path, "one")
    words = small_words("hidden_positives", f"run.dir={tmp_path}", "run.name=two", "trainer.checkpoint_every=1")
    started = time.monotonic()
    number = submitted(capsys, site(), *words)
    folder, log = tmp_path / "two", tmp_path / "logs" / f"two-{number}.out"

    def said() -> str:
        return log.read_text() if log.is_file() else ""

    def ended() -> bool:
        return cluster.job(number)["JobState"] in ENDED

    last = folder / "checkpoints" / "last.ckpt"
    cluster.expect(lambda: last.is_file() or ended(), "checkpoint", 300)
    print(f"first checkpoint after {time.monotonic() - started:.1f} s")
    cluster.ask("scancel", "--signal=USR1", number)
    cluster.expect(lambda: cluster.job(number)["Restarts"] == "1" or ended(), "requeue", 120)
    assert cluster.job(number)["Restarts"] == "1", said()
    print(f"back in the queue after {time.monotonic() - started:.1f} s")
    cluster.expect(ended, "end of the job", 400)
    print(f"done after {time.monotonic() - started:.1f} s")
    text = said()
    print(text)
    assert cluster.job(number)["JobState"] == "COMPLETED", text
    assert f"job {number}, start 0, on n[1-2]: run.py train" in text
    assert "stopped by SIGUSR1" in text
    assert f"job {number} goes back into the queue" in text
    assert f"job {number}, start 1, on n[1-2]: run.py train" in text
    assert f"going on from {last}" in text
    assert "Traceback" not in text
    assert not list((tmp_path / "logs").glob("requeue-*"))

    assert read_json(folder / "environment.json")["processes"] == 2
    expect_equal(folder, one)
    assert any(name.startswith("pool.") for name in one.weights)
    metrics = read_json(folder / "metrics.json")
    assert metrics["steps"] == 8
    for key in ("val/cluster/acc", "val/linear/acc", "val/linear/miou", "best/linear/acc"):
        assert abs(metrics[key] - one.metrics[key]) < 0.5, key


def running(cluster, number, log):
    """Wait until both tasks of the stand-in have begun."""
    cluster.expect(lambda: cluster.job(number)["JobState"] == "RUNNING", "start", 60)
    cluster.expect(lambda: log.is_file() and "start 0" in log.read_text(), "first line", 60)
    time.sleep(3)


def stand_in(site, tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return site(python=str(python))


def test_a_more_urgent_job_sends_a_run_back_into_the_queue(cluster, site, tmp_path, capsys):
    number = submitted(capsys, stand_in(site, tmp_path), "run.name=less")
    log = tmp_path / "logs" / f"less-{number}.out"
    running(cluster, number, log)
    urgent = cluster.ask("sbatch", "--parsable", "-N2", "-p", "urgent", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.expect(lambda: cluster.job(number)["JobState"] in ENDED, "end of the job", 120)
    text = log.read_text()
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert (cluster.job(number)["JobState"], cluster.job(number)["Restarts"]) == ("COMPLETED", "1"), text
    assert "rank 0 stopped" in text
    assert "rank 1 of 2 done: run.py train run.name=less trainer=cpu" in text


def test_a_cancelled_job_does_not_come_back(cluster, site, tmp_path, capsys):
    number = submitted(capsys, stand_in(site, tmp_path), "run.name=gone")
    log = tmp_path / "logs" / f"gone-{number}.out"
    running(cluster, number, log)
    cluster.ask("scancel", number)
    cluster.expect(lambda: cluster.job(number)["JobState"] in ENDED, "end of the job", 60)
    time.sleep(2)
    assert (cluster.job(number)["JobState"], cluster.job(number)["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    assert "back into the queue" not in log.read_text()


def test_a_sweep_as_a_job_array(cluster, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        "program: run.py\nmethod: grid\nmetric: {name: val/kmeans/miou, goal: maximize}\n"
        'command: ["${program}", train, method=kmeans_baseline, "${args_no_hyphens}"]\n'
        "parameters: {seed: {values: [0, 1]}}\n"
    )
    small = [word for word in small_words("kmeans_baseline", "trainer.max_steps=1") if not word.startswith("method=")]
    options = [
        "--array=0-1",
        "--cpus-per-task=1",
        f"--chdir={submit.ROOT}",
        f"--output={tmp_path}/%a.out",
        f"--export=ALL,OMP_NUM_THREADS=1,LABELFREE_PYTHON={sys.executable}",
    ]
    command = ["sbatch", "--parsable", *options, str(submit.ROOT / "launch" / "sweep.sbatch"), f"sweep={path}"]
    number = cluster.ask(*command, f"run.dir={tmp_path}", *small)
    shares = [f"{number}_0", f"{number}_1"]
    cluster.expect(lambda: all(cluster.job(share)["JobState"] in ENDED for share in shares), "end of the array", 300)
    said = "".join(file.read_text() for file in sorted(tmp_path.glob("*.out")))
    assert [cluster.job(share)["JobState"] for share in shares] == ["COMPLETED", "COMPLETED"], said
    assert said.count("2 trials, 1 of them here") == 2
    (sweep,) = tmp_path.glob("sweeps/two-*")
    assert len(list(sweep.glob("00*/metrics.json"))) == 2
    with (sweep / "trials.csv").open(newline="") as handle:
        assert "finished" in [row["state"] for row in csv.DictReader(handle)]
