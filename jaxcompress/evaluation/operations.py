"""Floating-point operations of a function, as it is traced.

XLA's own count (`compiled.cost_analysis()`) takes the body of a loop once, however often it runs, and layers are a loop
here. This one follows the trace into loops and counts what matters in a transformer: matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations of all matrix products in one call, 2 for a multiplication with its addition.

    A `scan` counts as often as it runs, of a `cond` the most expensive branch.

    Args:
      args: arrays, or their shapes and dtypes; nothing is computed.

    Raises:
      ValueError: a matrix product in a `while` loop, of which nobody knows how often it runs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(shape[axis] for axis in contracted) * math.prod(equation.outvars[0].aval.shape)
    inside = [_count(inner) for inner in _inner(params)]
    if name == "while" and any(inside):
        raise ValueError("a matrix product runs in a while loop, nobody knows how often; use a scan")
    if name == "cond":
        return max(inside)
    return params.get("length", 1) * sum(inside) if name == "scan" else sum(inside)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    is_program = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=is_program):
        if is_program(leaf):
            yield getattr(leaf, "jaxpr", leaf)
