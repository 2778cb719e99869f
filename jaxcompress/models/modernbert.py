"""ModernBERT (Warner et al. 2024): a bidirectional encoder for long texts, and heads that say which tokens stay.

Layers alternate: every third attends to all tokens, the others to those at most half a window away, each kind with a
RoPE base of its own. Norms come before attention and MLP (the first layer has none before attention), the MLP is a
GeGLU, and nothing has a bias. Weights are stacked over layers, and layers are scanned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxcompress.models.activations import ACTIVATIONS, check_encoder_activation
from jaxcompress.models.choices import check_choices
from jaxcompress.models.encoder import check_rows
from jaxcompress.models.lookup import look_up
from jaxcompress.models.rope import RopeConfig, turned
from jaxcompress.recurrence.block_attention import local_attention, whole_attention
from jaxcompress.recurrence.softmax import MASKED
from jaxcompress.state.shapes import Hidden, Tokens, Valid


@dataclass(frozen=True)
class ModernBertConfig:
    """Shape of a ModernBERT. Hashable, so that it can be a static argument under jit.

    Attributes:
      attends_to_all: for each layer, whether it attends to all tokens; otherwise to those at most `reach` away.
      global_rope, local_rope: of layers of the two kinds.
      max_length: maximum number of tokens in a row, including special tokens.
      activation, head_activation: of the MLPs and of the heads, by their Hugging Face names.
      head_bias: whether the dense layer of a head has a bias.
      pooling: what stands for the whole row: its first token, or the mean of its tokens.
      num_labels: number of token classes.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    attends_to_all: tuple[bool, ...]
    reach: int = 64
    global_rope: RopeConfig = field(default_factory=lambda: RopeConfig(160_000.0))
    local_rope: RopeConfig = field(default_factory=lambda: RopeConfig(10_000.0))
    max_length: int = 8192
    norm_eps: float = 1e-5
    activation: str = "gelu"
    head_activation: str = "gelu"
    head_bias: bool = False
    pooling: Literal["cls", "mean"] = "cls"
    num_labels: int = 2

    def __post_init__(self) -> None:
        check_choices(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        for name in (self.activation, self.head_activation):
            check_encoder_activation(name)
        if not self.attends_to_all or self.reach < 1:
            raise ValueError(f"there is at least one layer, and a reach of 1 token, not {self.reach}")

    @property
    def num_layers(self) -> int:
        return len(self.attends_to_all)


class ModernBertLayer(nnx.Module):
    """Pre-norm attention and GeGLU."""

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        e, f = config.hidden_size, config.intermediate_size
        linear = lambda n, m: _linear(n, m, dtype, rngs)
        self.attention_norm, self.mlp_norm = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.query, self.key, self.value, self.out = linear(e, e), linear(e, e), linear(e, e), linear(e, e)
        self.gate, self.up, self.down = linear(e, f), linear(e, f), linear(f, e)

    def __call__(self, x: Hidden, valid: Valid, kind: _Kind, config: ModernBertConfig) -> Hidden:
        normed = jnp.where(kind.first, x, self.attention_norm(x))
        heads = lambda y: y.astype(self.out.dtype).reshape(*y.shape[:-1], config.num_heads, -1)
        turn = lambda y: turned(y, kind.cos[:, None], kind.sin[:, None])
        q, k, v = turn(heads(self.query(normed))), turn(heads(self.key(normed))), heads(self.value(normed))
        bias = jnp.where(valid, 0.0, MASKED)
        near = lambda q, k, v, bias: local_attention(q, k, v, bias, config.reach)
        # Within the reach of every token, the two kinds of layers are the same.
        if x.shape[1] <= config.reach + 1 or all(config.attends_to_all):
            out = whole_attention(q, k, v, bias)
        else:
            out = jax.lax.cond(kind.attends_to_all, whole_attention, near, q, k, v, bias)
        x = x + self.out(out.reshape(x.shape))
        normed = self.mlp_norm(x)
        return x + self.down(ACTIVATIONS[config.activation](self.gate(normed)) * self.up(normed))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Kind:
    """What differs between layers, stacked: [L] bools, and cosine and sine for each position and channel pair."""

    first: Array
    attends_to_all: Array
    cos: Array
    sin: Array


class ModernBert(nnx.Module):
    """The encoder alone.

    Attributes:
      config: its shape (static).
      embedding: [V, E].
      layers: one `ModernBertLayer` whose arrays have a leading axis L. The first row of `attention_norm` is not used.
      norm: after the last layer.
    """

    reads_question: ClassVar[bool] = False
    """Whether a row holds a question before the text."""

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(_small(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.embedding_norm = _norm(config, dtype, rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: ModernBertLayer(config, dtype=dtype, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = _norm(config, dtype, rngs)

    def hidden(self, tokens: Tokens, valid: Valid) -> Hidden:
        """The output of the last layer, before the norm.

        Args:
          tokens: ids, at most `config.max_length` a row.
          valid: False for padding, which nothing attends to.

        Raises:
          ValueError: as `jaxcompress.models.encoder.check_rows`.
        """
        check_rows(tokens, valid, self.config)
        config, places = self.config, jnp.arange(tokens.shape[1])
        head_dim = config.hidden_size // config.num_heads
        ropes = [rope.rotary(head_dim).cos_sin(places) for rope in (config.local_rope, config.global_rope)]
        to_all = jnp.array(config.attends_to_all)
        cos, sin = (jnp.stack(pair)[to_all.astype(jnp.int32)] for pair in zip(*ropes, strict=True))
        kinds = _Kind(jnp.arange(config.num_layers) == 0, to_all, cos, sin)
        body = lambda x, one: (one[0](x, valid, one[1], config), None)
        return jax.lax.scan(body, self.embedding_norm(look_up(self.embedding[...], tokens)), (self.layers, kinds))[0]


class ModernBertClassifier(ModernBert):
    """ModernBERT that classifies every token: a dense layer, its norm, and a linear layer."""

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.head = ClassifierHead(config, config.num_labels, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Tokens, valid: Valid) -> Float[Array, "B T C"]:
        """Class logits of every token, float32. Logits of padding are finite but have no meaning."""
        return self.head(self.norm(self.hidden(tokens, valid)), self.config)

    def keep_probability(self, tokens: Tokens, valid: Valid) -> Float[Array, "B T"]:
        """The probability of the last class, "keep"."""
        return jax.nn.softmax(self(tokens, valid), axis=-1)[..., -1]


class Provence(ModernBert):
    """ModernBERT that reads a question and a text, and says which tokens of the text answer it (Provence, Chirkova et
    al. 2025), as the checkpoints of OpenProvence do.

    A row is question and text with special tokens around and between them. The pruning head reads the last layer's
    output *before* the last norm: its checkpoints were trained so, with transformers 4, whose last hidden state of a
    ModernBERT that is.
    """

    reads_question: ClassVar[bool] = True

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.pruning = _linear(config.hidden_size, config.num_labels, dtype, rngs, bias=True)
        self.ranking = ClassifierHead(config, 1, dtype=dtype, rngs=rngs)

    def keep_and_relevance(self, tokens: Tokens, valid: Valid) -> tuple[Float[Array, "B T"], Float[Array, " B"]]:
        """The probability that each token stays, and how relevant the text is for the question, in (0, 1)."""
        last = self.hidden(tokens, valid)
        keep = jax.nn.softmax(self.pruning(last).astype(jnp.float32), axis=-1)[..., -1]
        normed = self.norm(last)
        if self.config.pooling == "cls":
            pooled = normed[:, 0]
        else:
            pooled = jnp.where(valid[..., None], normed, 0).sum(1) / jnp.maximum(valid.sum(1, keepdims=True), 1)
        return keep, jax.nn.sigmoid(self.ranking(pooled, self.config)[..., 0])

    def keep_probability(self, tokens: Tokens, valid: Valid) -> Float[Array, "B T"]:
        """The probability that each token stays."""
        return self.keep_and_relevance(tokens, valid)[0]


class Kompress(ModernBert):
    """ModernBERT with the two heads of Kompress (Headroom): one for tokens, and a convolution for spans.

    With p a token's probability and s that of the span around it, the score is p (1 + s) / 2.
    """

    FEATURES: ClassVar[int] = 256

    def __init__(self, config: ModernBertConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        conv = lambda n, m, width: nnx.Conv(
            n, m, kernel_size=(width,), padding="SAME", param_dtype=dtype, dtype=dtype, rngs=rngs
        )
        self.token = _linear(config.hidden_size, 2, dtype, rngs, bias=True)
        self.span_in, self.span_out = conv(config.hidden_size, self.FEATURES, 5), conv(self.FEATURES, 1, 3)

    def keep_probability(self, tokens: Tokens, valid: Valid) -> Float[Array, "B T"]:
        """The score of each token, in (0, 1). Tokens beyond the ends of a row count as 0 in the convolutions."""
        inside = valid[..., None]
        last = jnp.where(inside, self.norm(self.hidden(tokens, valid)), 0)
        p = jax.nn.softmax(self.token(last).astype(jnp.float32), axis=-1)[..., 1]
        features = jnp.where(inside, ACTIVATIONS["gelu"](self.span_in(last)), 0)
        s = jax.nn.sigmoid(self.span_out(features).astype(jnp.float32))[..., 0]
        return p * (0.5 + 0.5 * s)


class ClassifierHead(nnx.Module):
    """A dense layer with an activation, its norm, and a linear layer to classes."""

    def __init__(self, config: ModernBertConfig, labels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        e = config.hidden_size
        self.dense = _linear(e, e, dtype, rngs, bias=config.head_bias)
        self.norm = _norm(config, dtype, rngs)
        self.classes = _linear(e, labels, dtype, rngs, bias=True)

    def __call__(self, x: Float[Array, "*n E"], config: ModernBertConfig) -> Float[Array, "*n C"]:
        """Class logits, float32."""
        return self.classes(self.norm(ACTIVATIONS[config.head_activation](self.dense(x)))).astype(jnp.float32)


_small = jax.nn.initializers.normal(0.02)


def _linear(n: int, m: int, dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = False) -> nnx.Linear:
    """Linear layer that multiplies in `dtype` and returns float32, as those of `jaxcompress.models.encoder`."""
    return nnx.Linear(
        n, m, use_bias=bias, kernel_init=_small, param_dtype=dtype, dtype=dtype, preferred_element_type=jnp.float32,
        rngs=rngs,
    )  # fmt: skip


def _norm(config: ModernBertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.norm_eps, use_bias=False, param_dtype=dtype, dtype=jnp.float32,
        use_fast_variance=False, rngs=rngs,
    )  # fmt: skip
