"""Between Hugging Face's config.json and `DecoderConfig`.

What is missing in a config.json has the value that transformers 5 gives it, family by family. Both layouts of RoPE are
read: `rope_theta` next to `rope_scaling`, and `rope_parameters` of transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxcompress.models.decoder import DecoderConfig
from jaxcompress.models.rope import RopeConfig


class _Family(NamedTuple):
    model_type: str
    defaults: Mapping[str, Any]


_ALL = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", {"max_position_embeddings": 2048}),
    "MistralForCausalLM": _Family(
        "mistral", {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "Qwen2ForCausalLM": _Family("qwen2", _QWEN),
    "Qwen3ForCausalLM": _Family("qwen3", {**_QWEN, "head_dim": 128}),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face config.json describes.

    Raises ValueError, with what was given and what is known, for an architecture, activation, RoPE type or layer type
    that the decoder does not have, for quantised weights, and for missing entries.
    """
    architecture = _architecture(raw)
    if missing := [key for key in _REQUIRED if raw.get(key) is None]:
        raise ValueError(f"the config of this {architecture} lacks {', '.join(missing)}")
    if raw.get("quantization_config"):
        raise ValueError("the checkpoint is quantised (quantization_config); only plain float weights are read")
    c = {**_ALL, **_FAMILIES[architecture].defaults, **raw}
    if c["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"unknown hidden_act {c['hidden_act']!r}; known: 'silu'")
    biased = bool(c["attention_bias"]) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    return DecoderConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=c["head_dim"] or c["hidden_size"] // c["num_attention_heads"],
        rope=_rope(c),
        norm_eps=c["rms_norm_eps"],
        qkv_bias=biased or architecture == "Qwen2ForCausalLM",
        out_bias=biased,
        mlp_bias=bool(c["mlp_bias"]) and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=bool(c["tie_word_embeddings"]),
        sliding=_sliding(architecture, c),
        max_position=c["max_position_embeddings"],
    )


def hugging_face_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of this decoder, for transformers 5: the inverse of `decoder_config`.

    The architecture follows from the config: Qwen3 with `qk_norm`, Qwen2 with biases on query, key and value only,
    Mistral if every layer slides, else Llama. Raises ValueError if that architecture lacks something the decoder has.
    """
    windows = sorted({w for w in config.sliding if w})
    every_slides = bool(windows) and all(config.sliding)
    if config.qk_norm:
        architecture = "Qwen3ForCausalLM"
    elif config.qkv_bias and not config.out_bias:
        architecture = "Qwen2ForCausalLM"
    else:
        architecture = "MistralForCausalLM" if every_slides else "LlamaForCausalLM"
    _refuse_what_is_lacking(architecture, config, windows)
    family = {
        "LlamaForCausalLM": {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias},
        "MistralForCausalLM": {"sliding_window": windows[0] if windows else None},
        "Qwen2ForCausalLM": _qwen_layers(config, windows),
        "Qwen3ForCausalLM": {"attention_bias": config.qkv_bias, **_qwen_layers(config, windows)},
    }
    return {
        "architectures": [architecture],
        "model_type": _FAMILIES[architecture].model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_position,
        "rope_parameters": _rope_parameters(config.rope),
        **family[architecture],
    }


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if names:
        given = names[0]
    else:
        by_type = {family.model_type: name for name, family in _FAMILIES.items()}
        given = by_type.get(raw.get("model_type", ""), raw.get("model_type"))
    if given not in _FAMILIES:
        raise ValueError(f"unknown architecture {given!r}; known: {', '.join(_FAMILIES)}")
    return given


def _rope(c: Mapping[str, Any]) -> RopeConfig:
    given = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(
            f"rope_parameters differ by layer type ({', '.join(given)}); only one RoPE for all layers is known"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_REQUIRED:
        raise ValueError(f"unknown rope type {kind!r}; known: {', '.join(_ROPE_REQUIRED)}")
    partial = given.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial}; only 1.0, the whole head rotated, is known")
    if missing := [key for key in _ROPE_REQUIRED[kind] if given.get(key) is None]:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)}")
    theta = float(given.get("rope_theta") or c["rope_theta"])
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=float(given["factor"]))
    # Transformers lets the entry beside the RoPE parameters win over the one among them.
    original = c.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = original or c["max_position_embeddings"]
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=float(given["factor"]),
            original_context=original,
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
        )
    factor = float(given.get("factor") or c["max_position_embeddings"] / original)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_context=original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        attention_factor=_attention_factor(given, factor),
        truncate=bool(given.get("truncate", True)),
    )


def _attention_factor(given: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin where the config says more than `factor`, which implies one of its own."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if not (mscale and all_dim):
        return None
    temperature = lambda scale: 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
    return temperature(mscale) / temperature(all_dim)


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            parameters["attention_factor"] = rope.attention_factor
    return parameters


def _sliding(architecture: str, c: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers = c["num_hidden_layers"]
    if architecture == "MistralForCausalLM":
        return (c["sliding_window"],) * layers if c["sliding_window"] is not None else ()
    if architecture == "LlamaForCausalLM":
        return ()
    window = c["sliding_window"] if c["use_sliding_window"] else None
    types = c["layer_types"]
    if types is None:
        slides = [window is not None and layer >= c["max_window_layers"] for layer in range(layers)]
    else:
        if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
            raise ValueError(f"unknown layer types {unknown}; known: 'full_attention', 'sliding_attention'")
        slides = [kind == "sliding_attention" for kind in types]
    if any(slides) and window is None:
        raise ValueError("layer_types has sliding_attention, but use_sliding_window is false or sliding_window null")
    return tuple(window if s else None for s in slides) if any(slides) else ()


def _qwen_layers(config: DecoderConfig, windows: list[int]) -> dict[str, Any]:
    slides = [bool(w) for w in config.sliding] or [False] * config.num_layers
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "max_window_layers": slides.index(True) if windows else config.num_layers,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
    }


def _refuse_what_is_lacking(architecture: str, config: DecoderConfig, windows: list[int]) -> None:
    llama, mistral, qwen3 = (architecture == f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen3"))
    qkv, out = config.qkv_bias, config.out_bias
    lacking = {
        "sliding windows of different lengths": len(windows) > 1,
        "sliding windows in some layers only": bool(windows) and llama,
        "biases on query, key and value without one on the output": qkv and not out and qwen3,
        "biases on query, key, value and output": qkv and out and mistral,
        "bias on the output without those on query, key and value": out and not qkv,
        "biases in the MLP": config.mlp_bias and not llama,
        f"hidden_size ({config.hidden_size}) that is not a multiple of num_heads ({config.num_heads})": llama
        and config.hidden_size % config.num_heads != 0,
    }
    if reasons := [reason for reason, applies in lacking.items() if applies]:
        raise ValueError(
            f"no Hugging Face architecture fits: the nearest, {architecture}, has no {', no '.join(reasons)}"
        )
