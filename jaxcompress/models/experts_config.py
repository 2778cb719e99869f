"""Shape of a mixture of experts (see `jaxcompress.models.experts`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClampedGate:
    """The gate of GPT-OSS: min(g, limit) * sigmoid(alpha * g) * (clip(u, -limit, limit) + 1)."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of each layer. Their width is the decoder's `intermediate_size`.

    Attributes:
      count: X, the number of experts.
      chosen: the number of experts that a token is sent to.
      normalised: the weights of the chosen experts sum to 1 (Mixtral, GPT-OSS: a softmax over the chosen logits); else
        they are shares of a softmax over all experts (Qwen3-MoE without `norm_topk_prob`).
      bias: biases on the router and in the experts.
      clamped: the gate of GPT-OSS; None for that of a gated MLP with the decoder's `activation`.
    """

    count: int
    chosen: int
    normalised: bool = True
    bias: bool = False
    clamped: ClampedGate | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise ValueError(f"a token goes to 1 to {self.count} experts, not {self.chosen}: there are {self.count}")
