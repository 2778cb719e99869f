"""jaxcompress compress-prompt"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxcompress.cli.flags import JsonFlag, WeightFlags, at_least
from jaxcompress.cli.runtime import prepare, tell, write_json
from jaxcompress.inputs.text import decoded, named, parse_json, read_text, standard_input, unescaped

if TYPE_CHECKING:
    from jaxcompress.prompt import Compressed, Compressor, Kept, TokenizerCounter

_KEPT, _DROPPED, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class CompressPrompt(JsonFlag, WeightFlags):
    """Drops the words of a text that a token classifier scores lowest (LLMLingua-2).

    Reads --file, --prompt or standard input. Writes the shorter text to standard output, and the number of tokens saved
    to standard error. Exactly the asked number of tokens stays. `generate --shorten` keeps the same words at the same
    rate and reader. --json prints text, tokens, words, labels and scores. --model is an encoder that classifies tokens.

    Example: jaxcompress compress-prompt --file minutes.txt --rate 0.33 --force . '\\n' --digits > shorter.txt
    """

    file: tuple[Path, ...] = ()
    """Read these UTF-8 files, one context each; - is standard input."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Read this text; may be given several times, one context each."""
    reader: str | None = None
    """Folder of the model that will read the text, whose tokens are counted; `embedded` for the embedded language
    model. The classifier's own tokens are counted if not given."""
    rate: float | None = None
    """Share of the reader's tokens that stay, in (0, 1]; 0.5 if neither this nor --tokens is given."""
    tokens: int | None = None
    """Number of the reader's tokens that stay, of all contexts together."""
    scope: Literal["chunk", "document", "corpus"] = "document"
    """Which words compete for the number of tokens: those of a chunk, of a context, or of all contexts."""
    force: tuple[str, ...] = ()
    """Words, signs or white space that stay. \\n is a line feed (or whatever ends a line in the text), \\r a carriage
    return, \\t a tab, \\\\ a backslash."""
    digits: bool = False
    """Keep words with a digit."""
    drop_consecutive: bool = False
    """Keep only the first of equal forced words in a row."""
    word: Literal["mean", "first"] = "mean"
    """A word's score: the mean of its subwords' probabilities, or that of the first subword."""
    contexts: int | None = None
    """Keep only so many contexts, those with the highest mean score, before words are dropped."""
    budget: Literal["exact", "official"] = "exact"
    """exact: the asked number of tokens is met. official: the published arithmetic (percentiles of each chunk)."""
    structured: bool = False
    """The text has tags: <llmlingua, rate=0.3>...</llmlingua>, <llmlingua, compress=False>...</llmlingua>."""
    json_text: bool = False
    """The text is JSON: its strings are compressed, the rest stays."""
    stream: bool = False
    """Read and write piece by piece, in constant memory."""
    show: bool = False
    """Print the whole text instead, kept words in colour."""
    report: bool = False
    """Also tell how many of the content words and numbers are left, and which are lost."""

    def run(self) -> None:
        self._check()
        prepare()
        from jaxcompress.prompt import Compressor

        count = self._count()  # a wrong folder is told before the classifier is loaded
        compressor = Compressor.load(self.model, dtype=self.dtype, count=count, word=self.word)
        if self.stream:
            return self._streamed(compressor)
        texts = list(self.prompt) or [read_text(path) for path in self._files]
        if self.budget == "official":
            return self._official(compressor, texts)
        result, text = self._compressed(compressor, texts)
        if self.json:
            write_json(
                dict(
                    text=text, tokens_before=result.tokens_before, tokens_after=result.tokens_after, ratio=result.ratio,
                    words=result.words, labels=result.labels.astype(int).tolist(),
                    scores=result.scores.round(6).tolist(),
                )
            )  # fmt: skip
        elif self.show:
            print("\n\n".join("".join(_coloured(one)) for one in result.documents).rstrip("\n"))
        else:
            print(text)
        _report(result.tokens_before, result.tokens_after)
        if self.report:
            _recovered(texts, text)
        return None

    @property
    def _files(self) -> tuple[Path, ...]:
        return self.file or (Path("-"),)

    def _check(self) -> None:
        """What can be known before anything is loaded."""
        if self.file and self.prompt:
            raise ValueError("give --file or --prompt, not both")
        if self.rate is not None and self.tokens is not None:
            raise ValueError("give --rate or --tokens, not both")
        at_least(1, tokens=self.tokens, contexts=self.contexts)
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"--rate must be in (0, 1], the share of tokens that stays, not {self.rate}")
        modes = dict(structured=self.structured, json_text=self.json_text, stream=self.stream, official=self.official)
        given = [name.replace("_", "-") for name, on in modes.items() if on]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; choose one")
        if given and given != ["official"] and self.tokens is not None:
            raise ValueError(f"--{given[0]} takes --rate, not --tokens")
        contexts = len(self.file) + len(self.prompt)
        if given in (["structured"], ["json-text"]) and contexts > 1:
            raise ValueError(f"--{given[0]} takes one text, not {contexts}")
        if given and self.contexts is not None:
            raise ValueError(f"--contexts does not go with {given[0]}")
        if given in (["stream"], ["official"]) and (self.show or self.json):
            raise ValueError(f"--show and --json do not go with {given[0]}")
        if self.show and self.json:
            raise ValueError("give --show or --json, not both")
        if self.official and self.scope != "document":
            raise ValueError("--scope does not go with official, which knows chunks only")
        if self.drop_consecutive and not (self.force or self.digits):
            raise ValueError("--drop-consecutive is for words that --force or --digits keep; give one of them")
        if self.stream and self.report:
            raise ValueError("--report compares whole texts; it does not go with stream")

    @property
    def official(self) -> bool:
        return self.budget == "official"

    def _count(self) -> TokenizerCounter | None:
        from jaxcompress import embedded
        from jaxcompress.inputs.tokenizer import Tokenizer
        from jaxcompress.prompt import TokenizerCounter

        if self.reader is None:
            return None
        folder = embedded.decoder_folder() if self.reader == "embedded" else Path(self.reader).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"--reader: there is no folder {folder}; give a model's folder, or embedded")
        return TokenizerCounter(Tokenizer(folder))

    def _options(self) -> dict[str, Any]:
        force = [unescaped(string) for string in self.force]
        return dict(scope=self.scope, force=force, digits=self.digits, drop_consecutive=self.drop_consecutive)

    def _compressed(self, compressor: Compressor, texts: list[str]) -> tuple[Compressed, str]:
        from jaxcompress.prompt import Contexts, compress_json, compress_structured

        options = self._options()
        rate = 0.5 if self.rate is None else self.rate
        if self.structured:
            result = compress_structured(compressor, texts[0], rate=rate, **options)
        elif self.json_text:
            value, result = compress_json(compressor, parse_json(texts[0], "the text"), rate=rate, **options)
            return result, json.dumps(value, ensure_ascii=False, allow_nan=False)
        else:
            filter = None if self.contexts is None else Contexts(count=self.contexts)
            result = compressor.compress(texts, rate=self.rate, tokens=self.tokens, filter=filter, **options)
        return result, result.text

    def _official(self, compressor: Compressor, texts: list[str]) -> None:
        rate = 0.5 if self.rate is None else self.rate
        options = self._options()
        try:
            output = compressor.official.compress(
                texts, rate, target_token=-1 if self.tokens is None else self.tokens, token_to_word=self.word,
                force_tokens=options["force"], force_reserve_digit=self.digits, drop_consecutive=self.drop_consecutive,
            ).output  # fmt: skip
        except (IndexError, ZeroDivisionError, AssertionError) as error:
            raise ValueError(f"the published code fails for this text and these options: {error}") from error
        print(output["compressed_prompt"])
        _report(output["origin_tokens"], output["compressed_tokens"])
        if self.report:
            _recovered(texts, output["compressed_prompt"])

    def _streamed(self, compressor: Compressor) -> None:
        from jaxcompress.prompt import compress_stream

        before = after = 0
        rate = 0.5 if self.rate is None else self.rate
        for result in compress_stream(compressor, self._pieces(), rate=rate, **self._options()):
            print(result.text, end="", flush=True)
            before, after = before + result.tokens_before, after + result.tokens_after
        print()
        _report(before, after)

    def _pieces(self) -> Iterator[str]:
        from contextlib import nullcontext

        yield from self.prompt
        for path in () if self.prompt else self._files:
            with nullcontext(standard_input()) if str(path) == "-" else path.open("rb") as file:
                yield from decoded(iter(partial(file.read, 1 << 16), b""), named(path))


def _coloured(kept: Kept) -> Iterator[str]:
    """The text with kept words in one colour and dropped words in another."""
    at, text = 0, kept.scored.text
    for (start, stop), stays in zip(kept.scored.spans.tolist(), kept.labels.tolist(), strict=True):
        yield text[at:start]
        yield (_KEPT if stays else _DROPPED) + text[start:stop] + _PLAIN
        at = stop
    yield text[at:]


def _report(before: int, after: int) -> None:
    ratio = f"{before / after:.2f}" if after else "-"
    tell(f"{before:,} tokens to {after:,}, ratio {ratio}, {before - after:,} saved")


def _recovered(texts: list[str], shorter: str) -> None:
    from jaxcompress.prompt.recovery import recovery

    tell(f"recovered {recovery(chr(10).join(texts), shorter)}")
