"""The entries of a config.json that describe mixtures of experts: Mixtral, Qwen3-MoE and GPT-OSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcompress.checkpoints._entries import flag, number, shown, whole
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.experts import ClampedGate, ExpertsConfig

MIXTRAL, QWEN3_MOE, GPT_OSS = "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"

DEFAULTS: dict[str, dict[str, Any]] = {
    MIXTRAL: {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": None, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    QWEN3_MOE: {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "use_sliding_window": False,
        "sliding_window": 4096, "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None,
    },
    GPT_OSS: {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
        "layer_types": None, "attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
        "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
"""The defaults of transformers 5, by architecture."""

COUNT = ("num_experts", "num_local_experts")
"""The number of experts; transformers reads either name."""


def experts_in(architecture: str, c: Mapping[str, Any]) -> ExpertsConfig | None:
    """The experts that a config.json with defaults describes; None for an architecture without.

    Raises:
      ValueError: an entry is out of range; some layers have a plain MLP.
    """
    if architecture not in DEFAULTS:
        return None
    count = whole(c, next(key for key in COUNT if c.get(key) is not None))
    chosen = whole(c, "num_experts_per_tok", most=count)
    if architecture == GPT_OSS:
        gate = ClampedGate(number(c, "swiglu_alpha"), number(c, "swiglu_limit"))
        return ExpertsConfig(count, chosen, bias=True, clamped=gate)
    if architecture == QWEN3_MOE:
        _refuse_plain_layers(c)
        return ExpertsConfig(count, chosen, normalised=flag(c, "norm_topk_prob"))
    return ExpertsConfig(count, chosen)


def _refuse_plain_layers(c: Mapping[str, Any]) -> None:
    step, plain = whole(c, "decoder_sparse_step"), c["mlp_only_layers"]
    if step != 1 or plain:
        raise ValueError(
            f"decoder_sparse_step is {step} and mlp_only_layers {shown(plain)}, so some layers have a plain MLP; the "
            "decoder runs all layers alike, and only models with experts in every layer are known"
        )


def architecture_of_experts(config: DecoderConfig) -> str | None:
    """The architecture nearest to a decoder with experts or sinks; None for one without.

    It is GPT-OSS with sinks, or with biases or clamped gates in experts; else Qwen3-MoE with `qk_norm`, else Mixtral.
    """
    experts = config.experts
    if config.sinks or (experts and (experts.clamped or experts.bias)):
        return GPT_OSS
    if experts is None:
        return None
    return QWEN3_MOE if config.qk_norm else MIXTRAL


def entries_of_experts(architecture: str, config: DecoderConfig) -> dict[str, Any]:
    """The entries of config.json that describe the experts: the inverse of `experts_in`."""
    experts = config.experts
    if experts is None:
        return {}
    if architecture == QWEN3_MOE:
        return {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.chosen,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": experts.normalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    entries: dict[str, Any] = {"num_local_experts": experts.count, "num_experts_per_tok": experts.chosen}
    if architecture == GPT_OSS and experts.clamped is not None:
        entries |= {"swiglu_alpha": experts.clamped.alpha, "swiglu_limit": experts.clamped.limit}
    return entries


def lacking_experts(architecture: str, config: DecoderConfig) -> dict[str, bool]:
    """Features of the decoder's layers, and whether it has one that the architecture lacks."""
    if architecture not in DEFAULTS:
        return {}
    experts, oss = config.experts, architecture == GPT_OSS
    some = bool(config.sliding) and not all(config.sliding) and any(config.sliding)
    return {
        "plain MLP": experts is None,
        "attention without sinks": oss and not config.sinks,
        "experts without biases": oss and experts is not None and not experts.bias,
        "experts with the SiLU gate": oss and experts is not None and experts.clamped is None,
        "norm of queries and keys": oss and config.qk_norm,
        "experts whose weights do not sum to 1": experts is not None
        and not experts.normalised
        and architecture != QWEN3_MOE,
        "sliding windows in some layers only": some and not oss,
        "biases on query, key and value without one on the output": config.qkv_bias
        and not config.out_bias
        and architecture != MIXTRAL,
        "biases in attention": (config.qkv_bias or config.out_bias) and architecture == MIXTRAL,
    }
