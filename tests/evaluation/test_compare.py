"""The comparison of policies: that its columns are what they say."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_decoder

from jaxcompress import policies
from jaxcompress.evaluation.compare import _spread, compare, exams
from jaxcompress.evaluation.recall import Wording, answers
from jaxcompress.evaluation.sweep import sweep

VOCABULARY = 61
WORDS = Wording(*(np.array(part, np.int32) for part in ([1, 2], [1, 3], [4], [1])), np.arange(20, 60, dtype=np.int32))
FILLER = np.random.default_rng(0).integers(5, 20, 400).astype(np.int32)
TASKS = exams(FILLER, WORDS, context=200, seeds=2, rows=2, questions=3, bos=0)


def test_exams_have_one_length_and_answers_within_the_context() -> None:
    assert len(TASKS.whole) == 4
    assert {len(row.tokens) for row in TASKS.whole} == {200}
    (length,) = {len(row.tokens) for row in TASKS.single}
    assert TASKS.prompt == length - 7  # "\n# recall:", key, arrow, value
    for row in TASKS.single:
        assert row.tokens[0] == 0  # the beginning of sequence, however much was cut
        (first,) = np.flatnonzero(row.distance)
        assert (row.tokens[first - row.distance[first] :][:2] == row.tokens[first : first + 2]).all()
        assert row.tokens[TASKS.prompt :][:2].tolist() == WORDS.recall.tolist()


def test_answers_count_for_the_seed_that_drew_their_question() -> None:
    """Facts that were cut off leave seeds with different numbers of questions."""
    tasks = exams(FILLER, WORDS, context=200, seeds=4, rows=1, questions=8, bos=0)
    counts = np.bincount(tasks.drawn)
    assert len(set(counts.tolist())) > 1
    for row, seed in zip(tasks.single, tasks.drawn, strict=True):
        asked = row.tokens[tasks.prompt :].tolist()
        text = tasks.whole[seed].tokens.tolist()
        assert any(text[at : at + len(asked)] == asked for at in range(len(text)))
    right = np.repeat([1.0, 0.0, 0.0, 0.0], counts)
    assert _spread(right, np.array(tasks.drawn))[0] == 0.25


@pytest.mark.slow
def test_rows() -> None:
    """Means over seeds of what the parts give, bytes as measured, and nothing that a policy cannot do."""
    model = tiny_decoder(VOCABULARY)
    asked = [policies.Full(), policies.TOVA(), policies.once(policies.TOVA(), 12), policies.Window(60)]
    rows = list(compare(model, TASKS, asked, (40, 20)))
    assert [(row.policy, row.slots) for row in rows] == [
        ("full", 200), ("tova", 40), ("tova", 20), ("tova/once12", 40), ("tova/once12", 20),
    ]  # fmt: skip
    tova = rows[1]
    whole = answers(model, TASKS.whole, policies.TOVA(), 40)
    assert tova.nats == pytest.approx(whole.nats.mean(), rel=1e-5)
    assert tova.nats_spread == pytest.approx(whole.nats.reshape(2, 2).mean(1).std(), rel=1e-4)
    assert tova.recall == pytest.approx(whole.right.mean())
    before = answers(model, TASKS.single, policies.TOVA(), 40, prompt=TASKS.prompt)
    assert before.distance.tolist() == [row.distance.max() for row in TASKS.single]
    config = model.config
    assert tova.asked_bytes == 2 * config.num_layers * config.num_kv_heads * 40 * config.head_dim * 4
    assert tova.asked_bytes < tova.state_bytes < 1.2 * tova.asked_bytes
    assert tova.occupied == 1.0
    once = rows[3]
    assert once.nats is once.recall is once.tokens_per_second is None
    assert once.before is not None
    # The prompt's 12, and the question up to its last token but one.
    assert once.occupied == pytest.approx((12 + 6) / 40)


@pytest.mark.usefixtures("as_users_call_it")
def test_arguments_are_checked_at_the_call() -> None:
    """Not when the first line is asked for."""
    model = tiny_decoder(VOCABULARY)
    for given, says in (
        ((["tova"], [4]), "'tova'"),
        (([policies.TOVA()], [0]), "slots must be a whole number, at least 1, not 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            compare(model, TASKS, *given)
        with pytest.raises((TypeError, ValueError), match=says):
            sweep(model, FILLER[None, :9], *given)
    with pytest.raises(ValueError, match="cannot be stored as float7"):
        compare(model, TASKS, [policies.TOVA()], [4], dtype="float7")
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunks'"):
        sweep(model, FILLER[None, :9], [policies.TOVA()], [4], chunks=2)
    with pytest.raises(ValueError, match="token ids"):
        sweep(model, FILLER[:9], [policies.TOVA()], [4])


def test_what_comes_from_the_prompt_does_not_count() -> None:
    """With the whole row as prompt but the answer, only the answer is predicted from the state."""
    model = tiny_decoder(VOCABULARY)
    length = len(TASKS.single[0].tokens)
    given = answers(model, TASKS.single, policies.TOVA(), 30, prompt=length - 2)
    assert given.nats.shape == (len(TASKS.single),)


def test_a_policy_for_prompts_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="mode oneshot"):
        answers(tiny_decoder(VOCABULARY), TASKS.whole, policies.once(policies.TOVA(), 8), 40)
    with pytest.raises(ValueError, match="slots or more"):
        answers(tiny_decoder(VOCABULARY), TASKS.single, policies.once(policies.TOVA(), 8), 10, prompt=TASKS.prompt)


def test_texts_without_facts() -> None:
    """A tokenizer with too few whole words: loss, and nothing that needs questions."""
    tasks = exams(FILLER, None, context=100, seeds=2, rows=2, bos=0)
    assert [row.tokens[0] for row in tasks.whole] == [0] * 4
    assert len({tuple(row.tokens) for row in tasks.whole}) == 4
    model = tiny_decoder(VOCABULARY)
    (row,) = compare(model, tasks, [policies.TOVA(), policies.once(policies.TOVA(), 12)], (40,))
    assert row.nats == pytest.approx(answers(model, tasks.whole, policies.TOVA(), 40).nats.mean(), rel=1e-5)
    assert (row.recall, row.before, row.after) == (None, None, None)
    with pytest.raises(ValueError, match="499 tokens of text are needed, 400 were given"):
        exams(FILLER, None, context=500, seeds=1, bos=0)
