"""The server, asked by OpenAI's client and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import numpy as np
import openai
from serving_here import Here, serving, tiny_served
from starlette.testclient import TestClient

from jaxcompress.generation import GenerationConfig, TextUntil, generate
from jaxcompress.generation.config import GREEDY
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.policies import Full
from jaxcompress.server import Settings, bound
from jaxcompress.server.app import make_app
from jaxcompress.server.ask import read_ask
from jaxcompress.server.shapes import Shaped
from jaxcompress.server.texts import TextPiece, text_pieces
from jaxcompress.serving import Engine, EngineClosed, Piece, Request, Ticket
from jaxcompress.serving.engine import AsyncPieces
from jaxcompress.serving.request import TokenLogprobs

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
LONG = dict(prompt="abc", max_tokens=20_000, temperature=0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    settings = Settings(stop_seconds=5.0, max_tokens=20_000, body_bytes=100_000)
    with serving(tiny_served(tmp_path_factory.mktemp("model")), settings, prompt_tokens=500) as here:
        yield here


@pytest.fixture(scope="module")
def client(here: Here) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0)


def alone(here: Here, prompt: Any, most: int, config: GenerationConfig = GREEDY, seed: int = 0) -> str:
    """The text that `generate` gives."""
    spec = next(iter(here.served.pools.values()))
    tokenizer, ids = here.served.tokenizer, prompt
    if isinstance(prompt, list):
        ids = tokenizer.encode(tokenizer.apply_chat_template(prompt), add_bos=False)
    elif isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    (tokens,) = generate(
        spec.model, [ids], spec.policy, spec.slots, max_new_tokens=most, config=config, seeds=[seed], segment=32
    )
    until = TextUntil(tokenizer, (), here.served.stop_ids, ids)
    return "".join(map(until.push, tokens[0][tokens[0] >= 0])) + until.finish()


def test_a_conversation_with_the_official_client(here: Here, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny/tova:16", "tiny/window:16"]
    assert [client.models.retrieve(model.id) for model in client.models.list()] == list(client.models.list())
    given: dict[str, Any] = dict(model="tiny", messages=HELLO, max_tokens=12, temperature=0)
    answer = client.chat.completions.create(**given)
    expected = alone(here, HELLO, 12)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, answer.usage.prompt_tokens + 12)
    stream = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert [chunk.choices[0].delta.role for chunk in chunks][0] == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * (len(chunks) - 1), "length"]
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 16  # the answer before it left a prefix


def test_seeds_choices_stops_and_logprobs(here: Here, client: openai.OpenAI) -> None:
    config = GenerationConfig(temperature=0.8, top_p=0.9)
    given: dict[str, Any] = dict(model="tiny", messages=HELLO, max_tokens=9, temperature=0.8, top_p=0.9, seed=7)
    answer = client.chat.completions.create(**given, n=2, logprobs=True, top_logprobs=3)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [alone(here, HELLO, 9, config, seed) for seed in (7, 8)]
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [len(one.top_logprobs) for one in told.content] == [3] * 9
    assert b"".join(bytes(one.bytes or ()) for one in told.content).decode(errors="replace") == texts[0]
    for one in (one for entry in told.content for one in (entry, *entry.top_logprobs)):
        spelled = "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes or ())
        assert one.token in (bytes(one.bytes or ()).decode(errors="replace"), spelled)
        assert "\ufffd" not in one.token
    streamed = [""] * 2
    for chunk in client.chat.completions.create(**given, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    whole = alone(here, "abc", 12)
    stop = whole[4:6]
    cut = client.completions.create(model="tiny", prompt="abc", max_tokens=12, temperature=0, stop=[stop], logprobs=2)
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].logprobs is not None
    assert cut.choices[0].logprobs.token_logprobs is not None
    several = client.completions.create(model="tiny", prompt=["abc", "Hello"], max_tokens=5, temperature=0)
    assert [choice.text for choice in several.choices] == [alone(here, text, 5) for text in ("abc", "Hello")]
    ids = here.served.tokenizer.encode("abc").tolist()
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0).choices[0].text == whole[:5]


def test_errors_have_the_shape_of_the_official_client(here: Here, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"})  # type: ignore[arg-type]
    assert refused.value.param == "response_format"
    assert "nothing restricts it to a format" in refused.value.message
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt'; known: tiny, tiny/tova:16"):
        client.chat.completions.create(model="gpt", messages=HELLO)  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt/4'; known: tiny, tiny/tova:16") as unknown:
        client.models.retrieve("gpt/4")
    assert unknown.value.code == "model_not_found"
    assert 'path="/v1/models/{model}",status="404"' in here.ask("/metrics")[1]


@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        (TEXT, b"{", 400, "the body is not JSON"),
        (TEXT, b"\xff", 400, "the body is not JSON"),
        (TEXT, b"[" * 50_000, 400, "the body is not JSON"),
        (TEXT, [], 400, "the body must be a JSON object, not list"),
        (TEXT, b"x" * 100_001, 413, "larger than 100,000 bytes"),
        (TEXT, {}, 400, "prompt must be a string"),
        (TEXT, dict(prompt=[]), 400, "prompt must be a string"),
        (TEXT, dict(prompt=[[1], "a", {}]), 400, "prompt must be a string"),
        (TEXT, dict(prompt=[10**9]), 400, "outside the vocabulary"),
        (TEXT, dict(prompt=""), 400, "the prompt is empty"),
        (TEXT, dict(prompt="a" * 600), 400, "the prompt has 600 tokens, and the engine takes 500 at most"),
        (TEXT, dict(prompt="a", max_tokens=0), 400, "max_tokens must be a whole number from 1 to 20000, not 0"),
        (TEXT, dict(prompt="a", max_tokens=True), 400, "max_tokens must be a whole number"),
        (TEXT, dict(prompt="a", temperature="hot"), 400, "temperature must be a number"),
        (TEXT, dict(prompt="a", temperature=-1), 400, "temperature must be from 0 to 100, not -1"),
        (TEXT, dict(prompt="a", temperature=10**400), 400, "temperature must be from 0 to 100, not 1000"),
        (TEXT, b'{"prompt": "a", "temperature": ' + 9999 * b"1" + b"}", 400, "the body is not JSON"),
        (TEXT, b'{"prompt": "a", "temperature": NaN}', 400, "temperature must be from 0 to 100, not nan"),
        (TEXT, dict(prompt="a", top_p=2), 400, "top_p must be from 0 to 1"),
        (TEXT, dict(prompt="a", top_k=0), 400, "top_k must be a whole number"),
        (TEXT, dict(prompt="a", n=9), 400, "n must be a whole number from 1 to 8"),
        (TEXT, dict(prompt=["a"] * 9), 400, "9 prompts of 1 choices are more than 8 answers"),
        (TEXT, dict(prompt="a", seed=2**63), 400, "seed must be a whole number"),
        (TEXT, dict(prompt=[[True, 3]]), 400, "prompt must be a string, a list of token ids, or a list of these"),
        (TEXT, dict(prompt="a", stop=[""]), 400, "stop must be a string"),
        (TEXT, dict(prompt="a", stop=5), 400, "stop must be a string"),
        (TEXT, dict(prompt="a", logprobs=21), 400, "logprobs must be a whole number from 0 to 20"),
        (TEXT, dict(prompt="a", echo=True), 400, "echo True is not supported"),
        (TEXT, dict(prompt="a", logit_bias={"5": 1}), 400, "logit_bias"),
        (TEXT, dict(prompt="a", presence_penalty=1), 400, "give repetition_penalty"),
        (TEXT, dict(prompt="a", stream="yes"), 400, "stream must be true or false"),
        (TEXT, dict(prompt="a", stream_options=5), 400, "stream_options must be an object"),
        (TEXT, dict(prompt="a", stream_options=dict(include_usage="no")), 400, "include_usage must be true"),
        (TEXT, dict(prompt="a", stream_options=dict(usage=True)), 400, "stream_options.usage is unknown here"),
        (TEXT, dict(prompt="a", model=5), 400, "model must be a string"),
        (CHAT, {}, 400, "messages must be a list"),
        (CHAT, dict(messages=["hi"]), 400, "messages[0] must be like"),
        (CHAT, dict(messages=[dict(role="user", content=[dict(type="image_url")])]), 400, "the model reads text only"),
        (CHAT, dict(messages=[dict(role="user")]), 400, "messages[0] has no content of text"),
        (CHAT, dict(messages=HELLO, top_logprobs=2), 400, "top_logprobs is given without logprobs"),
        (TEXT, dict(prompt="a", max_token=5), 400, "to change the answer; did you mean max_tokens?"),
        (TEXT, dict(prompt="a", grammar="x"), 400, "grammar is unknown here, and may be meant"),
        (TEXT, dict(prompt="a", ignore_eos=True), 400, "ignore_eos True is not supported: an answer ends where"),
        (TEXT, dict(prompt="a", **{"\ud83d": 1}), 400, "\ufffd is unknown here"),
        (CHAT, dict(messages=HELLO, reasoning_effort="low"), 400, "give chat_template_kwargs what"),
        (CHAT, dict(messages=HELLO, tool_choice="required"), 400, "tool_choice 'required' is not supported"),
        (CHAT, dict(messages=HELLO, chat_template_kwargs=5), 400, "chat_template_kwargs must be an object, not 5"),
        (CHAT, dict(messages=HELLO, chat_template_kwargs=dict(self=1)), 400, "self cannot be an argument"),
        (CHAT, dict(messages=[dict(role="user", content="a", name="Bo")]), 400, "messages[0].name would be lost"),
        (CHAT, dict(messages=[dict(role="user", content="a", tool_call_id="1")]), 400, "messages[0].tool_call_id is"),
        (CHAT, dict(messages=[dict(role="assistant", tool_calls=[{}])]), 400, "messages[0].tool_calls [{}] is"),
        (CHAT, dict(messages=HELLO, tools=[dict(type="function")]), 400, "the model is not given tools"),
        ("/v1/nothing", {}, 404, "POST /v1/nothing is not answered here"),
    ],
)  # fmt: skip
def test_wrong_requests_are_told_what_is_wrong(here: Here, path: str, body: Any, status: int, why: str) -> None:
    code, answer = here.ask(path, body)
    assert code == status, answer
    assert why in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert here.ask(TEXT, dict(prompt="a", max_tokens=1))[0] == 200  # and the server goes on


def test_what_changes_no_answer_is_taken(here: Here, client: openai.OpenAI) -> None:
    said: Any = [*HELLO, dict(role="assistant", content="Hi", tool_calls=None, refusal=None, annotations=[]), *HELLO]
    answer = client.chat.completions.create(
        model="tiny", messages=said, max_completion_tokens=5, temperature=0, user="me", metadata={"a": "b"},
        store=False, service_tier="auto", safety_identifier="x", prompt_cache_key="y", parallel_tool_calls=True,
        tool_choice="none", prediction={"type": "content", "content": "Hi"},
        extra_body=dict(min_tokens=0, ignore_eos=False, chat_template_kwargs={}, grammar=None),
    )  # fmt: skip
    plain: Any = [dict(role=one["role"], content=one["content"]) for one in said]
    assert answer.choices[0].message.content == alone(here, plain, 5)


def test_what_the_template_is_given(tmp_path: Path) -> None:
    served = tiny_served(tmp_path, "{% for m in messages %}{{ m.name }}:{{ m.content }}{% endfor %}{{ think }}")
    body = dict(messages=[dict(role="user", content="a", name="Bo")], chat_template_kwargs=dict(think="aloud"))
    (request,) = read_ask(body, served, Settings(), chat=True, client="").requests
    assert served.tokenizer.decode(request.prompt) == "Bo:aaloud"


def test_full_writes_as_far_as_there_is_room(here: Here) -> None:
    spec = next(iter(here.served.pools.values()))
    full = replace(here.served, pools=dict(full=replace(spec, policy=Full(), slots=20)))
    most = lambda **body: read_ask(body, full, Settings(), chat=False, client="").requests[0].max_new_tokens
    assert [most(prompt="a" * n) for n in (5, 19, 20)] == [15, 1, 1]  # the last one is refused by the engine
    assert most(prompt="a", max_tokens=50) == 50
    assert read_ask(dict(prompt="a"), here.served, Settings(), chat=False, client="").requests[0].max_new_tokens == 1024


def test_a_stop_in_what_was_held_back_is_the_reason(here: Here) -> None:
    """The half of a character is held back until the answer ends, and is printed as U+FFFD."""

    async def reason(stop: str) -> list[tuple[str, str | None]]:
        given: asyncio.Queue[Piece] = asyncio.Queue()
        half = int(here.served.tokenizer.encode("é", add_bos=False)[0])
        given.put_nowait(Piece((half,), ended="length"))
        ticket = Ticket(Request([1], 1), np.array([1]))
        texts = text_pieces(AsyncPieces(ticket, given), here.served.tokenizer, (stop,), ())
        return [(piece.text, piece.ended) async for piece in texts]

    assert asyncio.run(reason("x")) == [("\ufffd", "length")]
    assert asyncio.run(reason("\ufffd")) == [("", "stop")]


@pytest.mark.parametrize(("seed", "seeds"), [(-2, [-2, -1, 0]), (2**63 - 2, [2**63 - 2, 2**63 - 1, -(2**63)])])
def test_the_first_choice_has_the_seed_that_was_given(here: Here, seed: int, seeds: list[int]) -> None:
    body = dict(prompt="a", seed=seed, n=3)
    assert [one.seed for one in read_ask(body, here.served, Settings(), chat=False, client="").requests] == seeds


def test_a_long_prompt_is_answered_without_being_watched(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = lambda: (
        read_ask(dict(prompt="a" * 9, stream=True, watch=True), here.served, Settings(), chat=False, client="").watched
    )
    assert watched()
    monkeypatch.setattr("jaxcompress.server.ask.WATCHED", 8)
    assert not watched()


def test_of_two_tokens_of_one_name_the_better_one_counts(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, token: b"aab"[token : token + 1])
    ask = read_ask(dict(prompt="a", logprobs=3), here.served, Settings(), chat=False, client="")
    piece = TextPiece("a", (0,), (TokenLogprobs(-0.5, (0, 1, 2), (-0.5, -1.0, -2.0)),), None, None, ("a",))
    chunk = Shaped(ask, here.served.tokenizer).chunk(0, piece, first=True, offset=0)
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5, "b": -2.0}]


def test_other_answers(here: Here) -> None:
    assert here.ask("/health") == (200, "ok\n")
    assert here.ask("/ready") == (200, "ready\n")
    status, metrics = here.ask("/metrics")
    assert status == 200
    assert 'jaxcompress_rows{pool="tiny/tova:16"} 3.0' in metrics
    assert "jaxcompress_first_token_seconds_count" in metrics
    status, page = here.ask("/")
    assert (status, "What the state holds" in page) == (200, True)
    assert here.ask(TEXT)[0] == 405
    assert here.ask("/health", host="evil.example")[0] == 400
    assert here.ask(TEXT, b"{}", content_type="text/plain")[0] == 415
    many = dict(messages=[dict(role="user", content=[dict(type="text", text="Hel"), dict(type="text", text="lo")])])
    told = [here.ask(CHAT, dict(body, max_tokens=4, temperature=0))[1] for body in (many, dict(messages=HELLO))]
    assert told[0]["choices"] == told[1]["choices"]


def test_what_the_state_holds_is_streamed(here: Here) -> None:
    body = dict(messages=HELLO, max_tokens=6, temperature=0, stream=True, watch=True)
    _, text = here.ask(CHAT, body)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    told = [event["jaxcompress"] for event in events]
    assert "".join(told[0]["prompt"]).startswith("<|im_start|>user\nHello")
    assert len(told[-1]["held"]) == len(told[0]["prompt"]) + 6
    assert sum(told[-1]["held"]) == pytest.approx(1600, abs=20)
    assert "prompt" not in told[-1]
    said = dict(body, messages=[dict(role="user", content="你")], max_tokens=1)
    (event, *_) = [json.loads(line[6:]) for line in here.ask(CHAT, said)[1].splitlines() if line.startswith("data: {")]
    assert event["jaxcompress"]["prompt"].count("你") == 1  # with the last of its three tokens
    assert "\ufffd" not in "".join(event["jaxcompress"]["prompt"])


def test_answers_that_end_at_a_stop_string_are_timed(here: Here) -> None:
    counted = lambda: float(re.findall(r"^jaxcompress_answer_seconds_count (.*)$", here.ask("/metrics")[1], re.M)[0])
    before, text = counted(), alone(here, "abc", 12)
    body = dict(prompt="abc", max_tokens=20_000, temperature=0, stop=[text[4:6]])
    assert here.ask(TEXT, body)[1]["choices"][0]["finish_reason"] == "stop"
    assert counted() == before + 1


def raw(here: Here, body: Any, rest: str | None = None) -> socket.socket:
    """Sends a request, or what is given of one, and leaves the answer to be read."""
    connection = socket.create_connection(("127.0.0.1", here.port), timeout=60)
    content = json.dumps(body)
    rest = f"content-length: {len(content)}\r\n\r\n{content}" if rest is None else rest
    head = f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall((head + rest).encode())
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(here: Here, stream: bool) -> None:
    connection = raw(here, dict(LONG, stream=stream, n=2))
    if stream:
        assert connection.recv(1000)
    else:
        time.sleep(0.3)
    connection.close()
    assert here.idle()
    assert here.ask(TEXT, dict(prompt="a", max_tokens=1))[0] == 200


def test_slow_clients_hold_up_nobody(here: Here) -> None:
    slow = raw(here, dict(LONG, max_tokens=2000, stream=True))
    half = raw(here, None, "")
    for _ in range(20):
        assert slow.recv(1)
        time.sleep(0.005)
    assert here.ask(TEXT, dict(prompt="a", max_tokens=3))[0] == 200
    assert here.idle()  # the row wrote its answer without waiting for the reader
    slow.close()
    half.close()


def test_keys_and_room(here: Here) -> None:
    settings = Settings(api_key="open sesame", concurrency=1, body_seconds=0.3, max_tokens=20_000)
    with serving(here.served, settings) as guarded:
        key = dict(authorization="Bearer open sesame")
        for wrong in ({}, dict(authorization="Bearer open"), dict(authorization="Basic open sesame")):
            for path, body in ((TEXT, dict(prompt="a")), ("/v1/models", None), ("/metrics", None)):
                status, answer = guarded.ask(path, body, **wrong)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert guarded.ask("/v1/models", **key)[0] == 200
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="open sesame", max_retries=0)
        with client.completions.create(model="tiny", **LONG, stream=True) as stream:
            next(stream)
            status, answer = guarded.ask(TEXT, dict(prompt="a"), **key)
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert guarded.idle()
        half = raw(guarded, None, "authorization: Bearer open sesame\r\ncontent-length: 100\r\n\r\n{")
        assert b"408" in half.recv(100)
        half.close()
        assert guarded.ask(TEXT, dict(prompt="a", max_tokens=1), **key)[0] == 200


def test_more_answers_than_there_will_ever_be_room_for(here: Here) -> None:
    """Three rows and one place to wait: a client that asks again later would be refused for ever."""
    with serving(here.served, Settings(max_tokens=20_000), waiting=1) as small:
        body = dict(prompt="a", max_tokens=1)
        for more, param in ((dict(n=5), "n"), (dict(prompt=["a"] * 5), "prompt"), (dict(prompt=["a"] * 3, n=2), "n")):
            status, answer = small.ask(TEXT, body | more)
            assert (status, answer["error"]["param"]) == (400, param)
            assert "it has 3 rows, and 1 may wait; ask for 4 at most" in answer["error"]["message"]
        assert len(small.ask(TEXT, body | dict(n=4))[1]["choices"]) == 4


def test_no_time_left(here: Here) -> None:
    with serving(here.served, Settings(seconds=0.3, max_tokens=20_000)) as hurried:
        assert '"code":"deadline"' in hurried.ask(TEXT, dict(LONG, stream=True))[1]
        status, answer = hurried.ask(TEXT, LONG)
        assert (status, answer["error"]["code"]) == (504, "deadline")


def test_answers_are_finished_before_the_server_ends(here: Here) -> None:
    found: list[Any] = []
    with serving(here.served, Settings(stop_seconds=20.0, max_tokens=20_000)) as ending:
        body = dict(LONG, max_tokens=400)
        thread = threading.Thread(target=lambda: found.append(ending.ask(TEXT, body)))
        thread.start()
        while not ending.engine.stats()["tiny/tova:16"].counts.requests:
            time.sleep(0.01)
    thread.join()
    assert found[0][0] == 200
    assert found[0][1]["usage"]["completion_tokens"] == 400
    with pytest.raises(OSError, match="refused"):
        ending.ask("/health")


def test_an_engine_that_cannot_start_is_told(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches the server sees it, and its end still closes the engine."""

    def broken(self: Engine) -> None:
        raise MemoryError("no room for the programs")

    monkeypatch.setattr(Engine, "start", broken)
    engine = Engine(here.served.pools)
    with TestClient(make_app(here.served, engine), base_url="http://localhost") as asked:
        until = time.monotonic() + 20
        while asked.get("/health").status_code == 200 and time.monotonic() < until:
            time.sleep(0.01)
        assert (asked.get("/health").status_code, asked.get("/ready").status_code) == (503, 503)
        answer = asked.post(TEXT, json=dict(prompt="a"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "failed")
    with pytest.raises(EngineClosed):
        engine.submit(Request([1], 1))


def test_places_of_streamed_tokens_go_on(client: openai.OpenAI) -> None:
    given: dict[str, Any] = dict(model="tiny", prompt="abc", max_tokens=9, temperature=0, logprobs=1)
    whole = client.completions.create(**given).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**given, stream=True)]
    assert whole is not None
    assert [at for one in chunks if one is not None for at in one.text_offset or ()] == whole.text_offset
    assert len(chunks) > 1


def test_addresses_that_cannot_be_had(here: Here) -> None:
    with pytest.raises(ValueError, match="a port is from 0 .* to 65535, not 70000"):
        bound("127.0.0.1", 70_000)
    with pytest.raises(OSError, match=f"port {here.port} of 127.0.0.1 is in use; give another with --port"):
        bound("127.0.0.1", here.port)
    with pytest.raises(OSError, match="the server cannot listen at 192.0.2.1, port 0"):
        bound("192.0.2.1", 0)
