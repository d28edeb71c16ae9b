"""The configuration: default <- backbone <- data <- method <- trainer <- experiment <- command line.

Groups are chosen by bare words (`method=stego data=folder`), values by dotted keys (`optim.head.lr=1e-4`). Keys are
strict: only what the layers define exists, a wrong key or type ends in one line with the nearest valid name.
"""

import copy
import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import CheckpointError, ConfigError, did_you_mean
from common.files import write_text
from common.formats import trees
from common.machine import cores
from common.names import shown as names_shown
from common.names import written
from common.rules import Rules, Typed

log = logging.getLogger("labelfree.config")

CONFIGS = Path(__file__).resolve().parent / "configs"
GROUPS = ("backbone", "data", "method")
WORDS = ("experiment", "method", "data", "backbone", "trainer")
MODELS = {"data": ("folder", "scenes"), "backbone": ("tiny", "resnet18")}
"""Members of groups whose common keys every member has."""
DEFAULT_WORDS = {"method": "kmeans_baseline", "data": "scenes", "backbone": "tiny", "trainer": "auto"}

DEEPEST = 20
"""Brackets inside of each other in a value of the command line."""

CHANGEABLE = ("backbone.weights", "backbone.precision", "backbone.acknowledge_licence")
"""Keys of method and backbone that may be set anew for a checkpoint."""

THIS_MACHINE = ("cache.dir", "run.dir", "run.name", "run.resume", "run.overwrite")
"""Where files are written is this machine's to say: what a checkpoint holds of these keys is not followed."""

IN_PHASES = ("method.", "optim.", "data.")
"""Beginnings of the keys that a phase may change."""
COLON = "write a space behind a colon and quote the whole word: 'key={name: value}'"


class Known(dict[str, Any]):
    """The keys that there are, with their defaults, and what each may be."""

    def __init__(self, defaults: dict[str, Any], allowed: Rules) -> None:
        super().__init__(defaults)
        self.rules = allowed


def names(group: str) -> list[str]:
    """The names a group word can take: the yaml files of configs/<group>/."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def figure(experiment: str) -> str:
    """One line about a recipe: the figure to reach, who published it, and what was reached here."""
    # Without OmegaConf, whose trees take most of the time of a list of all recipes.
    facts = yaml.safe_load(member("experiment", experiment).read_text())["figure"]
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
    recipe = load_group("experiment", words["experiment"]) if "experiment" in words else {}
    recipe.pop("figure", None)
    named = recipe.pop("words", {}) | {word: words[word] for word in DEFAULT_WORDS if word in words}
    chosen = {**DEFAULT_WORDS, **(defaults or {}), **named}
    method = load_group("method", chosen["method"])
    chosen |= method.pop("words", {}) | named  # what a method is at home with, where nothing else is asked for
    dotted = {key: raw for key, raw in words.items() if key not in WORDS}

    tree = read_yaml(CONFIGS / "default.yaml")
    for group in GROUPS[:2]:
        tree[group] = load_group(group, chosen[group])
        expect_shared(group, chosen[group], tree[group])
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
    known = Known(flatten(base), rules(*(chosen[group] for group in GROUPS)))
    for source, layer in layers:
        for key, value in flatten(layer).items():
            OmegaConf.update(base, key, checked(key, value, known, f"{source}: "))
    for key, raw in dotted.items():
        expect_known(key, known)
        OmegaConf.update(base, key, checked(key, parse_value(key, raw, known), known), merge=False)
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


def phases(overlays: Any, known: Known, given: Iterable[str]) -> list[dict[str, Any]]:
    """`phases` with dotted keys and checked values; keys `given` on the command line win. Raises ConfigError."""
    found = []
    for number, overlay in enumerate(OmegaConf.to_container(OmegaConf.create(list(overlays))), start=1):
        if not isinstance(overlay, dict):
            raise ConfigError(
                f"phases: phase {number} is {overlay}, expected keys as in {{share: 1, method.kappa: 16}}"
            )
        own = flatten(overlay)
        share = own.pop("share", 1)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
            raise ConfigError(f"phases: share={share} of phase {number}: must be a number above 0")
        for key in own:
            if not key.startswith(IN_PHASES):
                raise ConfigError(f"phases: {key} of phase {number}: only {', '.join(IN_PHASES)} keys may change")
        values = {key: checked(key, value, known, f"phases: phase {number}: ") for key, value in own.items()}
        found.append({"share": share} | {key: value for key, value in values.items() if key not in given})
    return found


def member(group: str, name: str) -> Path:
    """The yaml of one group member. Raises ConfigError for an unknown name."""
    path = CONFIGS / group / f"{name}.yaml"
    if not path.is_file() or "/" in name:
        kind = {"data": "data set", "experiment": "recipe"}.get(group, group)
        raise ConfigError(f"{group}={name}: no such {kind}; {did_you_mean(name, names(group), 'run.py list')}")
    return path


def load_group(group: str, name: str) -> dict[str, Any]:
    """The yaml of one group member as a plain dict. Raises ConfigError for an unknown name."""
    tree = read_yaml(member(group, name))
    tree.pop("rules", None)  # see `rules`
    return tree


@functools.cache
def rules(*members: str) -> Rules:
    """What each key may be with these members of GROUPS: configs/rules.yaml, and the `rules` of their own yamls."""
    texts = yaml.safe_load((CONFIGS / "rules.yaml").read_text())
    for group, name in zip(GROUPS, members, strict=True):
        own = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text()).get("rules", {})
        texts |= {f"{group}.{key}": text for key, text in own.items()}
    return Rules(texts)


def read_yaml(path: Path) -> dict[str, Any]:
    """A yaml as a dict of the caller's own; parsed once, and again where the file has changed."""
    state = path.stat()
    return copy.deepcopy(_parsed(path, state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=512)
def _parsed(path: Path, changed: int, size: int) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path)) or {}


