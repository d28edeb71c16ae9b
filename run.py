"""The one entry: `run.py <command> key=value …`. See `run.py` alone, or the README, for the commands."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from common import console, ending
from common.errors import ConfigError, did_you_mean

log = logging.getLogger("labelfree")


def train(words: list[str]) -> None:
    """train method=… data=… backbone=… trainer=… [experiment=…] [key=value …]: train, evaluate, fill a run folder"""
    import config

    cfg = config.compose(words)
    from engine import ahead

    ahead.expect_training(cfg)
    say_default(words)
    from engine.training import train as run

    show(run(cfg))


def say_default(words: list[str]) -> None:
    """Where neither a method nor a recipe is named: which method is taken, and why."""
    if not any(word.startswith(("method=", "experiment=")) for word in words):
        log.info(
            "no method is named, so this is kmeans_baseline: k-means on frozen features, the row that every method has "
            "to beat; it trains nothing. Start with method=hidden_positives; `run.py list` names the others"
        )


def pseudo(words: list[str]) -> None:
    """pseudo method=… data=… backbone=… [output=folder] [key=value …]: the offline stage alone; its labels as pngs"""
    import config

    named = config.parse_words(words)
    output = named.pop("output", None)
    cfg = config.compose([f"{key}={value}" for key, value in named.items()])
    from engine import ahead

    ahead.expect_stage(cfg)
    from engine.stages.stage import pseudo as run

    run(cfg, Path(output) if output else None)


def evaluate(words: list[str]) -> None:
    """eval ckpt=… [key=value …]: the scores of a checkpoint"""
    from launch.words import of_checkpoint

    named, rest = of_checkpoint(words, "ckpt")
    import config
    from engine import ahead

    ahead.expect_evaluation(config.parse_words(rest))
    from engine.evaluating import evaluate as run

    show(run(Path(named["ckpt"]), rest))


def predict(words: list[str]) -> None:
    """predict ckpt=… input=folder output=folder [names=file|none] [levels=all] [key=value …]: maps, overlays, areas"""
    from launch.words import of_checkpoint

    named, rest = of_checkpoint(words, "ckpt", "input", "output", optional=("levels", "names"))
    paths = [Path(named[name]) for name in ("ckpt", "input", "output")]
    if named["levels"] not in (None, "all"):
        raise ConfigError(f"levels={named['levels']}: expected all, or no such word")
    from inference import asked

    asked.expect_pictures(*paths[1:])
    asked.expect_names(named["names"])
    from inference.levels import predict_levels
    from inference.predicting import predict as run

    if named["levels"]:
        predict_levels(*paths, rest)
    run(*paths, rest, named["names"])


def retrieve(words: list[str]) -> None:
    """retrieve ckpt=… image=… [k=8] [output=folder] [key=value …]: a picture's segments and the nearest ones"""
    from launch.words import of_checkpoint, whole_number

    named, rest = of_checkpoint(words, "ckpt", "image", optional=("k", "output"))
    nearest = 8 if named["k"] is None else whole_number("k", named["k"], "the nearest segments of each segment")
    from inference.asked import expect_picture

    expect_picture(Path(named["image"]))
    from inspection.retrieving import retrieve as run

    run(Path(named["ckpt"]), Path(named["image"]), nearest, maybe_path(named["output"]), rest)


def explain(words: list[str]) -> None:
    """explain ckpt=… image=… point=x,y [output=folder] [names=file|none] [key=value …]: why a patch is what it is"""
    from launch.words import of_checkpoint

    named, rest = of_checkpoint(words, "ckpt", "image", "point", optional=("output", "names"))
    from inference.asked import expect_names, expect_picture
    from inspection.asked import parse_point

    parse_point(named["point"])
    expect_picture(Path(named["image"]))
    expect_names(named["names"])
    from inspection.explaining import explain as run

    folder = maybe_path(named["output"])
    run(Path(named["ckpt"]), Path(named["image"]), named["point"], folder, rest, named["names"])


