"""The configuration: default <- backbone <- data <- method <- trainer <- experiment <- command line.

Groups are chosen by bare words (`method=stego data=folder`), values by dotted keys (`optim.head.lr=1e-4`). Keys are
strict: only what the layers define exists, a wrong key or type ends in one line with the nearest valid name.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import CheckpointError, ConfigError, did_you_mean, one_of
from common.files import write_text

log = logging.getLogger("labelfree.config")

CONFIGS = Path(__file__).resolve().parent / "configs"
GROUPS = ("backbone", "data", "method")
WORDS = ("experiment", "method", "data", "backbone", "trainer")
DEFAULT_WORDS = {"method": "kmeans_baseline", "data": "scenes", "backbone": "tiny", "trainer": "auto"}

NULLABLE = {
    "run.name": str,
    "wandb.entity": str,
    "trainer.max_steps": int,
    "trainer.max_epochs": int,
    "trainer.threads": int,
    "trainer.devices": (int, str),
    "predict.size": int,
    "predict.window": int,
    "predict.overlap": float,
    "data.root": str,
    "data.lists": str,
    "cache.dir": str,
    "data.train_size": (int, list),
    "data.eval_size": (int, list),
    "backbone.weights": str,
    "backbone.mean": list,
    "backbone.std": list,
    "backbone.levels": list,
    "backbone.output_stride": int,
    "backbone.eval_output_stride": int,
    "backbone.pad_type": str,
    "backbone.licence": str,
    "method.num_clusters": int,
    "method.licence": str,
    "method.regions.root": str,
    "method.crop.size": int,
    "method.stage.size": (int, list),
    "method.crops.size": int,
    "method.crops.max_per_image": int,
    "method.crops.pictures": int,
    "method.maps.power": (float, str),
    "method.restarts.epoch": int,
    "method.things": int,
    "method.pool.size": int,
    "method.augment.size": (int, list),
    "method.slots": int,
    "method.salience.root": str,
    "method.terms.self.shift": float,
    "method.terms.knn.shift": float,
    "method.terms.random.shift": float,
    "evaluation.kmeans.clusters": int,
    "evaluation.window.size": int,
    "evaluation.window.stride": int,
    "backbone.published_file": str,
    "backbone.sha256": str,
    "backbone.pretraining": str,
}
"""Types of keys whose default does not tell them: null, or one of several types."""

CHANGEABLE = ("backbone.weights", "backbone.precision", "backbone.acknowledge_licence")
"""Keys of method and backbone that may be set anew for a checkpoint."""

NEVER_NULL = ("data.train_size", "data.eval_size", "trainer.devices", "method.maps.power")

IN_PHASES = ("method.", "optim.", "data.")
"""Beginnings of the keys that a phase may change."""

CHOICES = {
    "logger": ("csv", "wandb"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.strategy": ("auto", "ddp"),
    "trainer.precision": ("32-true", "bf16-mixed", "16-mixed"),
    "trainer.progress": ("auto", "bar", "lines", "none"),
    "evaluation.matching": ("hungarian", "hungarian_iou", "many_to_one", "many_to_one_iou"),
    "evaluation.extra": ("drop", "background", "merge", "stego_compat"),
    "evaluation.absent": ("skip", "zero"),
    "evaluation.crf": ("none", "dense"),
    "evaluation.partition": ("all", "within", "none"),
    "evaluation.cluster_init": ("normal", "first_batch"),
    "trainer.contrast": ("global", "local"),
    "evaluation.kmeans.init": ("k-means++", "random"),
    "evaluation.posthoc.optimizer": ("adam", "adamw", "sgd"),
    "evaluation.posthoc.schedule": ("constant", "cosine", "linear"),
    "predict.probe": ("auto", "cluster", "kmeans"),
    "explain.embedding": ("auto", "pca", "umap"),
    "search.backend": ("auto", "faiss_gpu", "faiss_cpu", "torch"),
    "data.train_crop": ("center", "random", "five", "none", "keep"),
    "data.eval_crop": ("center", "none", "keep"),
    "data.interpolation": ("faithful", "nearest", "bilinear", "bilinear_plain", "nearest_corner"),
    "data.cache": ("none", "ram", "disk"),
    "backbone.pos_interp": ("dino", "timm"),
    "backbone.precision": ("float32", "bf16", "fp16"),
}
GROUP_CHOICES = {
    "optimizer": ("adam", "adamw", "sgd"),
    "schedule": ("constant", "cosine", "linear", "poly", "step"),
}
OPTIONAL = (".clip_norm", ".clip_value", ".clip_each", ".weight_decay_end", ".warmup_from")
"""Keys of optimiser groups that may be null."""
OPTIM_NOT_NEGATIVE = (
    ".lr", ".lr_end", ".weight_decay", ".weight_decay_end", ".warmup", ".warmup_from", ".power", ".drop",
)  # fmt: skip
POSITIVE = (
    "trainer.max_steps", "trainer.max_epochs", "trainer.val_every", "trainer.checkpoint_every", "trainer.log_every",
    "trainer.num_nodes", "trainer.threads", "data.batch_size", "data.eval_batch_size", "method.num_clusters",
    "evaluation.kmeans.clusters", "evaluation.kmeans.restarts", "evaluation.kmeans.iterations",
    "evaluation.kmeans.points", "evaluation.kmeans.pictures", "evaluation.retrieval.pictures",
    "predict.size", "predict.window", "explain.clusters", "explain.points",
)  # fmt: skip

NOT_NEGATIVE = (
    "seed", "evaluation.posthoc.epochs", "evaluation.posthoc.lr", "evaluation.posthoc.weight_decay",
    "evaluation.posthoc.keep_mb", "evaluation.retrieval.k", "evaluation.retrieval.iterations",
    "evaluation.retrieval.location_scale", "explain.pictures",
)  # fmt: skip


def names(group: str) -> list[str]:
    """The names a group word can take: the yaml files of configs/<group>/."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def figure(experiment: str) -> str:
    """One line about a recipe: the figure to reach, who published it, and what was reached here."""
    facts = load_group("experiment", experiment)["figure"]
    source = f" ({facts['source']})" if facts["source"] != "-" else ""
    here = f"reached here: {facts['here']}" if facts["here"] else "not run here"
    return f"to reach: {_reach_text(facts['reach'])}{source}; {here}"


