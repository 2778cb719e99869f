"""The feed-forward networks of decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxcompress.models.activations import ACTIVATIONS
from jaxcompress.models.config import DecoderConfig, MLPKind
from jaxcompress.models.experts import Experts
from jaxcompress.models.initializers import initializers
from jaxcompress.models.int8 import Linear
from jaxcompress.state.shapes import Hidden


class GatedMLP(nnx.Module):
    """Gated feed-forward network (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        e, f = config.hidden_size, config.intermediate_size
        small, out = initializers(config)
        linear = _linear(config, dtype, rngs)
        self.gate, self.up, self.down = linear(e, f, small), linear(e, f, small), linear(f, e, out)

    def __call__(self, x: Hidden, config: DecoderConfig) -> Hidden:
        return self.down(ACTIVATIONS[config.activation](self.gate(x)) * self.up(x))


class PlainMLP(nnx.Module):
    """Feed-forward network without a gate (Vaswani et al. 2017)."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        e, f = config.hidden_size, config.intermediate_size
        small, out = initializers(config)
        linear = _linear(config, dtype, rngs)
        self.up, self.down = linear(e, f, small), linear(f, e, out)

    def __call__(self, x: Hidden, config: DecoderConfig) -> Hidden:
        return self.down(ACTIVATIONS[config.activation](self.up(x)))


def _linear(config: DecoderConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[[int, int, Initializer], Linear]:
    """(inputs, outputs, initializer of the kernel) -> a projection, with a bias if the config says so."""
    return lambda n, m, init: Linear(n, m, use_bias=config.mlp_bias, kernel_init=init, param_dtype=dtype, rngs=rngs)


MLPS: Mapping[MLPKind, Callable[..., GatedMLP | PlainMLP | Experts]] = {
    "gated": GatedMLP,
    "plain": PlainMLP,
    "experts": Experts,
}
"""(config, dtype, rngs) -> the network of this kind."""
