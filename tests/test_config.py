"""Layers, strictness, types and the traps of the dot-list: exact error texts."""

import pytest
import yaml
from omegaconf import OmegaConf

import config
from common.errors import CheckpointError, ConfigError


def message(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.compose(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_wins_over_every_layer():
    cfg = config.compose(["method=hidden_positives", "optim.head.lr=1e-4", "trainer.max_steps=1e3", "seed=7"])
    assert cfg.optim.head.lr == 1e-4
    assert cfg.trainer.max_steps == 1000
    assert isinstance(cfg.trainer.max_steps, int)
    assert cfg.seed == 7
    assert cfg.method.name == "hidden_positives"
    assert cfg.optim.linear_probe.lr == 1e-3  # the default layer shines through
    assert cfg.optim.cluster_probe == {**config.compose([]).optim.cluster_probe, "lr": 1e-2}  # the method's, merged


def test_a_trainer_preset_wins_over_the_default_and_loses_to_the_command_line():
    assert config.compose(["trainer=debug"]).trainer.max_steps == 6
    assert config.compose(["trainer=debug", "trainer.max_steps=9"]).trainer.max_steps == 9


@pytest.mark.parametrize("group", ["method", "data", "backbone", "trainer"])
def test_every_member_of_every_group_composes(group):
    for name in config.names(group):
        words = [f"{group}={name}"]
        cfg = config.compose(words)
        if group != "trainer":
            assert cfg[group].name == name


def test_unknown_key_names_the_nearest():
    assert message("optim.head.lrr=1", "method=hidden_positives") == (
        "optim.head.lrr: no such key; did you mean optim.head.lr?"
    )


def test_last_part_of_a_key_is_found_too():
    assert message("max_steps=3") == "max_steps: no such key; did you mean trainer.max_steps?"


def test_unknown_members_name_the_nearest():
    assert message("method=hidden_positive") == "method=hidden_positive: no such method; did you mean hidden_positives?"
    assert message("data=scene") == "data=scene: no such data set; did you mean scenes?"
    assert message("data=coco").endswith("no such data set; did you mean coco81 or coco_instances or cocostuff171?")
    assert message("backbone=resnet5").startswith("backbone=resnet5: no such backbone; did you mean resnet50")


def test_flags_and_bare_words_are_refused():
    assert message("--seed=1") == "--seed=1: flags are not used here; write seed=1 without dashes"
    assert message("hidden_positives") == (
        "hidden_positives: expected key=value, as in method=hidden_positives or seed=3"
    )


def test_none_is_not_null():
    assert message("run.name=None") == "run.name=None: write run.name=null for no value"
    assert config.compose(["run.name=null"]).run.name is None


def test_wrong_types():
    assert message("trainer.max_steps=abc") == "trainer.max_steps=abc: expected a whole number, got a text"
    assert message("trainer.max_steps=1.5") == "trainer.max_steps=1.5: expected a whole number, got a number"
    assert message("seed=true") == "seed=True: expected a whole number, got true or false"
    assert message("run.overwrite=1") == "run.overwrite=1: expected true or false, got a whole number"
    assert message("seed=null") == "seed=null: this key needs a value (a whole number)"


def test_a_group_of_keys_cannot_be_set_as_a_whole():
    assert message("trainer=debug", "optim.linear_probe=3").startswith(
        "optim.linear_probe: is a group of keys; set one of "
    )


def test_texts_stay_texts():
    cfg = config.compose(["run.name=0042", "data=folder", "data.root=/a:b/[c]"])
    assert cfg.run.name == "0042"
    assert cfg.data.root == "/a:b/[c]"


def test_choices_and_cross_field_rules():
    assert message("logger=wand") == "logger=wand: not one of csv, wandb; did you mean wandb?"
    assert message("trainer.max_steps=null") == (
        "trainer.max_steps=null: set trainer.max_steps or trainer.max_epochs, one of them ends the run"
    )
    assert message("trainer.max_steps=5", "trainer.max_epochs=2") == (
        "trainer.max_epochs=2: trainer.max_steps=5 is set too; set one of them to null"
    )
    assert config.compose(["trainer.max_epochs=2"]).trainer.max_steps is None
    assert message("trainer.devices=two") == "trainer.devices=two: expected auto or a whole number from 1 to 1024"
    assert message("data.batch_size=0") == "data.batch_size=0: must be at least 1"
    assert (
        message("optim.linear_probe.optimizer=adma")
        == "optim.linear_probe.optimizer=adma: not one of adam, adamw, sgd, lars; did you mean adam?"
    )
    assert message("optim.linear_probe.clip_norm=abc") == (
        "optim.linear_probe.clip_norm=abc: expected a number, got a text"
    )
    assert message("optim.linear_probe.clip_norm=-1").endswith("must be above 0, or null for no clipping")
    assert config.compose(["method=hidden_positives", "optim.head.clip_norm=null"]).optim.head.clip_norm is None
    assert message("optim.linear_probe.lr=-1") == "optim.linear_probe.lr=-1: must not be negative"


def test_the_result_cannot_be_changed_by_accident():
    cfg = config.compose([])
    with pytest.raises(Exception, match="read-only"):
        cfg.seed = 3


def test_a_yaml_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    path, parsed, load = tmp_path / "x.yaml", [], OmegaConf.load
    monkeypatch.setattr(config.OmegaConf, "load", lambda given: parsed.append(given) or load(given))
    path.write_text("a: [1]\n")
    config.read_yaml(path)["a"].append(2)  # the caller's own
    assert config.read_yaml(path) == {"a": [1]}
    path.write_text("a: [1, 3]\n")
    assert config.read_yaml(path) == {"a": [1, 3]}
    assert parsed == [path, path]


def test_saved_config_is_plain_yaml_and_restores(tmp_path):
    cfg = config.compose(["seed=5"])
    config.save(cfg, tmp_path / "config.yaml")
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tree == config.plain(cfg)
    assert config.restore(tree, ["seed=6"]).seed == 6
    with pytest.raises(ConfigError, match=r"^method=stego: a checkpoint keeps its method; only values"):
        config.restore(tree, ["method=stego"])
    with pytest.raises(ConfigError) as caught:
        config.restore(tree, ["method.num_clusters=9"])
    assert str(caught.value) == "method.num_clusters=9: a checkpoint keeps its method; it fits its weights alone"


def old_tree(*words: str) -> dict:
    """What a checkpoint of an earlier version holds: keys that are there now are missing."""
    tree = config.plain(config.compose(["method=hidden_positives", "seed=5", *words]))
    del tree["evaluation"]["posthoc"], tree["evaluation"]["resolutions"], tree["method"]["guarded"]
    return tree


def test_a_stored_configuration_without_a_new_key_takes_its_default():
    cfg = config.restore(old_tree("method.dim=16"), ["evaluation.resolutions=[64]"])
    assert (cfg.seed, cfg.method.dim, cfg.method.guarded) == (5, 16, True)
    assert cfg.evaluation.posthoc.epochs == 0
    assert cfg.evaluation.resolutions == [64]
    assert cfg.trainer.max_steps == 200  # stored, though the layers of another method would say 300
    now = config.plain(config.compose(["method=hidden_positives", "seed=6"]))
    assert config.first_difference(config.with_defaults(old_tree()), now) == "seed (5 -> 6)"


def test_stored_keys_that_are_gone_end_in_one_line(caplog):
    tree = old_tree()
    tree["evaluation"]["kmeans"]["magic"] = 3
    tree["gone"] = {"x": 1}
    with caplog.at_level("WARNING", logger="labelfree.config"):
        cfg = config.restore(tree)
    assert [record.getMessage() for record in caplog.records] == [
        "the checkpoint holds keys that this version does not have; they are left out: evaluation.kmeans.magic, gone.x"
    ]
    assert "gone" not in cfg
    assert "magic" not in cfg.evaluation.kmeans
    tree["method"]["magic"] = 3
    with pytest.raises(CheckpointError) as caught:
        config.restore(tree)
    assert str(caught.value) == (
        "method.magic: the checkpoint was written with this key, which this version does not have; "
        "use the version it was made with (environment.json in its run folder names the commit)"
    )
    tree["method"]["name"] = "stegosaurus"
    with pytest.raises(ConfigError, match=r"^method=stegosaurus: no such method; "):
        config.restore(tree)
    assert config.with_defaults({"seed": 99})["method"]["name"] == "kmeans_baseline"


def test_first_difference_names_the_key():
    old, new = (
        config.plain(config.compose([])),
        config.plain(config.compose(["optim.linear_probe.lr=0.5", "run.name=x"])),
    )
    assert config.first_difference(old, new, ignore=("run.",)) == "optim.linear_probe.lr (0.001 -> 0.5)"
    assert config.first_difference(old, old) is None


def test_every_key_of_every_yaml_is_commented():
    """A yaml is the manual: a line that sets a value explains it, in itself or in a sibling group above."""
    for path in sorted(config.CONFIGS.rglob("*.yaml")):
        if path.parent.name in ("trainer", "experiment", "sweep") or path.name == "rules.yaml":
            continue  # these set keys that default.yaml explains, or those of W&B
        lines = path.read_text().partition("\nrules:")[0].splitlines()
        explained = {line.split(":")[0].strip() for line in lines if "#" in line and ":" in line.split("#")[0]}
        for line in lines:
            body = line.split("#")[0].rstrip()
            if not body or body.endswith(":") or body.lstrip().startswith("-"):
                continue
            key = body.split(":")[0].strip()
            assert "#" in line or key in explained or key == "name", f"{path.name}: {key} has no comment"


def test_every_method_yaml_holds_only_what_it_may():
    for name in config.names("method"):
        tree = OmegaConf.to_container(OmegaConf.load(config.CONFIGS / "method" / f"{name}.yaml"))
        assert tree["method"]["name"] == name
        assert "num_clusters" in tree["method"]


def test_every_key_that_may_be_null_has_a_type():
    """So that a wrong value ends in one line."""
    for group in ("method", "backbone", "data"):
        for name in config.names(group):
            cfg = config.compose([f"{group}={name}", *(["data.root=x"] if group == "data" else [])])
            rules = config.rules(*(cfg[member].name for member in config.GROUPS))
            known = config.Known(config.flatten(cfg), rules)
            free = [key for key, value in known.items() if value is None and not config.expected_type(key, known)]
            assert not free, name


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (
            "optim.head.schedule: cosin",
            "optim.head.schedule=cosin: not one of constant, cosine, linear, poly, step, exponential",
        ),
        ("method.kappa: 5, data.interpolation: blurry", "data.interpolation=blurry: not one of "),
    ],
)
def test_settings_of_a_phase_keep_the_rules_of_all_settings(phase, message):
    with pytest.raises(ConfigError) as caught:
        config.compose(["method=segsort", f"phases=[{{share: 1}}, {{share: 1, {phase}}}]"])
    assert str(caught.value).startswith(f"phases: phase 2: {message}")


def test_a_method_may_be_at_home_with_a_backbone(monkeypatch):
    """Its `words` stand in for the default words, and give way to a recipe and to the command line."""
    load = config.load_group

    def with_words(group, name):
        at_home = group == "method" and name in ("stego", "eagle")
        return load(group, name) | ({"words": {"backbone": "resnet18"}} if at_home else {})

    monkeypatch.setattr(config, "load_group", with_words)
    assert config.compose(["method=stego"]).backbone.name == "resnet18"
    assert config.compose(["method=dino"]).backbone.name == "tiny"
    assert config.compose(["method=stego", "backbone=tiny"]).backbone.name == "tiny"
    assert config.compose(["experiment=eagle_cityscapes27_vits8"]).backbone.name == "dino_vits8_300ep"
