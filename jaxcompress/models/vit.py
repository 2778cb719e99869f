"""Vision transformers as towers: ViT and DeiT, CLIP, SigLIP. One Flax NNX module, used as a pytree.

A tower runs in pieces, so that its tokens can be dropped or merged between any two layers:

    patches = tower.embed(pixels)
    patches, inputs = tower.run_layers(patches, range(0, 3))  # attention inputs of layer 2
    patches = keep_some(patches, inputs)
    patches, _ = tower.run_layers(patches, range(3, 12))
    tower.logits(patches)

`run_layers(..., reduce=...)` calls `reduce` between a layer's attention and its MLP, where ToMe merges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxcompress.models.activations import ACTIVATIONS, TowerActivation
from jaxcompress.models.patches import Patches, Pixels, Reduce
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.recurrence.block_attention import whole_attention
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.recurrence.softmax import MASKED
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.precision import weighted


class TowerAttention(nnx.Module):
    """Query, key, value and output projections of attention."""

    def __init__(self, config: TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = lambda: _linear(config.hidden_size, config.hidden_size, dtype, rngs)
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()

    def project(self, x: Float[Array, "B N E"], heads: int) -> tuple[Array, Array, Array]:
        """[B, N, H, D] each."""
        split = lambda y: y.reshape(*y.shape[:-1], heads, -1)
        return split(self.query(x)), split(self.key(x)), split(self.value(x))


class TowerMLP(nnx.Module):
    def __init__(self, config: TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.up = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.down = _linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, x: Float[Array, "*B E"], activation: TowerActivation) -> Float[Array, "*B E"]:
        return self.down(ACTIVATIONS[activation](self.up(x)))


class TowerLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.attention = TowerAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = TowerMLP(config, dtype=dtype, rngs=rngs)


class AttentionPool(nnx.Module):
    """One learned query attends to all tokens (SigLIP's head).

    Attributes:
      probe: [E], the query before its projection.
      kernel, bias: [3E, E] (out, in) and [3E], the query, key and value projections.
    """

    def __init__(self, config: TowerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        e = config.hidden_size
        self.probe = nnx.Param(_small(rngs.params(), (e,), dtype))
        self.kernel = nnx.Param(_small(rngs.params(), (3 * e, e), dtype))
        self.bias = nnx.Param(jnp.zeros((3 * e,), dtype))
        self.out = _linear(e, e, dtype, rngs)
        self.norm = _norm(config, dtype, rngs)
        self.mlp = TowerMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N E"], bias: Float[Array, "B N"], config: TowerConfig) -> Float[Array, "B E"]:
        b, n, e = x.shape
        kernels, biases = jnp.split(self.kernel[...], 3), jnp.split(self.bias[...], 3)
        probe = jnp.broadcast_to(self.probe[...], (b, 1, e)).astype(x.dtype)
        q, k, v = (y @ w.T + c for y, w, c in zip((probe, x, x), kernels, biases, strict=True))
        split = lambda y: y.reshape(b, -1, config.num_heads, config.head_dim)
        scores = scores_of("bqhd,bnhd->bhqn", split(q), split(k))
        weights = jax.nn.softmax(scores + bias[:, None, None], axis=-1)
        out = weighted("bhqn,bnhd->bqhd", weights, split(v)).astype(x.dtype).reshape(b, e)
        out = self.out(out)
        return out + self.mlp(self.norm(out), config.activation)


class VisionTower(nnx.Module):
    """A vision transformer.

    Attributes:
      config: its shape (static).
      patch: [E, C, P, P], the patch embedding, with `patch_bias` [E] if it has one.
      position: [special + patches, E].
      class_token, distillation_token: [E], if the tower has them.
      layers: one `TowerLayer` whose arrays have a leading axis L.
      pre_norm, norm: norms before the first layer (CLIP) and after the last layer.
      pool: attention pooling (SigLIP).
      classifier, distillation_classifier: output layers of a classifier.
    """

    def __init__(self, config: TowerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        e, p = config.hidden_size, config.patch_size
        self.patch = nnx.Param(_small(rngs.params(), (e, config.channels, p, p), dtype))
        if config.patch_bias:
            self.patch_bias = nnx.Param(jnp.zeros((e,), dtype))
        self.position = nnx.Param(_small(rngs.params(), (config.special + config.num_patches, e), dtype))
        if config.special > 0:
            self.class_token = nnx.Param(_small(rngs.params(), (e,), dtype))
        if config.special > 1:
            self.distillation_token = nnx.Param(_small(rngs.params(), (e,), dtype))
        if config.pre_norm:
            self.pre_norm = _norm(config, dtype, rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: TowerLayer(config, dtype=dtype, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = _norm(config, dtype, rngs)
        if config.pooling == "attention":
            self.pool = AttentionPool(config, dtype=dtype, rngs=rngs)
        if config.labels:
            self.classifier = _linear(e, config.labels, dtype, rngs, jnp.float32)
            if config.special > 1:
                self.distillation_classifier = _linear(e, config.labels, dtype, rngs, jnp.float32)

    def embed(self, pixels: Pixels) -> Patches:
        """Patches in raster order after the special tokens, before the first layer.

        Raises:
          ValueError: there are no images, or pixels have another size or number of channels.
        """
        c = self.config
        if not pixels.shape[0]:
            raise ValueError("no images were given; a prompt without pictures needs no tower")
        if pixels.shape[1:] != (c.channels, c.image_size, c.image_size):
            given, expected = list(pixels.shape[1:]), [c.channels, c.image_size, c.image_size]
            raise ValueError(f"the tower sees images of {expected}, not {given}; use the checkpoint's image processor")
        b, p = pixels.shape[0], c.patch_size
        pixels = pixels[:, :, : c.grid * p, : c.grid * p].astype(self.patch[...].dtype)
        cells = pixels.reshape(b, c.channels, c.grid, p, c.grid, p)
        x = jnp.einsum("bcipjq,ecpq->bije", cells, self.patch[...]).reshape(b, c.num_patches, -1)
        if c.patch_bias:
            x = x + self.patch_bias[...]
        special = [self.class_token[...]] if c.special > 0 else []
        special += [self.distillation_token[...]] if c.special > 1 else []
        if special:
            x = jnp.concatenate([jnp.broadcast_to(jnp.stack(special), (b, c.special, x.shape[-1])), x], axis=1)
        x = x + self.position[...]
        n = x.shape[1]
        group = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
        return Patches(self.pre_norm(x) if c.pre_norm else x, jnp.ones((b, n), jnp.float32), group)

    def run_layers(
        self,
        patches: Patches,
        layers: range | None = None,
        *,
        reduce: Reduce | None = None,
        proportional: bool = False,
    ) -> tuple[Patches, AttentionInputs]:
        """Runs some layers, all by default. Returns the tokens and the attention inputs of the last of these layers.

        Args:
          reduce: called between attention and MLP of each of these layers. The `AttentionInputs`, also the
            returned ones, then belong to the tokens at the start of the layer.
          proportional: a token of size s counts as s equal tokens: log s is added to its scores (ToMe, 3.2).

        Raises:
          ValueError: no layers are given, or the tower does not have them.
        """
        every = range(self.config.num_layers)
        layers = every if layers is None else layers
        if not len(layers) or layers[0] not in every or layers[-1] not in every or layers.step != 1:
            raise ValueError(f"cannot run layers {layers}: the tower has layers 0 to {every[-1]}")
        if reduce is not None:
            attention = None
            for number in layers:
                layer = jax.tree.map(lambda w, number=number: w[number], self.layers)
                patches, attention = self._layer(layer, patches, proportional, lambda p, s, n=number: reduce(p, s, n))
            assert attention is not None
            return patches, attention

        heads = jnp.zeros((*patches.size.shape, self.config.num_heads, self.config.head_dim), patches.hidden.dtype)
        start = patches, AttentionInputs(heads, heads, _bias(patches.size, proportional))

        def body(loop: tuple[Patches, AttentionInputs], inputs: Any) -> tuple[tuple[Patches, AttentionInputs], None]:
            layer, index = inputs
            if layer is None:
                layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), self.layers)
            return self._layer(layer, loop[0], proportional), None

        # For a part of the layers, index inside the loop: slicing the stacked weights would copy them at each call.
        weights = self.layers if layers == every else None
        return jax.lax.scan(body, start, (weights, jnp.arange(layers.start, layers.stop)))[0]

    def _layer(
        self,
        layer: Any,
        patches: Patches,
        proportional: bool,
        reduce: Callable[[Patches, AttentionInputs], Patches] | None = None,
    ) -> tuple[Patches, AttentionInputs]:
        x, bias = patches.hidden, _bias(patches.size, proportional)
        q, k, v = layer.attention.project(layer.attention_norm(x), self.config.num_heads)
        attention = AttentionInputs(q, k, bias)
        x = x + layer.attention.out(whole_attention(q, k, v, bias).reshape(x.shape))
        patches = Patches(x, patches.size, patches.group)
        if reduce is not None:
            patches = reduce(patches, attention)
        x = patches.hidden
        x = x + layer.mlp(layer.mlp_norm(x), self.config.activation)
        return Patches(x, patches.size, patches.group), attention

    def pooled(self, patches: Patches) -> Float[Array, "B E"]:
        """One vector for each picture, from the tokens after the last layer."""
        x = self.norm(patches.hidden)
        if self.config.pooling == "class":
            return x[:, 0]
        if self.config.pooling == "attention":
            return self.pool(x, _bias(patches.size, False), self.config)
        weight = (patches.size / patches.size.sum(-1, keepdims=True))[..., None]
        return (x * weight).sum(1).astype(x.dtype)

    def logits(self, patches: Patches) -> Float[Array, "B V"]:
        """Class scores from the tokens after the last layer, float32. A distilled DeiT averages its two heads.

        Raises:
          ValueError: the tower has no classifier.
        """
        if not self.config.labels:
            raise ValueError("this tower has no classifier; load a checkpoint that classifies images")
        out = self.classifier(self.pooled(patches))
        if self.config.special > 1:
            out = (out + self.distillation_classifier(self.norm(patches.hidden)[:, 1])) / 2
        return out

    def __call__(self, pixels: Pixels) -> Patches:
        """The tokens after the last layer, before the final norm."""
        return self.run_layers(self.embed(pixels))[0]


_small = jax.nn.initializers.normal(0.02)


def _bias(size: Float[Array, "B N"], proportional: bool) -> Float[Array, "B N"]:
    present = size > 0
    return jnp.where(present, jnp.log(jnp.where(present, size, 1.0)) if proportional else 0.0, MASKED)


def _linear(n: int, m: int, dtype: DTypeLike, rngs: nnx.Rngs, returns: Any = None) -> nnx.Linear:
    return nnx.Linear(n, m, kernel_init=_small, param_dtype=dtype, preferred_element_type=returns, rngs=rngs)


def _norm(config: TowerConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.norm_eps, param_dtype=dtype, use_fast_variance=False, rngs=rngs
    )
