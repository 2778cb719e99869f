"""The shape of a decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxcompress.models.experts import ExpertsConfig
from jaxcompress.models.rope import RopeConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Hashable, so that it can be a static argument under jit.

    Attributes:
      intermediate_size: width of the MLP, or of each expert.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      out_bias, mlp_bias: biases on the output projection and in the MLP (Llama with `attention_bias`, `mlp_bias`).
      experts: a mixture of experts in place of each layer's MLP (Mixtral, Qwen3-MoE, GPT-OSS); None for an MLP.
      sinks: each query head has a learned logit in its softmax that stands for no token (GPT-OSS).
      qk_norm: RMS norm of each head's query and key before RoPE (Qwen3).
      tied: the output projection is the embedding, transposed.
      sliding: one entry per layer; the window of a sliding-window layer (a query sees itself and window - 1
        earlier tokens), None for a full layer. Empty: every layer is full.
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
    experts: ExpertsConfig | None = None
    sinks: bool = False
    qk_norm: bool = False
    tied: bool = False
    sliding: tuple[int | None, ...] = ()
    max_position: int = 2048

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}: RoPE rotates channels in pairs")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.experts and self.mlp_bias:
            raise ValueError("mlp_bias is that of a plain MLP; biases of experts are set in ExpertsConfig")
        if self.sliding and len(self.sliding) != self.num_layers:
            raise ValueError(f"sliding has {len(self.sliding)} entries for {self.num_layers} layers")

    @property
    def windows(self) -> Int[Array, " L"] | None:
        """Sliding window per layer as an array; None if all layers are full. A full layer's exceeds every position."""
        if not any(self.sliding):
            return None
        return jnp.array([w or jnp.iinfo(jnp.int32).max for w in self.sliding], jnp.int32)
