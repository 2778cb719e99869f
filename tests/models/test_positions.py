"""Readers of texts warn where positions leave what the model was trained for, once for each sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress.evaluation.perplexity import perplexity
from jaxcompress.evaluation.recall import Recall, answers
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation import decode, generate, init_decode_state, prefill, prefill_stream
from jaxcompress.inputs.position_warning import PositionWarning
from jaxcompress.models.checks import warn_of_positions
from jaxcompress.policies import TOVA, Full, StreamingLLM, per_layer

KNOWN, SLOTS = 16, 4
MODEL = tiny_decoder(max_position=KNOWN)


@contextmanager
def told(*ends: int) -> Iterator[None]:
    """The texts within warn of these positions, each once, and of no others."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", PositionWarning)
        yield
    said = [str(one.message) for one in found if one.category is PositionWarning]
    assert [text.split(",")[0] for text in said] == [f"positions reach {end}" for end in ends]
    assert all(f"trained for {KNOWN}" in text and "--placement slot or compact" in text for text in said)


@pytest.mark.parametrize(
    ("policy", "placement", "begin", "end", "warns"),
    [
        (TOVA(), None, 0, KNOWN + 1, True),
        (TOVA(), None, 0, KNOWN, False),
        (TOVA(), None, KNOWN + 1, KNOWN + 2, False),  # it was told when the border was crossed
        (TOVA(), "slot", 0, KNOWN + 1, False),
        (TOVA(), "compact", 0, KNOWN + 1, False),
        (StreamingLLM(1), None, 0, KNOWN + 1, False),
        (StreamingLLM(1), "absolute", 0, KNOWN + 1, True),
        (Full(), "slot", 0, KNOWN + 1, True),
        (per_layer(StreamingLLM(1), TOVA()), None, 0, KNOWN + 1, True),
    ],
)
def test_which_positions_grow(policy: Any, placement: Any, begin: int, end: int, warns: bool) -> None:
    with told(*[end] * warns):
        warn_of_positions(MODEL.config, policy, placement, end, begin=begin)


@pytest.mark.parametrize(
    "reads",
    [
        lambda ids, placement: perplexity(MODEL, ids, TOVA(), SLOTS, placement=placement),
        lambda ids, placement: trace(MODEL, ids, TOVA(), SLOTS, prompt=1, placement=placement),
        lambda ids, placement: answers(MODEL, [task(ids[0])], TOVA(), SLOTS, placement=placement),
    ],
    ids=["perplexity", "trace", "answers"],
)
def test_evaluation_warns(reads: Callable[..., Any]) -> None:
    for length, placement, warns in ((20, None, True), (20, "slot", False), (16, None, False)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", PositionWarning)
            reads(random_tokens(1, length), placement)
        assert len([one for one in found if one.category is PositionWarning]) == warns


def task(ids: np.ndarray) -> Recall:
    """A text with one answer of two tokens."""
    asked, distance = np.zeros(len(ids), bool), np.zeros(len(ids), np.int32)
    asked[-2:], distance[-2] = True, 5
    return Recall(ids, asked, np.zeros(len(ids), bool), distance)


def test_a_sequence_in_several_calls_is_told_of_once() -> None:
    ids = random_tokens(12)
    fresh = lambda: init_decode_state(MODEL, TOVA(), SLOTS)
    with told():
        begun = prefill(MODEL, [ids], fresh())
    with told(24):
        longer = prefill(MODEL, [ids], begun.copy())
    with told():
        decode(MODEL, longer, 8)
    with told(20):
        decode(MODEL, begun, 8)
    with told(20):
        list(generate(MODEL, [ids], TOVA(), SLOTS, max_new_tokens=8))
    with told(24):
        *_, (read, _) = prefill_stream(MODEL, [ids, ids, ids], fresh(), segment=8)
    assert read == 36
