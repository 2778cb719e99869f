"""From the body of a request to what the engine is asked."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxcompress.generation.config import GenerationConfig
from jaxcompress.generation.text import TextUntil
from jaxcompress.generation.turns import check_arguments
from jaxcompress.inputs.token_ids import token_ids
from jaxcompress.server.errors import ApiError, refused
from jaxcompress.server.fields import Fields
from jaxcompress.server.settings import Served, Settings
from jaxcompress.serving.request import Request
from jaxcompress.serving.row_sampling import STOPS, TOP

NO_GRAMMAR = "the model writes plain text, and nothing restricts it to a format; ask for the format in the prompt"
NO_TOOLS = "the model is not given tools; describe them in the prompt"

HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "parallel_tool_calls", "prediction",
)  # fmt: skip
"""Fields of OpenAI's API that change no answer. `user` names the client (see `make_app`)."""

WATCHED = 8192
"""Tokens of a prompt whose state is watched, at most, since each piece of the answer tells of all of them. What the
state holds of a longer one is not told."""


@dataclass(frozen=True)
class Ask:
    """What a request asks for.

    Attributes:
      chat: whether it came as a conversation.
      model: as named in the request.
      pool: where it is answered.
      requests: one for each choice.
      stop: strings to stop at.
      stream, usage, watched: whether the answer is streamed, whether the stream ends with the usage, whether the stream
        tells what the state holds (of prompts of up to `WATCHED` tokens).
      top_logprobs: how many likely tokens are told beside each token; None: no log-probabilities.
      choices: choices for each prompt.
    """

    chat: bool
    model: str
    pool: str
    requests: tuple[Request, ...]
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    watched: bool
    top_logprobs: int | None
    choices: int


def read_ask(body: Any, served: Served, settings: Settings, *, chat: bool, client: str) -> Ask:
    """Checks a body. Raises ApiError."""
    if not isinstance(body, Mapping):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}")
    fields = Fields(body)
    model = fields.text("model") or served.name
    pool = served.pool(model)
    if pool is None:
        raise unknown_model(model, served)
    _refuse(fields, chat)
    prompts = [_conversation(fields, served)] if chat else _prompts(fields, served)
    choices = fields.whole("n", 1, settings.choices) or 1
    if len(prompts) * choices > settings.choices:
        raise refused("prompt", f"{len(prompts)} prompts of {choices} choices are more than {settings.choices} answers")
    stop = _stop(fields)
    top = _top_logprobs(fields, chat)
    ends = TextUntil(served.tokenizer, stop, served.stop_ids).ids
    if len(ends) > STOPS:
        raise refused("stop", f"{len(ends)} stop tokens are more than {STOPS}")
    stream, watch = fields.flag("stream"), fields.flag("watch")
    watched = stream and watch and max(map(len, prompts)) <= WATCHED
    options = Fields(fields.object("stream_options"), "stream_options.")
    usage = options.flag("include_usage")
    options.no_others(("include_obfuscation",))
    one = Request((), 1, _config(fields, ends), _seed(fields), top is not None, settings.seconds, client, watched)
    most = _most(fields, settings)
    fields.no_others(HARMLESS)
    room = lambda prompt: max(1, served.pools[pool].room(len(prompt), settings.max_tokens)) if most is None else most
    requests = tuple(
        replace(one, prompt=prompt, max_new_tokens=room(prompt), seed=(one.seed + n + 2**63) % 2**64 - 2**63)
        for prompt in prompts
        for n in range(choices)
    )
    return Ask(chat, model, pool, requests, stop, stream, usage, watched, top, choices)


def unknown_model(model: str, served: Served) -> ApiError:
    """The error for a model that the server does not have, status 404."""
    known = ", ".join((served.name, *served.pools))
    return ApiError(404, f"unknown model {model!r:.80}; known: {known}", param="model", code="model_not_found")


def _refuse(fields: Fields, chat: bool) -> None:
    """Refuses what changes an answer and is not there, rather than answering something else."""
    fields.only("response_format", {"type": "text"}, why=NO_GRAMMAR)
    for name in ("tools", "functions"):
        fields.only(name, [], why=NO_TOOLS)
    for name in ("tool_choice", "function_call"):
        fields.only(name, "none", "auto", why=NO_TOOLS)
    fields.only("reasoning_effort", "none", why="give chat_template_kwargs what the model's template takes")
    fields.only("verbosity", "medium", why="ask for a short or long answer in the prompt")
    fields.only("min_tokens", 0, why="an answer ends where the model ends it")
    fields.only("ignore_eos", False, why="an answer ends where the model ends it")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, 0, why="give repetition_penalty (above 1: what was said becomes less likely)")
    fields.only("logit_bias", {}, why="no token's chance can be set by hand")
    fields.only("modalities", ["text"], why="answers are text")
    if not chat:
        fields.only("suffix", "", why="the model only continues a text")
        fields.only("echo", False, why="the answer holds new text only; put it after the prompt yourself")
        fields.only("best_of", 1, fields.get("n"), why="all choices are returned; choose among them")


