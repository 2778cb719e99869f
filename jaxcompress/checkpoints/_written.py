"""A policy as an expression and arrays, from which the same policy is made again."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.checkpoints._policy import SavedPolicy
from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.policies.gates import LearnedGates, gated
from jaxcompress.policies.learned import DMS, Retention
from jaxcompress.policies.names import get_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.registry import LEARNED


class WrittenPolicy(NamedTuple):
    """A policy in writing.

    Attributes:
      expression: what `get_policy` takes; `learned` stands in it for the learned policy.
      learned: the learned policy in it, None if there is none.
    """

    expression: str
    learned: SavedPolicy | None

    def make(self) -> Policy:
        """The policy. Raises ValueError if the expression or the weights give none."""
        return get_policy(self.expression, None if self.learned is None else self.learned.make())


def written_policy(policy: Policy) -> WrittenPolicy | None:
    """A policy in writing; None if writing does not give it back: a class of one's own, or one with arrays of its own.

    At most one learned policy may stand in it, any number of times.
    """
    for written in (WrittenPolicy(policy.name, None), _with_learned(policy)):
        try:
            if written is not None and written.make() == policy:
                return written
        except (TypeError, ValueError):  # no name that is known, or not the settings of a learned policy
            continue
    return None


def policy_digest(policy: Policy) -> str:
    """64 hexadecimal digits that stand for the name and the arrays of a policy."""
    digest = hashlib.sha256(policy.name.encode())
    for leaf in jax.tree.leaves(policy):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _with_learned(policy: Policy) -> WrittenPolicy | None:
    """With `learned` in place of the first learned policy in it."""
    inside = jax.tree.leaves(policy, is_leaf=lambda one: _head(one) is not None)
    one = next((one for one in inside if _head(one) is not None), None)
    if one is None:
        return None
    kind = "dmc" if isinstance(one, gated) else one.label
    settings = {name: getattr(one, name) for name in LEARNED[kind].settings}
    weights = {name: np.asarray(weight) for name, weight in _head(one)._asdict().items()}
    return WrittenPolicy(policy.name.replace(one.name, "learned"), SavedPolicy(kind, settings, weights))


def _head(one: Any) -> Any:
    """The network of a learned policy, None for anything else."""
    learned = one.gates if isinstance(one, gated) and isinstance(one.gates, LearnedGates) else one
    head = learned.head if isinstance(learned, DMS | Retention | LearnedGates) and learned is not None else None
    return head if isinstance(head, ForgetHead) and isinstance(one, Policy) else None
