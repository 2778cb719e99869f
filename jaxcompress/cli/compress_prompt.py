"""jaxcompress compress-prompt"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import tyro

from jaxcompress.cli.flags import JsonFlag, WeightFlags, at_least
from jaxcompress.cli.paths import READ
from jaxcompress.cli.runtime import prepare, tell, write_json
from jaxcompress.inputs.text import decoded, named, opened, parse_json, read_text, unescaped

if TYPE_CHECKING:
    from jaxcompress.prompt import Compressed, Compressor, Kept, Kind, TokenizerCounter

Protect = Literal[
    "code", "quotes", "urls", "paths", "identifiers", "numbers", "negations", "no-code", "no-quotes", "no-urls",
    "no-paths", "no-identifiers", "no-numbers", "no-negations", "none",
]  # fmt: skip
"""`jaxcompress.prompt.KINDS`, for the parser, which imports no array library."""

T = TypeVar("T")
_KEPT, _DROPPED, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class CompressPrompt(JsonFlag, WeightFlags):
    """Drops the words of a text that a token classifier scores lowest (LLMLingua-2).

    Reads --file, --prompt or standard input. Writes the shorter text to standard output, and the number of tokens saved
    to standard error. Exactly the asked number of tokens stays. Code, quotations, URLs, paths, identifiers, numbers and
    negations stay whole, and count; --protect none lets them go, and then `generate --shorten` keeps the same words at
    the same rate and reader. --json prints text, tokens, words, labels and scores. --model is an encoder that
    classifies tokens.

    Example: jaxcompress compress-prompt --file minutes.txt --rate 0.33 --force . '\\n' > shorter.txt
    """

    file: Annotated[tuple[Path, ...], READ] = ()
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
    question: str | None = None
    """What the text is read for: keep the sentences that answer it. --model has to be an encoder that reads a question
    (an OpenProvence checkpoint)."""
    threshold: float | None = None
    """Keep what scores above it, with no number of tokens to meet. With --question and neither --rate nor --tokens:
    0.1 if not given."""
    unit: Literal["word", "sentence"] | None = None
    """What is kept or dropped as a whole; a sentence with --question, else a word, if not given."""
    scope: Literal["chunk", "document", "corpus"] = "document"
    """Which words compete for the number of tokens: those of a chunk, of a context, or of all contexts."""
    force: tuple[str, ...] = ()
    """Words, signs or white space that stay. \\n is a line feed (or whatever ends a line in the text), \\r a carriage
    return, \\t a tab, \\\\ a backslash."""
    protect: tuple[Protect, ...] = ()
    """Kinds of things that stay whole: those named (numbers urls), or all but those named (no-quotes), or none; all if
    not given. --budget official knows numbers only, and sentences need none: none if not given."""
    drop_consecutive: bool = False
    """Keep only the first of equal words of --force in a row."""
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
    messages: Annotated[Path | None, READ] = None
    """Read a JSON list of chat messages as OpenAI has them, or an object with a field `messages`, and write the same
    with shorter texts; - is standard input."""
    roles: tuple[str, ...] = ()
    """Whose messages are shortened: user, assistant, tool, function; user and tool if not given."""
    stream: bool = False
    """Read and write piece by piece, in constant memory."""
    show: bool = False
    """Print the whole text instead, kept words in colour."""
    report: bool = False
    """Also tell how many of the content words and numbers are left, and which are lost (not with --stream, which does
    not hold the text); the seconds that it took; and what --price and --reader-speed ask."""
    price: float | None = None
    """Of a million prompt tokens of the reader, in any currency: tell what one reading saves."""
    reader_speed: float | None = None
    """Prompt tokens that the reader takes in per second: tell from which length of a prompt on compression pays."""

    def run(self) -> None:
        self._check()
        prepare()
        from jaxcompress.prompt import Compressor

        count = reader_counter(self.reader)  # a wrong folder is told before the classifier is loaded
        began = perf_counter()
        compressor = Compressor.load(self.model, dtype=self.dtype, count=count, word=self.word, unit=self._unit)
        if self.question is not None:
            compressor = compressor.asking(self.question)
        loading, clock = perf_counter() - began, _Clock()
        if self.stream:
            before, after = self._streamed(compressor, clock)
        elif self.messages is not None:
            before, after = self._of_messages(compressor, clock)
        else:
            texts = list(self.prompt) or ["".join(_without_nul([read_text(path)], named(path))) for path in self._files]
            made = self._official if self.official else self._of_texts
            before, after = made(compressor, texts, clock)
        if self.report:
            self._paid(before, after, clock.seconds, loading)

    def _of_texts(self, compressor: Compressor, texts: list[str], clock: _Clock) -> tuple[int, int]:
        with clock:
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
        return result.tokens_before, result.tokens_after

    def _of_messages(self, compressor: Compressor, clock: _Clock) -> tuple[int, int]:
        from jaxcompress.prompt.messages import SHORTENED, compress_messages

        assert self.messages is not None
        value = parse_json(read_text(self.messages), named(self.messages), parse_float=_Fraction)
        whole = isinstance(value, dict) and "messages" in value
        found = value["messages"] if whole else value
        with clock:
            shorter, result = compress_messages(
                compressor, found, roles=self.roles or SHORTENED, rate=self.rate, tokens=self.tokens, **self._options()
            )
        print(_as_json({**value, "messages": shorter} if whole else shorter))
        _report(result.tokens_before, result.tokens_after)
        if self.report:
            _recovered([one.scored.text for one in result.documents], result.text)
        return result.tokens_before, result.tokens_after

    def _paid(self, before: int, after: int, seconds: float, loading: float) -> None:
        from jaxcompress.prompt import Payoff

        paid = Payoff(before, after, seconds, loading)
        tell(f"{seconds:.2f} s to compress ({paid.speed:,.0f} tokens/s), {loading:.2f} s to load before")
        if self.price is not None:
            tell(f"one reading costs {paid.cost_saved(self.price):.6g} less at {self.price:g} per million tokens")
        if self.reader_speed is not None:
            length, loaded = paid.pays_from(self.reader_speed), f"a reader of {self.reader_speed:g} tokens/s"
            if length is None:
                tell(f"does not pay for {loaded}, at any length; it would below {paid.fastest_reader:,.0f} tokens/s")
            else:
                tell(f"pays for {loaded} from {length:,} tokens on, with loading; without, at any length")

    @property
    def _files(self) -> tuple[Path, ...]:
        return self.file or (Path("-"),)

    def _check(self) -> None:
        """What can be known before anything is loaded."""
        self._check_inputs()
        self._check_budget()
        self._check_threshold()
        self._check_modes()

    def _check_inputs(self) -> None:
        if self.file and self.prompt:
            raise ValueError("give --file or --prompt, not both")
        if self.messages is not None and (self.file or self.prompt):
            raise ValueError("--messages is read instead of --file and --prompt; give one of them")
        if self.roles and self.messages is None:
            raise ValueError("--roles is for --messages; give them")
        from_roles = [role for role in self.roles if role not in ("user", "assistant", "tool", "function")]
        if from_roles:
            raise ValueError(
                f"--roles: {from_roles[0]} is none of user, assistant, tool, function; others stay as they are"
            )
        contexts = len(self.file) + len(self.prompt)
        if (self.structured or self.json_text) and contexts > 1:
            raise ValueError(f"--{'structured' if self.structured else 'json-text'} takes one text, not {contexts}")

    def _check_budget(self) -> None:
        if self.rate is not None and self.tokens is not None:
            raise ValueError("give --rate or --tokens, not both")
        at_least(1, tokens=self.tokens, contexts=self.contexts)
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"--rate must be in (0, 1], the share of tokens that stays, not {self.rate}")
        for name, value in (("--price", self.price), ("--reader-speed", self.reader_speed)):
            if value is not None and not self.report:
                raise ValueError(f"{name} is for --report; give it too")
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, not {value}")
        check_kinds(self.protect)
        if self.official and self.protect not in ((), ("none",), ("numbers",)):
            raise ValueError("--budget official knows --protect numbers only")

    def _check_threshold(self) -> None:
        if self.threshold is None:
            return
        if not 0 <= self.threshold < 1:
            raise ValueError(f"--threshold must be in [0, 1), a probability, not {self.threshold}")
        if self.rate is not None or self.tokens is not None:
            raise ValueError("--threshold keeps as much as scores above it; give it, or --rate or --tokens")
        if self.contexts is not None or self.scope != "document" or self.drop_consecutive:
            raise ValueError("--threshold does not go with --contexts, --scope and --drop-consecutive")

    def _check_modes(self) -> None:
        modes = dict(
            structured=self.structured, json_text=self.json_text, messages=self.messages is not None,
            stream=self.stream, official=self.official,
        )  # fmt: skip
        given = [name.replace("_", "-") for name, on in modes.items() if on]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; choose one")
        if given and given[0] not in ("official", "messages") and self.tokens is not None:
            raise ValueError(f"--{given[0]} takes --rate, not --tokens")
        if given and (self.threshold is not None or (given[0] == "official" and self._unit == "sentence")):
            raise ValueError(f"--threshold and --unit sentence do not go with {given[0]}")
        if given and self.contexts is not None:
            raise ValueError(f"--contexts does not go with {given[0]}")
        if given and given[0] in ("stream", "official", "messages") and (self.show or self.json):
            raise ValueError(f"--show and --json do not go with {given[0]}")
        if self.show and self.json:
            raise ValueError("give --show or --json, not both")
        if self.official and self.scope != "document":
            raise ValueError("--scope does not go with official, which knows chunks only")
        if self.drop_consecutive and not (self.force or (self.official and self.protect)):
            raise ValueError("--drop-consecutive is for words that --force keeps; give it too")

    @property
    def _unit(self) -> Literal["word", "sentence"]:
        return self.unit or ("word" if self.question is None else "sentence")

    @property
    def _threshold(self) -> float | None:
        """The probability above which words or sentences stay; None if a number of tokens is to be met."""
        plain = not (self.structured or self.json_text or self.stream or self.messages is not None)
        no_budget = self.rate is None and self.tokens is None
        if self.threshold is None and self.question is not None and plain and no_budget:
            from jaxcompress.prompt.compressor import THRESHOLD

            return THRESHOLD
        return self.threshold

    @property
    def official(self) -> bool:
        return self.budget == "official"

    def _kinds(self) -> list[Kind]:
        return [] if not self.protect and self._unit == "sentence" else kinds_named(self.protect)

    def _options(self) -> dict[str, Any]:
        force = [unescaped(string) for string in self.force]
        return dict(scope=self.scope, force=force, protect=self._kinds(), drop_consecutive=self.drop_consecutive)

    def _compressed(self, compressor: Compressor, texts: list[str]) -> tuple[Compressed, str]:
        from jaxcompress.prompt import Contexts, compress_json, compress_structured

        options = self._options()
        rate = 0.5 if self.rate is None else self.rate
        if self.structured:
            result = compress_structured(compressor, texts[0], rate=rate, **options)
        elif self.json_text:
            value, result = compress_json(
                compressor, parse_json(texts[0], "the text", parse_float=_Fraction), rate=rate, **options
            )
            return result, _as_json(value)
        elif self._threshold is not None:
            chosen = dict(force=options["force"], protect=options["protect"])
            result = compressor.prune(texts, threshold=self._threshold, **chosen)
        else:
            filter = None if self.contexts is None else Contexts(count=self.contexts)
            result = compressor.compress(texts, rate=self.rate, tokens=self.tokens, filter=filter, **options)
        return result, result.text

    def _official(self, compressor: Compressor, texts: list[str], clock: _Clock) -> tuple[int, int]:
        rate = 0.5 if self.rate is None else self.rate
        options = self._options()
        try:
            with clock:
                output = compressor.official.compress(
                    texts, rate, target_token=-1 if self.tokens is None else self.tokens, token_to_word=self.word,
                    force_tokens=options["force"], force_reserve_digit="numbers" in self.protect,
                    drop_consecutive=self.drop_consecutive,
                ).output  # fmt: skip
        except (IndexError, ZeroDivisionError, AssertionError) as error:
            raise ValueError(f"the published code fails for this text and these options: {error}") from error
        print(output["compressed_prompt"])
        _report(output["origin_tokens"], output["compressed_tokens"])
        if self.report:
            _recovered(texts, output["compressed_prompt"])
        return output["origin_tokens"], output["compressed_tokens"]

    def _streamed(self, compressor: Compressor, clock: _Clock) -> tuple[int, int]:
        from jaxcompress.prompt import compress_stream

        before = after = 0
        rate = 0.5 if self.rate is None else self.rate
        reading = _Clock()
        pieces = reading.steps(self._pieces())
        for result in clock.steps(compress_stream(compressor, pieces, rate=rate, **self._options())):
            print(result.text, end="", flush=True)
            before, after = before + result.tokens_before, after + result.tokens_after
        clock.seconds -= reading.seconds  # which the steps of the stream hold
        print()
        _report(before, after)
        return before, after

    def _pieces(self) -> Iterator[str]:
        from jaxcompress.prompt.joining import SEPARATOR

        for n, text in enumerate(self.prompt):
            yield from (SEPARATOR, text) if n else (text,)
        for n, path in enumerate(() if self.prompt else self._files):
            if n:
                yield SEPARATOR
            with opened(path) as file:
                yield from _without_nul(decoded(iter(partial(file.read, 1 << 16), b""), named(path)), named(path))


class _Clock:
    """Seconds of blocks, and of the steps of iterators."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += perf_counter() - self._began

    def steps(self, items: Iterator[T]) -> Iterator[T]:
        done = object()
        while True:
            with self:
                item = next(items, done)
            if item is done:
                return
            yield cast(T, item)


