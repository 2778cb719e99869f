"""Values: frozen dataclasses that JAX accepts like any argument.

    @value
    class Scale(Value):
        by: float = 2.0                     # a setting: static, part of the compiled program
        weights: Array = leaf()             # an array, or another value: a leaf, an argument of the compiled program

A value is registered as a pytree. `jax.jit(f)(value, x)` needs no static arguments, new weights cause no compilation,
and no weight is a constant of a program. Two values are equal if their types, settings and weights are; 1 and 1.0
differ.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.core
import numpy as np

Kind = TypeVar("Kind")


def leaf(**options: Any) -> Any:
    """A field that holds arrays or values, in a class decorated with `value`; options are those of
    `dataclasses.field`."""
    return field(metadata={"leaf": True}, **options)


class Value:
    """The base class of all values. Subclasses are decorated with `value`, and may override `check`."""

    def check(self) -> None:
        """Raises ValueError if the settings are inconsistent; called when a value is created."""

    def __post_init__(self) -> None:
        for name in _settings_of(type(self)):
            setting = getattr(self, name)
            if isinstance(setting, np.generic):
                object.__setattr__(self, name, setting.item())
            elif not isinstance(setting, Hashable) or isinstance(setting, jax.Array):
                raise TypeError(
                    f"{type(self).__name__}: {name} is a setting, which must be a plain value such as a number or a "
                    f"string, not a {type(setting).__name__}; declare it as leaf() if it holds arrays"
                )
        self.check()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        mine, how = jax.tree.flatten(self)
        theirs, other_how = jax.tree.flatten(other)
        return how == other_how and all(map(_same, mine, theirs))

    def __hash__(self) -> int:
        leaves, how = jax.tree.flatten(self)
        if leaves:
            raise TypeError(
                f"{type(self).__name__} holds arrays, so it cannot be hashed or be a static argument of jax.jit: pass "
                "it as an ordinary argument"
            )
        return hash(how)

    def __repr__(self) -> str:
        """An expression that recreates the value; arrays appear by dtype and shape only."""
        given = []
        for one in fields(self):  # type: ignore[arg-type]
            now = getattr(self, one.name)
            required = one.default is MISSING and one.default_factory is MISSING
            if required:
                given.append(_shown(now))
            elif not same_setting(now, one.default):
                given.append(f"{one.name}={_shown(now)}")
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(leaf, field))
def value(cls: type[Kind]) -> type[Kind]:
    """Makes a class of values. Annotated fields are settings; fields declared as `leaf()` hold arrays or values."""
    made: Any = dataclass(frozen=True, eq=False, repr=False, init="__init__" not in cls.__dict__)(cls)
    leaves = tuple(one.name for one in fields(made) if one.metadata.get("leaf"))
    settings = _settings_of(made)

    def flatten(one: Any) -> tuple[list[Any], _Settings]:
        return [getattr(one, name) for name in leaves], _Settings(tuple(getattr(one, name) for name in settings))

    def flatten_with_keys(one: Any) -> tuple[list[Any], _Settings]:
        children, rest = flatten(one)
        return [(jax.tree_util.GetAttrKey(n), child) for n, child in zip(leaves, children, strict=True)], rest

    def unflatten(rest: _Settings, children: Any) -> Any:
        one = object.__new__(made)  # without checks: leaves may be anything while JAX works on a tree
        for name, x in (*zip(settings, rest.values, strict=True), *zip(leaves, children, strict=True)):
            object.__setattr__(one, name, x)
        return one

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def same_setting(one: Any, other: Any) -> bool:
    """Whether two settings are equal by type and content, at any depth: 1, 1.0 and True differ."""
    return _Settings((one,)) == _Settings((other,))


def _settings_of(cls: Any) -> tuple[str, ...]:
    return tuple(one.name for one in fields(cls) if not one.metadata.get("leaf"))


class _Settings:
    """Settings of a value, compared by type and content: 1, 1.0 and True all differ."""

    __slots__ = ("values", "_key")

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values, self._key = values, _typed(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Settings) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.values)


def _typed(x: Any) -> Any:
    """A form of a setting that equals another only if the types are equal too, at any depth."""
    if isinstance(x, tuple):
        return type(x), tuple(map(_typed, x))
    return type(x), (x.hex() if isinstance(x, float) else x)  # hex: 0.0 and -0.0 differ, nan equals nan


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer):  # their contents are unknown
        return False
    return np.shape(x) == np.shape(y) and np.asarray(x).dtype == np.asarray(y).dtype and bool(np.array_equal(x, y))


def _shown(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"<{x.dtype} [{', '.join(map(str, x.shape))}]>"
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return f"({', '.join(map(_shown, x))}{',' * (len(x) == 1)})"
    if isinstance(x, tuple):
        inside = (f"{name}={_shown(y)}" for name, y in zip(x._fields, x, strict=True))  # type: ignore[attr-defined]
        return f"{type(x).__name__}({', '.join(inside)})"
    return repr(x)