def expect_shared(group: str, name: str, tree: dict[str, Any]) -> None:
    """Raises ConfigError where the yaml of a data set or a backbone lacks a key that all of them have."""
    models = MODELS[group]
    shared = set.intersection(*(set(load_group(group, model)) for model in models)) - {"rules"}
    missing = sorted(shared - set(tree))
    if missing:
        raise ConfigError(
            f"{group}.{missing[0]}: configs/{group}/{name}.yaml lacks this key"
            f"{f', and {len(missing) - 1} more' if missing[1:] else ''}; copy it from configs/{group}/{models[0]}.yaml"
        )


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
        raise ConfigError(f"{key}: no such key; {did_you_mean(key, [*WORDS, *known], 'run.py show-config')}")


def parse_value(key: str, raw: str, known: Known) -> Any:
    """The text of a command-line value as the type that its key wants."""
    if raw == "None":
        raise ConfigError(f"{key}=None: write {key}=null for no value")
    if written(raw) != raw:
        raise ConfigError(
            f"{key}={written(raw)}: is no UTF-8, which the settings of a run are written in; rename it, or name a link "
            "to it"
        )
    if expected_type(key, known) == (str,) and raw != "null":
        return raw[1:-1] if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'" else raw
    try:
        if trees.depth(raw) > DEEPEST:
            raise yaml.YAMLError
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw)):  # a word can stand for millions
            raise yaml.YAMLError
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))["value"]
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError(
            f"{key}={shown(raw)}: cannot be read as a value; quote texts that hold brackets or colons"
            + (f", and {COLON}" if raw.startswith(("{", "[{")) else "")
        ) from None
    glued = trees.glued(value)
    if glued is not None:
        raise ConfigError(f"{key}={shown(raw)}: '{glued}' is one name; {COLON}")
    return value


def expected_type(key: str, known: Known) -> tuple[type, ...]:
    """The types a key takes: those of its rule, else that of its default; empty where any value goes."""
    if key in known.rules:
        return known.rules[key].types
    value = known.get(key)
    return () if value is None or isinstance(value, dict) else (type(value),)


