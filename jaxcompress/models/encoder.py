"""One encoder for the BERT and XLM-RoBERTa families with a token-classification head, as a Flax NNX module.

BERT: Devlin et al. 2019. XLM-RoBERTa: Conneau et al. 2020; its positions start at another number. Weights are stacked
over layers, and layers are scanned. There is no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxcompress.inputs.token_ids import check_read
from jaxcompress.models.activations import ACTIVATIONS, check_encoder_activation
from jaxcompress.models.lookup import look_up
from jaxcompress.recurrence.block_attention import whole_attention
from jaxcompress.recurrence.softmax import MASKED
from jaxcompress.state.shapes import Hidden, Positions, Tokens, Valid


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder. Hashable, so that it can be a static argument under jit.

    Attributes:
      num_labels: number of token classes.
      max_position: rows of the position table.
      token_types: rows of the segment table; the first row is added to every token.
      padding_id: None for BERT, whose positions are 0, 1, 2, ...; the id of `<pad>` for XLM-RoBERTa, whose positions
        count the tokens other than `<pad>`, starting at padding_id + 1. `<pad>` itself has position padding_id.
      activation: activation of the MLP, by its Hugging Face name; "gelu" is the exact GELU.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_labels: int = 2
    max_position: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12
    padding_id: int | None = None
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        check_encoder_activation(self.activation)
        if self.max_length < 1:
            raise ValueError(f"no token fits: {self.max_position} positions, the first {self.first_position} unused")

    @property
    def first_position(self) -> int:
        """Row of the position table for the first token."""
        return 0 if self.padding_id is None else self.padding_id + 1

    @property
    def max_length(self) -> int:
        """Maximum number of tokens in a row, including special tokens."""
        return self.max_position - self.first_position


class EncoderAttention(nnx.Module):
    """Attention with its projections, all with biases."""

    def __init__(self, config: EncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = lambda: _linear(config.hidden_size, config.hidden_size, dtype, rngs)
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()

    def __call__(self, x: Hidden, valid: Valid, config: EncoderConfig) -> Hidden:
        heads = lambda y: y.astype(self.out.dtype).reshape(*y.shape[:-1], config.num_heads, -1)
        bias = jnp.where(valid, 0.0, MASKED)
        out = whole_attention(heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), bias)
        return self.out(out.reshape(x.shape))


class EncoderLayer(nnx.Module):
    """Post-norm attention and MLP: each is added to its input, then normed."""

    def __init__(self, config: EncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention = EncoderAttention(config, dtype=dtype, rngs=rngs)
        self.attention_norm, self.mlp_norm = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.up = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.down = _linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, x: Hidden, valid: Valid, config: EncoderConfig) -> Hidden:
        x = self.attention_norm(x + self.attention(x, valid, config))
        return self.mlp_norm(x + self.down(ACTIVATIONS[config.activation](self.up(x))))


class Encoder(nnx.Module):
    """A bidirectional transformer that classifies every token.

    Attributes:
      config: its shape (static).
      embedding, position_embedding, type_embedding: [V, E], [max_position, E], [token_types, E].
      layers: one `EncoderLayer` whose arrays have a leading axis L.
      head: E to num_labels.
    """

    reads_question: ClassVar[bool] = False
    """Whether a row holds a question before the text."""

    def __init__(self, config: EncoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        table = lambda rows: nnx.Param(_small(rngs.params(), (rows, config.hidden_size), dtype))
        self.embedding, self.position_embedding = table(config.vocab_size), table(config.max_position)
        self.type_embedding = table(config.token_types)
        self.embedding_norm = _norm(config, dtype, rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: EncoderLayer(config, dtype=dtype, rngs=nnx.Rngs(params=key)))(keys)
        self.head = _linear(config.hidden_size, config.num_labels, dtype, rngs)

    def __call__(self, tokens: Tokens, valid: Valid) -> Float[Array, "B T C"]:
        """Class logits of every token, float32. Logits of padding are finite but have no meaning.

        Args:
          tokens: ids, at most `config.max_length` a row.
          valid: False for padding, which nothing attends to.
        """
        return self.head(self.hidden(tokens, valid)).astype(jnp.float32)

    def keep_probability(self, tokens: Tokens, valid: Valid) -> Float[Array, "B T"]:
        """The probability of the last class, "keep"."""
        return jax.nn.softmax(self(tokens, valid), axis=-1)[..., -1]

    def hidden(self, tokens: Tokens, valid: Valid) -> Hidden:
        """The output of the last layer.

        Raises:
          ValueError: as `check_rows`.
        """
        config = self.config
        check_rows(tokens, valid, config)
        body = lambda x, layer: (layer(x, valid, config), None)
        return jax.lax.scan(body, self.embed(tokens), self.layers)[0]

    def embed(self, tokens: Tokens) -> Hidden:
        """Input of the first layer: the normed sum of token, position and segment embeddings."""
        positions = look_up(self.position_embedding[...], self.positions(tokens))
        return self.embedding_norm(look_up(self.embedding[...], tokens) + positions + self.type_embedding[...][0])

    def positions(self, tokens: Tokens) -> Positions:
        """Rows of the position table (see `EncoderConfig.padding_id`)."""
        padding = self.config.padding_id
        if padding is None:
            return jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        counted = (tokens != padding).astype(jnp.int32)
        return jnp.cumsum(counted, axis=-1) * counted + padding


def check_rows(tokens: Tokens, valid: Valid, config: Any) -> None:
    """Raises ValueError if rows have more tokens than an encoder has positions, or ids that it does not know.

    Under `jax.jit` ids are unknown and not checked.
    """
    check_read(tokens, config.vocab_size, valid)
    if tokens.shape[1] > config.max_length:
        raise ValueError(
            f"rows have {tokens.shape[1]} tokens; the encoder takes at most {config.max_length}: cut the text into rows"
        )


_small = jax.nn.initializers.normal(0.02)


def _linear(n: int, m: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Linear layer that multiplies in `dtype`, accumulates in float32 and returns float32, as matrix units do.

    On a CPU, XLA uses the matrix units for bfloat16 only with a float32 result; this is 5 times faster than float32.
    """
    return nnx.Linear(
        n, m, kernel_init=_small, param_dtype=dtype, dtype=dtype, preferred_element_type=jnp.float32, rngs=rngs
    )


def _norm(config: EncoderConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.norm_eps, param_dtype=dtype, dtype=jnp.float32, use_fast_variance=False,
        rngs=rngs,
    )  # fmt: skip
