"""jaxcompress generate"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxcompress.cli.file_message import Pieces, frame, framed, joined, written
from jaxcompress.cli.flags import (
    JsonFlag,
    ModeFlags,
    PlacementFlag,
    PolicyFlags,
    SamplingFlags,
    StateDtypeFlag,
    TemplateFlags,
    WeightFlags,
)
from jaxcompress.cli.mesh import ProfileFlag
from jaxcompress.cli.paths import READ
from jaxcompress.cli.runtime import chosen_policy, open_model, progress, tell, tell_of_training, write_json
from jaxcompress.inputs.text import decoded, named, opened, read_text, unescaped

if TYPE_CHECKING:
    import numpy as np

    from jaxcompress.distributed import ShardingRules
    from jaxcompress.generation import DecodeState, TextUntil
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.prompt import Compressed

_BLOCK = 1 << 16  # bytes of a file that are read at once


@dataclass(frozen=True, kw_only=True)
class Generate(
    JsonFlag, ProfileFlag, StateDtypeFlag, PlacementFlag, ModeFlags, TemplateFlags, SamplingFlags, PolicyFlags,
    WeightFlags,
):  # fmt: skip
    """Reads a prompt of any length through a fixed number of slots, and writes on.

    Text appears as it is written. Several --prompt are one batch, of which row n has the seed --seed + n. A file is
    read in segments, so that memory does not grow with its length. With --chat and --file, --prompt is a question about
    the file: the file, an empty line and the question are the user's message.

    Example: cat book.txt | jaxcompress generate --file - --policy tova --slots 128 --placement slot
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Read this text; may be given several times."""
    file: Annotated[Path | None, READ] = None
    """Read this UTF-8 file; - is standard input. In mode streaming or chunked."""
    chat: bool = False
    """Read the text as a user's message, in the chat template of the tokenizer."""
    shorten: float | None = None
    """Share of the prompt's tokens that stay, in (0, 1], counted by the model's tokenizer without the begin token: the
    embedded prompt compressor drops words, as `compress-prompt --rate` does, and the model reads what is left. The
    ratios of both compressions are told on standard error. A file is then read whole."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End at this text, of which nothing is printed; may be given several times. It may be the name of a special token
    (<|eot_id|>). \\n is a line feed, \\r a carriage return, \\t a tab, \\\\ a backslash."""
    stop_id: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """End at this token id; may be given several times."""

    def run(self) -> None:
        self._check()
        rules = self.rules()
        model, tokenizer = open_model(self.model, self.dtype, rules)
        from jaxcompress.generation import TextUntil, decode_stream

        if wrong := [token for token in self.stop_id if not 0 <= token < model.config.vocab_size]:
            raise ValueError(f"--stop-id {wrong[0]} is outside the vocabulary; give 0 to {model.config.vocab_size - 1}")
        until = partial(
            TextUntil, tokenizer, [unescaped(text) for text in self.stop], (*tokenizer.eos_ids, *self.stop_id)
        )
        config = self.sampling(until().ids)
        state, prompts = self._read(model, tokenizer, rules)
        rows = [_Row(until(after=ids)) for ids in prompts]
        live = len(rows) == 1 and not self.json
        for tokens in decode_stream(model, state, self.max_new_tokens, config, stream_every=8):
            for row, new in zip(rows, tokens, strict=True):
                row.push(new)
            if live:
                print(rows[0].take(), end="", flush=True)
            if all(row.until.stopped for row in rows):
                break
        for row in rows:
            row.finish()
        self._print(rows, live)

    def _print(self, rows: Sequence[_Row], live: bool) -> None:
        """What was written; where it is printed live, the rest of it."""
        asked = self.prompt or (str(self.file),)
        if live:
            print(rows[0].take())
        elif self.json:
            write_json(
                [
                    dict(prompt=text, text=row.text, tokens=row.count, stopped=row.until.stopped)
                    for text, row in zip(asked, rows, strict=True)
                ]
            )
        else:
            for n, (prompt, row) in enumerate(zip(asked, rows, strict=True)):
                print(f"--- {n}: {prompt}\n{row.text}")

    def _check(self) -> None:
        """What can be known before anything is loaded."""
        self.check_sampling()
        if self.shorten is not None and not 0 < self.shorten <= 1:
            raise ValueError(f"--shorten must be in (0, 1], the share of tokens that stays, not {self.shorten}")
        self.chunk_tokens()
        self.check_placement(self.policy)
        if not self.prompt and self.file is None:
            raise ValueError("give --prompt or --file")
        if self.prompt and self.file is not None and not self.chat:
            raise ValueError("give --prompt or --file, not both; with --chat, --prompt is a question about the file")
        if self.file is not None and len(self.prompt) > 1:
            raise ValueError(f"--file takes one --prompt, not {len(self.prompt)}")
        for flag in ("system", "template_args"):
            if getattr(self, flag) is not None and not self.chat:
                raise ValueError(f"--{flag.replace('_', '-')} is for --chat")
        self.template_arguments()
        if self.mode == "oneshot" and self.file is not None and self.shorten is None:
            raise ValueError("--file is read in segments; use --mode streaming or chunked")

    def _read(
        self, model: Decoder, tokenizer: Tokenizer, rules: ShardingRules | None
    ) -> tuple[DecodeState, list[np.ndarray]]:
        """The state that has read all prompts, and by row the last token ids read."""
        from jaxcompress.generation import init_decode_state, prefill

        rows = 1 if self.file is not None else len(self.prompt)
        if self.model is not None:
            tell_of_training(self.policy, self.capacity, tokenizer.folder)
        state = init_decode_state(
            model, chosen_policy(self.policy, model, tokenizer.folder), self.capacity,
            batch=rows, seeds=self.seed, dtype=self.state_dtype, placement=self.placement, sharding=rules,
        )  # fmt: skip
        if self.shorten is None and self.file is not None:
            state, last = self._read_file(model, tokenizer, state)
            return state, [last]
        kept = self._shortened(tokenizer) if self.shorten is not None else []
        prompts = [self._encode(tokenizer, text) for text in ([one.text for one in kept] or self.prompt)]
        state = prefill(model, prompts, state, mode=self.mode, chunk=self.chunk_tokens())
        if kept:
            self._report(model, tokenizer, state, kept, prompts)
        return state, prompts

    def _encode(self, tokenizer: Tokenizer, text: str) -> np.ndarray:
        """Token ids of a text as it is read: in the chat template, and with the question if it is a file's."""
        if not self.chat:
            return tokenizer.encode(text)
        content = joined(text, self.prompt[0] if self.prompt and self.file is not None else None)
        text = written(tokenizer, content, self.system, self.template_arguments())
        return tokenizer.encode(text, add_bos=False)

    def _shortened(self, tokenizer: Tokenizer) -> list[Compressed]:
        """What the prompt compressor keeps of each text."""
        from jaxcompress.prompt import Compressor, TokenizerCounter
        from jaxcompress.prompt.reading import check_left

        compressor = Compressor.load(count=TokenizerCounter(tokenizer))
        texts = self.prompt if self.file is None else (read_text(self.file),)
        kept = [compressor.compress(text, rate=self.shorten) for text in texts]
        for one in kept:
            check_left(one)
        return kept

    def _report(self, model, tokenizer, state, kept, prompts) -> None:
        """Tells what both compressions came to."""
        from jaxcompress.prompt.reading import report_of

        for row, (one, ids) in enumerate(zip(kept, prompts, strict=True)):
            whole = len(self._encode(tokenizer, one.documents[0].scored.text))
            tell(str(report_of(model, state, one, original_tokens=whole, prompt_tokens=len(ids), row=row)))

    def _read_file(self, model: Decoder, tokenizer: Tokenizer, state: DecodeState) -> tuple[DecodeState, np.ndarray]:
        """The state that has read the file, segment by segment, and the last token ids."""
        from jaxcompress.generation import encode_stream, prefill_stream

        assert self.file is not None
        question = self.prompt[0] if self.prompt else None
        around = frame(tokenizer, self.system, question, self.template_arguments()) if self.chat else None
        last = tokenizer.encode("", add_bos=False)

        def remembered(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            nonlocal last
            for piece in pieces:
                last = piece
                yield piece

        read = 0
        with opened(self.file) as file, progress(None, "reading") as bar:
            texts = decoded(iter(partial(file.read, _BLOCK), b""), named(self.file))
            source = Pieces(texts if around is None else framed(around, texts))
            pieces = remembered(encode_stream(source, tokenizer, add_bos=around is None))
            by = 1 if self.mode == "streaming" else self.chunk_tokens()
            for count, after in prefill_stream(model, pieces, state, chunk=by):
                bar(count - read)
                read, state = count, after
        if around is None and read <= len(tokenizer.opening()):
            raise ValueError(f"{self.file} is empty; there is nothing to read")
        return state, last


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
