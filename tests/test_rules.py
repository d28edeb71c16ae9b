"""No number of any method, data set or backbone is without a rule, and no nonsense passes one."""

import math

import pytest

import config
from common import rules
from common.errors import CheckpointError, ConfigError

NONSENSE = (-1, 1e12, math.nan, math.inf, "nonsense", True, [], ["x"], [math.nan], [-1e12], [[1]], {"a": 1})
MEMBERS = [(group, name) for group in config.GROUPS for name in config.names(group)]
LARGE = {
    "seed": "any seed is as good as another",
    "data.scenes_seed": "any seed is as good as another",
}
"""Keys that take 1e12, and why."""
NEGATIVE = {
    "data.workers": "-1 chooses",
    "method.crf.shift": "is taken off a kernel",
    "method.terms.*.shift": "features may be apart",
}
"""Keys that take -1, and why."""


def known(group: str, name: str) -> config.Known:
    cfg = config.compose([f"{group}={name}"])
    return config.Known(config.flatten(cfg), config.rules(*(cfg[member].name for member in config.GROUPS)))


def numeric(rule: rules.Rule | None, value: object) -> bool:
    if rule is None:
        return value is None or (isinstance(value, int | float | list) and not isinstance(value, bool))
    return any(kind in rule.types for kind in (int, float, list))


@pytest.mark.parametrize(("group", "name"), MEMBERS)
def test_every_number_has_a_rule_that_keeps_nonsense_out(group, name):
    keys = known(group, name)
    for key, value in keys.items():
        rule = keys.rules.get(key)
        if key == "phases" or not numeric(rule, value):  # phases: see `config.phases`
            continue
        assert rule is not None, f"{key}: declare what it may be, in configs/{group}/{name}.yaml or configs/rules.yaml"
        if isinstance(rule, rules.Within):
            continue
        for nonsense in (
            -1,
            1e12,
            math.nan,
            math.inf,
            "nonsense",
            True,
            [],
            ["x"],
            [math.nan],
            [-1e12],
            [[1]],
            {"a": 1},
        ):
            said = refusal(key, nonsense, keys)
            if excused(key, rule, nonsense):
                assert said is None
                continue
            assert said is not None, f"{key}={nonsense} passes"
            assert said.startswith(f"{key}=")
            assert "\n" not in said
        if value is not None:
            assert config.checked(key, value, keys) == value


def refusal(key: str, value: object, keys: config.Known) -> str | None:
    try:
        config.checked(key, value, keys)
    except ConfigError as error:
        return str(error)
    return None


def excused(key: str, rule: rules.Rule, value: object) -> bool:
    """Whether a key may well have such a value."""
    if value == -1 and not isinstance(value, bool):
        return key in rules.Rules(dict.fromkeys(NEGATIVE, "within(1)"))
    if value == 1e12:
        return key in LARGE
    if not isinstance(rule, rules.Listed):
        return False
    texts = isinstance(rule.item, rules.Text | rules.Place)
    return bool(value == [] and not rule.length and not rule.least) or (
        texts and isinstance(value, list) and value and not isinstance(value[0], list)  # numbers are texts there
    )


@pytest.mark.parametrize("name", config.names("experiment"))
def test_every_recipe_keeps_the_rules(name):
    words = config.load_group("experiment", name)["words"]
    config.compose([f"experiment={name}", *([] if words["data"] == "scenes" else ["data.root=x"])])


