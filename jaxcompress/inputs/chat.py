"""Conversations as text, by a model's own template: Jinja in a sandbox, with what `transformers` gives to templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any


def render(
    template: str, messages: Sequence[Mapping[str, Any]], named: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The text of a conversation.

    Args:
      template: Jinja.
      messages: e.g. `[{"role": "user", "content": "Hello"}]`; entries that are None are left out.
      named: special tokens by name, which templates write: "bos_token", ...
      add_generation_prompt: end with what opens the model's turn.

    Raises:
      ValueError: no messages, or the template is wrong or refuses them.
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        example = {"role": "user", "content": "Hello"}
        raise ValueError(f"a conversation is a list of one or more messages like {example}, not {messages!r:.200}")
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compiled(template).render(
            **named, messages=said, tools=None, documents=None, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise ValueError(f"the chat template refuses this conversation: {error or type(error).__name__}") from error


@cache
def _compiled(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: marks what a model wrote, for training; here just its text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        """Jinja's own escapes HTML."""
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
