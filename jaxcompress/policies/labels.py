"""How a policy is written, and read again: its label, then the settings that differ from the defaults.

    tova-kv_head      lagkv+16-cross      h2o-recent16-layer      every16      merge_nearest-threshold0.5

Each class has a `label`. In it, {field} stands for a number and [...] for what is left out at the default: Window has
the label `window[+{sinks}]`. The other settings follow in the order of the class, each after a dash:

    a word        itself                 tova-kv_head
    a number      after its name         h2o-recent16, h2o-recent0.25
    True          its name               lagkv+16-cross
    False, None   `no_` and its name     expected_attention-no_covariance

Every value of such settings has one spelling: `read(cls, write(value))` is the value, and `write(read(cls, text))` the
text. Numbers keep their types: 1 and 1.0 differ. Weights are not written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from jaxcompress.state.values import Value, same_setting

Kind = TypeVar("Kind")


class Named(Value):
    """A value that has a name. `str` gives it.

    Attributes:
      label: how the class is written (see `jaxcompress.policies.labels`). It is not inherited: a class without a label
        of its own is written by its name.

    Raises:
      ValueError: a setting of another type than its hint says, where that is a number, a bool or None; or NaN.
    """

    label = ""

    def __post_init__(self) -> None:
        for name, kinds in _kinds(type(self)).items():
            now = getattr(self, name)
            if not _is_of(now.item() if isinstance(now, np.generic) else now, kinds):
                words = " or ".join(_KINDS[kind] for kind in _KINDS if kind in kinds)
                raise ValueError(f"{name} of {type(self).__name__} must be {words}, not {now!r:.60}")
        super().__post_init__()

    @property
    def name(self) -> str:
        """For tables, messages and `get_policy`."""
        return write(self)

    def __str__(self) -> str:
        return self.name


class _Form(NamedTuple):
    """A label in its parts: `window[+{sinks}]` is (window, +, sinks, True)."""

    word: str
    join: str
    number: str
    optional: bool


def spellings(cls: type[Named]) -> tuple[str, ...]:
    """How a class may be written without settings, N for a number: `window`, `window+N`."""
    form = _form(cls)
    with_number = (f"{form.word}{form.join}N",) * bool(form.number)
    return (form.word,) * (form.optional or not form.number) + with_number


def write(value: Named) -> str:
    """The label of a value and the settings that differ from the defaults."""
    form, words = _form(type(value)), []
    text = form.word
    for field in _settings(type(value)):
        now, usual = getattr(value, field.name), same_setting(getattr(value, field.name), field.default)
        if field.name != form.number:
            words += [] if usual else [_word(field.name, now)]
        elif not (form.optional and usual):
            text += f"{form.join}{now}"
    return "".join((text, *words))


def read(cls: type[Kind], text: str, *parts: Any) -> Kind | None:
    """The value that is written so, None where the text has another label.

    Args:
      parts: what goes before the settings, such as the policy that a combinator goes around.

    Raises:
      ValueError: an unknown setting, another spelling than `write` has, or what the class itself refuses.
    """
    form = _form(cls)
    number = f"(?:{re.escape(form.join)}(\\d+))" + "?" * form.optional if form.number else "()"
    found = re.fullmatch(f"{form.word}{number}((?:-.*)?)", text)
    if found is None:
        if form.number and re.fullmatch(f"{form.word}(-.*)?", text):
            raise ValueError(f"{text!r} needs a number: {spellings(cls)[0]}, where N is {form.number}")  # type: ignore[arg-type]
        return None
    given: dict[str, Any] = {form.number: int(found[1])} if found[1] else {}
    rest = found[2]
    while rest:
        name, setting, rest = _next_setting(cls, rest, text)
        given[name] = setting
    lacking = [
        field.name
        for field in fields(cls)[len(parts) :]  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given
    ]
    if lacking:
        raise ValueError(f"{text} needs {' and '.join(lacking)}: write numbers as {text}-{lacking[0]}8, or use Python")
    value = cls(*parts, **given)
    if write(value) != text:  # type: ignore[arg-type]
        raise ValueError(f"{text!r} is written {write(value)!r}")  # type: ignore[arg-type]
    return value


_KINDS = {bool: "True or False", float: "a number", int: "a whole number", NoneType: "None"}
"""The types of plain settings, in words."""


@cache
def _kinds(cls: Any) -> dict[str, frozenset[type]]:
    """The types of each setting whose hint has no others than `_KINDS`; {} where hints cannot be read."""
    try:
        hints = get_type_hints(cls)
    except NameError:
        return {}
    kinds = {}
    for field in _settings(cls):
        hint = hints[field.name]
        some = frozenset(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
        if some <= _KINDS.keys():
            kinds[field.name] = some - {int} if float in some else some
    return kinds


def _is_of(given: Any, kinds: frozenset[type]) -> bool:
    """Whether a setting is of these types. A whole number is a number, NaN and a bool are none."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        return type(given) in kinds
    return float in kinds and not math.isnan(given) or int in kinds and isinstance(given, int)


