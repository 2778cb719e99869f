"""jaxcompress generate"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxcompress.cli.runtime import (
    StateDtype,
    at_least,
    chunk_of,
    open_model,
    policy_named,
    warn_of_positions,
    write_json,
)
from jaxcompress.inputs.text import read_text, standard_input, unescaped

if TYPE_CHECKING:
    from jaxcompress.generation import TextUntil


@dataclass(frozen=True)
class Generate:
    """Reads a prompt of any length through a fixed number of slots and writes on.

    Text appears as it is written. Several --prompt are written side by side, as one batch. --file reads a file, or
    standard input (-), however long, in segments: memory does not grow.

    Example: cat book.txt | jaxcompress generate --file - --policy tova --slots 128 --placement slot --max-new-tokens
      200
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """May be given several times."""
    file: Path | None = None
    """Read the prompt from here; - for standard input."""
    chat: bool = False
    """Wrap the prompt as a user's message in the tokenizer's chat template."""
    shorten: float | None = None
    """The share of the prompt's tokens that stays, in (0, 1], counted by the model's tokenizer without the begin token:
    the embedded prompt compressor drops words, as `compress-prompt --rate` does, and the model reads what is left. The
    ratios of both compressions are printed on standard error. A file is then read whole."""
    model: str | None = None
    """Hugging Face folder, hub id, GGUF file or smollm2; the embedded model if not given."""
    policy: str = "tova"
    """See `jaxcompress info` for the names; `own` is the one that the model was saved with."""
    slots: tuple[int, ...] = (128,)
    """Capacity: one for all layers, or one for each."""
    max_new_tokens: int = 128
    """Tokens to generate, at most."""
    mode: Literal["streaming", "chunked", "oneshot"] = "streaming"
    """How the prompt is read (--file: streaming or chunked)."""
    chunk: int | None = None
    """Tokens between two selections in mode chunked; 128 if not given."""
    placement: Literal["absolute", "slot", "compact"] | None = None
    """Where tokens stand for RoPE; as the policy was published if not given. `slot` and `compact` keep distances within
    what the model was trained on, however long the text."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    """Row n of a batch uses seed + n."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End at this text, of which nothing is printed; may be given several times. Names of special tokens (<|eot_id|>)
    count, and \\n, \\r, \\t and \\\\ stand for a line feed, a carriage return, a tab and a backslash."""
    stop_id: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """End at this token; may be given several times."""
    dtype: str | None = None
    """Of weights; the checkpoint's if not given."""
    state_dtype: StateDtype | None = None
    """What keys and values are stored in, the last three with a scale per slot and head; as --dtype if not given."""
    json: bool = False
    """Print JSON when done instead of text as it comes."""

    def run(self) -> None:
        if bool(self.prompt) == (self.file is not None):
            raise ValueError("give either --prompt or --file")

        at_least(1, max_new_tokens=self.max_new_tokens)
        if self.shorten is not None and not 0 < self.shorten <= 1:
            raise ValueError(f"--shorten must be in (0, 1], the share of tokens that stays, not {self.shorten}")
        chunk = chunk_of(self.mode, self.chunk)
        if self.temperature == 0:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name.replace('_', '-')} does nothing at --temperature 0, which takes the best token"
                    )
        if self.chat and self.file is not None:
            raise ValueError("--chat needs --prompt: a file is read as it is")
        if self.mode == "oneshot" and self.file is not None and self.shorten is None:
            raise ValueError("--file is read in segments; use --mode streaming or chunked")
        model, tokenizer = open_model(self.model, self.dtype)
        from jaxcompress.generation import GenerationConfig, TextUntil, decode_stream, init_decode_state, prefill

        if wrong := [token for token in self.stop_id if not 0 <= token < model.config.vocab_size]:
            raise ValueError(f"--stop-id {wrong[0]} is outside the vocabulary; give 0 to {model.config.vocab_size - 1}")
        until = partial(
            TextUntil, tokenizer, [unescaped(text) for text in self.stop], (*tokenizer.eos_ids, *self.stop_id)
        )
        policy = policy_named(self.policy, tokenizer.folder)
        config = GenerationConfig(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, until().ids
        )
        slots = self.slots[0] if len(self.slots) == 1 else self.slots
        batch = max(len(self.prompt), 1)
        state = init_decode_state(
            model, policy, slots, batch=batch, seeds=self.seed, dtype=self.state_dtype, placement=self.placement
        )
        kept = self._shortened(tokenizer) if self.shorten is not None else []
        if self.file is not None and not kept:
            state, last = self._read_file(model, tokenizer, state, chunk)
            prompts = [last]
        else:
            texts = [one.text for one in kept] or self.prompt
            prompts = [self._encode(tokenizer, text) for text in texts]
            state = prefill(model, prompts, state, mode=self.mode, chunk=chunk)
        if kept:
            self._report(model, tokenizer, state, kept, prompts)
        end = int(state.kv[0].seen.max()) + self.max_new_tokens
        warn_of_positions(model, [self.placement or policy.placement], end)
        rows = [_Row(until(after=[] if ids is None else ids)) for ids in prompts]
        live = batch == 1 and not self.json
        for tokens in decode_stream(model, state, self.max_new_tokens, config, stream_every=8):
            for row, new in zip(rows, tokens, strict=True):
                row.push(new)
            if live:
                print(rows[0].take(), end="", flush=True)
            if all(row.until.stopped for row in rows):
                break
        for row in rows:
            row.finish()
        if live:
            print(rows[0].take())
        elif self.json:
            texts = self.prompt or (str(self.file),)
            write_json(
                [
                    dict(prompt=text, text=row.text, tokens=row.count, stopped=row.until.stopped)
                    for text, row in zip(texts, rows, strict=True)
                ]
            )
        else:
            for n, (prompt, row) in enumerate(zip(self.prompt, rows, strict=True)):
                print(f"--- {n}: {prompt}\n{row.text}")

    def _encode(self, tokenizer, text: str):
        if self.chat:
            return tokenizer.encode(tokenizer.apply_chat_template([dict(role="user", content=text)]), add_bos=False)
        return tokenizer.encode(text)

    def _shortened(self, tokenizer):
        from jaxcompress.prompt import Compressor, TokenizerCounter

        compressor = Compressor.load(count=TokenizerCounter(tokenizer))
        return [compressor.compress(text, rate=self.shorten) for text in self.prompt or (read_text(self.file),)]

    def _report(self, model, tokenizer, state, kept, prompts) -> None:
        from jaxcompress.prompt.reading import report_of

        for row, (one, ids) in enumerate(zip(kept, prompts, strict=True)):
            whole = len(self._encode(tokenizer, one.documents[0].scored.text))
            told = report_of(model, state, one, original_tokens=whole, prompt_tokens=len(ids), row=row)
            print(f"jaxcompress: {told}", file=sys.stderr)

    def _read_file(self, model, tokenizer, state, chunk: int):
        from contextlib import nullcontext

        from jaxcompress.cli import runtime
        from jaxcompress.generation import encode_stream, prefill_stream

        path = str(self.file)
        by = 1 if self.mode == "streaming" else chunk
        tail, count, last = None, 0, state

        def remember(pieces):
            nonlocal tail
            for piece in pieces:
                tail = piece
                yield piece

        opening = len(tokenizer.opening())
        with (
            nullcontext(standard_input()) if path == "-" else open(path, "rb") as text,
            runtime.progress(None, "reading") as bar,
        ):
            pieces = remember(encode_stream(text, tokenizer))
            for now, after in prefill_stream(model, pieces, state, chunk=by):
                bar(now - count)
                count, last = now, after
        if count <= opening:
            raise ValueError(f"{self.file} is empty; there is nothing to read")
        return last, tail


class _Row:
    """Text of one sequence as it grows."""

    def __init__(self, until: TextUntil):
        self.until = until
        self.text, self.shown, self.count = "", 0, 0

    def push(self, tokens) -> None:
        for token in tokens:
            if self.until.stopped or token < 0:
                return
            self.count += 1
            self.text += self.until.push(token)

    def finish(self) -> None:
        self.text += self.until.finish()

    def take(self) -> str:
        new, self.shown = self.text[self.shown :], len(self.text)
        return new
