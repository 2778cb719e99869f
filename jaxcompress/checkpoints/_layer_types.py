"""Converts between the entries of config.json about kinds of layers, and windows and RoPE by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcompress.checkpoints._entries import flag, object_in, shown, whole
from jaxcompress.checkpoints._rope_config import rope_config, rope_parameters
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.rope import RopeConfig

Sliding = tuple[int | None, ...]
Ropes = tuple[RopeConfig, tuple[RopeConfig | None, ...]]
_FULL, _SLIDING = "full_attention", "sliding_attention"


# Windows


def no_window(c: Mapping[str, Any], layers: int) -> Sliding:
    return ()


def one_window(c: Mapping[str, Any], layers: int) -> Sliding:
    """`sliding_window` in every layer (Mistral, Phi-3)."""
    return () if c["sliding_window"] is None else (whole(c, "sliding_window"),) * layers


def one_window_if_used(c: Mapping[str, Any], layers: int) -> Sliding:
    """`sliding_window` in every layer, if `use_sliding_window` (Qwen3-MoE)."""
    window = _used_window(c)
    return () if window is None else (window,) * layers


def qwen_windows(c: Mapping[str, Any], layers: int) -> Sliding:
    """From layer `max_window_layers` on, if `use_sliding_window`, unless `layer_types` says which."""
    window = _used_window(c)
    first = whole(c, "max_window_layers", least=0) if c["layer_types"] is None else 0
    return _by_type(c, layers, window, [window is not None and layer >= first for layer in range(layers)])


def smollm3_windows(c: Mapping[str, Any], layers: int) -> Sliding:
    """In layers without RoPE, if `use_sliding_window`, unless `layer_types` says which."""
    window = _used_window(c)
    return _by_type(c, layers, window, [window is not None and not turns for turns in _with_rope(c, layers)])


def gemma_windows(every: int | None) -> Any:
    """In all layers but each n-th, unless `layer_types` says which; `every` is n, None for the config's own."""

    def windows(c: Mapping[str, Any], layers: int) -> Sliding:
        window = None if c["sliding_window"] is None else whole(c, "sliding_window")
        n = whole(c, "sliding_window_pattern") if every is None else every
        return _by_type(c, layers, window, [(layer + 1) % n != 0 for layer in range(layers)])

    return windows


def _used_window(c: Mapping[str, Any]) -> int | None:
    window = None if c["sliding_window"] is None else whole(c, "sliding_window")
    return window if flag(c, "use_sliding_window") else None


def _by_type(c: Mapping[str, Any], layers: int, window: int | None, otherwise: Sequence[bool]) -> Sliding:
    """The windows by `layer_types`, or if that is absent by `otherwise`: which layers slide."""
    types, slides = c["layer_types"], list(otherwise)
    if types is not None:
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            raise ValueError(f"layer_types must be a list of names, not {shown(types)}")
        if unknown := sorted(set(types) - {_FULL, _SLIDING}):
            raise ValueError(f"unknown layer types {unknown}; known: {_FULL!r}, {_SLIDING!r}")
        if len(types) != layers:
            raise ValueError(f"layer_types has {len(types)} entries for {layers} layers")
        slides = [kind == _SLIDING for kind in types]
    if any(slides) and window is None:
        raise ValueError(f"layer_types has {_SLIDING}, but use_sliding_window is false or sliding_window null")
    return tuple(window if s else None for s in slides) if any(slides) else ()


def layer_types(config: DecoderConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a config.json."""
    slides = [bool(w) for w in config.sliding] or [False] * config.num_layers
    window = next((w for w in config.sliding if w), None)
    return {"sliding_window": window, "layer_types": [_SLIDING if s else _FULL for s in slides]}


# RoPE


def one_rope(c: Mapping[str, Any], head_dim: int, sliding: Sliding) -> Ropes:
    return rope_config(c, head_dim), ()


def phi3_rope(c: Mapping[str, Any], head_dim: int, sliding: Sliding) -> Ropes:
    """The first Phi-3 checkpoints call longrope "yarn"."""
    for key in ("rope_scaling", "rope_parameters"):
        given = object_in(c, key)
        if "yarn" in (given.get("type"), given.get("rope_type")):
            c = {**c, key: {**given, "rope_type": "longrope"}}
    return rope_config(c, head_dim, partial=True), ()


def neox_rope(c: Mapping[str, Any], head_dim: int, sliding: Sliding) -> Ropes:
    """GPT-NeoX has its own names for the base and the share of rotated channels."""
    own = {"rope_theta": c["rotary_emb_base"], "partial_rotary_factor": c["rotary_pct"]}
    return rope_config({**c, **own}, head_dim, partial=True), ()


def gemma3_ropes(c: Mapping[str, Any], head_dim: int, sliding: Sliding) -> Ropes:
    """One RoPE for full layers, to which `rope_scaling` applies, and one for layers with a window."""
    given, scaling = object_in(c, "rope_parameters"), object_in(c, "rope_scaling")

    def of(kind: str, theta: Any, more: Mapping[str, Any]) -> RopeConfig:
        own = {**object_in(given, kind), **more}
        return rope_config({**c, "rope_theta": theta, "rope_scaling": None, "rope_parameters": own}, head_dim)

    full, local = of(_FULL, c["rope_theta"], scaling), of(_SLIDING, c["rope_local_base_freq"], {})
    ropes = tuple(local if window else full for window in sliding)
    return full, () if set(ropes) <= {full} else ropes


def gemma3_rope_entries(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `gemma3_ropes`."""
    slides = zip(config.sliding, config.layer_ropes, strict=True) if config.sliding and config.layer_ropes else ()
    local = next((rope for window, rope in slides if window and rope), config.rope)
    return {"rope_parameters": {_FULL: rope_parameters(config.rope), _SLIDING: rope_parameters(local)}}


def smollm3_ropes(c: Mapping[str, Any], head_dim: int, sliding: Sliding) -> Ropes:
    """Some layers have no RoPE."""
    rope = rope_config(c, head_dim)
    turns = _with_rope(c, whole(c, "num_hidden_layers"))
    return rope, () if all(turns) else tuple(rope if turn else None for turn in turns)


def _with_rope(c: Mapping[str, Any], layers: int) -> list[bool]:
    """Whether each layer has RoPE: 1 in `no_rope_layers`."""
    given = c["no_rope_layers"]
    if given is None:
        every = whole(c, "no_rope_layer_interval")
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(given, list) or not all(one in (0, 1) and not isinstance(one, float) for one in given):
        raise ValueError(f"no_rope_layers must be a list of 0 (no RoPE) and 1 (RoPE), not {shown(given)}")
    if len(given) < layers:
        raise ValueError(f"no_rope_layers has {len(given)} entries for {layers} layers")
    return [bool(one) for one in given[:layers]]