@cache
def choices(cls: Any) -> dict[str, tuple[Any, ...]]:
    """What each setting may be whose hint is a `Literal`; {} for a class whose hints only the code around it knows."""
    try:
        hints = get_type_hints(cls)
    except NameError:
        return {}
    names = [field.name for field in _settings(cls) if get_origin(hints[field.name]) is Literal]
    return {name: get_args(hints[name]) for name in names}


@cache
def _form(cls: Any) -> _Form:
    label = vars(cls).get("label") or cls.__name__
    found = re.fullmatch(r"(\w+)(\[?)(\+?)(?:\{(\w+)\})?\]?", label)
    if found is None:
        raise ValueError(
            f"{cls.__name__} has the label {label!r}; one is like 'tova', 'snapkv+{{window}}' or 'every{{n}}'"
        )
    return _Form(found[1], found[3], found[4] or "", bool(found[2]))


def _settings(cls: Any) -> list[Any]:
    return [field for field in fields(cls) if not field.metadata.get("leaf")]


def _word(name: str, setting: Any) -> str:
    if isinstance(setting, str) and re.fullmatch(r"\w+", setting):
        return f"-{setting}"
    if setting is True:
        return f"-{name}"
    if setting is False or setting is None:
        return f"-no_{name}"
    return f"-{name}{setting!r}" if isinstance(setting, int | float) else f"-{name}={setting!r}"


def _next_setting(cls: Any, rest: str, text: str) -> tuple[str, Any, str]:
    """The field that the first word of the rest sets, its setting, and what follows."""
    for name, pattern, meaning in _words(cls):
        if found := re.match(f"-{pattern}(?=-|$)", rest):
            return name, meaning(found[0][1 + len(name) :]), rest[found.end() :]
    known = ", ".join(dict.fromkeys(re.sub(r"\(.*", "N", pattern) for _, pattern, _ in _words(cls)))
    raise ValueError(f"{text!r} has an unknown setting {rest!r}; known after a dash: {known or 'none'}")


_NUMBER = r"(?:-?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf)|nan)"


@cache
def _words(cls: Any) -> list[tuple[str, str, Callable[[str], Any]]]:
    """(field, pattern of its word, what makes a setting of what follows the field's name)."""
    words: list[tuple[str, str, Callable[[str], Any]]] = []
    hints, number = get_type_hints(cls), _form(cls).number
    for field in _settings(cls):
        hint = hints[field.name]
        kinds = set(get_args(hint)) if get_origin(hint) is not Literal and get_args(hint) else {hint}
        if field.name == number:
            continue
        words += [(field.name, word, lambda _, word=word: word) for word in choices(cls).get(field.name, ())]
        if bool in kinds:
            words += [(field.name, field.name, lambda _: True), (field.name, f"no_{field.name}", lambda _: False)]
        if NoneType in kinds:
            words.append((field.name, f"no_{field.name}", lambda _: None))
        if kinds & {int, float}:
            words.append((field.name, f"{field.name}{_NUMBER}", _number))
    return words


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
