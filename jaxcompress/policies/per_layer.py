"""A policy for each layer."""

from __future__ import annotations

from itertools import groupby

from jaxcompress.policies.policy import Policy, leaf, policy


@policy
class per_layer(Policy):
    """A policy for each layer of the model, first to last: `per_layer(*[Window(4)] * 2, *[TOVA()] * 30)`.

    Layers may differ in scope, schedule and placement; consecutive layers of one policy are stacked. Where one scope or
    placement is asked for, it is the first layer's.

    Raises:
      ValueError: no policies, or nested ones.
    """

    layers: tuple[Policy, ...] = leaf()

    def __init__(self, *layers: Policy) -> None:
        object.__setattr__(self, "layers", layers)
        self.__post_init__()

    def check(self) -> None:
        if not self.layers or any(not isinstance(one, Policy) or one.layers for one in self.layers):
            raise ValueError("per_layer needs one plain policy for each layer of the model")

    def __repr__(self) -> str:
        return f"per_layer({', '.join(map(repr, self.layers))})"

    @property
    def name(self) -> str:
        runs = ((name, len(tuple(run))) for name, run in groupby(one.name for one in self.layers))
        return f"per_layer({','.join(f'{n}*{name}' if n > 1 else name for name, n in runs)})"

    scope = property(lambda self: self.layers[0].scope)  # type: ignore[assignment]
    placement = property(lambda self: self.layers[0].placement)  # type: ignore[assignment]
    needs = property(lambda self: max(one.needs for one in self.layers))  # type: ignore[assignment]