def _reach_text(reach: str | dict[str, float]) -> str:
    """{"cluster_crf/acc": 57.2, "cluster_crf/miou": 24.6} -> cluster_crf 57.2 acc / 24.6 mIoU."""
    if isinstance(reach, str):
        return reach
    probes: dict[str, list[str]] = {}
    for key, value in reach.items():
        probe, name = key.split("/")
        probes.setdefault(probe, []).append(f"{value} {'mIoU' if name == 'miou' else name}")
    return ", ".join(f"{probe} {' / '.join(scores)}" for probe, scores in probes.items())


def published(experiment: str) -> dict[str, float]:
    """The figures that a recipe has to reach, as metrics.json names them: {"cluster_crf/acc": 57.2, …}, percent.

    Empty where its `figure.reach` is a text: nothing published, or a figure of another kind.
    """
    reach = load_group("experiment", experiment)["figure"]["reach"]
    return {} if isinstance(reach, str) else dict(reach)


def parse_words(tokens: Iterable[str]) -> dict[str, str]:
    """`key=value` tokens -> raw texts; the last one wins.

    Raises ConfigError for `--x=1`, for a bare word, and for an empty key.
    """
    words: dict[str, str] = {}
    for token in tokens:
        if token.startswith("-"):
            raise ConfigError(
                f"{token}: flags are not used here; write {token.lstrip('-') or 'key=value'} without dashes"
            )
        key, equals, value = token.partition("=")
        if not equals or not key:
            raise ConfigError(f"{token}: expected key=value, as in method=hidden_positives or seed=3")
        words[key] = value
    return words


def flag(words: dict[str, str], key: str) -> bool:
    """Takes a word that is true or false out of `words`; False where it is not there. Raises ConfigError."""
    value = words.pop(key, "false")
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={value}: expected true or false")
    return value == "true"


