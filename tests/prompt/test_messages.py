"""Lists of chat messages, and whether shortening pays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxcompress.prompt import BudgetTooSmall, Compressor, Payoff, compress_messages, compress_stream

LONG = "The harbor was quiet that night. Ships, ships, and more ships lay at anchor; nobody spoke of $4,200."
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"where": "the harbor at night"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": LONG},
    {
        "role": "user",
        "name": "Ann",
        "content": [{"type": "text", "text": LONG}, {"type": "image_url", "image_url": {}}],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": LONG},
    {"role": "tool", "tool_call_id": "c2", "content": "quiet"},
    {"role": "user", "content": ""},
    {"role": "user", "content": []},
    {"role": "assistant", "content": LONG},
]


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return Compressor.load(Path(__file__).parents[1] / "fixtures" / "prompt" / "bert")


def test_only_texts_of_the_roles_are_shortened(compressor: Compressor) -> None:
    given = copy.deepcopy(MESSAGES)
    shorter, result = compress_messages(compressor, given, rate=0.5, protect=["numbers"])
    assert given == MESSAGES
    assert [n for n, (old, new) in enumerate(zip(MESSAGES, shorter, strict=True)) if old != new] == [1, 3]
    assert shorter[1]["content"][1:] == MESSAGES[1]["content"][1:]
    text = shorter[1]["content"][0]["text"]
    assert "$4,200" in text
    assert {**shorter[3], "content": LONG} == MESSAGES[3]
    assert shorter[4]["content"] == "quiet"  # its only word
    assert result.tokens_after == result.asked == int(result.tokens_before * 0.5 + 0.5)
    only, _ = compress_messages(compressor, MESSAGES, roles=["assistant"], tokens=6)
    assert [n for n, (old, new) in enumerate(zip(MESSAGES, only, strict=True)) if old != new] == [7]
    assert compressor.tokenizer.count(only[7]["content"]) == 6
    assert compress_messages(compressor, [])[0] == []


def test_words_are_not_forced_where_sentences_are_kept(compressor: Compressor) -> None:
    by_sentence = replace(compressor, unit="sentence")
    ways: list[Callable[[list[str]], Any]] = [
        lambda force: compress_messages(by_sentence, MESSAGES, force=force),
        lambda force: list(compress_stream(by_sentence, [LONG], force=force)),
        lambda force: by_sentence.compress(LONG, force=force),
    ]
    for way in ways:
        way(["\n"])
        with pytest.raises(ValueError, match="force takes white space where sentences are kept whole, not 'quiet'"):
            way(["quiet"])


@pytest.mark.parametrize("rate", [1, 0.5])
def test_short_messages(compressor: Compressor, rate: float) -> None:
    """Nothing stands between messages, and what each keeps in any case is no fault of the budget."""
    chat = [{"role": "user", "content": text} for text in ("yes", "ok", "thanks")]
    reader = replace(compressor, count=lambda text: len(text.split()) + text.count("\n"))
    shorter, result = compress_messages(reader, chat, rate=rate)
    assert shorter == chat
    assert (result.tokens_before, result.tokens_after, result.asked) == (3, 3, 3 if rate == 1 else 2)
    with pytest.raises(BudgetTooSmall, match="needs 2 of 3 tokens, more than the 1 asked for"):
        compress_messages(reader, chat, tokens=1, force=["yes", "thanks"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ({"role": "user"}, "messages are a list of objects with a role, not dict"),
        (["hello"], "message 0 is no object with a role, but str"),
        ([{"content": "a"}], "message 0 has no role"),
        ([{"role": "user", "content": 3}], "content of message 0 is a string, null or a list, not int"),
        ([{"role": "user", "content": ["a"]}], "part 0 of message 0 is no object with a type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part 0 of message 0 is of type text and has no text"),
    ],
)
def test_messages_that_are_none(compressor: Compressor, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_messages(compressor, messages)


def test_roles_that_stay(compressor: Compressor) -> None:
    with pytest.raises(ValueError, match="role 'system' are not shortened; roles: user, assistant"):
        compress_messages(compressor, MESSAGES, roles=["system"])


def test_when_it_pays() -> None:
    paid = Payoff(tokens_before=1000, tokens_after=250, seconds=0.5, loading=1.0)
    assert paid.speed == 2000
    assert paid.fastest_reader == 1500
    assert paid.cost_saved(3) == pytest.approx(0.00225)
    length = paid.pays_from(500)
    assert length == 1000  # 1 s + 0.5 s + 250 / 500 s = 1000 / 500 s
    assert paid.pays_from(1500) is None
    assert Payoff(1000, 250, 0.5).pays_from(500) == 1
    assert Payoff(0, 0, 0.1).pays_from(1) is None
    assert Payoff(10, 10, 0.1).pays_from(1) is None
