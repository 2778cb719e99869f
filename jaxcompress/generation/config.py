"""The configuration of sampling and stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxcompress.generation.sampling import (
    Appeared,
    NextLogits,
    NextTokens,
    RowKeys,
    divisor,
    draw,
    greedy,
    heat,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)
from jaxcompress.inputs.described import described
from jaxcompress.inputs.scalars import number, whole
from jaxcompress.inputs.token_ids import token_ids
from jaxcompress.models.decoder import Decoder


@dataclass(frozen=True)
class GenerationConfig:
    """Configures how the next token is chosen and where a row ends. Hashable, so that it can be a static jit argument.

    The defaults take the best token. Logits are processed in Hugging Face's order: repetition penalty, temperature,
    top-k, top-p, min-p. For another sampling method, override `sample` in a subclass.

    Numbers may be Python numbers, NumPy numbers, or arrays without dimensions; they are stored as Python numbers.

    Attributes:
      temperature: the divisor of the logits; 0 takes the best token (greedy) and needs no keys. 1 draws from the
        model's own distribution. If it is so small that the quotients overflow float32, the draw is among the tokens
        that tie for the best.
      top_k: keep the k best tokens, and the tokens that tie with the k-th (Fan et al. 2018). None: all.
      top_p: keep the fewest best tokens that together have probability top_p (nucleus, Holtzman et al. 2020).
        None or 1: all.
      min_p: keep the tokens with at least min_p times the probability of the best (Nguyen et al. 2024). None: all.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens seen before (Keskar et
        al. 2019). 1: no penalty; below 1 repetition is encouraged.
      stop_token_ids: a row ends after one of these tokens; the stop token is part of the output.

    Raises:
      ValueError: temperature is negative or not finite, top_k is not an integer >= 1, top_p is not in (0, 1], min_p
        is not in [0, 1], repetition_penalty is not a positive number, stop_token_ids is no tuple, or top_k, top_p or
        min_p is given at temperature 0, where they change nothing.
    """

    temperature: Any = 0.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = 1.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive = "a positive number (1: no penalty)"
        self._settle("temperature", number, lambda x: x >= 0, "a finite number >= 0 (0: greedy)")
        self._settle("top_k", whole, lambda x: x >= 1, "an integer >= 1, or None to keep all tokens")
        self._settle("top_p", number, lambda x: 0 < x <= 1, "in (0, 1], or None to keep all tokens")
        self._settle("min_p", number, lambda x: 0 <= x <= 1, "in [0, 1], or None to keep all tokens")
        self._settle("repetition_penalty", number, lambda x: x > 0, positive)
        if not isinstance(self.stop_token_ids, tuple):
            raise ValueError(
                f"stop_token_ids must be a tuple of token ids, such as tuple(tokenizer.eos_ids), not "
                f"{described(self.stop_token_ids)}; text to stop at belongs to StopStrings"
            )
        narrows = {"top_k": self.top_k is not None, "top_p": self.top_p not in (None, 1), "min_p": bool(self.min_p)}
        if self.greedy and any(narrows.values()):
            given = " and ".join(name for name, is_given in narrows.items() if is_given)
            raise ValueError(f"{given} does nothing at temperature 0, which takes the best token; give a temperature")

    def _settle(
        self, name: str, kind: Callable[[Any, str], int | float], holds: Callable[[Any], bool], rule: str
    ) -> None:
        """Stores the number of a field as a Python number, if the number satisfies its rule."""
        given = getattr(self, name)
        if given is None and type(self).__dataclass_fields__[name].default is None:
            return
        try:
            value = kind(given, name)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise ValueError(f"{name} must be {rule}, got {given!r}")
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, so that no keys are needed."""
        return self.temperature == 0

    @property
    def penalises_repetition(self) -> bool:
        """Whether `sample` needs the tokens that appeared before."""
        return self.repetition_penalty != 1

    def sample(self, keys: RowKeys | None, logits: NextLogits, appeared: Appeared | None = None) -> NextTokens:
        """Draws one token per row.

        The logits are not checked: a row of NaN still gives some token, so a loop must check the logits itself.

        Args:
          keys: [B] one key per row, for this step only (see `row_keys`); None if greedy.
          logits: [B, V].
          appeared: [B, V] bool, the tokens so far (see `remember`); only the repetition penalty uses it.

        Returns:
          [B] int32.

        Raises:
          ValueError: keys or appeared are missing though they are needed.
        """
        logits = self.warp(logits, appeared)
        if self.greedy:
            return greedy(logits)
        if keys is None:
            raise ValueError("sampling at a temperature above 0 needs one key per row: row_keys(seeds)")
        return draw(keys, logits)

    def warp(self, logits: NextLogits, appeared: Appeared | None = None) -> NextLogits:
        """The float32 logits to draw from: removed tokens have -inf.

        At temperature 0 only the repetition penalty applies, since no other setting changes the best token.

        Raises:
          ValueError: there is a repetition penalty and no `appeared`.
        """
        logits = logits.astype(jnp.float32)
        if self.penalises_repetition:
            if appeared is None:
                raise ValueError(
                    "a repetition penalty needs `appeared`: jnp.zeros((B, V), bool), kept up by remember()"
                )
            logits = penalise_repetition(logits, appeared, divisor(self.repetition_penalty))
        if self.greedy:
            return logits
        if self.temperature != 1:
            logits = heat(logits, divisor(self.temperature))
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits


GREEDY = GenerationConfig()


def check_config(model: Decoder, config: Any) -> None:
    """Raises ValueError if `config` is no configuration, or if a stop token is no token id of the model."""
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"config must be GenerationConfig(temperature=..., ...), not {described(config)}")
    token_ids(list(config.stop_token_ids), model.config.vocab_size, "stop_token_ids")