def maybe_path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def clusters(words: list[str]) -> None:
    """clusters ckpt=… [sweep=6..40 | k=8] [key=value …]: what each cluster is, a file to name them; another number"""
    from launch.words import of_checkpoint, whole_number

    named, rest = of_checkpoint(words, "ckpt", optional=("sweep", "k"))
    sweep, k = named["sweep"], named["k"]
    if sweep is not None and k is not None:
        raise ConfigError(f"k={k}: sweep={sweep} tries numbers of clusters, k takes one; give one of the two")
    if k is not None:
        number = whole_number("k", k, "the number of clusters to take")
        from inspection.cluster_count import take as run

        run(Path(named["ckpt"]), number, rest)
    elif sweep is not None:
        from inspection.asked import numbers

        numbers(sweep)
        from inspection.cluster_count import sweep as run

        run(Path(named["ckpt"]), sweep, rest)
    else:
        from inspection.clusters import clusters as run

        run(Path(named["ckpt"]), rest)


def compare(words: list[str]) -> None:
    """compare methods="a b" seeds="0 1 2" [key=value …] | runs="…" [eval="…"] [checkpoint=…] [published=…]: a table"""
    import config
    from launch import asked

    asked.read(config.parse_words(words))
    from launch.compare import main as run

    code = run(words)
    if code:
        raise SystemExit(code)


def export(words: list[str]) -> None:
    """export ckpt=… output=….pt2 [names=file|none] [key=value …]: one torch.export program, free of this project"""
    from launch.words import of_checkpoint

    named, rest = of_checkpoint(words, "ckpt", "output", optional=("names",))
    from inference.asked import expect_names, expect_program

    expect_program(Path(named["output"]))
    expect_names(named["names"])
    from inference.exporting import export as run

    run(Path(named["ckpt"]), Path(named["output"]), rest, named["names"])


def import_checkpoint(words: list[str]) -> None:
    """import-checkpoint from=stego|hp file=… output=….ckpt [data=…] [key=value …]: the authors' checkpoint as ours"""
    import config
    from launch.words import take

    named, rest = take(words, "from", "file", "output")
    origin, file, output = named["from"], Path(named["file"]), Path(named["output"])
    from released import asked

    asked.expect(origin, file, output, config.parse_words(rest))
    from released.importing import import_checkpoint as run

    run(origin, file, output, rest)


def data(words: list[str]) -> None:
    """data [name=… [root=…] [rebuild=true] [key=value …]]: what to fetch and under which terms; checks what is there"""
    import config

    named = config.parse_words(words)
    rebuild = config.flag(named, "rebuild")
    name, root = (named.pop(key, None) for key in ("name", "root"))
    if name is None and words:
        raise ConfigError(f"{words[0]}: name the data set first, as in run.py data name=cocostuff27 root=<folder>")
    keys = {key if "." in key else f"data.{key}": value for key, value in named.items()}
    keys |= {} if root is None else {"data.root": root}
    group = [] if name is None else [f"data={name}"]
    cfg = config.compose([*group, *(f"{key}={value}" for key, value in keys.items())])
    from datamodules import inventory

    for line in inventory.names() if name is None else inventory.describe(cfg):
        print(line, flush=True)
    for line in () if name is None else inventory.examine(cfg, rebuild):
        print(line, flush=True)


def weights(words: list[str]) -> None:
    """weights [backbone=… [fetch=true] [key=value …]]: what to fetch, from where, under which terms; checks the file"""
    import config

    named = config.parse_words(words)
    fetch = config.flag(named, "fetch")
    if words and "backbone" not in named:
        raise ConfigError(f"{words[0]}: name the backbone first, as in run.py weights backbone=dino_vits8")
    cfg = config.compose([f"{key}={value}" for key, value in named.items()]).backbone
    from models import published

    if not words:
        lines = published.overview()
    else:
        lines = published.report(cfg, fetch)
    for line in lines:
        print(line, flush=True)


