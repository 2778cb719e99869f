"""Two compressions in a row: a long prompt is shortened, then read into a bounded state.

read = read_shortened(model, tokenizer, text, scorer, rate=0.5, policy=TOVA(), slots=128)
for tokens in decode_stream(model, read.state, max_new_tokens=100): ...
print(read.report)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxcompress.generation.decode_state import DecodeState, init_decode_state
from jaxcompress.generation.generate import prefill
from jaxcompress.generation.text import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.init_state import Slots
from jaxcompress.policies.policy import Policy
from jaxcompress.prompt.recovery import Recovery, recovery
from jaxcompress.prompt.word_scores import Kept, Scorer, keep
from jaxcompress.state.placement import Placement


@dataclass(frozen=True)
class ReadingReport:
    """What two compressions did, counted in tokens of the model that reads.

    Nothing is taken from what was asked for: tokens are those of the two texts, and slots those that hold a token when
    all has been read, averaged over layers and kv heads.

    Attributes:
      original_tokens, prompt_tokens: before and after shortening, the begin token included.
      held_tokens: slots in use after reading, of a layer and head on average.
      recovery: see `jaxcompress.prompt.recovery`.
      scorer, policy: who chose.
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
    """A shortened prompt, read: `jaxcompress.generation.decode_stream` goes on from `state`."""

    state: DecodeState
    kept: Kept
    report: ReadingReport


def read_shortened(
    model: Decoder,
    tokenizer: Tokenizer,
    text: str,
    scorer: Scorer,
    *,
    rate: float,
    policy: Policy,
    slots: Slots,
    before: str = "",
    after: str = "",
    seed: int = 0,
    dtype: Any = None,
    placement: Placement | None = None,
    **reading: Any,
) -> ShortenedReading:
    """Shortens a text and reads what is left through a bounded state.

    Args:
      rate: share of the words that stay, exactly.
      before, after: read as they are, around the text: instruction and question. They count in both numbers of tokens.
      dtype, placement: of the state (see `jaxcompress.generation.init_decode_state`).
      reading: `mode`, `chunk`, `segment` (see `jaxcompress.generation.prefill`).

    Raises:
      ValueError: as `keep` and `prefill` do; the text has no words.
    """
    kept = keep(scorer(text), rate=rate)
    if not kept.labels.any():
        raise ValueError(f"nothing is left to read: {int(kept.labels.sum())} of {len(kept.labels)} words stay")
    whole, short = (tokenizer.encode(before + middle + after) for middle in (text, kept.text))
    state = init_decode_state(model, policy, slots, seeds=seed, dtype=dtype, placement=placement)
    state = prefill(model, [short], state, **reading)
    report = report_of(model, state, kept, original_tokens=len(whole), prompt_tokens=len(short))
    return ShortenedReading(state, kept, report)


def report_of(
    model: Decoder,
    state: DecodeState,
    kept: Kept,
    *,
    original_tokens: int,
    prompt_tokens: int,
    row: int = 0,
) -> ReadingReport:
    """What was done to a prompt that has been read, which is one row of `state`."""
    held = held_tokens(model, state, row)
    found = recovery(kept.scored.text, kept.text)
    return ReadingReport(original_tokens, prompt_tokens, held, found, kept.scored.by, state.policy.name)


def held_tokens(model: Decoder, state: DecodeState, row: int = 0) -> float:
    """Slots in use in a row, of a layer and kv head on average."""
    used = 0.0
    for part in state.kv:
        occupied = (part.positions[:, row] >= 0).sum()  # all sets of the part's layers
        sets = part.positions.shape[2]
        heads = model.config.num_kv_heads if part.owner is not None else len(part.heads) or model.config.num_kv_heads
        # In a pool every slot belongs to one head; elsewhere a set serves heads / sets of them.
        used += float(occupied) * (1 if part.owner is not None else heads / sets)
    return used / (model.config.num_layers * model.config.num_kv_heads)
