"""Converts between Hugging Face's config.json and `DecoderConfig`.

An entry that is missing in config.json has the default of transformers 5 for that family (see
`jaxcompress.checkpoints._families`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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
from jaxcompress.checkpoints._families import FAMILIES, Family, nearest_architecture
from jaxcompress.checkpoints._rope_config import ROPE_ENTRIES, rope_parameters
from jaxcompress.models.activations import Activation
from jaxcompress.models.config import DecoderConfig

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
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NULLABLE = ("num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Entries of which null says something else than their absence."""
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip
_WRITTEN: Mapping[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

INTERPRETED = frozenset(
    {
        "architectures", "model_type", "dtype", "torch_dtype", "quantization_config",
        *ROPE_ENTRIES, *_REQUIRED, *_ALL, *(key for family in FAMILIES.values() for key in family.defaults),
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
    architecture = architecture_of(raw)
    family = FAMILIES[architecture]
    if missing := [key for key in _REQUIRED if raw.get(key) is None]:
        raise ValueError(f"the config of this {architecture} lacks {', '.join(missing)}")
    _refuse_quantised(raw, family)
    c = {**_ALL, **family.defaults, **said(raw, *_NULLABLE)}
    act = family.activation_entry
    if text(c, act) not in _ACTIVATIONS:
        raise ValueError(f"unknown {act} {c[act]!r}; known: {', '.join(map(repr, _ACTIVATIONS))}")
    hidden, heads, layers = whole(c, "hidden_size"), whole(c, "num_attention_heads"), _layers(c)
    if c["head_dim"] is None and hidden % heads:
        raise ValueError(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) without head_dim")
    head_dim = hidden // heads if c["head_dim"] is None else whole(c, "head_dim")
    sliding = family.windows(c, layers)
    rope, layer_ropes = family.ropes(c, head_dim, sliding)
    common: dict[str, Any] = dict(
        vocab_size=whole(c, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole(c, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if c["num_key_value_heads"] is None else whole(c, "num_key_value_heads"),
        head_dim=head_dim,
        rope=rope,
        layer_ropes=layer_ropes,
        norm_eps=number(c, "rms_norm_eps"),
        activation=_ACTIVATIONS[c[act]],
        tied=flag(c, "tie_word_embeddings"),
        sliding=sliding,
        max_position=whole(c, "max_position_embeddings"),
    )
    return DecoderConfig(**(common | family.fields(c)))


def hugging_face_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of this decoder, for transformers 5: the inverse of `decoder_config`.

    The architecture follows from the config (see `nearest_architecture`): a decoder whose features several families
    have is written as the most common of them, whatever family it was read from.

    Raises:
      ValueError: that architecture lacks a feature of the decoder.
    """
    architecture = nearest_architecture(config)
    windows = sorted({w for w in config.sliding if w})
    _refuse_what_is_lacking(architecture, config, windows)
    family = FAMILIES[architecture]
    act = family.activation_entry
    written = {
        "architectures": [architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        act: _WRITTEN[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_position,
        "rope_parameters": rope_parameters(config.rope),
        **family.entries(config),
    }
    written = {key: value for key, value in written.items() if key not in family.lacks}
    _check_that_it_says_all(written, config)
    return written


def _refuse_quantised(raw: Mapping[str, Any], family: Family) -> None:
    given = object_in(raw, "quantization_config")
    if given and given.get("quant_method") not in family.quantised:
        methods = f", or those of {', '.join(family.quantised)}" if family.quantised else ""
        raise ValueError(
            f"the checkpoint is quantised (quantization_config, quant_method {shown(given.get('quant_method'))}); in "
            f"this family only plain float weights are read{methods}"
        )


def _layers(c: Mapping[str, Any]) -> int:
    return whole(c, "num_hidden_layers", most=MOST_LAYERS)


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The architecture of a config.json, by the first of `architectures` or by `model_type`.

    Raises:
      ValueError: it is not known.
    """
    given = architecture_in(raw)
    if given is None:
        kind = raw.get("model_type")
        given = next((name for name, family in FAMILIES.items() if family.model_type == kind), kind)
    if not isinstance(given, str) or given not in FAMILIES:
        raise ValueError(f"unknown architecture {shown(given)}; known: {', '.join(FAMILIES)}")
    return given


def _check_that_it_says_all(written: Mapping[str, Any], config: DecoderConfig) -> None:
    """Raises ValueError if the config.json that was written means another decoder."""
    again = decoder_config(written)
    names = [one.name for one in fields(config) if getattr(again, one.name) != getattr(config, one.name)]
    if names:
        given = ", ".join(f"{name}={shown(getattr(config, name))}" for name in names)
        raise ValueError(
            f"no Hugging Face architecture fits: the nearest, {written['architectures'][0]}, lacks {given}"
        )


def _refuse_what_is_lacking(architecture: str, config: DecoderConfig, windows: list[int]) -> None:
    """Raises ValueError for what the config.json could say, but transformers would not do or the weights not hold."""
    of = lambda *names: architecture.removesuffix("ForCausalLM") in names
    qkv, out, heads = config.qkv_bias, config.out_bias, config.num_heads
    lacking = {
        "sliding windows of different lengths": len(windows) > 1,
        "sliding windows in some layers only": bool(windows)
        and (of("Llama") or of("Phi3") and not all(config.sliding)),
        "biases on query, key and value without one on the output": qkv and not out and not of("Qwen2"),
        "biases on query, key, value and output": qkv and out and of("Mistral", "Phi3", "Mixtral"),
        "bias on the output without those on query, key and value": out and not qkv,
        "biases in the MLP": config.mlp_bias and not of("Llama", "SmolLM3", "GPTNeoX"),
        f"hidden_size ({config.hidden_size}) that is not a multiple of num_heads ({heads})": config.hidden_size % heads
        and of("Llama", "Gemma2", "Gemma3", "GPTNeoX", "Phi3"),
        f"heads of a width ({config.head_dim}) other than hidden_size / num_heads": of("GPTNeoX", "Phi3")
        and config.head_dim * heads != config.hidden_size,
        "query heads that share keys": config.num_kv_heads != heads and of("GPTNeoX"),
        f"RoPE of type {config.rope.kind}": config.rope.kind not in ("default", "longrope") and of("Phi3"),
    }
    if reasons := [reason for reason, applies in lacking.items() if applies]:
        raise ValueError(
            f"no Hugging Face architecture fits: the nearest, {architecture}, has no {', no '.join(reasons)}"
        )
