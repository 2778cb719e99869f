"""One decoder for all families (`jaxcompress.checkpoints` lists them), as a Flax NNX module used as a pytree.

The module holds weights, stacked over layers. It does not decide where keys and values are stored: its layers are
scanned with an `Attend` function, which does. Plain causal attention is one such function (training, teacher forcing);
a step of the bounded recurrence is another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxcompress.inputs.described import described
from jaxcompress.inputs.token_ids import check_read
from jaxcompress.models.attention import Attention
from jaxcompress.models.checks import check_state
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.initializers import initializers
from jaxcompress.models.int8 import as_float, is_int8, part_of, product, scores_of_all
from jaxcompress.models.lookup import look_up
from jaxcompress.models.mlp import MLPS
from jaxcompress.models.norms import NORMS
from jaxcompress.policies.cache_view import LayerContext
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.advance import step_for
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.recurrence.step import Step, StepSpec, enter
from jaxcompress.state.attention_traits import soft_capped
from jaxcompress.state.kv_state import KVState, State, runs
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import AttentionOut, Hidden, Keys, Logits, Positions, Queries, Tokens, Valid, Values


@runtime_checkable
class Attend(Protocol):
    """The attention of a layer, given its queries, keys and values before RoPE.

    `layer` has this layer's weights, and `index` is its number as a scalar array. `carry` is passed from layer to layer
    (a KV state). `xs` is this layer's slice of the caller's per-layer inputs. Returns the attention output, the carry,
    and a per-layer result.
    """

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        positions: Positions,
        layer: Layer,
        index: Int[Array, ""],
        carry: Any,
        xs: Any,
    ) -> tuple[AttentionOut, Any, Any]: ...


class Layer(nnx.Module):
    """Attention and MLP, with norms before or after them, one after the other or in parallel."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = lambda: NORMS[config.norm](config.hidden_size, epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs)
        if config.norms_at != "after":
            self.attention_norm, self.mlp_norm = norm(), norm()
        if config.norms_at != "before":
            self.attention_out_norm, self.mlp_out_norm = norm(), norm()
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLPS[config.mlp](config, dtype=dtype, rngs=rngs)

    def project(self, x: Hidden, config: DecoderConfig) -> tuple[Queries, Keys, Values]:
        """Queries, keys and values before RoPE, from the residual stream before the layer."""
        return self.attention.project(x if config.norms_at == "after" else self.attention_norm(x), config)

    def close(self, x: Hidden, attended: Float[Array, "B T *heads"], config: DecoderConfig) -> Hidden:
        """The residual stream after the layer, from that before it and the output of its attention."""
        out = self.attention.project_out(attended)
        if config.norms_at != "before":
            out = self.attention_out_norm(out)
        if config.parallel:
            return x + out + self.mlp(self.mlp_norm(x), config)
        x = x + out
        out = self.mlp(x if config.norms_at == "after" else self.mlp_norm(x), config)
        return x + (out if config.norms_at == "before" else self.mlp_out_norm(out))


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Attributes:
      config: its shape (static).
      embedding: [V, E].
      layers: one `Layer` whose arrays have a leading axis L.
      head: [E, V], absent if tied.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        small, _ = initializers(config)
        self.embedding = nnx.Param(small(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: Layer(config, dtype=dtype, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = NORMS[config.norm](config.hidden_size, epsilon=config.norm_eps, param_dtype=dtype, rngs=rngs)
        if not config.tied:
            self.head = nnx.Param(small(rngs.params(), (config.hidden_size, config.vocab_size), dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """The float type of activations, of weights that are not int8, and of states that are given none."""
        return self.embedding[...].dtype

    def embed(self, tokens: Tokens) -> Hidden:
        """[B, T, E]. Ids are not checked: an id outside the vocabulary gives another token's embedding, or NaN."""
        table = self.embedding[...]
        x = as_float(part_of(table, tokens)) if is_int8(table) else look_up(table, tokens)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.scaled_embedding else x

    def run_layers(
        self,
        x: Hidden,
        positions: Positions,
        attend: Attend,
        carry: Any = (),
        xs: Any = None,
        layers: range | None = None,
    ) -> tuple[Hidden, Any, Any]:
        """Runs some layers, all by default. Returns the residual stream, the carry and stacked per-layer results."""
        config = self.config

        def body(loop: tuple[Hidden, Any], inputs: Any) -> tuple[tuple[Hidden, Any], Any]:
            x, carry = loop
            layer, index, x_slice = inputs
            if layer is None:
                layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), self.layers)
            q, k, v = layer.project(x, config)
            out, carry, y = attend(q, k, v, positions, layer, index, carry, x_slice)
            return (layer.close(x, out, config), carry), y

        every = range(config.num_layers)
        layers = every if layers is None else layers
        # For a part of the layers, index inside the loop: slicing the stacked weights would copy them at each call.
        weights = self.layers if layers == every else None
        indices = jnp.arange(layers.start, layers.stop, dtype=jnp.int32)
        (x, carry), ys = jax.lax.scan(body, (x, carry), (weights, indices, xs))
        return x, carry, ys

    def logits(self, x: Hidden) -> Logits:
        """Scores of the next token, float32."""
        head = self.embedding[...] if self.config.tied else self.head[...]
        if is_int8(head):
            logits = scores_of_all(x, head, axis=0 if self.config.tied else 1)
        else:
            logits = product(x, head.T if self.config.tied else head, jnp.float32)
        return soft_capped(logits, self.config.logit_softcap)

    def __call__(self, tokens: Tokens, positions: Positions | None = None) -> Logits:
        """Logits by plain causal attention, without a state. Positions default to 0..T-1; -1 marks padding."""
        return self.logits(self.norm(self.hidden(tokens, positions)))

    def hidden(self, tokens: Tokens, positions: Positions | None = None) -> Hidden:
        """The residual stream after the last layer by plain causal attention, before the final norm.

        Raises:
          ValueError: tokens are not integers [B, T], or ids are outside the vocabulary (ids are not checked under jit).
        """
        check_read(tokens, self.config.vocab_size, None if positions is None else positions >= 0)
        return self.hidden_of(self.embed(tokens), positions)

    def hidden_of(self, x: Hidden, positions: Positions | None = None) -> Hidden:
        """Like `hidden`, from embeddings, which need not be embeddings of tokens."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])

        def attend(q, k, v, positions, layer, index, carry, xs):
            here = layer.attention.constants(self.config, index)
            q, k = here.placed(q, k, positions)
            return causal_attention(q, k, v, positions, window=here.window, traits=here.traits), carry, xs

        return self.run_layers(x, positions, attend)[0]


def check_decoder(model: Any) -> None:
    """Raises ValueError if `model` is no decoder; the message names the decoder inside it, if it has one."""
    if isinstance(model, Decoder):
        return
    hint = next((f"; give its .{name}" for name in ("model", "decoder") if hasattr(model, name)), "")
    raise ValueError(f"the first argument must be a Decoder, not {described(model)}{hint}")


class ReadResult(NamedTuple):
    """Result of `read`.

    Attributes:
      hidden: [B, T, E], normed; `model.logits(hidden)` gives the scores of next tokens. Padding has no meaning.
      state: advanced by T tokens.
      freed, died: one entry per part of the state, [L, n, B, P, F]; see `jaxcompress.recurrence.advance.Advanced`.
    """

    hidden: Hidden
    state: State
    freed: tuple[Array, ...]
    died: tuple[Array, ...]


def read(
    model: Decoder,
    tokens: Tokens,
    state: State,
    policy: Policy,
    *,
    valid: Valid | None = None,
    chunk: int = 1,
    placement: Placement | None = None,
    recurrence: Step | None = None,
) -> ReadResult:
    """Reads a block of tokens into the state. The function is pure; jit it with `chunk` and `placement` static.

    Args:
      tokens: [B, T]; T may be 1 (decoding).
      valid: [B, T], False for padding, which may be anywhere. None means no padding.
      chunk: tokens between two selections: 1 is streaming, T is one-shot, other values are chunked.
      placement: positions of tokens for RoPE; None: the policy's. The same in every call on a state: keys are cached
        rotated for `absolute` only, and a state does not tell which, so that another one would mix them silently.
      recurrence: computes a layer; a different one gives the same result with a different gradient (see
        `jaxcompress.training.recurrent`).

    Raises:
      ValueError: tokens are not integers [B, T]; ids are outside the vocabulary (under jit ids are unknown and not
        checked); the state has another batch size, or was made for another model or policy; a pool is to stand at
        re-indexed positions.
    """
    config = model.config
    check_read(tokens, config.vocab_size, valid)
    check_state(config, state, policy, batch=tokens.shape[0])
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    nth = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    positions = jnp.where(valid, state[0].seen[:, None] + nth - 1, -1)
    x = model.embed(tokens)
    done, freed, died = [], [], []
    for layers, parts in runs(state):
        attend = attend_slots(config, policy.at(layers.start), layers.start, chunk, placement, recurrence)
        attend = attend if len(parts) == 1 else by_parts(attend, config)
        x, parts, gone = model.run_layers(x, layer_positions(positions, parts, state), attend, parts, layers=layers)
        done += [replace(part, seen=part.seen + nth[:, -1]) for part in parts]
        freed += [pair[0] for pair in gone]
        died += [pair[1] for pair in gone]
    return ReadResult(model.norm(x), tuple(done), tuple(freed), tuple(died))


def layer_positions(positions: Positions, parts: State, before: State) -> Positions:
    """Converts positions of earlier layers to those of the layers of these parts.

    They differ if tokens were renumbered between the layers (see `read_block`).
    """
    return jnp.where(positions >= 0, positions + (parts[0].seen - before[0].seen)[:, None], -1)


def attend_slots(
    config: DecoderConfig, policy: Policy, first: int, chunk: int, placement: Placement | None, recurrence: Step | None
) -> Attend:
    """The `Attend` function for a run of layers that starts at `first`. The carry has the run's parts of the state.

    Args:
      recurrence: by default, the step that reads tokens in chunks of `chunk` (see `jaxcompress.recurrence.advance`).
    """

    def attend(q, k, v, positions, layer, index, carry: State, xs):
        (part,) = carry
        step = recurrence or step_for(q.shape[1], chunk)
        spec = _step_spec(config, policy, layer, index, part, chunk, placement)
        block, part = enter(q, k, v, positions, part, index - first, spec)
        result = step(block, part, index - first, spec)
        return result.out, (result.state,), ((result.freed, result.died),)

    return attend


def by_parts(attend: Attend, config: DecoderConfig) -> Attend:
    """The `Attend` function for a layer whose heads differ in capacity: each part of its state attends separately."""

    def attend_parts(q, k, v, positions, layer, index, carry: State, xs):
        heads = lambda x, part: heads_of(x, part, config)
        results = [
            attend(heads(q, part), heads(k, part), heads(v, part), positions, layer, index, (part,), xs)
            for part in carry
        ]
        order = np.argsort([head for part in carry for head in part.heads])
        out = jnp.concatenate([result[0] for result in results], axis=2)[:, :, order]
        return out, tuple(result[1][0] for result in results), tuple(result[2][0] for result in results)

    return attend_parts


def _step_spec(
    config: DecoderConfig, policy: Policy, layer: Layer, index: Array, part: KVState, chunk: int, placement: Any
) -> StepSpec:
    """The constants while tokens are read into some heads of a layer."""
    heads = part.heads or tuple(range(config.num_kv_heads))
    out = as_float(layer.attention.out.kernel[...])
    project = out.reshape(config.num_kv_heads, -1, config.head_dim, config.hidden_size)
    if part.heads:
        project = project[part.heads,]
    group = config.num_heads // config.num_kv_heads
    which = part.heads or tuple(range(part.kv_heads))
    here = layer.attention.constants(config, index)
    context = LayerContext(
        here.rotary,
        placement or policy.placement,
        project,
        (group * len(heads), len(heads)),
        which,
        here.traits.of_heads(which, config.num_kv_heads) if part.heads else here.traits,
    )
    return StepSpec(policy, context, chunk, here.window)


def heads_of(x: Array, part: KVState, config: DecoderConfig) -> Array:
    """Selects from x (queries, keys or values, [B, T, heads, D]) the kv heads that a part of the state holds."""
    split = x.reshape(*x.shape[:2], config.num_kv_heads, -1, x.shape[-1])[:, :, part.heads]
    return split.reshape(*x.shape[:2], -1, x.shape[-1])


def last_hidden(result: ReadResult, valid: Valid | None) -> Float[Array, "B 1 E"]:
    """Hidden state of each row's last token, [B, 1, E]."""
    if valid is None:
        return result.hidden[:, -1:]
    t = valid.shape[1]
    last = (t - 1 - jnp.argmax(valid[:, ::-1], axis=1))[:, None, None]
    return jnp.take_along_axis(result.hidden, last, axis=1)