def line(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.compose(words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("backbone.levels=[a]", "backbone.levels=[a]: expected a list of whole numbers from -1000 to 1000, 1 or more "
         "of them, no two alike, as in [3,5]"),
        ("backbone.mean=[]", "backbone.mean=[]: expected a list of 3 numbers from -10 to 10, as in [0.5,0.5,0.5]"),
        ("backbone.std=[nan,1,1]", "backbone.std=[nan, 1, 1]: expected a list of 3 numbers above 0, at most 10, as in "
         "[0.5,0.5,0.5]"),
        ("method=dino method.augment.contrast=-1", "method.augment.contrast=-1: expected a number from 0 to 1"),
        ("method=dino method.augment.gray_p=1e12", "method.augment.gray_p=1e+12: expected a number from 0 to 1"),
        ("method=transfgu method.augment.hue=-1", "method.augment.hue=-1: expected a number from 0 to 0.5"),
        ("method=transfgu method.augment.blur_kernel=4", "method.augment.blur_kernel=4: expected an odd number from "
         "1 to 255"),
        ("method=deep_spectral method.augment.scale=[2,1]", "method.augment.scale=[2, 1]: expected a list of 2 numbers "
         "above 0, at most 1, in ascending order, as in [0.4,1.0]"),
        ("method.num_clusters=1e9", "method.num_clusters=1000000000: must be at most 65536, or null for the number of "
         "classes"),
        ("optim.linear_probe.lr=1e40", "optim.linear_probe.lr=1e+40: must be at most 10000"),
        ("data.max_broken=5", "data.max_broken=5: expected a number from 0 to 1"),
        ("run.name=' '", "run.name= : must not be blank"),
        ("predict.size=1", "predict.size=1: must be at least 8"),
        ("evaluation.window.stride=8", "evaluation.window.stride=8: there are no windows; set evaluation.window.size, "
         "or this to null"),
        (f"backbone.levels={'[' * 5000}", f"backbone.levels={'[' * 200}…: cannot be read as a value; quote texts that "
         "hold brackets or colons"),
        ("backbone.levels=[&a [1],*a]", "backbone.levels=[&a [1],*a]: cannot be read as a value; quote texts that hold "
         "brackets or colons"),
        ("phases=[{share:1},{share:1}]", "phases=[{share:1},{share:1}]: 'share:1' is one name; write a space behind a "
         "colon and quote the whole word: 'key={name: value}'"),
        ("method=maskdistill method.masks.options={heads:[0]}", "method.masks.options={heads:[0]}: cannot be read as a "
         "value; quote texts that hold brackets or colons, and write a space behind a colon and quote the whole word: "
         "'key={name: value}'"),
        ("run.name=a\nb", "run.name=a\\nb: must not hold control characters ('a\\nb')"),
        ("phases=[{share: .nan}]", "phases: share=nan of phase 1: must be a number above 0"),
    ],
)  # fmt: skip
def test_the_lines(words, said):
    first, *rest = words.split(" ") if words.startswith("method=") else [words]
    assert line(first, *rest) == said


def test_where_files_go_is_not_taken_from_a_checkpoint(tmp_path):
    words = ["seed=3", f"cache.dir={tmp_path}/theirs", f"run.dir={tmp_path}/runs", "run.name=x", "run.overwrite=true"]
    tree = config.plain(config.compose(words))
    cfg = config.restore(tree)
    assert (cfg.seed, cfg.cache.dir, cfg.run.dir, cfg.run.name, cfg.run.overwrite) == (3, None, "runs", None, False)
    assert config.restore(tree, ["cache.dir=mine"]).cache.dir == "mine"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", "x", "seed=x: expected a whole number, got a text"),
        ("data", "x", "the stored data=x: expected a group of keys; the file was changed or is foreign"),
        ("cache", [1], "the stored cache=[1]: expected a group of keys"),
        ("trainer", {"max_steps": "x"}, "trainer.max_steps=x: expected a whole number, got a text"),
        ("evaluation", {"kmeans": 3}, "the stored kmeans=3: expected a group of keys"),
        ("optim", {"linear_probe": {"lr": [1]}}, "optim.linear_probe.lr=[1]: expected a number, got a list like [1,2]"),
    ],
)
def test_a_stored_configuration_keeps_the_rules_too(key, value, said):
    tree = {**config.plain(config.compose([])), key: value}
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        config.restore(tree)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
