"""Pairs are judged in both orders, by any function, a server or a local model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jaxcompress.evaluation.pairwise import INSTRUCTION, comparison, judge_pair, likelihood_judge, verdict


def longer(instruction: str, text: str) -> str:
    """A judge that prefers the longer text."""
    a, b = text.split("[Text A]\n")[1].split("\n\n[End")[0].split("\n\n[Text B]\n")
    return f"I compared them. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


@pytest.mark.parametrize(
    ("candidate", "outcome"), [("a long text", "win"), ("a", "loss"), ("abcd!", "tie")], ids=["win", "loss", "tie"]
)
def test_a_text_wins_in_both_places(candidate: str, outcome: str) -> None:
    judged = judge_pair(longer, "Write.", candidate, "abcd.")
    assert (judged.outcome, judged.consistent, len(judged.said)) == (outcome, True, 2)


@pytest.mark.parametrize("letter", "AB")
def test_a_judge_that_prefers_a_place_ties(letter: str) -> None:
    judged = judge_pair(lambda instruction, text: f"[[{letter}]]", "Write.", "one", "two")
    assert (judged.outcome, judged.consistent) == ("tie", False)


def test_a_tie_in_one_order_only() -> None:
    said = iter(["[[A]]", "[[C]]"])
    judged = judge_pair(lambda instruction, text: next(said), "Write.", "one", "two")
    assert (judged.outcome, judged.consistent) == ("tie", False)


def test_equal_texts_tie_unasked() -> None:
    def never(instruction: str, text: str) -> str:
        raise AssertionError

    assert judge_pair(never, "Write.", "same", "same") == ("tie", True, ())


def test_places_are_swapped() -> None:
    seen = []

    def judge(instruction: str, text: str) -> str:
        seen.append((instruction, text))
        return "[[C]]"

    judge_pair(judge, "Write.", "one", "two")
    assert seen == [(INSTRUCTION, comparison("Write.", *pair)) for pair in (("one", "two"), ("two", "one"))]


def test_the_last_verdict_counts() -> None:
    assert verdict("[[A]] at first, but then [[B]]") == "B"
    with pytest.raises(ValueError, match=r"\[\[A\]\], \[\[B\]\] or \[\[C\]\]; this one said 'both are good'"):
        verdict("both are good")


@pytest.fixture
def url() -> Iterator[str]:
    """A server that speaks OpenAI's chat completions and judges by length."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            said = longer(*(message["content"] for message in messages))
            choice = dict(message=dict(role="assistant", content=said), finish_reason="stop")
            body = json.dumps(dict(choices=[choice])).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_server_as_judge(url: str) -> None:
    pytest.importorskip("openai")
    from jaxcompress.prompt.endpoint import Endpoint

    judge = Endpoint(url, "judge", temperature=0.0, timeout=5.0, attempts=1)
    assert judge_pair(judge, "Write.", "longer", "short").outcome == "win"
    assert judge_pair(judge, "Write.", "short", "longer").outcome == "loss"


def test_a_local_model_as_judge() -> None:
    from jaxcompress.checkpoints import load_embedded

    judge = likelihood_judge(load_embedded())
    text = comparison("Write.", "one", "two")
    assert verdict(judge(INSTRUCTION, text)) in ("A", "B", "C")
    assert judge(INSTRUCTION, text) == judge(INSTRUCTION, text)
    assert judge_pair(judge, "Write.", "one", "two").outcome in ("win", "tie", "loss")