def compose(tokens: Iterable[str] = (), defaults: dict[str, str] | None = None) -> DictConfig:
    """The full, checked configuration of a run from command-line words.

    `defaults` replaces the default group words (tests use it). Raises ConfigError with one clear line.
    """
    words = parse_words(tokens)
    chosen = {**DEFAULT_WORDS, **(defaults or {})}
    recipe: dict[str, Any] = {}
    if "experiment" in words:
        recipe = load_group("experiment", words["experiment"])
        chosen |= recipe.pop("words", {})
        recipe.pop("figure", None)
    chosen |= {word: words[word] for word in DEFAULT_WORDS if word in words}
    dotted = {key: raw for key, raw in words.items() if key not in WORDS}

    tree = read_yaml(CONFIGS / "default.yaml")
    for group in GROUPS[:2]:
        tree[group] = load_group(group, chosen[group])
    method = load_group("method", chosen["method"])
    tree["method"] = method.pop("method")
    for group, settings in method.pop("optim", {}).items():
        tree["optim"][group] = tree["optim"].get(group, {}) | settings
    base = OmegaConf.create(tree)
    layers = [("configs/method/" + chosen["method"] + ".yaml", method)]
    layers.append(
        ("configs/trainer/" + chosen["trainer"] + ".yaml", {"trainer": load_group("trainer", chosen["trainer"])})
    )
    if recipe:
        layers.append(("configs/experiment/" + words["experiment"] + ".yaml", recipe))
    known = flatten(base)
    for source, layer in layers:
        for key, value in flatten(layer).items():
            OmegaConf.update(base, key, checked(key, value, known, f"{source}: "))
    for key, raw in dotted.items():
        expect_known(key, known)
        OmegaConf.update(base, key, checked(key, parse_value(key, raw, known), known))
    base.phases = phases(base.phases, known, dotted)
    for asked, other in (("max_epochs", "max_steps"), ("max_steps", "max_epochs")):
        if dotted.get(f"trainer.{asked}", "null") != "null" and f"trainer.{other}" not in dotted:
            base.trainer[other] = None  # asking for epochs takes the number of steps of the yamls away, and vice versa
    try:
        cfg = OmegaConf.create(OmegaConf.to_container(base, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {str(error).splitlines()[0]}") from None
    check(cfg)
    for overlay in plain(cfg)["phases"]:
        check(changed(cfg, {key: value for key, value in overlay.items() if key != "share"}))
    return freeze(cfg)


def phases(overlays: Any, known: dict[str, Any], given: Iterable[str]) -> list[dict[str, Any]]:
    """`phases` with dotted keys and checked values; keys `given` on the command line win. Raises ConfigError."""
    found = []
    for number, overlay in enumerate(OmegaConf.to_container(OmegaConf.create(list(overlays))), start=1):
        if not isinstance(overlay, dict):
            raise ConfigError(
                f"phases: phase {number} is {overlay}, expected keys as in {{share: 1, method.kappa: 16}}"
            )
        own = flatten(overlay)
        share = own.pop("share", 1)
        if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
            raise ConfigError(f"phases: share={share} of phase {number}: must be a number above 0")
        for key in own:
            if not key.startswith(IN_PHASES):
                raise ConfigError(f"phases: {key} of phase {number}: only {', '.join(IN_PHASES)} keys may change")
        values = {key: checked(key, value, known, f"phases: phase {number}: ") for key, value in own.items()}
        found.append({"share": share} | {key: value for key, value in values.items() if key not in given})
    return found


def load_group(group: str, name: str) -> dict[str, Any]:
    """The yaml of one group member as a plain dict. Raises ConfigError for an unknown name."""
    path = CONFIGS / group / f"{name}.yaml"
    if not path.is_file() or "/" in name:
        raise ConfigError(f"{group}={name}: no such {group}; {did_you_mean(name, names(group))}")
    return read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path)) or {}