def list_names(words: list[str]) -> None:
    """list [method=… data=… backbone=… trainer=… experiment=…]: what there is, and what one of it takes"""
    from engine.listing import listing

    for line in listing(words):
        print(line)


def show_config(words: list[str]) -> None:
    """show-config method=… data=… …: the merged configuration"""
    from omegaconf import OmegaConf

    import config

    print(OmegaConf.to_yaml(config.compose(words)), end="")


def doctor(words: list[str]) -> None:
    """doctor: versions, CUDA, faiss, disk, run folder, W&B; one line each"""
    import config

    config.compose(words)
    from engine.doctor import examine

    if not examine(words):
        raise SystemExit(1)


def version(words: list[str]) -> None:
    """version: of this project, with its licence"""
    from common import about

    if words:
        raise ConfigError(f"{words[0]}: version takes no words")
    print(about.signature())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "pseudo": pseudo,
    "eval": evaluate,
    "predict": predict,
    "retrieve": retrieve,
    "clusters": clusters,
    "explain": explain,
    "compare": compare,
    "export": export,
    "import-checkpoint": import_checkpoint,
    "data": data,
    "weights": weights,
    "list": list_names,
    "show-config": show_config,
    "doctor": doctor,
    "version": version,
}


def show(metrics: dict) -> None:
    """Print the closing table on rank zero."""
    from lightning.pytorch.utilities import rank_zero_only
    from rich.console import Console

    from evaluation import headline
    from reporting import report

    if rank_zero_only.rank != 0:
        return
    method = report.method_of(metrics) + "," * ("stands_on" in metrics)
    what = f"{method} on {metrics['data']} with {metrics['backbone']}"
    title = f"{what}, seed {metrics['seed']}, step {metrics['steps']}"
    title += f" ({metrics['checkpoint']})" if "checkpoint" in metrics else ""
    out = Console(width=None if sys.stdout.isatty() else 110)
    out.print(title, style="bold", highlight=False, markup=False)
    out.print(report.final_table(metrics))
    out.print(headline.sentence(metrics), highlight=False, markup=False)
    if "published/source" in metrics:
        out.print(f"published: {metrics['published/source']}", highlight=False, markup=False)
    rule = metrics.get("selection/rule")
    if rule:
        chosen = "chosen with labels" if metrics["selection/uses_labels"] else "chosen without labels"
        labelled = any(key.endswith("/miou") for key in metrics)
        matching = f"; matching: {metrics['protocol/matching']}" if labelled else ""
        out.print(f"best: {rule} (step {metrics['best/step']}, {chosen}){matching}", highlight=False, markup=False)
        if not labelled:
            out.print(report.LABEL_FREE, highlight=False, markup=False)


HELP = {"help", "-h", "--help"}
ROOMS = (
    "labelfree", "common", "datamodules", "engine", "evaluation", "grouping", "inference", "inspection", "launch",
    "lightning_modules", "losses", "models", "pseudo_labels", "released", "reporting", "retrieval",
)  # fmt: skip
"""Whose lines are said, beside the warnings of everyone; those of libraries that inform are not."""


def explain_words(asked: list[str]) -> None:
    """The commands, or one of them with the words that follow it."""
    from launch.manual import manual, usage

    for line in manual(COMMANDS[asked[0]], asked[1:]) if asked else usage(COMMANDS):
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0: done, 1: unhealthy, 2: something for the user to mend (one line on stderr).

    85: stopped by SIGUSR1, to be started again; 143: stopped by SIGTERM; 130: by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    console.prepare()
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    def work() -> int:
        helped = bool(HELP.intersection(argv)) or not argv
        asked = [word for word in argv if word not in HELP]
        if asked and asked[0] not in COMMANDS:
            raise ConfigError(f"{asked[0]}: no such command; {did_you_mean(asked[0], COMMANDS)}")
        if helped:
            explain_words(asked)
            return 0 if argv else 2
        from launch.words import at_home

        COMMANDS[argv[0]]([at_home(word) for word in argv[1:]])
        return 0

    return ending.ended(work)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(console.finished(main))
