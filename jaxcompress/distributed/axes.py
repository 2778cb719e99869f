"""The logical axes of arrays: what each axis of a weight or of a state stands for. Nothing here knows devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import jax

from jaxcompress.state.kv_state import KVState

Axis = Literal["batch", "kv_heads", "embed", "mlp", "vocabulary"]
"""Logical axes that may be spread over devices. Slots are none: a selection looks at all slots of a set."""

Axes = tuple[Axis | None, ...]
"""One entry for each axis of an array; None for axes that stay whole."""

_E, _K, _M, _V, _B = "embed", "kv_heads", "mlp", "vocabulary", "batch"

ARRAYS: dict[str, Axes] = {
    "embedding": (_V, _E),
    "head": (_E, _V),
    # Stacked over layers. Query heads lie beside each other by the kv head that they read.
    "attention.query.kernel": (None, _E, _K),
    "attention.key.kernel": (None, _E, _K),
    "attention.value.kernel": (None, _E, _K),
    "attention.query.bias": (None, _K),
    "attention.key.bias": (None, _K),
    "attention.value.bias": (None, _K),
    "attention.out.kernel": (None, _K, _E),
    "mlp.gate.kernel": (None, _E, _M),
    "mlp.up.kernel": (None, _E, _M),
    "mlp.gate.bias": (None, _M),
    "mlp.up.bias": (None, _M),
    "mlp.down.kernel": (None, _M, _E),
    # Mixtures: [L, experts, ...]; each device has a part of every expert.
    "mlp.gate": (None, None, _E, _M),
    "mlp.up": (None, None, _E, _M),
    "mlp.gate_bias": (None, None, _M),
    "mlp.up_bias": (None, None, _M),
    "mlp.down": (None, None, _M, _E),
    # Of `DecodeState` and of a training batch.
    "logits": (_B, None),
    "appeared": (_B, None),
    "keys": (_B,),
    "done": (_B,),
    "broken": (_B,),
    "tokens": (_B, None),
    "weights": (_B, None),
}
"""The logical axes of arrays, by the end of their dotted path in a pytree. Others stay whole."""

_WRAPPERS = ("value", "qvalue")
"""Last words of a path that belong to the container of an array."""


def axes_of(name: str, dimensions: int) -> Axes:
    """The logical axes of an array with so many axes, by its dotted path: of a model, of an optimizer's moments of it,
    or of a training batch."""
    words = name.split(".")
    while len(words) > 1 and words[-1] in _WRAPPERS:
        words.pop()
    for start in range(len(words)):
        axes = ARRAYS.get(".".join(words[start:]))
        if axes is not None and len(axes) == dimensions:
            return axes
    return (None,) * dimensions


def state_axes(part: KVState) -> KVState:
    """The logical axes of a part of a state: the same structure, with `Axes` in place of arrays.

    Rows and heads are axes. A pool of slots that all heads share, and a set of tokens that they share, have no heads.
    """
    front = lambda *axes: lambda x: (*axes, *(None,) * (x.ndim - len(axes)))
    named = lambda axes, tree: jax.tree.map(front(*axes), tree)
    own = _K if part.sets > 1 else None
    by_head = (None, _B, _K if part.kv_heads > 1 else None)
    by_set: Any = (None, _B, own)
    return replace(
        part, keys=named(by_head, part.keys), values=named(by_head, part.values),
        positions=named(by_set, part.positions),
        owner=named((None, _B), part.owner), stats=named(by_set, part.stats), memory=named((None, _B), part.memory),
        seen=(_B,), layer=(None,),
    )  # fmt: skip
