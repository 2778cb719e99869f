"""The entries of a config.json that describe mixtures of experts: Mixtral, Qwen3-MoE and GPT-OSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcompress.checkpoints._entries import flag, number, shown, whole
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.experts_config import ClampedGate, ExpertsConfig

Entries = Mapping[str, Any]
Fields = dict[str, Any]


def mixtral_experts(c: Entries) -> Fields:
    return _fields(ExpertsConfig(*_numbers(c)))


def mixtral_experts_entries(config: DecoderConfig) -> Fields:
    experts = config.experts
    return {} if experts is None else {"num_local_experts": experts.count, "num_experts_per_tok": experts.chosen}


def qwen3_experts(c: Entries) -> Fields:
    """Raises ValueError if some layers have a plain MLP."""
    step, plain = whole(c, "decoder_sparse_step"), c["mlp_only_layers"]
    if step != 1 or plain:
        raise ValueError(
            f"decoder_sparse_step is {step} and mlp_only_layers {shown(plain)}, so some layers have a plain MLP; the "
            "decoder runs all layers alike, and only models with experts in every layer are known"
        )
    experts = ExpertsConfig(*_numbers(c), normalised=flag(c, "norm_topk_prob"))
    return {**_fields(experts), "intermediate_size": whole(c, "moe_intermediate_size")}


def qwen3_experts_entries(config: DecoderConfig) -> Fields:
    experts = config.experts
    if experts is None:
        return {}
    return {
        "num_experts": experts.count, "num_experts_per_tok": experts.chosen, "norm_topk_prob": experts.normalised,
        "moe_intermediate_size": config.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def gpt_oss_experts(c: Entries) -> Fields:
    gate = ClampedGate(number(c, "swiglu_alpha"), number(c, "swiglu_limit"))
    return _fields(ExpertsConfig(*_numbers(c), bias=True, clamped=gate))


def gpt_oss_experts_entries(config: DecoderConfig) -> Fields:
    entries = mixtral_experts_entries(config)
    if config.experts is not None and config.experts.clamped is not None:
        entries |= {"swiglu_alpha": config.experts.clamped.alpha, "swiglu_limit": config.experts.clamped.limit}
    return entries


def _numbers(c: Entries) -> tuple[int, int]:
    """How many experts there are, and how many of them a token is sent to. The first has two names in transformers."""
    count = whole(c, "num_local_experts" if c["num_experts"] is None else "num_experts")
    return count, whole(c, "num_experts_per_tok", most=count)


def _fields(experts: ExpertsConfig) -> Fields:
    return {"mlp": "experts", "experts": experts}
