"""Teachers: pieces for them, a model of this library, a server that is slow, busy, wrong or gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prompt.endpoint import Endpoint, Refused
from jaxcompress.prompt.teacher import INSTRUCTION, TeacherFailed, count_words, cut_for_teacher, model_teacher

Reply = tuple[int, dict[str, str], bytes]


def said(text: str, reason: str = "stop") -> Reply:
    choice = dict(message=dict(role="assistant", content=text), finish_reason=reason)
    return 200, {}, json.dumps(dict(choices=[choice])).encode()


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
        return Endpoint(self.url, "teacher", **(dict(first_pause=0.01, timeout=5.0) | changes))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


class TestEndpoint:
    def test_asks_as_openai_does(self, server: Server) -> None:
        assert server.endpoint(key="secret", extra=dict(seed=7))(INSTRUCTION, "a long text") == "short"
        (seen,) = server.seen
        assert seen["path"] == "/v1/chat/completions"
        assert seen["key"] == "Bearer secret"
        assert seen["model"] == "teacher"
        assert seen["messages"] == [
            dict(role="system", content=INSTRUCTION),
            dict(role="user", content="a long text"),
        ]
        assert (seen["temperature"], seen["top_p"], seen["max_tokens"], seen["seed"]) == (0.3, 1.0, 4000, 7)

    def test_key_is_not_shown(self, server: Server) -> None:
        assert "secret" not in repr(server.endpoint(key="secret"))

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_what_may_pass_is_tried_again(self, server: Server, status: int) -> None:
        server.reply = lambda number, body: (status, {}, b"busy") if number < 3 else said("short")
        assert server.endpoint()(INSTRUCTION, "text") == "short"
        assert len(server.seen) == 3

    def test_pauses_grow(self, server: Server) -> None:
        server.reply = lambda number, body: (503, {}, b"") if number < 4 else said("short")
        server.endpoint(first_pause=0.1)(INSTRUCTION, "text")
        pauses = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
        assert [low <= pause for low, pause in zip((0.05, 0.1, 0.2), pauses, strict=True)] == [True] * 3

    @pytest.mark.parametrize("date", [False, True])
    def test_waits_as_long_as_asked(self, server: Server, date: bool) -> None:
        asked = formatdate(time.time() + 2, usegmt=True) if date else "0.4"
        server.reply = lambda number, body: (429, {"Retry-After": asked}, b"") if number == 1 else said("short")
        server.endpoint()(INSTRUCTION, "text")
        assert server.times[1] - server.times[0] >= (0.9 if date else 0.39)

    def test_all_threads_wait_for_a_rate_limit(self, server: Server) -> None:
        server.reply = lambda number, body: (429, {"Retry-After": "0.5"}, b"") if number == 1 else said("short")
        endpoint = server.endpoint()
        threads = [threading.Thread(target=endpoint, args=(INSTRUCTION, "text")) for _ in range(2)]
        threads[0].start()
        while not server.times:
            time.sleep(0.005)
        time.sleep(0.1)
        threads[1].start()
        for thread in threads:
            thread.join()
        assert min(server.times[1:]) - server.times[0] >= 0.49

    def test_no_more_requests_than_allowed(self, server: Server) -> None:
        endpoint = server.endpoint(per_minute=600.0)
        for _ in range(3):
            endpoint(INSTRUCTION, "text")
        assert server.times[2] - server.times[0] >= 0.19

    def test_gives_up_and_says_why(self, server: Server) -> None:
        server.reply = lambda number, body: (429, {}, b'{"error": {"message": "quota of today used up"}}')
        with pytest.raises(TeacherFailed, match="3 attempts.*429.*quota of today") as failed:
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
            (said("half of", "length"), "cut off"),
            (said("  "), "empty"),
            ((200, {}, b"<html>"), "not JSON"),
            ((200, {}, b'{"choices": []}'), "choices"),
        ],
    )
    def test_answers_that_are_none(self, server: Server, answer: Reply, why: str) -> None:
        server.reply = lambda number, body: answer
        with pytest.raises(TeacherFailed, match=why):
            server.endpoint()(INSTRUCTION, "text")

    def test_connection_that_breaks(self, server: Server) -> None:
        server.reply = lambda number, body: None if number == 1 else said("short")
        assert server.endpoint()(INSTRUCTION, "text") == "short"

    def test_nobody_there(self) -> None:
        with pytest.raises(TeacherFailed, match="2 attempts"):
            Endpoint("http://127.0.0.1:9", "m", attempts=2, first_pause=0.01)(INSTRUCTION, "text")

    def test_url_without_scheme(self) -> None:
        with pytest.raises(ValueError, match="http://"):
            Endpoint("localhost:8000", "m")


class TestModel:
    @pytest.fixture(scope="class")
    def loaded(self) -> Any:
        from jaxcompress.checkpoints import load_embedded

        return load_embedded()

    def test_writes_on_after_instruction_and_text(self, loaded: Any) -> None:
        from jaxcompress.generation import generate
        from jaxcompress.policies import TOVA

        model, tokenizer = loaded.model, loaded.tokenizer
        stop = tokenizer.encode(" the", add_bos=False).tolist()  # a word that this model soon writes
        from jaxcompress.generation import GenerationConfig

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
