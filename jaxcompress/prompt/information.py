"""How much a text surprises a decoder: negative log-likelihoods of its tokens, read through a bounded state.

A text may have any length. The state has a fixed number of slots, and one compiled function of fixed shapes reads every
segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcompress.generation.text import Tokenizer
from jaxcompress.inputs.token_ids import token_rows
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.policies import Window
from jaxcompress.policies.policy import Policy
from jaxcompress.prompt.word_scores import ScoredWords, Scorer
from jaxcompress.prompt.words import Spans, align, segment
from jaxcompress.state.kv_state import State
from jaxcompress.state.placement import Placement
from jaxcompress.training.loss import token_losses

Nats = Float[np.ndarray, " T"]
Ids = Int[np.ndarray, " T"]


@dataclass(frozen=True)
class Reader:
    """A decoder, and the state that it reads with.

    Attributes:
      policy: what the state keeps: by default the first 4 tokens and the newest ones. `Full()` keeps all; then `slots`
        must be enough for the text.
      segment: tokens per call, and between two selections.
      placement: where tokens stand for RoPE. `slot`, the default, keeps distances within what the model was trained on,
        however long the text. With `Full()` all placements are the same.
    """

    model: Decoder
    tokenizer: Tokenizer
    policy: Policy = Window(4)
    slots: Slots = 512
    segment: int = 128
    placement: Placement = "slot"

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ValueError(f"a segment has at least 1 token, not {self.segment}")

    def begin(self, rows: int = 1) -> Context:
        """The context before the first token of a text."""
        state = init_state(self.model.config, self.policy, self.slots, batch=rows, dtype=self.model.dtype)
        opening = self.tokenizer.bos_id
        return Context(state, np.full(rows, -1 if opening is None else opening, np.int32))

    def losses(self, context: Context, tokens: Int[np.ndarray, "B T"]) -> tuple[Float[np.ndarray, "B T"], Context]:
        """The losses of the next tokens, in nats, and the context after them.

        Rows may have different lengths. Padding is -1 and stands at the end; its losses are 0, and a row's context ends
        with its last token. The first token of a text without a begin token has no prediction: its loss is NaN.

        Raises:
          ValueError: ids other than -1 outside the vocabulary (see `jaxcompress.inputs.token_ids`).
        """
        there = np.asarray(tokens) != -1
        tokens = np.where(there, token_rows(tokens, self.model.config.vocab_size, valid=there), -1)
        all_losses = []
        for start in range(0, tokens.shape[1], self.segment):
            losses, context = self._segment(context, tokens[:, start : start + self.segment])
            all_losses.append(losses)
        if not all_losses:
            return np.zeros(tokens.shape, np.float32), context
        return np.concatenate(all_losses, axis=1), context

    def _segment(self, context: Context, tokens: np.ndarray) -> tuple[np.ndarray, Context]:
        """Reads one segment. The newest token of the context is not in the state yet: it is the first input."""
        width = tokens.shape[1]
        tokens = np.pad(tokens, [(0, 0), (0, self.segment - width)], constant_values=-1)
        inputs = np.concatenate([context.last[:, None], tokens[:, :-1]], axis=1)
        valid = (inputs >= 0) & (tokens >= 0)
        losses, state = _read_segment(
            self.model, np.maximum(inputs, 0), np.maximum(tokens, 0), valid, context.state,
            policy=self.policy, chunk=self.segment, placement=self.placement,
        )  # fmt: skip
        losses = np.where(valid, np.asarray(losses), np.where(tokens >= 0, np.nan, 0.0)).astype(np.float32)
        ends = (tokens >= 0).sum(1)
        last = np.where(ends > 0, tokens[np.arange(len(tokens)), np.maximum(ends - 1, 0)], context.last)
        return losses[:, :width], Context(state, last.astype(np.int32))


class Context(NamedTuple):
    """What a reader has read: a state without the newest token of each row, and these tokens [B], -1 for none."""

    state: State
    last: Int[np.ndarray, " B"]


@partial(jax.jit, static_argnames=("chunk", "placement"))
def _read_segment(
    model: Decoder,
    inputs: Array,
    targets: Array,
    valid: Array,
    state: State,
    *,
    policy: Policy,
    chunk: int,
    placement: Placement,
) -> tuple[Array, State]:
    done = read(model, inputs, state, policy, valid=valid, chunk=chunk, placement=placement)
    return token_losses(model.logits(done.hidden), targets), done.state


class TokenLosses(NamedTuple):
    """The tokens of a text, where each stands in it, and its loss.

    Attributes:
      ids: [T].
      places: [T, 2], text[start:end].
      nats: [T]; NaN where there is no prediction.
    """

    ids: Ids
    places: Int[np.ndarray, "T 2"]
    nats: Nats


def surprise(reader: Reader, text: str, context: Context | None = None) -> TokenLosses:
    """Reads a text, after `context` if one is given."""
    ids, places = reader.tokenizer.encode_with_places(text)
    losses, _ = reader.losses(reader.begin() if context is None else context, ids[None])
    return TokenLosses(ids, places, losses[0])


def per_unit(units: Spans, read: TokenLosses) -> Float[np.ndarray, " U"]:
    """The mean loss of the tokens that lie in each unit [U], completely or in part.

    A unit with a token that has no prediction scores +inf (nothing is known against it), a unit without tokens -inf.

    Args:
      units: [U, 2], start and end of each in characters.
    """
    first, last = align(units, read.places)
    sums, unread = (
        np.concatenate([[0], np.cumsum(x, dtype=np.float64)]) for x in (np.nan_to_num(read.nats), np.isnan(read.nats))
    )
    count = last - first
    mean = (sums[last] - sums[first]) / np.maximum(count, 1)
    known = np.where(unread[last] > unread[first], np.inf, mean)
    return np.where(count > 0, known, -np.inf).astype(np.float32)


def self_information(reader: Reader) -> Scorer:
    """Selective-Context over words (Li et al. 2023): a word that a decoder expected says little.

      score(word) = mean over its tokens of -log p(token | all tokens before)

    The whole text is read as one. See `jaxcompress.prompt.selective_context` for the paper's phrases and sentences.
    """

    def score(text: str) -> ScoredWords:
        spans = segment(text)
        return ScoredWords(text, spans, per_unit(spans, surprise(reader, text)), "self-information")

    return score
