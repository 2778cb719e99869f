"""What a policy is beside its name, in the settings of a cell: the weights of a learned one, the code of one's own."""

from __future__ import annotations

import hashlib
import re

import jax

from jaxcompress.checkpoints._written import policy_digest
from jaxcompress.policies.names import own_places
from jaxcompress.policies.own import own_source
from jaxcompress.policies.policy import Policy

POLICY_HASH = "policy_hash"
"""The setting of a cell that stands for what the name of its policy does not say."""


def policy_settings(name: str, policy: Policy) -> dict[str, str]:
    """The setting for a cell; none if the name says all.

    Args:
      name: the expression that names the policy, as the cell has it.
      policy: what it stands for. Of a learned one the name and the arrays count, whatever model it was saved with.
    """
    known = [own_source(place) for place in own_places(name)]
    if jax.tree.leaves(policy) or re.search(r"\blearned\b", name):
        known.append(policy_digest(policy).encode())
    if not known:
        return {}
    digest = hashlib.sha256()
    for part in known:
        digest.update(hashlib.sha256(part).digest())
    return {POLICY_HASH: digest.hexdigest()[:12]}
