"""Converts the metadata of a GGUF file to the equivalent config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcompress.checkpoints._entries import MOST_LAYERS, number, shown, text, whole
from jaxcompress.models.rope import RopeConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Hugging Face's names, by `general.architecture`. "llama" includes Mistral, with or without a sliding window."""

# Entries that would change a model's output but that the decoder does not support, with the values without effect.
_UNKNOWN = {
    "expert_count": (0,), "attention.causal": (True,), "attention.scale": (0.0,), "attention.clamp_kqv": (0.0,),
    "logit_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,), "use_parallel_residual": (False,),
    "attention.temperature_scale": (0.0,), "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip
_CLOSE = 1e-5
"""The relative tolerance between the factors of a known scaling and those in a file, which are float32."""


def config_of_metadata(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None
) -> dict[str, Any]:
    """Builds a Hugging Face config.json, for `decoder_config`.

    Args:
      shapes: the shapes of the file's tensors, by name. They determine the vocabulary size, whether there are biases,
        and whether the output projection is the embedding.
      factors: [D / 2], the tensor `rope_freqs.weight`: the divisor of each RoPE frequency.

    Raises:
      ValueError: the architecture is unknown, or the model has a feature that the decoder lacks; an entry is missing,
        of another type or out of range.
    """
    name = text(metadata, "general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {shown(name)} (general.architecture); known: {', '.join(ARCHITECTURES)}"
        )
    own = {key.removeprefix(name + "."): value for key, value in metadata.items() if key.startswith(name + ".")}
    for key, harmless in _UNKNOWN.items():
        if key in own and own[key] not in harmless:
            raise ValueError(f"{name}.{key} is {shown(own[key])}; the decoder has nothing of the kind")
    hidden, heads = whole(own, "embedding_length"), whole(own, "attention.head_count")
    layers = whole(own, "block_count", most=MOST_LAYERS)
    head = whole(own, "attention.key_length") if "attention.key_length" in own else hidden // heads
    if own.get("attention.value_length", head) != head:
        raise ValueError(f"values of another length ({shown(own['attention.value_length'])}) than keys ({head})")
    rotated = own.get("rope.dimension_count", head)
    if rotated != head:
        raise ValueError(f"rope.dimension_count is {shown(rotated)}; only the whole head, {head}, is known")
    vocabulary = shapes["token_embd.weight"][0] if len(shapes.get("token_embd.weight", ())) == 2 else None
    biases = {"attention_bias": "blk.0.attn_output.bias" in shapes, "mlp_bias": "blk.0.ffn_down.bias" in shapes}
    return {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": whole(own, "vocab_size") if vocabulary is None else vocabulary,
        "hidden_size": hidden,
        "intermediate_size": whole(own, "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole(own, "attention.head_count_kv") if "attention.head_count_kv" in own else heads,
        "head_dim": head,
        "rms_norm_eps": number(own, "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": whole(own, "context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope(own, head, factors),
        **biases,
        **_sliding(own, name, layers),
    }


def _rope(own: Mapping[str, Any], head: int, factors: np.ndarray | None) -> dict[str, Any]:
    theta = number(own, "rope.freq_base") if "rope.freq_base" in own else 10000.0
    known = ("rope.scaling.factor", "rope.scale_linear")  # the second is that of older files
    scale = next((key for key in known if key in own), known[0])
    kind = own.get("rope.scaling.type", "linear" if own.get(scale) else "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"unknown rope.scaling.type {shown(kind)}; known: none, linear, yarn, and the factors of llama3"
        )
    original = own.get("rope.scaling.original_context_length")
    if factors is not None:
        if kind != "none":
            raise ValueError(
                f"rope.scaling.type is {kind}, and there is rope_freqs.weight beside it; only one is known"
            )
        return {"rope_theta": theta, **_llama3(theta, head, factors, original)}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = number(own, scale)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    given = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
    yarn = {key: number(own, said) for key, said in given.items() if said in own}
    yarn |= {} if original is None else {"original_max_position_embeddings": original}
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if own.get(key, 1.0) != 1.0:  # llama.cpp multiplies it by the implied factor
            implied = 0.1 * float(np.log(factor)) + 1.0 if factor > 1 else 1.0
            yarn["attention_factor"] = number(own, key) * implied
    return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **yarn}


def _llama3(theta: float, head: int, factors: np.ndarray, original: Any) -> dict[str, Any]:
    """Recovers the settings of Llama 3's RoPE scaling from the factors in a file.

    The factors depend on `factor`, which is the largest of them, and on two lengths: the original context divided by
    `low_freq_factor` and by `high_freq_factor`. The original context is therefore arbitrary; Llama 3 has 8,192.

    Raises:
      ValueError: the factors are not those of Llama 3's scaling.
    """
    if factors.shape != (head // 2,) or not np.isfinite(factors).all() or not (factors > 0).all():
        raise ValueError(f"rope_freqs.weight must be {head // 2} positive numbers, not {list(factors.shape)}")
    factor = float(str(np.float32(factors.max())))
    context = original if isinstance(original, int) and original > 0 else 8192
    plain = RopeConfig(theta=theta).frequencies(head)[0]

    def settings(low: float, high: float) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }

    def fits(low: float, high: float) -> bool:
        rope = RopeConfig(theta, "llama3", factor, context, low, high)
        return bool(np.allclose(plain / rope.frequencies(head)[0], factors, rtol=_CLOSE, atol=0))

    if fits(1.0, 4.0):
        return settings(1.0, 4.0)
    ramp = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
    if ramp.sum() >= 2 and factor > 1:
        kept = (1 / factors[ramp].astype(float) - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(plain[ramp] * context / (2 * np.pi), kept, 1)  # rotations over the original context
        low, high = float(-start / slope), float((1 - start) / slope)
        if 0 < low < high and fits(low, high):
            return settings(low, high)
    raise ValueError("rope_freqs.weight has factors that are not Llama 3's; no other is known")


def _sliding(own: Mapping[str, Any], name: str, layers: int) -> dict[str, Any]:
    """The layers with a sliding window.

    `sliding_window_pattern` is a list by layer, or a number n: every n-th layer has no window. If the entry is absent,
    all layers have one.
    """
    if not own.get("attention.sliding_window"):
        return {"sliding_window": None}
    window = whole(own, "attention.sliding_window")
    pattern = own.get("attention.sliding_window_pattern")
    if pattern is None:
        slides = [True] * layers
    elif isinstance(pattern, np.ndarray):
        slides = [bool(one) for one in pattern]
    else:
        every = whole(own, "attention.sliding_window_pattern", least=0)
        slides = [every == 0 or layer % every < every - 1 for layer in range(layers)]
    if len(slides) != layers:
        raise ValueError(f"attention.sliding_window_pattern has {len(slides)} entries for {layers} layers")
    if name == "llama":
        if all(slides):
            return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
        if any(slides):
            raise ValueError("attention.sliding_window in some layers of a llama only; no such decoder is known")
        return {"sliding_window": None}
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"use_sliding_window": any(slides), "sliding_window": window, "layer_types": types}
