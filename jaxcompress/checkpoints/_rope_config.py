"""Converts between the RoPE entries of Hugging Face's config.json and `RopeConfig`.

Both layouts are read: `rope_theta` next to `rope_scaling`, and `rope_parameters` of transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from jaxcompress.checkpoints._entries import flag, number, numbers, object_in, said, shown, whole
from jaxcompress.models.rope import RopeConfig, RopeKind

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}

ROPE_ENTRIES = frozenset(
    {
        "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor",
        "rotary_pct", "rotary_emb_base", "rope_local_base_freq",
    }
)  # fmt: skip
"""The entries of a config.json that say something about RoPE."""


def rope_config(c: Mapping[str, Any], head_dim: int, *, partial: bool = False) -> RopeConfig:
    """The RoPE that a config describes.

    Args:
      c: the entries, with the defaults of the family.
      partial: whether the family may rotate a part of each head.

    Raises:
      ValueError: the type is unknown; RoPE differs by layer type; an entry is missing, of another type or out of range.
    """
    given = object_in(c, "rope_scaling") or object_in(c, "rope_parameters")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(
            f"rope_parameters differ by layer type ({', '.join(given)}); only Gemma 3 is known to have such layers"
        )
    given = said(given)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "su":  # the name of longrope in the first Phi-3 checkpoints
        kind = "longrope"
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise ValueError(f"unknown rope type {shown(kind)}; known: {', '.join(_REQUIRED)}")
    # If an entry occurs twice, the one in the RoPE parameters counts. The original context is the exception: there,
    # as in transformers, the top-level entry counts.
    given = {**{key: c[key] for key in ("rope_theta", "partial_rotary_factor") if key in c}, **given}
    if c.get("original_max_position_embeddings"):
        given["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    if missing := [key for key in _REQUIRED[kind] if key not in given]:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)}")
    rope = RopeConfig(
        number(given, "rope_theta"),
        cast(RopeKind, kind),
        partial=_partial(given, head_dim, partial),
        **_scaling(kind, given, c),
    )
    return _checked(rope, head_dim)


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` of a config.json for transformers 5: the inverse of `rope_config`."""
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.partial != 1.0:
        parameters["partial_rotary_factor"] = rope.partial
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "longrope":
        parameters |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.kind in ("yarn", "longrope") and rope.attention_factor is not None:
        parameters["attention_factor"] = rope.attention_factor
    return parameters


def _partial(given: Mapping[str, Any], head_dim: int, partial: bool) -> float:
    if given.get("partial_rotary_factor") is None:
        return 1.0
    factor = number(given, "partial_rotary_factor")
    if factor != 1.0 and not partial:
        raise ValueError(
            f"partial_rotary_factor is {factor}; only 1.0, the whole head rotated, is known in this family"
        )
    if factor > 1.0 or int(head_dim * factor) < 2 or int(head_dim * factor) % 2:
        raise ValueError(f"partial_rotary_factor {factor} rotates no even number of a head's {head_dim} channels")
    return factor


def _scaling(kind: str, given: dict[str, Any], c: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `RopeConfig` that belong to a type."""
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": number(given, "factor")}
    context = whole(c, "max_position_embeddings")
    if kind == "dynamic":
        return {"factor": number(given, "factor"), "original_context": context}
    # Null and 0 mean that the entry is absent, as in transformers.
    said_original = given.get("original_max_position_embeddings")
    original = whole(given, "original_max_position_embeddings") if said_original else context
    if kind == "llama3":
        low, high = number(given, "low_freq_factor"), number(given, "high_freq_factor")
        if not low < high:
            raise ValueError(f"low_freq_factor ({low}) must be less than high_freq_factor ({high})")
        return {
            "factor": number(given, "factor"), "original_context": original,
            "low_freq_factor": low, "high_freq_factor": high,
        }  # fmt: skip
    factor = number(given, "factor") if given.get("factor") else context / original
    if kind == "longrope":
        return {
            "factor": factor, "original_context": original, "context": context,
            "short_factors": numbers(given, "short_factor"), "long_factors": numbers(given, "long_factor"),
            "attention_factor": None if given.get("attention_factor") is None else number(given, "attention_factor"),
        }  # fmt: skip
    return {
        "factor": factor, "original_context": original,
        "beta_fast": number(given, "beta_fast") if given.get("beta_fast") else 32.0,
        "beta_slow": number(given, "beta_slow") if given.get("beta_slow") else 1.0,
        "attention_factor": _attention_factor(given, factor),
        "truncate": flag({"truncate": True, **given}, "truncate"),
    }  # fmt: skip


def _checked(rope: RopeConfig, head_dim: int) -> RopeConfig:
    pairs = rope.width(head_dim) // 2
    if rope.kind == "yarn" and rope.theta <= 1:
        raise ValueError(f"rope_theta must be greater than 1 for rope type 'yarn', not {rope.theta}")
    if rope.kind == "dynamic" and pairs < 2:
        raise ValueError("rope type 'dynamic' needs heads of which at least 4 channels are rotated")
    if rope.kind == "longrope":
        for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
            if len(factors) != pairs:
                raise ValueError(f"{name} has {len(factors)} numbers for {pairs} rotated channel pairs")
        if rope.attention_factor is None and rope.factor > 1 and rope.original_context < 2:
            raise ValueError("original_max_position_embeddings must be at least 2 for rope type 'longrope', not 1")
    return rope


def _attention_factor(given: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin from `attention_factor` or the `mscale` entries; None if `factor` implies it."""
    if given.get("attention_factor") is not None:
        return number(given, "attention_factor")
    if not (given.get("mscale") and given.get("mscale_all_dim")):
        return None
    mscale, all_dim = number(given, "mscale"), number(given, "mscale_all_dim")
    temperature = lambda scale: 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
    return temperature(mscale) / temperature(all_dim)
