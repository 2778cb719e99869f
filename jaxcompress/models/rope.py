"""Rotary position embedding (Su et al. 2021), with the context extensions that checkpoints use.

The layout is the half-split one of Llama and Hugging Face: of R rotated channels, i and i + R/2 are rotated together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxcompress.models.choices import check_choices

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    Keys are cached rotated, so their angles cannot change as a text grows. Where transformers chooses frequencies by
    the length of the sequence (`dynamic`, `longrope`), they follow here from `context`, for all positions alike.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: `default`; `linear` (Chen et al. 2023: positions divided by `factor`); `dynamic` (NTK: a larger base for
        longer contexts); `llama3` (long wavelengths divided by `factor`, short ones kept, a ramp between); `yarn` (Peng
        et al. 2023, NTK-by-parts with a temperature on attention); `longrope` (Ding et al. 2024: frequencies divided by
        searched factors).
      factor: factor of the context extension.
      original_context: context length in tokens of the original training (dynamic, llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: ends of the ramp (llama3).
      beta_fast, beta_slow: ends of the ramp, in rotations over the original context (yarn).
      attention_factor: multiplies cos and sin (yarn, longrope); None derives it from `factor`.
      truncate: round the ends of the yarn ramp to whole channels.
      partial: share of a head's channels that are rotated: the first ones.
      short_factors, long_factors: divisors of the frequencies (longrope), one for each rotated channel pair. The long
        ones serve if `context` is over `original_context`.
      context: length in tokens of the texts that are read (dynamic, longrope); None: the original context. Up to the
        original context, `dynamic` is `default`.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    partial: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    context: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angle per position for each of the R / 2 rotated channel pairs, and the factor on cos and sin."""
        width = self.width(head_dim)
        plain = self.theta ** -(np.arange(0, width, 2) / width)
        if self.kind == "linear":
            return plain / self.factor, 1.0
        if self.kind == "dynamic":
            longer = max(self.context or 0, self.original_context) / self.original_context
            theta = self.theta * (self.factor * longer - (self.factor - 1)) ** (width / (width - 2))
            return theta ** -(np.arange(0, width, 2) / width), 1.0
        if self.kind == "llama3":
            rotations = self.original_context * plain / (2 * math.pi)
            keep = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            return keep * plain + (1 - keep) * plain / self.factor, 1.0
        if self.kind == "yarn":
            return self._yarn(plain, width)
        if self.kind == "longrope":
            return self._longrope(plain)
        return plain, 1.0

    def width(self, head_dim: int) -> int:
        """R, the number of rotated channels of a head."""
        return int(head_dim * self.partial)

    def rotary(self, head_dim: int) -> Rotary:
        """The rotation of heads of this width."""
        return Rotary(*self.frequencies(head_dim))

    def _yarn(self, plain: np.ndarray, width: int) -> tuple[np.ndarray, float]:
        def channel(rotations: float) -> float:
            """The channel pair that makes this number of rotations over the original context."""
            return width * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        # The ends may cross for contexts of a few tokens; transformers then divides by the negative difference.
        ramp = np.clip((np.arange(width // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
        temperature = self.attention_factor
        if temperature is None:
            temperature = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return (1 - ramp) * plain + ramp * plain / self.factor, temperature

    def _longrope(self, plain: np.ndarray) -> tuple[np.ndarray, float]:
        name = "long_factors" if (self.context or 0) > self.original_context else "short_factors"
        factors = getattr(self, name)
        if len(factors) != len(plain):
            raise ValueError(f"longrope has {len(factors)} {name} for {len(plain)} rotated channel pairs; give as many")
        temperature = self.attention_factor
        if temperature is None:
            growth = math.log(self.factor) / math.log(self.original_context) if self.factor > 1 else 0.0
            temperature = math.sqrt(1 + growth)
        return plain / np.array(factors), temperature


@dataclass(frozen=True)
class Rotary:
    """Rotates vectors by the angles of their positions: a layer's `jaxcompress.state.placement.Rotate`.

    Attributes:
      frequencies: [R / 2], the angle per position of each rotated channel pair. Zeros leave vectors as they are.
      factor: on cos and sin.
    """

    frequencies: np.ndarray | Float[Array, " R"]
    factor: float | Float[Array, ""] = 1.0

    def __call__(self, x: Float[Array, "... D"], positions: Real[Array, "..."]) -> Float[Array, "... D"]:
        """Each vector of x, rotated by the angle of its position.

        `positions` has the shape of x without its last axis, or a shape that broadcasts to it; integers or fractions.
        Angles and products are float32. The result has the dtype of x.
        """
        return turned(x, *self.cos_sin(positions))

    def by_rank(self, x: Float[Array, "... D"], ranks: Int[Array, "..."], count: int) -> Float[Array, "... D"]:
        """Rotates at integer positions below `count`. Sines come from a table, which is cheaper than computing them."""
        cos, sin = self.cos_sin(jnp.arange(count))
        return turned(x, cos[ranks], sin[ranks])

    def cos_sin(self, positions: Real[Array, "..."]) -> tuple[Array, Array]:
        """Cosine and sine for each channel pair at each position, float32."""
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(self.frequencies, jnp.float32)
        return jnp.cos(angles) * self.factor, jnp.sin(angles) * self.factor


def turned(x: Float[Array, "... D"], cos: Float[Array, "... H"], sin: Float[Array, "... H"]) -> Float[Array, "... D"]:
    """Vectors with their first H channel pairs rotated by these angles, computed in float32."""
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    both = [a * cos - b * sin, b * cos + a * sin]
    if rest.shape[-1]:
        both.append(jnp.broadcast_to(rest, (*both[0].shape[:-1], rest.shape[-1])))
    return jnp.concatenate(both, axis=-1).astype(x.dtype)


def rotate(x: Float[Array, "... D"], positions: Real[Array, "..."], rope: RopeConfig) -> Float[Array, "... D"]:
    """The vectors x, rotated by the angles of their positions (see `Rotary`)."""
    return rope.rotary(x.shape[-1])(x, positions)