def flatten(tree: DictConfig | dict, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {dotted key: leaf}; lists are leaves, an empty mapping is a leaf."""
    if isinstance(tree, DictConfig):
        tree = OmegaConf.to_container(tree)
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def expect_known(key: str, known: dict[str, Any]) -> None:
    if key in known:
        return
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        raise ConfigError(
            f"{key}: is a group of keys; set one of {', '.join(inside[:6])}{', …' if len(inside) > 6 else ''}"
        )
    near = [name for name in known if key.startswith(name + ".") and known[name] == {}]
    if not near:
        raise ConfigError(f"{key}: no such key; {did_you_mean(key, known)}")


def parse_value(key: str, raw: str, known: dict[str, Any]) -> Any:
    """The text of a command-line value as the type that its key wants."""
    if raw == "None":
        raise ConfigError(f"{key}=None: write {key}=null for no value")
    if expected_type(key, known) == (str,) and raw != "null":
        return raw[1:-1] if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'" else raw
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))["value"]
    except (OmegaConfBaseException, yaml.YAMLError):
        raise ConfigError(f"{key}={raw}: cannot be read as a value; quote texts that hold brackets or colons") from None


def expected_type(key: str, known: dict[str, Any]) -> tuple[type, ...]:
    """The types a key takes; empty where any value goes (free-form mappings and null defaults of methods)."""
    if key.startswith("optim.") and key.endswith(OPTIONAL):
        return (float,)
    if key in NULLABLE:
        types = NULLABLE[key]
        return types if isinstance(types, tuple) else (types,)
    value = known.get(key)
    return () if value is None or isinstance(value, dict) else (type(value),)


def checked(key: str, value: Any, known: dict[str, Any], source: str = "") -> Any:
    """The value, whole floats turned to int and ints to float where the key wants it. Raises ConfigError."""
    expect_known(key, known)
    types = expected_type(key, known)
    if value is None:
        nullable = key in NULLABLE or (key.startswith("optim.") and key.endswith(OPTIONAL))
        if (types and not nullable) or key in NEVER_NULL:
            raise ConfigError(f"{source}{key}=null: this key needs a value ({type_names(types)})")
        return None
    if not types or (isinstance(value, types) and not (isinstance(value, bool) and bool not in types)):
        return value
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if int in types and isinstance(value, float) and value.is_integer():
        return int(value)
    if str in types and isinstance(value, int | float) and not isinstance(value, bool) and types == (str,):
        return str(value)
    raise ConfigError(f"{source}{key}={value}: expected {type_names(types)}, got {type_names((type(value),))}")


def type_names(types: tuple[type, ...]) -> str:
    readable = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        list: "a list like [1,2]",
        dict: "a mapping",
    }
    return " or ".join(readable.get(item, item.__name__) for item in types)


def check(cfg: DictConfig) -> None:
    """Rules that one key, or several together, must keep. Raises ConfigError."""
    flat = flatten(cfg)
    for key, choices in CHOICES.items():
        if key in flat and flat[key] is not None and flat[key] not in choices:
            raise ConfigError(
                f"{key}={flat[key]}: not one of {', '.join(choices)}; {did_you_mean(str(flat[key]), choices)}"
            )
    for key, value in flat.items():
        choices = GROUP_CHOICES.get(key.rsplit(".", 1)[-1]) if key.startswith("optim.") else None
        if choices:
            one_of(key, value, choices)
        if key.startswith("optim.") and key.endswith(OPTIM_NOT_NEGATIVE) and value is not None and value < 0:
            raise ConfigError(f"{key}={value}: must not be negative")
        if key.startswith("optim.") and ".clip_" in key and value is not None and value <= 0:
            raise ConfigError(f"{key}={value}: must be above 0, or null for no clipping")
    for key in POSITIVE:
        if flat.get(key) is not None and flat[key] < 1:
            raise ConfigError(f"{key}={flat[key]}: must be at least 1")
    for key in NOT_NEGATIVE:
        if flat[key] < 0:
            raise ConfigError(f"{key}={flat[key]}: must not be negative")
    resolutions = flat["evaluation.resolutions"]
    sizes = [size if isinstance(size, list) else [size] for size in resolutions]
    sound = all(len(size) in (1, 2) and all(type(side) is int and side > 0 for side in size) for size in sizes)
    if not sound or any(size in sizes[:i] for i, size in enumerate(sizes)):
        raise ConfigError(
            f"evaluation.resolutions={resolutions}: expected different sizes in pixels (the shorter side, or [H,W]), "
            "as in [320,448] or [[320,640]]"
        )
    if cfg.trainer.max_steps is not None and cfg.trainer.max_epochs is not None:
        raise ConfigError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: trainer.max_steps={cfg.trainer.max_steps} is set too; "
            "set one of them to null"
        )
    if isinstance(cfg.trainer.devices, str) and cfg.trainer.devices != "auto":
        raise ConfigError(f"trainer.devices={cfg.trainer.devices}: expected auto or a number of devices")
    if isinstance(cfg.trainer.devices, int) and cfg.trainer.devices < 1:
        raise ConfigError(f"trainer.devices={cfg.trainer.devices}: must be at least 1")
    if cfg.trainer.max_steps is None and cfg.trainer.max_epochs is None:
        raise ConfigError(
            "trainer.max_steps=null: set trainer.max_steps or trainer.max_epochs, one of them ends the run"
        )
    if cfg.predict.overlap is not None and not 0 <= cfg.predict.overlap <= 0.95:
        raise ConfigError(f"predict.overlap={cfg.predict.overlap}: expected a number from 0 to 0.95, or null")
    if not 0 <= cfg.predict.overlay_alpha <= 1:
        raise ConfigError(f"predict.overlay_alpha={cfg.predict.overlay_alpha}: expected a number from 0 to 1")


def freeze(cfg: DictConfig) -> DictConfig:
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as a plain dict: what checkpoints hold (they load without running code)."""
    return OmegaConf.to_container(cfg, resolve=True)


def restore(tree: dict[str, Any], tokens: Iterable[str] = ()) -> DictConfig:
    """A configuration out of a checkpoint, with command-line values on top; group words cannot be changed.

    Keys that are younger than the checkpoint have their defaults. Keys that are gone since are left out with a warning;
    of the method or the backbone they raise CheckpointError, because what they meant cannot be built any more.
    """
    for group in GROUPS:
        load_group(group, tree[group]["name"])  # a method that is gone ends here
    known = flatten(current(tree))
    free = tuple(f"{key}." for key, value in known.items() if value == {})
    gone = [key for key in flatten(tree) if key not in known and not key.startswith(free)]
    for key in gone:
        if key.startswith(("method.", "backbone.")):
            raise CheckpointError(
                f"{key}: the checkpoint was written with this key, which this version does not have; "
                "use the version it was made with (environment.json in its run folder names the commit)"
            )
    if gone:
        log.warning("the checkpoint holds keys that this version does not have; they are left out: %s", ", ".join(gone))
    base = OmegaConf.create(without(with_defaults(tree), gone))
    known = flatten(base)
    for key, raw in parse_words(tokens).items():
        if key in WORDS:
            raise ConfigError(
                f"{key}={raw}: a checkpoint keeps its {key}; only values such as data.root can be changed"
            )
        expect_known(key, known)
        if key.startswith(("method.", "backbone.")) and key not in CHANGEABLE:
            raise ConfigError(f"{key}={raw}: a checkpoint keeps its {key.split('.')[0]}; it fits its weights alone")
        OmegaConf.update(base, key, checked(key, parse_value(key, raw, known), known))
    check(base)
    return freeze(base)


def current(tree: dict[str, Any]) -> dict[str, Any]:
    """This version's configuration of the method, data set and backbone that a stored tree names, where they exist."""
    named = {group: tree.get(group, {}).get("name") for group in GROUPS}
    return plain(compose([f"{group}={name}" for group, name in named.items() if name in names(group)]))


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored tree, with the defaults of keys that it does not have yet."""

    def merged(default: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
        pairs = {key: (default.get(key), value) for key, value in stored.items()}
        nested = [key for key, pair in pairs.items() if all(isinstance(side, dict) for side in pair)]
        return {**default, **stored, **{key: merged(*pairs[key]) for key in nested}}

    return merged(current(tree), tree)


def without(tree: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A copy of a tree without these dotted keys, and without groups that hold no key then."""
    left = OmegaConf.create()
    for key, value in flatten(tree).items():
        if key not in keys:
            OmegaConf.update(left, key, value)
    return OmegaConf.to_container(left)


def changed(cfg: DictConfig, values: dict[str, Any]) -> DictConfig:
    """A copy with some values replaced (by our own code: values that become known late)."""
    tree = OmegaConf.create(plain(cfg))
    for key, value in values.items():
        OmegaConf.update(tree, key, value)
    return freeze(tree)


def save(cfg: DictConfig, path: Path) -> None:
    write_text(path, OmegaConf.to_yaml(cfg))


def first_difference(old: dict[str, Any], new: dict[str, Any], ignore: tuple[str, ...] = ()) -> str | None:
    """The first key (in the order of `new`) whose value differs, as `key (old -> new)`; None if all agree."""
    before, after = flatten(old), flatten(new)
    for key in [*after, *(k for k in before if k not in after)]:
        if not key.startswith(ignore) and before.get(key) != after.get(key):
            return f"{key} ({before.get(key)} -> {after.get(key)})"
    return None
