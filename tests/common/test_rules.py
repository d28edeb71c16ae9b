"""The vocabulary of rules: what each takes, what it says, and how texts become rules."""

import subprocess
import sys

import pytest

from common import rules
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value", "said"),
    [
        ("whole(1)", 0, "must be at least 1"),
        ("whole(0)", -1, "must not be negative"),
        ("whole(1)", 10**12, "must be at most 1000000000"),
        ("whole(1, 9)", 10, "must be at most 9"),
        ("whole(1)", 1.5, "expected a whole number, got a number"),
        ("whole(1)", True, "expected a whole number, got true or false"),
        ("whole(1)", "a", "expected a whole number, got a text"),
        ("whole(1)", None, "this key needs a value (a whole number)"),
        ("whole(1)", float("nan"), "expected a whole number, got a number"),
        ("whole(1, 9, odd=True)", 4, "expected an odd number from 1 to 9"),
        ("number(0)", -0.5, "must not be negative"),
        ("number(0)", float("nan"), "must be a finite number"),
        ("number(0)", float("inf"), "must be a finite number"),
        ("number(0)", 10**400, "expected a number, got a whole number"),
        ("number(above=0)", 0, "must be above 0"),
        ("number(0, 1)", 1.5, "expected a number from 0 to 1"),
        ("number(0, below=1)", 1, "expected a number from 0 to below 1"),
        ("number(above=0, most=1)", 0, "expected a number above 0, at most 1"),
        ("number(above=-1, below=1)", 1, "expected a number between -1 and 1"),
        ("number(above=0, most=60)", 70, "must be at most 60"),
        ("choice(mean, sinkhorn)", "sinkhor", "not one of mean, sinkhorn; did you mean sinkhorn?"),
        ("choice(mean, sinkhorn)", "x", "not one of mean, sinkhorn"),
        ("nullable(number(above=0), 'no clipping')", -1, "must be above 0, or null for no clipping"),
        ("text()", " ", "must not be blank"),
        ("text()", "a\nb", "must not hold control characters ('a\\nb')"),
        ("place()", "", "must not be blank"),
        ("place()", "a\0b", "must not be blank"),
        ("listed(whole(1), length=2)", [1], "expected a list of 2 whole numbers of at least 1"),
        ("listed(whole(1), least=1)", [], "expected a list of whole numbers of at least 1, 1 or more of them"),
        ("listed(number(0, 1), rising=True)", [1, 0], "expected a list of numbers from 0 to 1, in ascending order"),
        ("listed(number(0, 1))", [0, "x"], "expected a list of numbers from 0 to 1"),
        ("listed(number(0, 1))", [float("nan")], "expected a list of numbers from 0 to 1"),
        ("listed(number(0, 1))", [None], "expected a list of numbers from 0 to 1"),
        ("listed(number(0, 1))", 1, "expected a list like [1,2], got a whole number"),
        ("listed(whole(0), distinct=True)", [1, 1], "expected a list of whole numbers of at least 0, no two alike"),
        ("either(choice(auto), whole(1))", 0, "must be at least 1"),
        ("either(choice(auto), whole(1))", "aut", "expected auto or a whole number of at least 1"),
        ("either(whole(1), listed(whole(1), length=2))", [1], "expected a list of 2 whole numbers of at least 1"),
        ("within(9)", [1, {"x": 10}], "expected numbers from -9 to 9"),
        ("within(9)", float("nan"), "expected numbers from -9 to 9"),
    ],
)
def test_what_a_rule_refuses_and_says(text, value, said):
    assert rules.read(text).refusal(value) == said


@pytest.mark.parametrize(
    ("text", "value", "taken"),
    [
        ("whole(1)", 3.0, 3),
        ("number(0)", 3, 3.0),
        ("choice('1', '2')", 1, "1"),
        ("nullable(whole(1))", None, None),
        ("listed(whole(1))", [2.0, 3], [2, 3]),
        ("listed(number(0))", [1, 2.5], [1, 2.5]),
        ("either(choice(auto), whole(1))", 4, 4),
        ("either(choice(auto), whole(1))", "auto", "auto"),
        ("either(whole(1), listed(whole(1), length=2))", [4, 5], [4, 5]),
        ("within(9)", "any text", "any text"),
    ],
)
def test_what_a_rule_takes(text, value, taken):
    rule = rules.read(text)
    assert rule.refusal(value) is None
    cast = rule.cast(value)
    assert cast == taken
    assert type(cast) is type(taken)


@pytest.mark.parametrize("text", ["whole(", "wholes(1)", "whole('a', b=2)", "print(1)", "__import__('os')"])
def test_a_text_that_is_no_rule_is_named(text):
    with pytest.raises(ConfigError) as caught:
        rules.read(text)
    assert str(caught.value).startswith(f"rule {text}: cannot be read (")
    assert str(caught.value).endswith(f"known: {', '.join(rules.VOCABULARY)}")


def test_the_most_exact_rule_of_a_key_holds():
    found = rules.Rules({"optim.*.lr": "number(0)", "optim.head.lr": "number(0, 1)", "optim.*.l*": "number(0, 2)"})
    assert found["optim.head.lr"] == rules.number(0, 1)
    assert found["optim.x.lr"] == rules.number(0, 2)
    assert found.get("seed") is None


def test_settings_are_checked_without_torch():
    code = "import sys, config; config.compose(['method=hsg']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
