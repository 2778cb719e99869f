"""Lists of messages as OpenAI's chat completions have them: the texts of some roles are shortened, all else stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxcompress.inputs.scalars import Number
from jaxcompress.inputs.text import clean_value
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.counting import Counter, apart
from jaxcompress.prompt.keeping import BudgetTooSmall, Compressed, checked_budget, keep, keep_with_forced
from jaxcompress.prompt.word_scores import ScoredWords

Role = Literal["user", "assistant", "tool", "function"]
SHORTENED: tuple[Role, ...] = ("user", "tool")
"""Roles whose messages are shortened if no others are named."""


def compress_messages(
    compressor: Compressor,
    messages: Any,
    *,
    roles: Sequence[str] = SHORTENED,
    rate: Number | None = None,
    tokens: Number | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], Compressed]:
    """Shortens the texts of messages with these roles. What is given is not changed.

    Order, roles, names, tool calls, parts that are no text, messages of other roles and empty texts stay as they are.
    All texts share one budget; each is counted by itself. Each keeps at least the word with the highest score, since
    servers refuse empty ones: if that makes more than the budget, nothing stays beside it but what is forced.

    Args:
      messages: a list of objects. Each has a `role`, and a `content` that is a string, null, missing, or a list of
        parts; of these, {"type": "text", "text": ...} is shortened.
      roles: of user, assistant, tool and function. System and developer messages are never shortened.
      rate: the share of the tokens of the shortened texts that stays; 0.5 if neither this nor `tokens` is given.
      tokens: that stay of these texts together.
      options: as for `Compressor.compress`: scope, force, protect, drop_consecutive.

    Returns:
      The new messages, and the result for the texts in order.

    Raises:
      BudgetTooSmall: what is forced and protected has more tokens than may stay.
      ValueError: as `keep`; an unknown role in `roles`; messages of another form, the error says which.
    """
    if unknown := [role for role in roles if role not in get_args(Role)]:
        raise ValueError(f"messages of role {unknown[0]!r} are not shortened; roles: {', '.join(get_args(Role))}")
    value = clean_value(_checked(messages), "the messages")
    texts = [text for message in value if message["role"] in roles for text in _texts(message)]
    checked_budget(len(texts), rate, tokens)
    compressor.check_force(options.get("force", ()))
    scored = compressor.score(texts)
    result = _kept(scored, apart(compressor.counter), dict(rate=rate, tokens=tokens, **options))
    left = iter([document.text for document in result.documents])
    return [_put_back(message, left) if message["role"] in roles else message for message in value], result


def _kept(scored: Sequence[ScoredWords], count: Counter, options: Mapping[str, Any]) -> Compressed:
    """Some words of each text. Raises BudgetTooSmall if too much is forced and protected by the options."""
    with_one_word = [_with_one_word(one) for one in scored]
    try:
        return keep(with_one_word, count, **options)
    except BudgetTooSmall:
        keep(scored, count, **options)
        return keep_with_forced(with_one_word, count, **options)


def _checked(messages: Any) -> Any:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages are a list of objects with a role, not {type(messages).__name__}")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {n} is no object with a role, but {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f'message {n} has no role; give one, such as {{"role": "user", "content": ...}}')
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list | tuple):
            raise ValueError(f"the content of message {n} is a string, null or a list, not {type(content).__name__}")
        for m, part in enumerate(content):
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise ValueError(f"part {m} of message {n} is no object with a type")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"part {m} of message {n} is of type text and has no text")
    return messages


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [p["text"] for p in content or () if p["type"] == "text"]
    return (text for text in parts if text.strip())


def _put_back(message: Mapping[str, Any], left: Iterator[str]) -> dict[str, Any]:
    new = lambda text: next(left) if text.strip() else text
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": new(content)}
    if not content:
        return dict(message)
    parts = [{**part, "text": new(part["text"])} if part["type"] == "text" else part for part in content]
    return {**message, "content": parts}


def _with_one_word(scored: ScoredWords) -> ScoredWords:
    """The text with its best word protected."""
    if not len(scored.scores):
        return scored
    scores = scored.scores.copy()
    scores[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))] = np.inf
    return scored._replace(scores=scores)
