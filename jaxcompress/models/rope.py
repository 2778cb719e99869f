"""Rotary position embedding (Su et al. 2021), with the context extensions that checkpoints use.

The layout is the half-split one of Llama and Hugging Face: channels i and i + D/2 are rotated together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: `default`; `linear` (Chen et al. 2023: positions divided by `factor`); `llama3` (long wavelengths
        divided by `factor`, short ones kept, a ramp between); `yarn` (Peng et al. 2023, NTK-by-parts with a
        temperature on attention).
      factor: factor of the context extension.
      original_context: context length in tokens of the original training (llama3, yarn).
      low_freq_factor, high_freq_factor: ends of the ramp (llama3).
      beta_fast, beta_slow: ends of the ramp, in rotations over the original context (yarn).
      attention_factor: multiplies cos and sin (yarn); None derives it from `factor`.
      truncate: round the ends of the yarn ramp to whole channels.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_context: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angle per position for each of the head_dim / 2 channel pairs, and the factor on cos and sin."""
        plain = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        if self.kind == "default":
            return plain, 1.0
        if self.kind == "linear":
            return plain / self.factor, 1.0
        if self.kind == "llama3":
            wavelength = 2 * math.pi / plain
            rotations = self.original_context / wavelength
            keep = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            return keep * plain + (1 - keep) * plain / self.factor, 1.0
        return self._yarn(plain, head_dim)

    def _yarn(self, plain: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        def channel(rotations: float) -> float:
            """The channel pair that makes this number of rotations over the original context."""
            return head_dim * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # The ends may cross for contexts of a few tokens; transformers then divides by the negative difference.
        ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
        temperature = self.attention_factor
        if temperature is None:
            temperature = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return (1 - ramp) * plain + ramp * plain / self.factor, temperature


@dataclass(frozen=True)
class Rotary:
    """Rotates vectors by the angles of their positions: a model's `jaxcompress.state.placement.Rotate`."""

    rope: RopeConfig

    def __call__(self, x: Float[Array, "... D"], positions: Real[Array, "..."]) -> Float[Array, "... D"]:
        return rotate(x, positions, self.rope)

    def by_rank(self, x: Float[Array, "... D"], ranks: Int[Array, "..."], count: int) -> Float[Array, "... D"]:
        """Rotates at integer positions below `count`. Sines come from a table, which is cheaper than computing them."""
        cos, sin = cos_sin(jnp.arange(count), self.rope, x.shape[-1])
        return turned(x, cos[ranks], sin[ranks])


def cos_sin(positions: Real[Array, "..."], rope: RopeConfig, head_dim: int) -> tuple[Array, Array]:
    """Cosine and sine for each channel pair at each position, float32."""
    frequencies, factor = rope.frequencies(head_dim)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def turned(x: Float[Array, "... D"], cos: Float[Array, "... H"], sin: Float[Array, "... H"]) -> Float[Array, "... D"]:
    """Vectors with their channel pairs rotated by these angles, computed in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate(x: Float[Array, "... D"], positions: Real[Array, "..."], rope: RopeConfig) -> Float[Array, "... D"]:
    """Rotates each vector of x by the angle of its position.

    `positions` has the shape of x without its last axis, or a shape that broadcasts to it; integers or fractions.
    Angles and products are float32. The result has the dtype of x.
    """
    return turned(x, *cos_sin(positions, rope, x.shape[-1]))
