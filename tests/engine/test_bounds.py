"""What the machine or the data cannot serve ends in one line before a run folder is made."""

import logging

import pytest

import config
from common import machine
from common.errors import ConfigError
from engine import setup, training
from tests.conftest import small_words


def refusal(method: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        training.train(config.compose(small_words(method, *words)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        (
            "kmeans_baseline", ["trainer.threads=4000"],
            "trainer.threads=4000: this machine has {cores} cores for this process; set {cores} at most, or null",
        ),
        (
            "kmeans_baseline", ["trainer.devices=999"],
            "trainer.devices=999: without GPUs each is a process on the CPU, and this machine has {cores} cores; "
            "set {cores} at most",
        ),
        (
            "kmeans_baseline", ["evaluation.extra=background", "evaluation.background=99", "method.num_clusters=15"],
            "evaluation.background=99: expected a class id from 0 to 11, which clusters beyond the classes become",
        ),
        (
            "kmeans_baseline", ["evaluation.kmeans.points=3"],
            "evaluation.kmeans.points=3: the k-means probe needs a point a cluster, and method.num_clusters is 12; set "
            "12 or more",
        ),
        (
            "dino", ["method.crops.global_size=4000"],
            "method.crops.global_size=4000: training pictures are 48 px (data.train_size), and a crop of them would be "
            "enlarged more than 4 times; set 192 at most",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served(method, words, said, tmp_path):
    runs = tmp_path / "runs"
    assert refusal(method, f"run.dir={runs}", *words) == said.format(cores=machine.cores())
    assert not runs.exists()


def test_a_stored_number_of_threads_is_that_of_another_machine():
    tree = config.plain(config.compose(["trainer.threads=4000"]))
    assert config.restore(tree).trainer.threads is None
    assert config.restore(config.plain(config.compose(["trainer.threads=1"]))).trainer.threads == 1


def test_a_run_of_several_nodes_says_that_it_waits(caplog, tmp_path):
    cfg = config.compose(small_words("kmeans_baseline", "trainer.num_nodes=2", "trainer.strategy=ddp"))
    with caplog.at_level(logging.INFO, logger="engine.setup"):
        setup.build_trainer(cfg, 1, [], [], tmp_path)
    assert caplog.messages[0].startswith("waiting for 2 nodes: the same command has to run on each of them (MASTER_")
