"""Teachers: pieces for them, a model of this library, a server that is slow, busy, wrong or gone."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt.endpoint import Endpoint, Refused
from jaxcompress.prompt.teacher import INSTRUCTION, TeacherFailed, count_words, cut_for_teacher, model_teacher

Reply = tuple[int, dict[str, str], bytes]
JSON = {"Content-Type": "application/json"}
SOON = {"retry-after-ms": "10"}
"""Asks the client to try again at once, so that tests need not wait."""


def said(text: str, reason: str = "stop") -> Reply:
    choice = dict(message=dict(role="assistant", content=text), finish_reason=reason)
    return 200, JSON, json.dumps(dict(choices=[choice])).encode()


class Server:
    """Answers on 127.0.0.1 with what `reply` says of (the number of the request, its body)."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.reply: Callable[[int, dict[str, Any]], Reply | None] = lambda number, body: said("short")
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.times.append(time.monotonic())
                    server.seen.append(dict(path=self.path, key=self.headers["Authorization"], **body))
                    number = len(server.seen)
                answer = server.reply(number, body)
                if answer is None:
                    self.connection.close()
                    return
                status, headers, data = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (OSError, ValueError):
                    self.close_connection = True

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def endpoint(self, **changes: Any) -> Endpoint:
        return Endpoint(self.url, "teacher", **(dict(timeout=5.0) | changes))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