def reader_counter(reader: str | None) -> TokenizerCounter | None:
    """What counts tokens for a value of --reader; None for the classifier's own tokens.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    from jaxcompress import embedded
    from jaxcompress.inputs.tokenizer import Tokenizer
    from jaxcompress.prompt import TokenizerCounter

    if reader is None:
        return None
    folder = embedded.decoder_folder() if reader == "embedded" else Path(reader).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--reader: there is no folder {folder}; give a model's folder, or embedded")
    return TokenizerCounter(Tokenizer(folder))


def check_kinds(named: tuple[Protect, ...]) -> None:
    """Raises ValueError for a --protect that names kinds in several ways."""
    if len({kind if kind == "none" else kind.startswith("no-") for kind in named}) > 1:
        raise ValueError("--protect takes kinds that stay, or kinds that need not (no-...), or none; not a mixture")


def kinds_named(named: tuple[Protect, ...]) -> list[Kind]:
    """The kinds that a value of --protect names: all if it is empty."""
    from jaxcompress.prompt import KINDS

    off = [kind.removeprefix("no-") for kind in named if kind.startswith("no-")]
    return [kind for kind in KINDS if kind not in off and (not named or off or kind in named)]


def _without_nul(pieces: Iterable[str], what: str) -> Iterator[str]:
    """The pieces. Raises ValueError at the first NUL, which text files do not have."""
    for piece in pieces:
        if "\0" in piece:
            raise ValueError(
                f"{what} has NUL characters, so it is binary; give a text, or take them out: tr -d '\\000'"
            )
        yield piece


def _coloured(kept: Kept) -> Iterator[str]:
    """The text with kept words in one colour and dropped words in another."""
    at, text = 0, kept.scored.text
    for (start, stop), stays in zip(kept.scored.spans.tolist(), kept.labels.tolist(), strict=True):
        yield text[at:start]
        yield (_KEPT if stays else _DROPPED) + text[start:stop] + _PLAIN
        at = stop
    yield text[at:]


@dataclass(frozen=True)
class _Fraction:
    """A number of JSON with a fraction or an exponent, as it is written: it may have more digits than a float."""

    written: str


def _as_json(value: Any) -> str:
    """The text of a value with `_Fraction` for floats. Raises ValueError for NaN and infinity."""
    if isinstance(value, _Fraction):
        return value.written
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_as_json(key)}: {_as_json(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _report(before: int, after: int) -> None:
    ratio = f"{before / after:.2f}" if after else "-"
    tell(f"{before:,} tokens to {after:,}, ratio {ratio}, {before - after:,} saved")


def _recovered(texts: list[str], shorter: str) -> None:
    from jaxcompress.prompt.recovery import recovery

    tell(f"recovered {recovery(chr(10).join(texts), shorter)}")