def checked(key: str, value: Any, known: Known, source: str = "") -> Any:
    """The value, whole floats turned to int and ints to float where the key wants it. Raises ConfigError."""
    expect_known(key, known)
    types = expected_type(key, known)
    rule = known.rules.get(key) or Typed(types)
    refusal = None if unresolved(value) else rule.refusal(value)
    if refusal is not None:
        example = known.get(key)
        if refusal.startswith("expected a list of") and isinstance(example, list) and example and example != value:
            refusal += f", as in {str(example).replace(' ', '')}"
        raise ConfigError(f"{source}{key}={shown(rule.cast(value))}: {refusal}")
    return rule.cast(value)


def shown(value: Any) -> str:
    """A value as it is written in yaml, shortened where it is long."""
    if isinstance(value, float):
        return f"{value:g}" if value.is_integer() else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value[:20]))}{', …' if len(value) > 20 else ''}]"
    text = "null" if value is None else names_shown(str(value))
    return text if len(text) <= 200 else f"{text[:200]}…"


def unresolved(value: Any) -> bool:
    """Whether a value is that of another key, ${…}: it is checked when it is known."""
    return isinstance(value, str) and "${" in value


def check(cfg: DictConfig) -> None:
    """Rules that one key, or several together, must keep. Raises ConfigError."""
    flat = flatten(cfg)
    known = Known(flat, rules(*(cfg[group].name for group in GROUPS)))
    for key, value in flat.items():
        if key in known.rules:
            checked(key, value, known)
    if cfg.trainer.max_steps is not None and cfg.trainer.max_epochs is not None:
        raise ConfigError(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: trainer.max_steps={cfg.trainer.max_steps} is set too; "
            "set one of them to null"
        )
    if cfg.trainer.max_steps is None and cfg.trainer.max_epochs is None:
        raise ConfigError(
            "trainer.max_steps=null: set trainer.max_steps or trainer.max_epochs, one of them ends the run"
        )
    if cfg.evaluation.window.stride is not None and cfg.evaluation.window.size is None:
        raise ConfigError(
            f"evaluation.window.stride={cfg.evaluation.window.stride}: there are no windows; set "
            "evaluation.window.size, or this to null"
        )


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
        load_group(group, str(_mapping(tree, group).get("name")))  # a method that is gone ends here
    known, whole = flatten(current(tree)), with_defaults(tree)
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
    words = parse_words(tokens)
    stored = without(whole, gone)
    known = Known(known, rules(*(tree[group]["name"] for group in GROUPS)))
    for key, value in flatten(stored).items():
        checked(key, value, known, "the checkpoint's ")
    base = OmegaConf.create(stored)
    for key in THIS_MACHINE:
        OmegaConf.update(base, key, known[key])
    if (base.trainer.threads or 0) > cores():
        base.trainer.threads = None
    mappings = {key: value for key, value in known.items() if value == {}}  # a whole one may be given anew
    known = Known(mappings | flatten(base), known.rules)
    for key, raw in words.items():
        expect_changeable(key, raw, known)
        OmegaConf.update(base, key, checked(key, parse_value(key, raw, known), known), merge=False)
    check(base)
    return freeze(base)


def expect_changeable(key: str, raw: str, known: Known) -> None:
    """Raises ConfigError for a word that the configuration of a checkpoint lacks, or that its weights depend on."""
    if key in WORDS:
        raise ConfigError(f"{key}={raw}: a checkpoint keeps its {key}; only values such as data.root can be changed")
    expect_known(key, known)
    if key.startswith(("method.", "backbone.")) and key not in CHANGEABLE:
        raise ConfigError(f"{key}={raw}: a checkpoint keeps its {key.split('.')[0]}; it fits its weights alone")


def current(tree: dict[str, Any]) -> dict[str, Any]:
    """This version's configuration of the method, data set and backbone that a stored tree names, where they exist."""
    named = {group: _mapping(tree, group).get("name") for group in GROUPS}
    return plain(compose([f"{group}={name}" for group, name in named.items() if name in names(group)]))


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A group of a stored tree, empty where it has none. Raises ConfigError for one that is no group."""
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(
            f"the stored {key}={shown(value)}: expected a group of keys; the file was changed or is foreign"
        )
    return value


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A stored tree, with the defaults of keys that it does not have yet."""

    def merged(default: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
        for key, value in default.items():
            if isinstance(value, dict):
                _mapping(stored, key)
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
