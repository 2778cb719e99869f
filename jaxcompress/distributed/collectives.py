"""What the devices of a compiled program send each other."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = dict(pred=8, s4=4, u4=4, bf16=16, f8e4m3fn=8, f8e5m2=8)
"""Of types whose name does not end in their width."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_FOUND = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-done)?\(")
"""A collective that ends where it began, or its end: only that has the result alone."""
_CALLED = re.compile(r"\b(body|calls|to_apply|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
"""Where the compiler does not note a loop's length, it is the only number in the loop's condition."""


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results on one device. Several arrays may be exchanged together.
      nbytes: of these results.
      times: how often it runs; a loop whose length is not known when the program is compiled counts once.
      op: the operation of JAX that it comes from, as XLA names it; may be empty.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    times: int
    op: str


def collectives(program: jax.stages.Compiled) -> tuple[Collective, ...]:
    """The exchanges of a compiled program, in the order in which XLA prints them.

    Where a loop's length is known, such as that of the loop over layers, its exchanges count so many times.

    Examples:
      >>> for one in collectives(jax.jit(step).lower(model, state).compile()):  # doctest: +SKIP
      ...     print(one.times, one.kind, one.shapes, one.op)
    """
    found: list[tuple[str, Collective]] = []
    callers: dict[str, list[tuple[str, str, int | None]]] = {}
    numbers: dict[str, list[int]] = {}
    entry = within = ""
    for line in str(program.as_text()).splitlines():
        if begins := _COMPUTATION.match(line):
            within = begins[2]
            entry = within if begins[1] else entry
        elif here := _FOUND.search(line):
            found.append((within, _collective(here[1], here[2], line)))
        numbers.setdefault(within, []).extend(int(n) for n in _CONSTANT.findall(line))
        called = dict(_CALLED.findall(line))
        trips = int(known[1]) if (known := _TRIPS.search(line)) else None
        for how, name in called.items():
            ends = called.get("condition", "") if how == "body" else ""
            callers.setdefault(name, []).append((within, ends, trips if how == "body" else 1))
        for names in _BRANCHES.findall(line):
            for name in re.findall(r"[\w.-]+", names):
                callers.setdefault(name, []).append((within, "", 1))

    def length(trips: int | None, condition: str) -> int:
        ends = numbers.get(condition, [])
        return trips or (ends[0] if len(ends) == 1 else 1)

    def runs(name: str) -> int:
        if name == entry:
            return 1
        return sum(length(trips, ends) * runs(caller) for caller, ends, trips in callers.get(name, ()))

    return tuple(one._replace(times=runs(name)) for name, one in found)


def _collective(results: str, kind: str, line: str) -> Collective:
    named = re.findall(r"\b(\w+)\[([\d,]*)\]", results)
    arrays = [(name, tuple(int(n) for n in dims.split(",") if n)) for name, dims in named]
    op = re.search(r'op_name="([^"]*)"', line)
    size = sum(_bits(name) * math.prod(shape) for name, shape in arrays) // 8
    return Collective(kind, tuple(shape for _, shape in arrays), size, 1, op[1] if op else "")


def _bits(name: str) -> int:
    return _BITS[name] if name in _BITS else int(re.sub(r"\D", "", name))
