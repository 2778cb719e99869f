"""Prompts of several parts: each with a rate of its own, or left as it is; and JSON.

    <llmlingua, compress=False>Answer briefly.</llmlingua><llmlingua, rate=0.3>The long part ...</llmlingua>

The tags are LLMLingua's (Jiang et al. 2023). A part with `compress=False` comes out unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from jaxcompress.inputs.scalars import Number, share
from jaxcompress.inputs.text import clean, clean_value
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.counting import apart
from jaxcompress.prompt.joining import joined
from jaxcompress.prompt.keeping import Compressed

_TAG = re.compile(r"<(?P<closes>/?)llmlingua\b(?P<settings>[^<>]*)>")
_SETTINGS = ("rate", "compress")


class Segment(NamedTuple):
    """A part of a prompt.

    Attributes:
      text: of the part.
      rate: the share of the part's tokens that stays; None for the rate of the whole, 1 for what is not compressed.
    """

    text: str
    rate: Number | None = None


def parse(text: str) -> list[Segment]:
    """The parts of a tagged text. Text outside of tags is a part without settings.

    Raises:
      ValueError: a tag that is not closed or nested, an unknown setting, a rate outside (0, 1].
    """
    found, at, opened = [], 0, None
    for tag in _TAG.finditer(text):
        closes = bool(tag["closes"])
        if closes != (opened is not None) or (closes and tag["settings"]):
            _refuse(tag if closes or opened is None else opened)
        found.append(Segment(text[at : tag.start()], None if opened is None else _rate(opened["settings"])))
        at, opened = tag.end(), None if closes else tag
    if opened is not None:
        _refuse(opened)
    found.append(Segment(text[at:]))
    return [segment for segment in found if segment.text]


def _refuse(tag: re.Match[str]) -> NoReturn:
    raise ValueError(f"the tag {tag[0]!r} is not closed, not opened, or inside another one")


def _rate(settings: str) -> Number | None:
    first, *parts = settings.split(",")
    given = {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in parts)}
    if first.strip() or not all(name in _SETTINGS and value for name, value in given.items()):
        raise ValueError(f"unknown settings {settings!r} in a tag; known: rate=0.3, compress=True, compress=False")
    if given.get("compress", "True") not in ("True", "False"):
        raise ValueError(f"compress is True or False, not {given['compress']!r}")
    if given.get("compress") == "False":
        return 1
    try:
        rate = float(given["rate"]) if "rate" in given else None
    except ValueError:
        rate = 0.0
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"a rate must be in (0, 1], the share of tokens that stays, not {given['rate']}")
    return rate


def compress_structured(
    compressor: Compressor, prompt: str | Sequence[Segment], *, rate: Number = 0.5, **options: Any
) -> Compressed:
    """Compresses the parts of a prompt, each to its own rate, and joins them again.

    White space at the beginning and end of a part stays.

    Args:
      prompt: a text with tags, or parts.
      rate: the share of the reader's tokens that stays, of parts without one of their own.
      options: as for `Compressor.compress`: scope, force, protect, drop_consecutive.
    """
    parts = parse(clean(prompt)) if isinstance(prompt, str) else [p._replace(text=clean(p.text)) for p in prompt]
    rates = [rate if part.rate is None else part.rate for part in parts]
    inner = [part.text.strip() for part in parts]
    result = compressor.compress(inner, rate=rates, **options)
    texts = [
        part.text if own == 1 else part.text.replace(text, document.text, 1) if text else part.text
        for part, own, text, document in zip(parts, rates, inner, result.documents, strict=True)
    ]
    text = "".join(texts)
    before, after = compressor.tokens("".join(part.text for part in parts)), compressor.tokens(text)
    asked = result.asked + after - result.tokens_after  # with the white space that stays
    return replace(result, text=text, tokens_before=before, tokens_after=after, asked=asked)


class KeyRule(NamedTuple):
    """What becomes of the texts under a key of a JSON object.

    Attributes:
      rate: the share of tokens that stays; None for the rate of the whole.
      compress: False leaves everything under the key as it is.
      remove: the key is removed if nothing is left of its text. A short one may lose all its words to other strings.
    """

    rate: Number | None = None
    compress: bool = True
    remove: bool = False


def compress_json(
    compressor: Compressor,
    value: Any,
    rules: Mapping[str, KeyRule] | None = None,
    *,
    rate: Number = 0.5,
    **options: Any,
) -> tuple[Any, Compressed]:
    """Compresses the strings of a JSON value; its structure, keys, numbers, true, false and null stay.

    Strings of the same rate share one budget, each its part of it in proportion to its tokens.

    Args:
      value: as `json.loads` gives it; nested at most 200 deep. Halves of characters become U+FFFD.
      rules: by the key of an object, at any depth; the innermost rule counts.
      rate: the share of the reader's tokens that stays, of strings without a rule.
      options: as for `Compressor.compress`: scope, force, protect, drop_consecutive.

    Returns:
      The new value, and the result for its strings, in order.

    Raises:
      ValueError: as `Compressor.compress`; nested too deeply; keys that differ only in halves of characters.
    """
    value, rules = clean_value(value, "the value"), rules or {}
    found = list(_strings(value, rules, KeyRule()))
    rates = [1 if not rule.compress else rate if rule.rate is None else rule.rate for _, rule in found]
    result = _by_rate(compressor, [text for text, _ in found], [share(own) for own in rates], options)
    texts = (text if own == 1 else document.text for (text, _), own, document in
             zip(found, rates, result.documents, strict=True))  # fmt: skip
    return _put_back(value, rules, texts), result


def _by_rate(
    compressor: Compressor, texts: Sequence[str], rates: Sequence[float], options: Mapping[str, Any]
) -> Compressed:
    """Compresses texts that are read apart; those of one rate together."""
    if compressor.count is not None:
        compressor = replace(compressor, count=apart(compressor.count))
    groups = {rate: [n for n, own in enumerate(rates) if own == rate] for rate in rates} or {1.0: []}
    parts = [compressor.compress([texts[n] for n in those], rate=rate, **options) for rate, those in groups.items()]
    those = [n for group in groups.values() for n in group]
    documents = [document for part in parts for document in part.documents]
    in_order = tuple(document for _, document in sorted(zip(those, documents, strict=True), key=lambda pair: pair[0]))
    text, of_all = joined([document.text for document in in_order]), lambda name: sum(getattr(p, name) for p in parts)
    return Compressed(text, in_order, *map(of_all, ("tokens_before", "tokens_after", "asked", "forced")))


def _strings(value: Any, rules: Mapping[str, KeyRule], rule: KeyRule) -> Iterator[tuple[str, KeyRule]]:
    if isinstance(value, str):
        yield value, rule
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, rules, rules.get(key, rule))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, rules, rule)


def _put_back(value: Any, rules: Mapping[str, KeyRule], texts: Iterator[str]) -> Any:
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        new = {key: _put_back(inner, rules, texts) for key, inner in value.items()}
        return {key: inner for key, inner in new.items() if inner != "" or not rules.get(key, KeyRule()).remove}
    return [_put_back(inner, rules, texts) for inner in value] if isinstance(value, list | tuple) else value
