"""Counts the floating-point operations of a function from its trace.

XLA's own count (`compiled.cost_analysis()`) includes the body of a loop only once, and layers are a loop here. This
module follows the trace into loops. It counts matrix products, which dominate the cost of a transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Operations of all matrix products in one call. A multiplication with its addition counts as 2.

    The body of a `scan` counts as often as it runs. A `cond` counts as its most expensive branch.

    Args:
      args: arrays, or their shapes and dtypes; nothing is computed.

    Raises:
      ValueError: a matrix product is in a `while` loop, whose number of iterations is unknown.
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
