"""`run.py help train`, `run.py train --help`: the words of a command with what they mean. Imports no torch."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import config
from common.formats.commented import commented
from engine.listing import wrapped

Command = Callable[[list[str]], None]

MEANING = {
    "method": "what is trained; run.py list names them, run.py list method=… says what one is",
    "data": "the pictures: a published set, scenes (drawn, no download) or folder (your own, with data.root=…)",
    "backbone": "the network that gives the features",
    "trainer": "where it runs: auto, cpu, gpu, ddp",
    "experiment": "a published setting, which names the four above; words beside it win",
    "ckpt": "a checkpoint, as runs/<name>/checkpoints/last.ckpt or best.ckpt",
    "input": "a folder of pictures (any depth)",
    "output": "where the result goes",
    "names": "a names.yaml of your own with the clusters' names; none: without the one of the run folder",
    "levels": "all: every level of a hierarchy too",
    "image": "a picture",
    "point": "column,row of a pixel, from the top left of the file",
    "k": "how many: the nearest segments that are shown, or the clusters that are taken",
    "sweep": "numbers of clusters to try, as 6..40",
    "methods": "methods that are trained on the same words, each with all seeds",
    "seeds": "seeds of each method",
    "runs": "run folders that are finished",
    "name": "of the data set, or of the comparison's folder",
    "root": "the folder that is checked",
    "eval": "words with which the finished runs are scored anew, as evaluation.crf=dense",
    "checkpoint": "best or last: the finished runs are scored anew from it, with the words of eval where there are any",
    "published": "a data set whose published rows stand below the measured ones, greyed and with their source",
    "fetch": "true: downloads it",
    "rebuild": "true: makes lists anew that can be made out of the files",
    "from": "whose file it is",
    "file": "the authors' file",
}
"""What the words of the commands mean, which no configuration file says; keys stand in configs/ with their meaning."""

TRAINING = (
    "seed", "run.name", "run.dir", "run.overwrite", "data.root", "data.batch_size", "data.train_size", "data.eval_size",
    "data.workers", "backbone.weights", "method.num_clusters", "trainer.max_steps", "trainer.val_every",
    "trainer.precision", "trainer.progress", "evaluation.crf", "logger",
)  # fmt: skip
CHECKPOINT = (
    "data.root", "data.eval_size", "data.workers", "backbone.weights", "evaluation.crf", "evaluation.flip",
    "evaluation.kmeans.pictures", "predict.probe", "predict.window", "trainer.accelerator",
)  # fmt: skip


def usage(commands: Mapping[str, Command]) -> Iterator[str]:
    """A line for every command."""
    yield "Commands (always key=value, never --flags):"
    for command in commands.values():
        yield f"  run.py {command.__doc__.strip()}"
    yield "`run.py help train` says what the words of a command mean."


def manual(command: Command, words: Iterable[str]) -> Iterator[str]:
    """What a command does, its words, and the keys that are set most, with the values that `words` give them."""
    call, _, what = command.__doc__.strip().partition(": ")
    yield f"run.py {call}"
    yield what
    yield ""
    for word in dict.fromkeys(re.findall(r"([a-z]+)=", call)):
        if word in MEANING:
            yield from wrapped(f"  {word + '=':<14}", MEANING[word])
    if "key=value" not in call:
        return
    chosen = [word for word in words if word.partition("=")[0] in config.WORDS]
    kept = "ckpt=" in call  # what it was trained on is in the checkpoint
    cfg = config.flatten(config.compose(["data=folder", *chosen] if kept else chosen))
    meanings = {key: comment for key, (_, comment) in commented(config.CONFIGS / "default.yaml").items()}
    for group in config.GROUPS:
        found = commented(config.CONFIGS / group / f"{cfg[f'{group}.name']}.yaml").items()
        prefix = "" if group == "method" else f"{group}."
        meanings |= {f"{prefix}{key}": comment for key, (_, comment) in found if comment}
    yield ""
    yield "Most used keys:"
    for key in CHECKPOINT if kept else TRAINING:
        value = "null" if cfg[key] is None else str(cfg[key]).lower() if isinstance(cfg[key], bool) else cfg[key]
        yield from wrapped(f"  {f'{key}={value}':<32}  ", meanings.get(key, ""))
    yield "All of them with their values: run.py show-config method=… data=…; what they mean: configs/"
