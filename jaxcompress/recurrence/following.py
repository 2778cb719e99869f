"""Kernels that apply the eviction rule of a policy themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jaxtyping import Array

from jaxcompress.pallas_kernels.dispatch import choose_kernel
from jaxcompress.pallas_kernels.types import Chosen
from jaxcompress.policies.schedule import Schedule
from jaxcompress.recurrence.attention import call_of
from jaxcompress.recurrence.layer import spare_slots
from jaxcompress.recurrence.step import StepSpec, TokenBlock
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.kv_state import KVState


def rule_of(state: KVState, spec: StepSpec) -> EvictionRule | None:
    """The eviction rule that a kernel may apply itself, if kernels support everything else in the call; else None."""
    policy = spec.policy
    plain = policy.schedule == Schedule() and policy.scope != "pool" and not policy.gates and not policy.reduction
    plain &= spec.context.placement == "absolute" and not spec.traits.beyond_kernels
    rule = policy.rule(state.capacity) if plain else None
    return rule and rule._replace(spare=spare_slots(state, spec))


def why_no_rule(rule: EvictionRule | None, spec: StepSpec) -> str | None:
    """The reason why a kernel for more than one token cannot apply the rule; None if it can."""
    if spec.traits.beyond_kernels:
        return spec.traits.beyond_kernels
    return None if rule else f"policy {spec.policy.name}, or where it places tokens, follows no rule that kernels know"


def rule_kernel(block: TokenBlock, state: KVState, spec: StepSpec) -> tuple[Chosen, EvictionRule] | None:
    """The kernel for a whole decoding step of this policy, and the policy's rule; None if no kernel supports it."""
    rule = rule_of(state, spec)
    if rule is None:
        return None
    chosen = choose_kernel("step_evict", call_of(block.grouped(state), state.keys, state.sets, rule), spec.backend)
    return chosen and (chosen, rule)


def rule_numbers(state: KVState, layer: Any) -> Array | None:
    """The policy's one number per slot, [B, P, S], for a kernel that applies its rule; None if it has none."""
    numbers = jax.tree.leaves(state.stats)
    return numbers[0][layer] if numbers else None


def with_rule_numbers(state: KVState, layer: Any, numbers: Array | None) -> KVState:
    if numbers is None:
        return state
    return replace(state, stats=jax.tree.map(lambda x: x.at[layer].set(numbers), state.stats))
