"""The turns of a conversation as the model's chat template writes them, one after another.

A state cannot be rewritten, so a new message is read as the text that the template puts after the last answer: the end
of that answer, the message, and the beginning of the next answer. A template that would write earlier turns otherwise
once they are old (Qwen3 leaves their thinking out, Mistral moves the system message) has no effect on what was read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jaxcompress.inputs.tokenizer import Tokenizer

Message = Mapping[str, Any]

ROLE_OF_MODEL = "assistant"
_MARK = "jaxcompress7c1e"


def begun(system: str | None) -> list[Message]:
    """The messages before the first one of a user: the system message, if there is one."""
    return [] if system is None else [dict(role="system", content=system)]


def of_user(content: str) -> Message:
    """A message of a user."""
    return dict(role="user", content=content)


def check_arguments(arguments: Any) -> None:
    """Raises ValueError if these are no arguments by name, or one of them is what a conversation sets itself."""
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(
            "the arguments of the chat template are given by name, such as {'enable_thinking': False}, not as "
            f"{arguments!r:.60}"
        )
    if reserved := {"self", "messages", "add_generation_prompt"} & set(arguments):
        raise ValueError(f"{', '.join(sorted(reserved))} cannot be an argument of the template: a conversation sets it")


def turn_text(tokenizer: Tokenizer, said: Sequence[Message], message: Message, arguments: Mapping[str, Any]) -> str:
    """What a model reads for a new message: all that the template writes, or what it writes after the last answer.

    Args:
      said: all messages so far; the last one is the model's, unless only a system message was said.
      arguments: of the template, such as `enable_thinking`.

    Raises:
      ValueError: there is no template, it refuses the messages, or it does not write the last answer as it is.
    """
    check_arguments(arguments)
    if not said or said[-1]["role"] != ROLE_OF_MODEL:
        return tokenizer.apply_chat_template([*said, message], **arguments)
    return _after_answer(tokenizer, said, [message], arguments)


def _after_answer(
    tokenizer: Tokenizer, said: Sequence[Message], then: Sequence[Message], arguments: Mapping[str, Any]
) -> str:
    """What the template writes after the last answer of `said`: for the messages `then`, if there are any."""
    mark, known = _MARK, json.dumps([*said, *then], default=str)
    while mark in known:
        mark += "0"
    marked = [*said[:-1], {**said[-1], "content": mark}, *then]
    text = tokenizer.apply_chat_template(marked, add_generation_prompt=bool(then), **arguments)
    _, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError(
            f"the chat template of {tokenizer.folder} leaves out, changes or repeats the model's last answer, so a "
            "conversation cannot go on from what was read"
        )
    return after


def closing_token(tokenizer: Tokenizer, system: str | None, arguments: Mapping[str, Any]) -> int | None:
    """The special token with which the template ends an answer; None if it uses none. Raises as `turn_text`.

    It is the one after the newest answer: where every message ends with a token of its own, as in GPT-OSS, an older
    answer ends as the thinking before it does. Some templates write no such token after the newest answer, or refuse a
    conversation that ends with an answer; then it is the one after an older answer.
    """
    answered = [*begun(system), of_user("a"), dict(role=ROLE_OF_MODEL, content="b")]
    older, newest = turn_text(tokenizer, answered, of_user("c"), arguments), ""
    with suppress(ValueError):
        newest = _after_answer(tokenizer, answered, [], arguments)
    found = (_leading_token(tokenizer, text.lstrip()) for text in (newest, older))
    return next((token for token in found if token is not None), None)


def _leading_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The special token that a text begins with; None if it begins with none."""
    special = tokenizer.special_tokens()
    return special.get(max(filter(text.startswith, special), key=len, default=""))


def without_stop(tokenizer: Tokenizer, text: str, last: int) -> str:
    """The text after an answer, without the stop token that ends the answer if the model wrote that token itself."""
    stop = tokenizer.decode([last], skip_special=False)
    rest = text.lstrip()
    return rest.removeprefix(stop) if stop and rest.startswith(stop) else text
