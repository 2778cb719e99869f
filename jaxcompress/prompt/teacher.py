"""Teachers: whatever shortens a text by removing words when it is told to (LLMLingua-2, section 3.1).

A teacher is any callable (instruction, text) -> compression. `model_teacher` makes one of a model that this library has
loaded; `jaxcompress.prompt.endpoint` has one for servers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from jaxcompress.generation.config import GREEDY, GenerationConfig
from jaxcompress.generation.generate import generate
from jaxcompress.generation.text import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.init_state import Slots
from jaxcompress.policies.policy import Policy
from jaxcompress.prompt.surface import words_of

INSTRUCTION = """\
You shorten text by deleting words that carry little information. Another model will read the result and must be able \
to recover the meaning.

1. Delete words only; never add any.
2. Leave the order of the remaining words as it is.
3. Leave the remaining words exactly as they are written: no other form, no synonym.
4. Use no abbreviation and no emoji.
5. Delete as much as you can without losing information, and answer with the shortened text alone."""
"""In our words, the fourth instruction of LLMLingua-2: five restrictions and no ratio to aim at."""


@runtime_checkable
class Teacher(Protocol):
    """Shortens a text; raises TeacherFailed, or anything else, if it cannot. Several threads may call it at once."""

    def __call__(self, instruction: str, text: str, /) -> str: ...


class TeacherFailed(RuntimeError):
    """The teacher gave no usable answer for a text. Another text, or another try, may succeed."""


def model_teacher(
    model: Decoder,
    tokenizer: Tokenizer,
    policy: Policy,
    slots: Slots,
    *,
    max_new_tokens: int = 1024,
    config: GenerationConfig = GREEDY,
) -> Teacher:
    """A decoder loaded by this library, which reads and writes through a bounded state.

    With a chat template the instruction is the system message and the text the user message; without one they are one
    plain text. An answer without one of the tokenizer's end tokens within `max_new_tokens` tokens is a failure, since
    words that were never reached would be labelled as deleted.
    """
    stop = tuple(dict.fromkeys((*config.stop_token_ids, *tokenizer.eos_ids)))

    def shorten(instruction: str, text: str) -> str:
        if tokenizer.has_chat_template:
            messages = [dict(role="system", content=instruction), dict(role="user", content=text)]
            prompt = tokenizer.encode(tokenizer.apply_chat_template(messages), add_bos=False)
        else:
            prompt = tokenizer.encode(f"{instruction}\n\nText:\n{text}\n\nShortened text:\n")
        (tokens,) = generate(
            model, [prompt], policy, slots, max_new_tokens=max_new_tokens, config=replace(config, stop_token_ids=stop)
        )
        written = tokens[0][tokens[0] >= 0]
        if not len(written) or int(written[-1]) not in stop:
            raise TeacherFailed(f"the answer did not end within {max_new_tokens} tokens")
        return tokenizer.decode(written[:-1]).strip()

    return shorten


def count_words(text: str) -> int:
    """How many words a text has, for `cut_for_teacher`."""
    return len(words_of(text))


def cut_for_teacher(
    text: str, *, limit: int = 512, count: Callable[[str], int] = count_words, ends: Sequence[str] = (".", "\n")
) -> list[str]:
    """Cuts a text into pieces that a teacher shortens one at a time; joined, they are the text.

    Given a long text, teachers summarise instead of deleting, so the paper sends at most 512 tokens at a time. A piece
    ends after the last full stop or line break that fits; without one, after the last word that fits. A single word
    longer than the limit is a piece of its own.

    Args:
      limit: the largest `count` of a piece.
      count: words by default; give a tokenizer's count to cut by tokens.
      ends: what a piece may end with.

    Raises:
      ValueError: the limit is less than 1.
    """
    if limit < 1:
        raise ValueError(f"a piece has at least 1 word, not {limit}")
    parts = _words_with_space(text)
    sizes = [count(part) for part in parts]
    pieces, start = [], 0
    while start < len(parts):
        end, size = start + 1, sizes[start]
        while end < len(parts) and size + sizes[end] <= limit:
            size, end = size + sizes[end], end + 1
        if end < len(parts):
            whole = (at for at in range(end, start, -1) if _ends(parts[at - 1], ends))
            end = next(whole, end)
        pieces.append("".join(parts[start:end]))
        start = end
    return pieces


def _words_with_space(text: str) -> list[str]:
    """The words of a text, each with the white space before it and the line breaks after it; joined, they are the text.

    What is white at the end is taken apart from the rest: a pattern would try each place of it anew.
    """
    words = text.rstrip()
    parts, lines = re.findall(r"\s*+\S++(?:[^\S\n]*\n)*", words), text.rfind("\n", len(words)) + 1
    if parts and lines:
        parts[-1] += text[len(words) : lines]
    done = lines if parts and lines else len(words)
    return [*parts, text[done:]] if done < len(text) else parts


def _ends(part: str, ends: Sequence[str]) -> bool:
    return any(part.endswith(end) or part.rstrip().endswith(end) for end in ends)
