"""What each family of decoders has of its own in Hugging Face's checkpoints: defaults, fields, tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxcompress.checkpoints._entries import flag, number, whole
from jaxcompress.checkpoints._experts import dequantised, mixtral_experts_apart, qwen3_experts_apart
from jaxcompress.checkpoints._experts_config import (
    gpt_oss_experts,
    gpt_oss_experts_entries,
    mixtral_experts,
    mixtral_experts_entries,
    qwen3_experts,
    qwen3_experts_entries,
)
from jaxcompress.checkpoints._layer_types import (
    Ropes,
    Sliding,
    gemma3_rope_entries,
    gemma3_ropes,
    gemma_windows,
    layer_types,
    neox_rope,
    no_window,
    one_rope,
    one_window,
    one_window_if_used,
    phi3_rope,
    qwen_windows,
    smollm3_ropes,
    smollm3_windows,
)
from jaxcompress.checkpoints._rope_config import rope_parameters
from jaxcompress.checkpoints._weights import DECODER, GEMMA, GPT_OSS, MIXTRAL, NEOX, OLMO2, PHI3, QWEN3_MOE, Names
from jaxcompress.models.config import DecoderConfig

Entries = Mapping[str, Any]


class Family(NamedTuple):
    """One architecture of Hugging Face.

    Attributes:
      model_type: its name in config.json.
      defaults: what transformers 5 takes missing entries for, where that differs from other families.
      fields: entries -> the fields of `DecoderConfig` that other families lack.
      entries: its inverse: the entries that other families lack.
      windows: (entries, number of layers) -> the sliding windows.
      ropes: (entries, width of heads, windows) -> RoPE, and that of each layer if they differ.
      names: the tensor names.
      lacks: entries of other families that this one does not have.
      quantised: the quantisation methods whose weights are read.
      unpacked: (tensors of the files, by the names that `Names.ours` gives; config) -> the tensors by `names`, if the
        files may hold them in another form.
    """

    model_type: str
    defaults: Entries
    fields: Callable[[Entries], dict[str, Any]]
    entries: Callable[[DecoderConfig], dict[str, Any]]
    windows: Callable[[Entries, int], Sliding] = no_window
    ropes: Callable[[Entries, int, Sliding], Ropes] = one_rope
    names: Names = DECODER
    lacks: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ()
    unpacked: Callable[[Entries, DecoderConfig], dict[str, Any]] = lambda tensors, config: dict(tensors)

    @property
    def activation_entry(self) -> str:
        """The entry that names the activation."""
        return "hidden_activation" if "hidden_activation" in self.defaults else "hidden_act"


def _biases(c: Entries) -> dict[str, Any]:
    biased = flag(c, "attention_bias")
    return {"qkv_bias": biased, "out_bias": biased}


def _bias_entries(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


def _all_biases(c: Entries) -> dict[str, Any]:
    return {**_biases(c), "mlp_bias": flag(c, "mlp_bias")}


def _all_bias_entries(config: DecoderConfig) -> dict[str, Any]:
    return {**_bias_entries(config), "mlp_bias": config.mlp_bias}


def _window_entries(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": layer_types(config)["sliding_window"]}


def _qwen_entries(config: DecoderConfig) -> dict[str, Any]:
    types = layer_types(config)
    slides = [bool(w) for w in config.sliding]
    first = slides.index(True) if any(slides) else config.num_layers
    return {"use_sliding_window": any(slides), "max_window_layers": first, **types}


def _neox(c: Entries) -> dict[str, Any]:
    return {
        "norm": "layer", "norm_eps": number(c, "layer_norm_eps"), "parallel": flag(c, "use_parallel_residual"),
        "mlp": "plain", "mlp_bias": True, **_biases(c),
        "head_dim": whole(c, "hidden_size") // whole(c, "num_attention_heads"),
        "num_kv_heads": whole(c, "num_attention_heads"),
    }  # fmt: skip


def _neox_entries(config: DecoderConfig) -> dict[str, Any]:
    turn = {**rope_parameters(config.rope), "partial_rotary_factor": config.rope.partial}
    return {
        "layer_norm_eps": config.norm_eps, "use_parallel_residual": config.parallel, "rope_parameters": turn,
        **_bias_entries(config),
    }  # fmt: skip


def _gemma(c: Entries) -> dict[str, Any]:
    if flag(c, "use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is true; only causal attention is known")
    cap = lambda key: None if c[key] is None else number(c, key)
    scalar = number(c, "query_pre_attn_scalar")
    return {
        "norm": "offset_rms", "norms_at": "both", "scaled_embedding": True,
        "query_pre_attn_scalar": None if scalar == whole(c, "head_dim") else scalar,
        "softcap": cap("attn_logit_softcapping"), "logit_softcap": cap("final_logit_softcapping"), **_biases(c),
    }  # fmt: skip


def _gemma3(c: Entries) -> dict[str, Any]:
    # transformers reads the cap on attention scores of Gemma 3, and does not use it.
    return {**_gemma({**c, "attn_logit_softcapping": None}), "qk_norm": True}


def _gemma_entries(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.query_pre_attn_scalar or config.head_dim
    whole_scalar = int(scalar) if float(scalar).is_integer() else scalar  # transformers insists on a whole number
    return {
        "query_pre_attn_scalar": whole_scalar, "attn_logit_softcapping": config.softcap,
        "final_logit_softcapping": config.logit_softcap, **_bias_entries(config), **layer_types(config),
    }  # fmt: skip


def _phi3_entries(config: DecoderConfig) -> dict[str, Any]:
    # Phi3Config has an original context of its own, which goes before that of the RoPE parameters.
    long = config.rope.kind == "longrope"
    original = config.rope.original_context if long else config.max_position
    return {**_window_entries(config), "original_max_position_embeddings": original}


def _smollm3_entries(config: DecoderConfig) -> dict[str, Any]:
    turns = [int(rope is not None) for rope in config.layer_ropes] or [1] * config.num_layers
    return {
        **_all_bias_entries(config), **layer_types(config), "no_rope_layers": turns,
        "use_sliding_window": any(config.sliding),
    }  # fmt: skip


_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "use_bidirectional_attention": False,
}  # fmt: skip

FAMILIES = {
    "LlamaForCausalLM": Family("llama", {"max_position_embeddings": 2048}, _all_biases, _all_bias_entries),
    "MistralForCausalLM": Family(
        "mistral",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        lambda c: {}, _window_entries, one_window,
    ),
    "Qwen2ForCausalLM": Family("qwen2", _QWEN, lambda c: {"qkv_bias": True}, _qwen_entries, qwen_windows),
    "Qwen3ForCausalLM": Family(
        "qwen3", {**_QWEN, "head_dim": 128},
        lambda c: {**_biases(c), "qk_norm": True},
        lambda config: {**_bias_entries(config), **_qwen_entries(config)},
        qwen_windows,
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        {
            "max_position_embeddings": 2048, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
            "use_parallel_residual": True, "rotary_pct": 0.25, "rotary_emb_base": 10000.0,
        },
        _neox, _neox_entries, no_window, neox_rope, NEOX, ("num_key_value_heads", "head_dim", "rms_norm_eps"),
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        {
            **_GEMMA, "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        },
        _gemma, _gemma_entries, gemma_windows(2), one_rope, GEMMA,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        {
            **_GEMMA, "max_position_embeddings": 131072, "sliding_window_pattern": 6,
            "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        },
        _gemma3, lambda config: {**_gemma_entries(config), **gemma3_rope_entries(config)},
        gemma_windows(None), gemma3_ropes, GEMMA,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        lambda c: {}, _phi3_entries, one_window, phi3_rope, PHI3,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        lambda c: {**_biases(c), "norms_at": "after", "qk_norm": True, "qk_norm_over": "projection"},
        _bias_entries, names=OLMO2,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {
            "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2000000.0,
            "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None, "layer_types": None,
            "no_rope_layers": None, "no_rope_layer_interval": 4,
        },
        _all_biases, _smollm3_entries, smollm3_windows, smollm3_ropes,
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        {
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": None, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "num_local_experts": 8, "num_experts": None, "num_experts_per_tok": 2,
        },
        mixtral_experts,
        lambda config: {**_window_entries(config), **mixtral_experts_entries(config)},
        one_window, names=MIXTRAL, unpacked=mixtral_experts_apart,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        {
            "max_position_embeddings": 32768, "num_key_value_heads": 4, "use_sliding_window": False,
            "sliding_window": 4096, "num_local_experts": 128, "num_experts": None, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None,
        },
        lambda c: {**_biases(c), "qk_norm": True, **qwen3_experts(c)},
        lambda config: {
            **_bias_entries(config), **_window_entries(config), "use_sliding_window": any(config.sliding),
            **qwen3_experts_entries(config),
        },
        one_window_if_used, names=QWEN3_MOE, unpacked=qwen3_experts_apart,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        {
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
            "layer_types": None, "attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
            "num_local_experts": 128, "num_experts": None, "num_experts_per_tok": 4, "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        lambda c: {**_biases(c), "sinks": True, **gpt_oss_experts(c)},
        lambda config: {**_bias_entries(config), **layer_types(config), **gpt_oss_experts_entries(config)},
        gemma_windows(2), names=GPT_OSS, quantised=("mxfp4",), unpacked=dequantised,
    ),
}  # fmt: skip
"""By the name in `architectures`."""


def nearest_architecture(config: DecoderConfig) -> str:
    """The architecture that has the features of a decoder, if one has; else the one that has most of them."""
    experts = config.experts
    if config.sinks or (experts and (experts.clamped or experts.bias)):
        return "GptOssForCausalLM"
    if experts:
        return "Qwen3MoeForCausalLM" if config.qk_norm else "MixtralForCausalLM"
    if config.norm == "layer":
        return "GPTNeoXForCausalLM"
    if config.norm == "offset_rms":
        return "Gemma3ForCausalLM" if config.qk_norm else "Gemma2ForCausalLM"
    if config.norms_at == "after":
        return "Olmo2ForCausalLM"
    if None in config.layer_ropes:
        return "SmolLM3ForCausalLM"
    if config.rope.partial != 1.0 or config.rope.kind == "longrope":
        return "Phi3ForCausalLM"
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    if config.qkv_bias and not config.out_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if config.sliding and all(config.sliding) else "LlamaForCausalLM"
