"""Compressions in a row: a long prompt is shortened, a picture's tokens are dropped, and both go into a bounded state.

state = init_decode_state(model, TOVA(), 128)
read = read_shortened(model, tokenizer, text, scorer, state, rate=0.5)
for tokens in decode_stream(model, read.state, max_new_tokens=100): ...
print(read.report)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress.generation.decode_state import DecodeState
from jaxcompress.generation.generate import prefill
from jaxcompress.generation.visual import prefill_encoded
from jaxcompress.inputs.scalars import Number
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.llava import Llava
from jaxcompress.prompt.counting import TokenizerCounter
from jaxcompress.prompt.keeping import Compressed, keep
from jaxcompress.prompt.recovery import Recovery, recovery
from jaxcompress.prompt.word_scores import Scorer
from jaxcompress.vision.method import Method
from jaxcompress.vision.reading import encode


@dataclass(frozen=True)
class ReadingReport:
    """What two compressions did, counted in tokens of the model that reads.

    All numbers are measured: the tokens of the two texts, and the slots that hold a token when all has been read.

    Attributes:
      original_tokens, prompt_tokens: before and after shortening, begin token, `before` and `after` included, and the
        visual tokens of a picture.
      held_tokens: slots in use after reading, on average over layers and kv heads.
      recovery: see `jaxcompress.prompt.recovery`.
      scorer, policy: what chose the words, what chose the slots.
    """

    original_tokens: int
    prompt_tokens: int
    held_tokens: float
    recovery: Recovery
    scorer: str
    policy: str

    @property
    def prompt_ratio(self) -> float:
        """How many times shorter the prompt is."""
        return self.original_tokens / self.prompt_tokens

    @property
    def state_ratio(self) -> float:
        """How many times fewer tokens the state holds than it has read; 1 if it holds all."""
        return self.prompt_tokens / self.held_tokens

    @property
    def ratio(self) -> float:
        """The product: how many times fewer tokens are held than a full cache of the original would hold."""
        return self.prompt_ratio * self.state_ratio

    def __str__(self) -> str:
        return (
            f"{self.original_tokens:,} tokens -> {self.prompt_tokens:,} ({self.prompt_ratio:.2f}x, {self.scorer}) -> "
            f"{self.held_tokens:,.4g} held ({self.state_ratio:.2f}x, {self.policy}) = {self.ratio:.2f}x in all; "
            f"recovered {self.recovery.kinds:.0%} of the content words, {self.recovery.numbers:.0%} of the numbers"
        )


class ShortenedReading(NamedTuple):
    """A shortened prompt that has been read: `jaxcompress.generation.decode_stream` goes on from `state`."""

    state: DecodeState
    kept: Compressed
    report: ReadingReport


def read_shortened(
    model: Decoder,
    tokenizer: Tokenizer,
    text: str,
    scorer: Scorer,
    state: DecodeState,
    *,
    rate: Number,
    before: str = "",
    after: str = "",
    **reading: Any,
) -> ShortenedReading:
    """Shortens a text and reads what is left through a bounded state.

    Args:
      state: of one row, fresh (see `jaxcompress.generation.init_decode_state`); donated.
      rate: the share of the text's tokens that stays, as `tokenizer` counts them without a begin token (see `keep`).
      before, after: read as they are, around the text: instruction and question. The rate does not count them; the
        report does.
      reading: `mode`, `chunk`, `segment` (see `jaxcompress.generation.prefill`).

    Raises:
      ValueError: as `keep` and `prefill`; no word is left to read.
    """
    kept = keep(scorer(text), TokenizerCounter(tokenizer), rate=rate)
    check_left(kept)
    original, short = (tokenizer.encode(before + middle + after) for middle in (text, kept.text))
    state = prefill(model, [short], state, **reading)
    report = report_of(model, state, kept, original_tokens=len(original), prompt_tokens=len(short))
    return ShortenedReading(state, kept, report)


def read_shortened_with_picture(  # ten parameters: those of `read_shortened`, the picture, and what drops its tokens
    model: Llava,
    tokenizer: Tokenizer,
    pixels: Float[np.ndarray, "*crops C W W"] | Array,
    text: str,
    scorer: Scorer,
    method: Method,
    state: DecodeState,
    *,
    rate: Number,
    before: str = "<image> ",
    after: str = "",
) -> ShortenedReading:
    """Shortens a text, drops visual tokens of a picture beside it, and reads both through a bounded state.

    Args:
      pixels: of one picture, as `jaxcompress.vision.encode` takes them.
      method: where visual tokens are dropped and how many are kept.
      state: of one row, fresh, from `init_decode_state(model.decoder, ...)`, with
        `jaxcompress.vision.slots_per_layer(...)` or any other number of slots that its policy can do with; donated.
      rate: as for `read_shortened`; pictures do not count.
      before, after: read as they are, around the text; one of them holds the tokenizer's image token.

    Returns:
      As `read_shortened`. The tokens of the report are words and visual tokens: all patches of the picture in the
      original, those that enter the decoder in the prompt. What the method drops between layers shows in the state.

    Raises:
      ValueError: as `read_shortened`; not one image token in `before`, the text and `after`.
    """
    kept = keep(scorer(text), TokenizerCounter(tokenizer), rate=rate)
    check_left(kept)
    original, short = (tokenizer.encode(before + middle + after) for middle in (text, kept.text))
    encoded = _encode(model, jnp.asarray(pixels)[None], method)
    whole = model.config.tokens_per_crop * (pixels.shape[0] if pixels.ndim == 4 else 1)
    state = prefill_encoded(model, [short], encoded, state, method)
    counts = len(original) - 1 + whole, len(short) - 1 + int((encoded.size[0] > 0).sum())
    report = report_of(model.decoder, state, kept, original_tokens=counts[0], prompt_tokens=counts[1])
    return ShortenedReading(state, kept, replace(report, scorer=f"{report.scorer} + {method.name}"))


_encode = jax.jit(encode, static_argnums=2)


def check_left(kept: Compressed) -> None:
    """Raises ValueError if no word is left to read."""
    if not kept.labels.any():
        raise ValueError(
            f"nothing is left to read: {kept.asked} of {kept.tokens_before} tokens may stay, and no word has so few; "
            "raise the rate or give a longer text"
        )


def report_of(
    model: Decoder, state: DecodeState, kept: Compressed, *, original_tokens: int, prompt_tokens: int, row: int = 0
) -> ReadingReport:
    """What was done to the one text of `kept`, which has been read into one row of `state`."""
    scored, held = kept.documents[0].scored, held_tokens(model, state, row)
    found = recovery(scored.text, kept.text)
    return ReadingReport(original_tokens, prompt_tokens, held, found, scored.by, state.policy.name)


def held_tokens(model: Decoder, state: DecodeState, row: int = 0) -> float:
    """Slots in use in a row, on average over layers and kv heads."""
    used = 0.0
    for part in state.kv:
        occupied = (part.positions[:, row] >= 0).sum()  # all sets of the part's layers
        sets = part.positions.shape[2]
        heads = model.config.num_kv_heads if part.owner is not None else len(part.heads) or model.config.num_kv_heads
        # In a pool every slot belongs to one head; elsewhere a set serves heads / sets of them.
        used += float(occupied) * (1 if part.owner is not None else heads / sets)
    return used / (model.config.num_layers * model.config.num_kv_heads)
