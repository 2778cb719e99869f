"""`jax.jit` for functions that close over arrays: those arrays become arguments of the program.

`jax.jit` writes arrays that a function closes over into the program as constants. With a frozen teacher the program is
as large as the teacher, and a large teacher cannot be compiled at all. Here such arrays are passed by reference, so an
objective may simply close over frozen weights. (JAX plans to do the same:
https://docs.jax.dev/en/latest/internals/constants.html.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr


class Compiled:
    """A jitted function, called with positional arguments.

    The arrays that it closes over are found at the first call for each set of shapes; this object keeps them alive.
    Arrays that a function jitted inside this one closes over stay constants.

    Args:
      function: pure; pytrees in, pytrees out.
      donate: the first argument is donated; it must not be used after the call.
    """

    def __init__(self, function: Callable[..., Any], *, donate: bool = False):
        self._traced = jax.jit(function)
        self._donate = donate
        self._programs: dict[Any, _Program] = {}

    def __call__(self, *args: Any) -> Any:
        program = self._program(args)
        return program.run(program.closed_over, *args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program for arguments of these shapes, as `jax.jit(...).lower` returns it."""
        program = self._program(args)
        return program.run.lower(program.closed_over, *args)

    def _program(self, args: tuple[Any, ...]) -> _Program:
        traced = self._traced.trace(*args)  # JAX caches it by shape
        if traced.jaxpr not in self._programs:
            jaxpr, results = traced.jaxpr.jaxpr, jax.tree.structure(traced.out_info)

            def run(closed_over: list[jax.Array], *args: Any) -> Any:
                return jax.tree.unflatten(results, eval_jaxpr(jaxpr, closed_over, *jax.tree.leaves(args)))

            jitted = jax.jit(run, donate_argnums=1 if self._donate else ())
            self._programs[traced.jaxpr] = _Program(jitted, list(map(jnp.asarray, traced.jaxpr.consts)))
        return self._programs[traced.jaxpr]


class _Program(NamedTuple):
    run: Any
    closed_over: list[jax.Array]
