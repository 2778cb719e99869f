"""Learned policies by name: what is saved with a model beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.policies.gates import dmc
from jaxcompress.policies.learned import DMS, Retention
from jaxcompress.policies.policy import Policy


class Kind(NamedTuple):
    """How a learned policy is made: of weights, and the settings that it has."""

    make: Callable[..., Policy]
    settings: tuple[str, ...]


LEARNED = {
    "dmc": Kind(dmc, ()),
    "dms": Kind(DMS, ("window", "scope")),
    "retention": Kind(Retention, ("scope", "recent")),
}


def learned_policy(kind: str, weights: Mapping[str, Any], **settings: Any) -> Policy:
    """A learned policy from what was saved: its kind, the arrays of its `ForgetHead` by name, `window` and `scope`.

    Raises:
      ValueError: an unknown kind, arrays of other names, unknown settings, or what the kind itself refuses.
    """
    if kind not in LEARNED:
        raise ValueError(f"unknown learned policy {kind!r}; known: {', '.join(LEARNED)}")
    if set(weights) != set(ForgetHead._fields):
        raise ValueError(f"a learned policy has the weights {', '.join(ForgetHead._fields)}, not {', '.join(weights)}")
    make, known = LEARNED[kind]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{kind} has no setting {', '.join(unknown)}; known: {', '.join(known) or 'none'}")
    return make(ForgetHead(**{name: jnp.asarray(weights[name], jnp.float32) for name in weights}), **settings)
