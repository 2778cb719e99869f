"""jaxcompress generate"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxcompress.cli.runtime import StateDtype


@dataclass(frozen=True)
class Generate:
    """Reads a prompt of any length through a fixed number of slots and writes on.

    Text appears as it is written. Several --prompt are written side by side, as one batch. --file reads a file, or
    standard input (-), however long, in segments: memory does not grow.

    Example: cat book.txt | jaxcompress generate --file - --policy tova --slots 128 --placement slot --steps 200
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """May be given several times."""
    file: Path | None = None
    """Read the prompt from here; - for standard input."""
    chat: bool = False
    """Wrap the prompt as a user's message in the tokenizer's chat template."""
    shorten: float | None = None
    """Keep only this share of the prompt's words, chosen by the embedded prompt compressor, and read what is left; what
    both compressions came to is told on standard error. A file is then read whole."""
    model: str | None = None
    """Hugging Face folder or hub id; the embedded model if not given."""
    policy: str = "tova"
    """See `jaxcompress info` for the names; `own` is the one that the model was saved with."""
    slots: tuple[int, ...] = (128,)
    """Capacity: one for all layers, or one for each."""
    steps: int = 128
    """Tokens to write."""
    mode: Literal["streaming", "chunked", "oneshot"] = "streaming"
    """How the prompt is read (--file: streaming or chunked)."""
    chunk: int = 128
    """Tokens between two selections in mode chunked."""
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
    """End at this text; may be given several times."""
    dtype: str | None = None
    """Of weights; the checkpoint's if not given."""
    state_dtype: StateDtype | None = None
    """What keys and values are stored in, the last three with a scale per slot and head; as --dtype if not given."""
    json: bool = False
    """Print JSON when done instead of text as it comes."""

    def run(self) -> None:
        if bool(self.prompt) == (self.file is not None):
            raise ValueError("give either --prompt or --file")
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, not {self.steps}")
        if self.chat and self.file is not None:
            raise ValueError("--chat needs --prompt: a file is read as it is")
        from jaxcompress.cli.runtime import open_model, policy_named, write_json

        model, tokenizer = open_model(self.model, self.dtype)
        from jaxcompress.generation import Sampler, Settings, continue_, prefill, start

        policy = policy_named(self.policy, tokenizer.folder)
        sampler = Sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        settings = Settings(sampler, tuple(tokenizer.eos_ids))
        slots = self.slots[0] if len(self.slots) == 1 else self.slots
        batch = max(len(self.prompt), 1)
        progress = start(model, policy, slots, batch=batch, seeds=self.seed, dtype=self.state_dtype)
        kept = self._shortened() if self.shorten is not None else []
        if self.file is not None and not kept:
            progress, last = self._read_file(model, tokenizer, policy, progress)
            prompts = [last]
        else:
            texts = [one.text for one in kept] or self.prompt
            prompts = [self._encode(tokenizer, text) for text in texts]
            progress = prefill(
                model, prompts, progress, policy, mode=self.mode, chunk=self.chunk, placement=self.placement
            )
        if kept:
            self._report(model, tokenizer, policy, progress, kept, prompts)
        self._warn(model, policy, progress)
        rows = [_Row(tokenizer, ids, self.stop) for ids in prompts]
        live = batch == 1 and not self.json
        bursts = continue_(
            model, progress, policy, steps=self.steps, settings=settings, burst=8, placement=self.placement
        )
        for tokens in bursts:
            for row, new in zip(rows, tokens, strict=True):
                row.push(new, settings.stop)
            if live:
                print(rows[0].take(), end="", flush=True)
            if all(row.over for row in rows):
                break
        for row in rows:
            row.finish()
        if live:
            print(rows[0].take())
        elif self.json:
            texts = self.prompt or (str(self.file),)
            write_json(
                [dict(prompt=t, text=r.text, tokens=r.count, stopped=r.over) for t, r in zip(texts, rows, strict=True)]
            )
        else:
            for n, (prompt, row) in enumerate(zip(self.prompt, rows, strict=True)):
                print(f"--- {n}: {prompt}\n{row.text}")

    def _encode(self, tokenizer, text: str):
        if self.chat:
            return tokenizer.encode(tokenizer.apply_chat_template([dict(role="user", content=text)]), add_bos=False)
        return tokenizer.encode(text)

    def _shortened(self):
        from jaxcompress.cli.runtime import read_text
        from jaxcompress.embedded import load_compressor
        from jaxcompress.prompt.word_scores import keep

        scorer = load_compressor()
        return [keep(scorer(text), rate=self.shorten) for text in self.prompt or (read_text(self.file),)]

    def _report(self, model, tokenizer, policy, progress, kept, prompts) -> None:
        from jaxcompress.prompt.reading import report_of

        for row, (one, ids) in enumerate(zip(kept, prompts, strict=True)):
            whole = len(self._encode(tokenizer, one.scored.text))
            told = report_of(
                model, policy, progress, one, original_tokens=whole, prompt_tokens=len(ids), row=row
            )  # fmt: skip
            print(f"jaxcompress: {told}", file=sys.stderr)

    def _read_file(self, model, tokenizer, policy, progress):
        from contextlib import nullcontext

        from jaxcompress.cli import runtime
        from jaxcompress.generation import encode_stream, read_on

        if self.mode == "oneshot":
            raise ValueError("--file is read in segments; use --mode streaming or chunked")
        path = str(self.file)
        by = 1 if self.mode == "streaming" else self.chunk
        tail, count = None, 0

        def remember(pieces):
            nonlocal tail
            for piece in pieces:
                tail = piece
                yield piece

        opening = len(tokenizer.opening())
        with (
            nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as text,
            runtime.progress(None, "reading") as bar,
        ):
            pieces = remember(encode_stream(text, tokenizer))
            for now, state in read_on(model, pieces, progress, policy, chunk=by, placement=self.placement):
                bar(now - count)
                count, progress = now, state
        if count <= opening:
            raise ValueError(f"{self.file} is empty; there is nothing to read")
        return progress, tail

    def _warn(self, model, policy, progress) -> None:
        end = int(progress.state[0].seen.max()) + self.steps
        placement = self.placement or policy.placement
        if placement == "absolute" and end > model.config.max_position:
            print(
                f"jaxcompress: positions reach {end}, the model was made for {model.config.max_position}; "
                "--placement slot or compact keeps distances short",
                file=sys.stderr,
            )


class _Row:
    """Text of one sequence as it grows."""

    def __init__(self, tokenizer, prompt, stop: tuple[str, ...]):
        from jaxcompress.generation import StopStrings, TextStream

        self.stream, self.stops = TextStream(tokenizer, after=prompt), StopStrings(stop)
        self.text, self.shown, self.count, self.over = "", 0, 0, False

    def push(self, tokens, stop_ids: tuple[int, ...]) -> None:
        for token in tokens:
            if self.over or token < 0:
                return
            self.count += 1
            self.over = int(token) in stop_ids
            if not self.over:
                self.text += self.stops.push(self.stream.push(int(token)))
                self.over = self.stops.stopped

    def finish(self) -> None:
        if not self.stops.stopped:
            self.text += self.stops.push(self.stream.finish()) + self.stops.finish()

    def take(self) -> str:
        new, self.shown = self.text[self.shown :], len(self.text)
        return new
