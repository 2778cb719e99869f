"""Renders conversations as text with a model's own chat template.

Templates are Jinja and run in a sandbox, with the filters and functions that `transformers` provides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    named: Mapping[str, str],
    add_generation_prompt: bool,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Renders a conversation as text.

    Args:
      template: the chat template, in Jinja.
      messages: e.g. `[{"role": "user", "content": "Hello"}]`; entries that are None are left out.
      named: special tokens by name ("bos_token", ...); templates refer to them by these names.
      add_generation_prompt: whether to end with the text that opens the model's turn.
      arguments: further names that the template may use, such as `enable_thinking` or `tools`.

    Raises:
      ValueError: there are no messages, the template is invalid, or the template refuses the messages.
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        example = {"role": "user", "content": "Hello"}
        raise ValueError(f"a conversation is a list of one or more messages like {example}, not {messages!r:.200}")
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        given = {"tools": None, "documents": None, **named, **(arguments or {})}
        return _compiled(template).render(given, messages=said, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program and may raise any exception
        raise ValueError(f"the chat template refuses this conversation: {error or type(error).__name__}") from error


@cache
def _compiled(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks model output for training. Here it renders the enclosed text unchanged."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        """Replaces Jinja's own filter, which escapes HTML."""
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
