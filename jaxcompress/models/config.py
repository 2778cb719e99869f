"""The shape of a decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxcompress.models.activations import Activation
from jaxcompress.models.choices import check_choices
from jaxcompress.models.experts_config import ExpertsConfig
from jaxcompress.models.norms import NormKind
from jaxcompress.models.rope import RopeConfig, Rotary

MLPKind = Literal["gated", "plain", "experts"]
"""Feed-forward networks (see `jaxcompress.models.mlp`)."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Hashable, so that it can be a static argument under jit.

    Attributes:
      intermediate_size: width of the MLP, or of each expert.
      rope: position embedding of all layers, unless `layer_ropes` says otherwise.
      norm: kind of all normalisations (see `jaxcompress.models.norms`).
      norms_at: whether attention and MLP have a norm before them, after them (OLMo 2), or both (Gemma).
      parallel: attention and MLP both read the residual stream before the layer (GPT-NeoX), not one after the other.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      out_bias, mlp_bias: biases on the output projection and in the MLP (Llama with `attention_bias`, `mlp_bias`).
      qk_norm: norm of queries and keys before RoPE (Qwen3).
      qk_norm_over: what that norm spans: each head, or the whole projection (OLMo 2).
      mlp: kind of feed-forward network.
      experts: the experts of each layer, if `mlp` is "experts" (Mixtral, Qwen3-MoE, GPT-OSS); else None.
      activation: that of the MLP.
      tied: the output projection is the embedding, transposed.
      scaled_embedding: embeddings are multiplied by the square root of E, rounded to their dtype (Gemma).
      query_pre_attn_scalar: attention scores are divided by the square root of this number; None: of D.
      sinks: each query head has a learned logit in its softmax that stands for no token (GPT-OSS).
      softcap: soft cap of attention scores (see `jaxcompress.state.attention_traits`); None: no cap.
      logit_softcap: the same for the scores of next tokens.
      sliding: one entry per layer; the window of a sliding-window layer (a query sees itself and window - 1
        earlier tokens), None for a full layer. Empty: every layer is full.
      max_position: tokens of the longest texts that the model was trained on; a `PositionWarning` tells of longer ones.
      layer_ropes: one entry per layer, its position embedding (Gemma 3); None for a layer without one (SmolLM3). Empty:
        `rope` in every layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    sliding: tuple[int | None, ...] = ()
    max_position: int = 2048
    norm: NormKind = "rms"
    norms_at: Literal["before", "after", "both"] = "before"
    parallel: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"
    mlp: MLPKind = "gated"
    experts: ExpertsConfig | None = None
    activation: Activation = "silu"
    scaled_embedding: bool = False
    query_pre_attn_scalar: float | None = None
    sinks: bool = False
    softcap: float | None = None
    logit_softcap: float | None = None
    layer_ropes: tuple[RopeConfig | None, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}: RoPE rotates channels in pairs")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        for name in ("sliding", "layer_ropes"):
            given = getattr(self, name)
            if given and len(given) != self.num_layers:
                raise ValueError(f"{name} has {len(given)} entries for {self.num_layers} layers")
        if wrong := [window for window in self.sliding if window is not None and window < 1]:
            raise ValueError(f"a sliding window has 1 token or more, not {wrong[0]}; None stands for a full layer")
        widths = {rope.width(self.head_dim) for rope in (self.rope, *self.layer_ropes) if rope}
        if len(widths) > 1:
            raise ValueError(f"layer_ropes rotate {sorted(widths)} channels; all layers with RoPE must rotate as many")
        if not all(2 <= width <= self.head_dim and width % 2 == 0 for width in widths):
            raise ValueError(f"RoPE rotates {widths.pop()} of {self.head_dim} channels; give an even number of them")
        if (self.mlp == "experts") != (self.experts is not None):
            given = f"mlp={self.mlp!r}, experts={self.experts}"
            raise ValueError(f"mlp='experts' and experts=ExpertsConfig(...) are given together, not {given}")
        if self.experts and self.mlp_bias:
            raise ValueError("mlp_bias is that of a plain or gated MLP; biases of experts are set in ExpertsConfig")
        if self.parallel and self.norms_at != "before":
            raise ValueError(f"parallel attention and MLP have norms before them, not norms_at={self.norms_at!r}")

    @property
    def windows(self) -> Int[Array, " L"] | None:
        """Sliding window per layer as an array; None if all layers are full. A full layer's exceeds every position."""
        if not any(self.sliding):
            return None
        return jnp.array([w or jnp.iinfo(jnp.int32).max for w in self.sliding], jnp.int32)

    def rotary(self, layer: Int[Array, ""] | int) -> Rotary:
        """The position embedding of a layer; its number may be traced."""
        if not self.layer_ropes:
            return self.rope.rotary(self.head_dim)
        still = np.zeros(self.rope.width(self.head_dim) // 2), 1.0
        each = [rope.frequencies(self.head_dim) if rope else still for rope in self.layer_ropes]
        frequencies, factors = zip(*each, strict=True)
        stacked = lambda x: jnp.asarray(np.array(x), jnp.float32)
        return Rotary(stacked(frequencies)[layer], stacked(factors)[layer])