class TestEndpoint:
    @pytest.fixture(autouse=True)
    def client(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("openai")
        monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def test_asks_as_openai_does(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        endpoint = server.endpoint(extra=dict(seed=7))
        assert endpoint(INSTRUCTION, "a long text") == "short"
        (seen,) = server.seen
        assert seen["path"] == "/v1/chat/completions"
        assert seen["key"] == "Bearer secret"
        assert seen["model"] == "teacher"
        assert seen["messages"] == [
            dict(role="system", content=INSTRUCTION),
            dict(role="user", content="a long text"),
        ]
        assert (seen["temperature"], seen["top_p"], seen["max_tokens"], seen["seed"]) == (0.3, 1.0, 4000, 7)
        assert "secret" not in repr(endpoint)
        server.reply = lambda number, body: (401, JSON, b'{"error": {"message": "no"}}')
        with pytest.raises(Refused) as refused:
            endpoint(INSTRUCTION, "text")
        assert "secret" not in str(refused.value)

    def test_the_key_comes_from_the_environment(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTHER", "hidden")
        server.endpoint(key_variable="OTHER")(INSTRUCTION, "text")
        server.endpoint()(INSTRUCTION, "text")
        assert [seen["key"] for seen in server.seen] == ["Bearer hidden", "Bearer none"]

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_what_may_pass_is_tried_again(self, server: Server, status: int) -> None:
        server.reply = lambda number, body: (status, SOON, b"busy") if number < 3 else said("short")
        assert server.endpoint()(INSTRUCTION, "text") == "short"
        assert len(server.seen) == 3

    def test_waits_as_long_as_asked(self, server: Server) -> None:
        server.reply = lambda number, body: (429, {"Retry-After": "0.3"}, b"") if number == 1 else said("short")
        server.endpoint()(INSTRUCTION, "text")
        assert server.times[1] - server.times[0] >= 0.29

    def test_several_threads_are_answered(self, server: Server) -> None:
        server.reply = lambda number, body: (429, SOON, b"") if number < 3 else said(body["messages"][1]["content"])
        endpoint, texts = server.endpoint(), [f"text {n}" for n in range(8)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda text: endpoint(INSTRUCTION, text), texts)) == texts

    def test_gives_up_and_says_why(self, server: Server) -> None:
        server.reply = lambda number, body: (429, SOON | JSON, b'{"error": {"message": "quota of today used up"}}')
        with pytest.raises(TeacherFailed, match=r"3 attempts.*429.*quota of today") as failed:
            server.endpoint(attempts=3)(INSTRUCTION, "text")
        assert not isinstance(failed.value, Refused)
        assert len(server.seen) == 3

    @pytest.mark.parametrize(("status", "for_all"), [(400, False), (413, False), (401, True), (404, True)])
    def test_a_refusal_is_final(self, server: Server, status: int, for_all: bool) -> None:
        server.reply = lambda number, body: (status, {}, b"not this")
        with pytest.raises(TeacherFailed, match=f"{status}.*not this") as failed:
            server.endpoint()(INSTRUCTION, "text")
        assert isinstance(failed.value, Refused) == for_all
        assert len(server.seen) == 1

    @pytest.mark.parametrize(
        ("answer", "why"),
        [
            (said("half of", "length"), "cut off by max_tokens"),
            (said("half of", "content_filter"), "cut off by the server's content filter"),
            (said("  "), "empty"),
            ((200, {"Content-Type": "text/html"}, b"<html>"), "not JSON"),
            ((200, JSON, b'{"choices": [{"mess'), "not JSON"),
            ((200, JSON, b'{"choices": []}'), "choices"),
            ((200, JSON, b'{"choices": null}'), "choices"),
            ((200, JSON, b'{"choices": [{}]}'), "choices"),
            ((200, JSON, b"[]"), "choices"),
        ],
    )
    def test_answers_that_are_none(self, server: Server, answer: Reply, why: str) -> None:
        server.reply = lambda number, body: answer
        with pytest.raises(TeacherFailed, match=why):
            server.endpoint()(INSTRUCTION, "text")

    def test_connection_that_breaks(self, server: Server) -> None:
        server.reply = lambda number, body: None if number == 1 else said("short")
        assert server.endpoint()(INSTRUCTION, "text") == "short"

    def test_a_server_that_is_too_slow(self, server: Server) -> None:
        def late(number: int, body: dict[str, Any]) -> Reply:
            time.sleep(0.3)
            return said("short")

        server.reply = late
        with pytest.raises(TeacherFailed, match="2 attempts.*timed out"):
            server.endpoint(attempts=2, timeout=0.05)(INSTRUCTION, "text")

    def test_nobody_there(self) -> None:
        with pytest.raises(TeacherFailed, match="2 attempts"):
            Endpoint("http://127.0.0.1:9", "m", attempts=2)(INSTRUCTION, "text")

    def test_wrong_settings(self) -> None:
        with pytest.raises(ValueError, match="http://"):
            Endpoint("localhost:8000", "m")
        with pytest.raises(ValueError, match="at least 1 attempt"):
            Endpoint("http://localhost:8000", "m", attempts=0)


def test_a_client_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "jaxcompress\[teacher\]"'):
        Endpoint("http://localhost:8000", "m")


class TestModel:
    @pytest.fixture(scope="class")
    def loaded(self) -> Any:
        from jaxcompress.checkpoints import load_embedded

        return load_embedded()

    def test_writes_on_after_instruction_and_text(self, loaded: Any) -> None:
        from jaxcompress.generation import GenerationConfig, generate
        from jaxcompress.policies import TOVA

        model, tokenizer = loaded.model, loaded.tokenizer
        stop = tokenizer.encode(" the", add_bos=False).tolist()  # a word that this model soon writes
        config = GenerationConfig(stop_token_ids=tuple(stop))
        teacher = model_teacher(model, tokenizer, TOVA(), 32, max_new_tokens=64, config=config)
        prompt = tokenizer.encode("Shorten.\n\nText:\nThe list is a list.\n\nShortened text:\n")
        (tokens,) = generate(model, [prompt], TOVA(), 32, max_new_tokens=64, config=config)
        written = tokens[0][tokens[0] >= 0]
        if int(written[-1]) in stop:
            assert teacher("Shorten.", "The list is a list.") == tokenizer.decode(written[:-1]).strip()
        else:
            with pytest.raises(TeacherFailed, match="64 tokens"):
                teacher("Shorten.", "The list is a list.")

    def test_an_answer_without_end_is_a_failure(self, loaded: Any) -> None:
        from jaxcompress.policies import TOVA

        model, tokenizer = loaded.model, loaded.tokenizer
        with pytest.raises(TeacherFailed, match="did not end within 2 tokens"):
            model_teacher(model, tokenizer, TOVA(), 32, max_new_tokens=2)("Shorten.", "The list is a list.")


class TestCut:
    @given(st.text(alphabet="ab .\n会,", max_size=80), st.integers(1, 9))
    def test_joined_pieces_are_the_text(self, text: str, limit: int) -> None:
        pieces = cut_for_teacher(text, limit=limit)
        assert "".join(pieces) == text
        assert all(count_words(piece) <= limit or len(piece.split()) == 1 for piece in pieces)

    def test_ends_at_the_last_sentence_that_fits(self) -> None:
        text = "One two. Three four.\nFive six seven eight nine."
        assert cut_for_teacher(text, limit=7) == ["One two. Three four.\n", "Five six seven eight nine."]
        assert cut_for_teacher(text, limit=5) == ["One two.", " Three four.\n", "Five six seven eight", " nine."]

    def test_counts_as_it_is_told(self) -> None:
        assert cut_for_teacher("aa bb cc", limit=6, count=len) == ["aa bb", " cc"]

    def test_limit_below_one(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            cut_for_teacher("a", limit=0)