def _conversation(fields: Fields, served: Served) -> np.ndarray:
    """The prompt of a conversation, as the chat template writes it."""
    given = fields.get("messages")
    if not isinstance(given, list) or not given:
        raise refused("messages", 'messages must be a list such as [{"role": "user", "content": "Hello"}]')
    if not served.tokenizer.has_chat_template:
        raise refused("messages", f"{served.name} has no chat template; send a plain prompt to /v1/completions")
    messages = [_message(message, n) for n, message in enumerate(given)]
    arguments = fields.object("chat_template_kwargs")
    try:
        check_arguments(arguments)
        written = lambda messages: served.tokenizer.apply_chat_template(messages, **arguments)
        text = written(messages)
        named = next((n for n, message in enumerate(messages) if "name" in message), None)
        if named is not None and text == written([dict(message, name=None) for message in messages]):
            where = f"messages[{named}].name"
            raise refused(where, f"{where} would be lost: the chat template writes no names; put it into the content")
    except ValueError as error:
        raise refused("messages", str(error)) from error
    return served.tokenizer.encode(text, add_bos=False)


def _message(message: Any, n: int) -> dict[str, str]:
    """Role, content and, where one is given, name."""
    where = f"messages[{n}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise refused(where, f'{where} must be like {{"role": "user", "content": "Hello"}}')
    fields = Fields(message, f"{where}.")
    role, content, name = fields.get("role"), fields.get("content"), fields.text("name")
    for tools in ("tool_calls", "function_call"):
        fields.only(tools, [], why=NO_TOOLS)
    fields.no_others(("annotations",))
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise refused(where, f"{where} has parts that are not text; the model reads text only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise refused(where, f"{where} has no content of text")
    return dict(role=role, content=content) | ({} if name is None else dict(name=name))


def _prompts(fields: Fields, served: Served) -> list[np.ndarray]:
    """One or more prompts, as texts or as token ids."""
    given = fields.get("prompt")
    is_text = lambda x: isinstance(x, str)
    is_ids = lambda x: isinstance(x, list) and bool(x) and all(type(token) is int for token in x)  # true is none
    several = given if isinstance(given, list) and not is_ids(given) else [given]
    if not several or not all(is_text(one) or is_ids(one) for one in several):
        raise refused("prompt", "prompt must be a string, a list of token ids, or a list of these")
    try:
        vocabulary = served.loaded.model.config.vocab_size
        found = [
            served.tokenizer.encode(one) if isinstance(one, str) else token_ids(one, vocabulary, "prompt")
            for one in several
        ]
    except ValueError as error:
        raise refused("prompt", str(error)) from error
    if not all(len(ids) for ids in found):
        raise refused("prompt", "the prompt is empty; give at least one character")
    return found


def _stop(fields: Fields) -> tuple[str, ...]:
    given = fields.get("stop")
    strings: Sequence[Any] = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(strings, list) or len(strings) > STOPS or not all(isinstance(s, str) and s for s in strings):
        raise refused("stop", f"stop must be a string, or a list of up to {STOPS} strings, none of them empty")
    return tuple(strings)


def _top_logprobs(fields: Fields, chat: bool) -> int | None:
    if not chat:
        return fields.whole("logprobs", 0, TOP)
    top = fields.whole("top_logprobs", 0, TOP)
    if fields.flag("logprobs"):
        return top or 0
    if top is not None:
        raise refused("top_logprobs", "top_logprobs is given without logprobs; set logprobs to true")
    return None


def _most(fields: Fields, settings: Settings) -> int | None:
    """Tokens of the answer, at most; None: as many as there is room for."""
    names = ("max_completion_tokens", "max_tokens")
    given = [fields.whole(name, 1, settings.max_tokens) for name in names]
    return next((number for number in given if number is not None), None)


def _seed(fields: Fields) -> int:
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    return secrets.randbits(31) if seed is None else seed


def _config(fields: Fields, stop_ids: tuple[int, ...]) -> GenerationConfig:
    """The sampling method; temperature 1 if none is given, as with OpenAI."""
    given = fields.number("temperature", 0.0, 100.0)
    temperature = 1.0 if given is None else given
    narrow: dict[str, Any] = dict(
        top_k=fields.whole("top_k", 1, 2**31 - 1),
        top_p=fields.number("top_p", 0.0, 1.0),
        min_p=fields.number("min_p", 0.0, 1.0),
    )
    if narrow["top_p"] == 0:  # the fewest tokens that sum to nothing: the best one
        narrow["top_p"] = None
        temperature = 0.0
    if temperature == 0:
        narrow = {}
    penalty = fields.number("repetition_penalty", 1e-3, 1e3)
    return GenerationConfig(
        temperature=temperature, repetition_penalty=1.0 if penalty is None else penalty, stop_token_ids=stop_ids,
        **narrow,
    )  # fmt: skip
