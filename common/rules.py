"""What a setting may be: a small vocabulary of rules, and the text they are written in beside the settings.

A yaml of `configs/` says `pool.size: nullable(whole(1, 1000000))` under `rules:`; `read` makes a `Rule` of the text.
Nothing here imports torch, so that a wrong setting is told at once.
"""

import ast
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError, did_you_mean

MOST = 10**9
"""The largest number where a rule names none: what is larger is a slip."""


class Rule:
    """What a value may be. `types`: the Python types that it may have, none where any will do."""

    types: tuple[type, ...] = ()
    null = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value of one of the types, as the end of a line; None where nothing is."""
        raise NotImplementedError

    def said(self, count: int | None = None) -> str:
        """The rule in words: for one value, or (with `count`, 0: any number) for the entries of a list."""
        raise NotImplementedError

    def cast(self, value: Any) -> Any:
        """The value, whole floats as int and ints as float where that is the type asked for."""
        return cast(value, self.types)

    def refusal(self, value: Any) -> str | None:
        """`problem`, also for values of a wrong type and null."""
        if value is None:
            return None if self.null else f"this key needs a value ({type_names(self.types)})"
        value = self.cast(value)
        if self.types and not is_a(value, self.types):
            return f"expected {type_names(self.types)}, got {type_names((type(value),))}"
        return self.problem(value)


@dataclass(frozen=True)
class Number(Rule):
    """A finite number of a range; `whole` ones are int."""

    whole: bool
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    odd: bool = False

    @property
    def types(self) -> tuple[type, ...]:
        return (int,) if self.whole else (float,)

    def problem(self, value: Any) -> str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.odd and value % 2 == 0:
            return f"expected {self.said()}"
        low = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        top = MOST if self.most is None and self.below is None else self.most
        high = (top is not None and value > top) or (self.below is not None and value >= self.below)
        if not low and not high:
            return None
        narrow = self.below is not None or (self.most is not None and self.most <= 1)
        if narrow and not self.whole:
            return f"expected {self.said()}"
        if high:
            return f"must be at most {top}"
        if self.above is not None:
            return f"must be above {self.above:g}"
        return "must not be negative" if self.least == 0 else f"must be at least {self.least:g}"

    def said(self, count: int | None = None) -> str:
        name = "number" if count is None or count == 1 else "numbers"
        name = f"odd {name}" if self.odd else f"whole {name}" if self.whole else name
        start = ("an " if self.odd else "a ") if count is None else f"{count} " if count else ""
        return start + name + self._range()

    def _range(self) -> str:
        open_low = self.above is not None
        low = self.above if open_low else self.least
        if low is None:
            return "" if self.most is None else f" of at most {self.most:g}"
        if self.below is not None:
            return f" between {low:g} and {self.below:g}" if open_low else f" from {low:g} to below {self.below:g}"
        if self.most is None:
            return f" above {low:g}" if open_low else f" of at least {low:g}"
        return f" above {low:g}, at most {self.most:g}" if open_low else f" from {low:g} to {self.most:g}"


@dataclass(frozen=True)
class Choice(Rule):
    """One of some texts."""

    known: tuple[str, ...]
    types = (str,)

    def problem(self, value: Any) -> str | None:
        if value in self.known:
            return None
        near = did_you_mean(value, self.known)
        return f"not one of {', '.join(self.known)}" + (f"; {near}" if near.startswith("did") else "")

    def said(self, count: int | None = None) -> str:
        words = " or ".join(self.known)
        return words if count is None else f"{count or 'some'} of {', '.join(self.known)}"


@dataclass(frozen=True)
class Text(Rule):
    """A text that is not blank and holds no control characters."""

    types = (str,)

    def problem(self, value: Any) -> str | None:
        if not value.strip():
            return "must not be blank"
        return None if value.isprintable() else f"must not hold control characters ({value!a})"

    def said(self, count: int | None = None) -> str:
        return "a text" if count is None else f"{count} texts" if count else "texts"


@dataclass(frozen=True)
class Place(Rule):
    """A path: any text but a blank one or one with a NUL, which no system takes."""

    types = (str,)

    def problem(self, value: Any) -> str | None:
        return "must not be blank" if not value.strip() or "\0" in value else None

    def said(self, count: int | None = None) -> str:
        return "a path" if count is None else f"{count} paths" if count else "paths"


@dataclass(frozen=True)
class Listed(Rule):
    """A list of values that keep one rule: `length` of them, or `least` to `most`."""

    item: Rule
    length: int | None = None
    least: int = 0
    most: int = 1000
    rising: bool = False
    distinct: bool = False
    types = (list,)

    def problem(self, value: Any) -> str | None:
        least, most = (self.least, self.most) if self.length is None else (self.length, self.length)
        sound = least <= len(value) <= most and not any(self.item.refusal(entry) for entry in value)
        sound = sound and not (self.rising and any(a > b for a, b in itertools.pairwise(value)))
        sound = sound and not (self.distinct and len({repr(entry) for entry in value}) < len(value))
        return None if sound else f"expected {self.said()}"

    def cast(self, value: Any) -> Any:
        return [cast(entry, self.item.types, widen=False) for entry in value] if isinstance(value, list) else value

    def said(self, count: int | None = None) -> str:
        least = f", {self.least} or more of them" if self.least and self.length is None else ""
        order = (", in ascending order" if self.rising else "") + (", no two alike" if self.distinct else "")
        start = "a list of " if count is None else "lists of "
        return start + self.item.said(self.length or 0) + least + order


@dataclass(frozen=True)
class Either(Rule):
    """What keeps one of several rules."""

    rules: tuple[Rule, ...]

    @property
    def types(self) -> tuple[type, ...]:
        return tuple(kind for rule in self.rules for kind in rule.types)

    def fitting(self, value: Any) -> list[Rule]:
        as_it_is = [rule for rule in self.rules if is_a(value, rule.types)]
        turned = [rule for rule in self.rules if is_a(rule.cast(value), rule.types)]
        return as_it_is or [rule for rule in turned if rule.types != (str,)] or turned  # 1 is a number before a text

    def problem(self, value: Any) -> str | None:
        fitting = self.fitting(value)
        said = [rule.problem(rule.cast(value)) for rule in fitting]
        if None in said:
            return None
        one = len(said) == 1 and not isinstance(fitting[0], Choice)
        return said[0] if one else f"expected {self.said()}"

    def cast(self, value: Any) -> Any:
        return self.fitting(value)[0].cast(value) if self.fitting(value) else value

    def said(self, count: int | None = None) -> str:
        return " or ".join(rule.said(count) for rule in self.rules)


@dataclass(frozen=True)
class Nullable(Rule):
    """What keeps a rule, or null; `meaning`: what null stands for."""

    rule: Rule
    meaning: str = ""
    null = True

    @property
    def types(self) -> tuple[type, ...]:
        return self.rule.types

    def problem(self, value: Any) -> str | None:
        said = self.rule.problem(value)
        return said and said + (f", or null for {self.meaning}" if self.meaning else "")

    def cast(self, value: Any) -> Any:
        return self.rule.cast(value)

    def said(self, count: int | None = None) -> str:
        return f"{self.rule.said(count)} or null"


@dataclass(frozen=True)
class Typed(Rule):
    """Anything of some types (of any where there are none), as long as it is finite: where no rule is declared."""

    types: tuple[type, ...] = ()

    @property
    def null(self) -> bool:
        return not self.types

    def problem(self, value: Any) -> str | None:
        return "must be a finite number" if isinstance(value, float) and not math.isfinite(value) else None

    def said(self, count: int | None = None) -> str:
        return type_names(self.types)


@dataclass(frozen=True)
class Within(Rule):
    """Anything, with numbers from -most to most: settings of a library, which checks them itself."""

    most: float
    types = ()
    null = True

    def problem(self, value: Any) -> str | None:
        numbers = (entry for entry in leaves(value) if isinstance(entry, int | float))
        return f"expected {self.said()}" if any(not abs(entry) <= self.most for entry in numbers) else None

    def said(self, count: int | None = None) -> str:
        return f"numbers from {-self.most:g} to {self.most:g}"


def whole(least: int, most: int | None = None, odd: bool = False) -> Rule:
    """A whole number from `least` to `most`."""
    return Number(True, least=least, most=most, odd=odd)


def number(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> Rule:
    """A number from `least` (or above `above`) to `most` (or below `below`)."""
    return Number(False, least, most, above, below)


def choice(*known: str) -> Rule:
    return Choice(known)


def listed(item: Rule, **settings: Any) -> Rule:
    return Listed(item, **settings)


def either(*rules: Rule) -> Rule:
    return Either(rules)


VOCABULARY: dict[str, Callable[..., Rule]] = {
    "whole": whole, "number": number, "choice": choice, "text": Text, "place": Place, "listed": listed,
    "either": either, "nullable": Nullable, "within": Within,
}  # fmt: skip


def read(text: str) -> Rule:
    """The rule that a text such as `nullable(whole(1))` stands for; bare words are texts. Raises ConfigError."""
    try:
        return _built(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ConfigError(f"rule {text}: cannot be read ({error}); known: {', '.join(VOCABULARY)}") from None


def _built(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in VOCABULARY:
        named = {item.arg or "": _built(item.value) for item in node.keywords}
        return VOCABULARY[node.func.id](*map(_built, node.args), **named)
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


class Rules(Mapping[str, Rule]):
    """Rules by dotted key; a key with `*` stands for any part, a later entry replaces an earlier one."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.exact = {key: read(text) for key, text in texts.items() if "*" not in key}
        self.patterns = {key: read(text) for key, text in texts.items() if "*" in key}

    def __getitem__(self, key: str) -> Rule:
        if key in self.exact:
            return self.exact[key]
        for pattern in reversed(self.patterns):
            if fnmatch.fnmatchcase(key, pattern):
                return self.patterns[pattern]
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.exact, *self.patterns])

    def __len__(self) -> int:
        return len(self.exact) + len(self.patterns)


# Types.


def is_a(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a value has one of the types; true and false are no whole numbers."""
    return isinstance(value, types) and not (isinstance(value, bool) and bool not in types)


def cast(value: Any, types: tuple[type, ...], widen: bool = True) -> Any:
    """A number as the one of the types that it can be: 3.0 as 3, 3 as 3.0 (with `widen`), 42 as "42"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or is_a(value, types):
        return value
    if float in types and isinstance(value, int):
        return float(value) if widen and abs(value) < 1 << 1000 else value
    if int in types and isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if types == (str,) else value


def type_names(types: tuple[type, ...]) -> str:
    """Types in a user's words."""
    readable = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        list: "a list like [1,2]",
        dict: "a mapping",
        type(None): "null",
    }
    return " or ".join(dict.fromkeys(readable.get(item, item.__name__) for item in types))


def leaves(value: Any) -> Iterator[Any]:
    """The values inside nested lists and mappings."""
    if isinstance(value, list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from leaves(entry)
    else:
        yield value
