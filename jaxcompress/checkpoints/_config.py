"""Converts between Hugging Face's config.json and `DecoderConfig`.

An entry that is missing in config.json has the default of transformers 5 for that family. Both layouts of RoPE are
read: `rope_theta` next to `rope_scaling`, and `rope_parameters` of transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxcompress.checkpoints._entries import (
    MOST_LAYERS,
    architecture_in,
    flag,
    number,
    object_in,
    said,
    shown,
    text,
    whole,
)
from jaxcompress.checkpoints._experts_config import (
    COUNT,
    DEFAULTS,
    GPT_OSS,
    MIXTRAL,
    QWEN3_MOE,
    architecture_of_experts,
    entries_of_experts,
    experts_in,
    lacking_experts,
)
from jaxcompress.models.config import DecoderConfig
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
    MIXTRAL: _Family("mixtral", DEFAULTS[MIXTRAL]),
    QWEN3_MOE: _Family("qwen3_moe", DEFAULTS[QWEN3_MOE]),
    GPT_OSS: _Family("gpt_oss", DEFAULTS[GPT_OSS]),
}
_WITH_BIASES = ("LlamaForCausalLM", "Qwen3ForCausalLM", QWEN3_MOE, GPT_OSS)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


INTERPRETED = frozenset(
    {
        "architectures", "model_type", "dtype", "torch_dtype", "rope_scaling", "rope_parameters",
        "original_max_position_embeddings", "partial_rotary_factor", "quantization_config", *COUNT,
        *_REQUIRED, *_ALL, *(key for family in _FAMILIES.values() for key in family.defaults),
    }
)  # fmt: skip
"""The entries that `decoder_config` reads, or that `hugging_face_config` and the writer of weights set."""


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face config.json describes.

    Raises:
      ValueError: the decoder does not have the architecture, activation, RoPE type or layer type; the weights are
        quantised; an entry is missing, of another type or out of range. The message gives the found and the known
        values.
    """
    architecture = _architecture(raw)
    if missing := [key for key in _REQUIRED if raw.get(key) is None]:
        raise ValueError(f"the config of this {architecture} lacks {', '.join(missing)}")
    quantised = object_in(raw, "quantization_config")
    if quantised and not (architecture == GPT_OSS and quantised.get("quant_method") == "mxfp4"):
        raise ValueError(
            "the checkpoint is quantised (quantization_config); only plain float weights are read, and the MXFP4 of "
            "GPT-OSS"
        )
    c = {**_ALL, **_FAMILIES[architecture].defaults, **said(raw, "num_key_value_heads", "sliding_window")}
    if text(c, "hidden_act") not in ("silu", "swish"):
        raise ValueError(f"unknown hidden_act {c['hidden_act']!r}; known: 'silu'")
    biased = flag(c, "attention_bias") and architecture in _WITH_BIASES
    hidden, heads = whole(c, "hidden_size"), whole(c, "num_attention_heads")
    if c["head_dim"] is None and hidden % heads:
        raise ValueError(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) without head_dim")
    return DecoderConfig(
        vocab_size=whole(c, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole(c, "moe_intermediate_size" if architecture == QWEN3_MOE else "intermediate_size"),
        num_layers=whole(c, "num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=heads if c["num_key_value_heads"] is None else whole(c, "num_key_value_heads"),
        head_dim=hidden // heads if c["head_dim"] is None else whole(c, "head_dim"),
        rope=_rope(c),
        norm_eps=number(c, "rms_norm_eps"),
        qkv_bias=biased or architecture == "Qwen2ForCausalLM",
        out_bias=biased,
        mlp_bias=flag(c, "mlp_bias") and architecture == "LlamaForCausalLM",
        experts=experts_in(architecture, c),
        sinks=architecture == GPT_OSS,
        qk_norm=architecture in ("Qwen3ForCausalLM", QWEN3_MOE),
        tied=flag(c, "tie_word_embeddings"),
        sliding=_sliding(architecture, c),
        max_position=whole(c, "max_position_embeddings"),
    )


def hugging_face_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of this decoder, for transformers 5: the inverse of `decoder_config`.

    The architecture follows from the config. With experts or sinks it is GPT-OSS, Qwen3-MoE or Mixtral (see
    `architecture_of_experts`); else Qwen3 with `qk_norm`, Qwen2 with biases on query, key and value only, Mistral if
    every layer has a sliding window, else Llama.

    Raises:
      ValueError: that architecture lacks a feature of the decoder.
    """
    windows = sorted({w for w in config.sliding if w})
    every_slides = bool(windows) and all(config.sliding)
    if (of_experts := architecture_of_experts(config)) is not None:
        architecture = of_experts
    elif config.qk_norm:
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
        MIXTRAL: {"sliding_window": windows[0] if windows else None},
        QWEN3_MOE: {
            "attention_bias": config.qkv_bias,
            "use_sliding_window": bool(windows),
            "sliding_window": windows[0] if windows else None,
        },
        GPT_OSS: {
            "attention_bias": config.qkv_bias,
            "sliding_window": windows[0] if windows else None,
            "layer_types": _layer_types(config),
        },
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
        **entries_of_experts(architecture, config),
    }


def _architecture(raw: Mapping[str, Any]) -> str:
    given = architecture_in(raw)
    if given is None:
        kind = raw.get("model_type")
        given = next((name for name, family in _FAMILIES.items() if family.model_type == kind), kind)
    if not isinstance(given, str) or given not in _FAMILIES:
        raise ValueError(f"unknown architecture {shown(given)}; known: {', '.join(_FAMILIES)}")
    return given


def _rope(c: Mapping[str, Any]) -> RopeConfig:
    given = object_in(c, "rope_scaling") or object_in(c, "rope_parameters")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(
            f"rope_parameters differ by layer type ({', '.join(given)}); only one RoPE for all layers is known"
        )
    given = said(given)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_REQUIRED:
        raise ValueError(f"unknown rope type {shown(kind)}; known: {', '.join(_ROPE_REQUIRED)}")
    # If an entry occurs twice, the one in the RoPE parameters counts. The original context is the exception: there,
    # as in transformers, the top-level entry counts.
    given = {**{key: c[key] for key in ("rope_theta", "partial_rotary_factor") if key in c}, **given}
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        partial = shown(given["partial_rotary_factor"])
        raise ValueError(f"partial_rotary_factor is {partial}; only 1.0, the whole head rotated, is known")
    if missing := [key for key in _ROPE_REQUIRED[kind] if key not in given]:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)}")
    theta = number(given, "rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=number(given, "factor"))
    if c.get("original_max_position_embeddings"):
        given["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    context = whole(c, "max_position_embeddings")
    # Null and 0 mean that the entry is absent, as in transformers.
    said_original = given.get("original_max_position_embeddings")
    original = whole(given, "original_max_position_embeddings") if said_original else context
    if kind == "llama3":
        low, high = number(given, "low_freq_factor"), number(given, "high_freq_factor")
        if not low < high:
            raise ValueError(f"low_freq_factor ({low}) must be less than high_freq_factor ({high})")
        return RopeConfig(
            theta=theta,
            kind=kind,
            factor=number(given, "factor"),
            original_context=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    assert kind == "yarn"
    if theta <= 1:
        raise ValueError(f"rope_theta must be greater than 1 for rope type 'yarn', not {theta}")
    factor = number(given, "factor") if given.get("factor") else context / original
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_context=original,
        beta_fast=number(given, "beta_fast") if given.get("beta_fast") else 32.0,
        beta_slow=number(given, "beta_slow") if given.get("beta_slow") else 1.0,
        attention_factor=_attention_factor(given, factor),
        truncate=flag({"truncate": True, **given}, "truncate"),
    )


def _attention_factor(given: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on cos and sin from `attention_factor` or the `mscale` entries; None if `factor` implies it."""
    if given.get("attention_factor") is not None:
        return number(given, "attention_factor")
    if not (given.get("mscale") and given.get("mscale_all_dim")):
        return None
    mscale, all_dim = number(given, "mscale"), number(given, "mscale_all_dim")
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
    layers = whole(c, "num_hidden_layers", most=MOST_LAYERS)
    if architecture == "LlamaForCausalLM":
        return ()
    window = None if c["sliding_window"] is None else whole(c, "sliding_window")
    if architecture in ("MistralForCausalLM", MIXTRAL):
        return () if window is None else (window,) * layers
    if architecture != GPT_OSS:
        window = window if flag(c, "use_sliding_window") else None
    if architecture == QWEN3_MOE:
        return () if window is None else (window,) * layers
    types = c["layer_types"]
    if types is None and architecture == GPT_OSS:
        slides = [layer % 2 == 0 for layer in range(layers)]
    elif types is None:
        first = whole(c, "max_window_layers", least=0)
        slides = [window is not None and layer >= first for layer in range(layers)]
    else:
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            raise ValueError(f"layer_types must be a list of names, not {shown(types)}")
        if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
            raise ValueError(f"unknown layer types {unknown}; known: 'full_attention', 'sliding_attention'")
        if len(types) != layers:
            raise ValueError(f"layer_types has {len(types)} entries for {layers} layers")
        slides = [kind == "sliding_attention" for kind in types]
    if any(slides) and window is None:
        raise ValueError("layer_types has sliding_attention, but use_sliding_window is false or sliding_window null")
    return tuple(window if s else None for s in slides) if any(slides) else ()


def _layer_types(config: DecoderConfig) -> list[str]:
    slides = config.sliding or (None,) * config.num_layers
    return ["sliding_attention" if window else "full_attention" for window in slides]


def _qwen_layers(config: DecoderConfig, windows: list[int]) -> dict[str, Any]:
    slides = [bool(w) for w in config.sliding] or [False] * config.num_layers
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "max_window_layers": slides.index(True) if windows else config.num_layers,
        "layer_types": _layer_types(config),
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
        **lacking_experts(architecture, config),
    }
    if reasons := [reason for reason, applies in lacking.items() if applies]:
        raise ValueError(
            f"no Hugging Face architecture fits: the nearest, {architecture}, has no {', no '.join(reasons)}"
        )
