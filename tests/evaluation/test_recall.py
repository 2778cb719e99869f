"""Recall tasks: that questions have the answers they claim, at the distances they claim."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.checkpoints._embedded import load_embedded
from jaxcompress.evaluation.recall import WORDS_PER_SIDE, Recall, Wording, answers, exam, one_by_one, weave, wording
from jaxcompress.models.decoder import Decoder

SPELLED = ["".join(letters) for letters in product("abcdefgh", repeat=3)][:100]
VOCABULARY = {f"Ġ{word}": 1000 + i for i, word in enumerate(SPELLED)} | {"Ġab": 1, "Ġabc1": 2, "abc": 3, "ĠAbc": 4}
WORDS = wording(VOCABULARY, lambda text: [ord(c) for c in text])
FILLER = np.arange(10_000, 11_000, dtype=np.int32)
NOTE, RECALL, ARROW = ([ord(c) for c in text] for text in ("\n# note:", "\n# recall:", " ->"))


def lines(task: Recall, marker: list[int]) -> list[tuple[int, list[int], list[int]]]:
    """Index of the value, key and value of every line that begins with a marker."""
    tokens = task.tokens.tolist()
    found = []
    for at in range(len(tokens)):
        if tokens[at : at + len(marker)] == marker:
            key = at + len(marker)
            value = key + WORDS_PER_SIDE + len(ARROW)
            assert tokens[key + WORDS_PER_SIDE : value] == ARROW
            assert tokens[value + WORDS_PER_SIDE] == ord("\n")
            found.append((value, tokens[key : key + WORDS_PER_SIDE], tokens[value : value + WORDS_PER_SIDE]))
    return found


def check(task: Recall, length: int, notes: int, questions: int) -> list[int]:
    """Everything that holds for every task; returns which note each question asks for."""
    assert [len(part) for part in task] == [length] * 4
    assert [part.dtype for part in task] == [np.int32, bool, bool, np.int32]
    told, asked = lines(task, NOTE), lines(task, RECALL)
    assert (len(told), len(asked)) == (notes, questions)
    tokens, distance = task.tokens, task.distance
    where = {value: i for i, (value, _, _) in enumerate(told)}
    expected_told, expected_asked = np.zeros(length, bool), np.zeros(length, bool)
    which = []
    for value, _, _ in told:
        expected_told[value : value + WORDS_PER_SIDE] = True
    for value, key, answer in asked:
        expected_asked[value : value + WORDS_PER_SIDE] = True
        source = value - int(distance[value])
        assert source < value
        assert told[where[source]][1:] == (key, answer)
        which.append(where[source])
    for value, _, _ in told + asked:
        expected_told[value - len(ARROW) - WORDS_PER_SIDE : value - len(ARROW)] = True
    np.testing.assert_array_equal(task.told, expected_told)
    np.testing.assert_array_equal(task.asked, expected_asked)
    np.testing.assert_array_equal(np.flatnonzero(distance), [value for value, _, _ in asked])
    filler = tokens[tokens >= FILLER[0]]
    np.testing.assert_array_equal(np.diff(filler), 1)  # all of it, in order
    return which


def test_words_are_whole_lower_case_tokens() -> None:
    np.testing.assert_array_equal(WORDS.words, np.arange(1000, 1100))
    assert WORDS.note.tolist() == NOTE
    with pytest.raises(ValueError, match="the tokenizer has 63 single-token words; recall tasks need at least 64"):
        wording({f"▁{word}": i for i, word in enumerate(SPELLED[:63])}, lambda text: [0])


@given(seed=st.integers(0, 2**32 - 1), notes=st.integers(1, 6), questions=st.integers(0, 8), extra=st.integers(0, 300))
def test_weave(seed: int, notes: int, questions: int, extra: int) -> None:
    length = 16 * notes + 18 * questions + extra
    task = weave(FILLER, WORDS, rng=np.random.default_rng(seed), length=length, notes=notes, questions=questions)
    check(task, length, notes, questions)
    again = weave(FILLER, WORDS, rng=np.random.default_rng(seed), length=length, notes=notes, questions=questions)
    assert all((a == b).all() for a, b in zip(task, again, strict=True))


@given(seed=st.integers(0, 2**32 - 1), notes=st.integers(1, 6), data=st.data())
def test_a_note_is_asked_for_once_if_so_wanted(seed: int, notes: int, data: st.DataObject) -> None:
    questions = data.draw(st.integers(0, notes))
    rng = np.random.default_rng(seed)
    task = weave(FILLER, WORDS, rng=rng, length=400, notes=notes, questions=questions, again=False)
    which = check(task, 400, notes, questions)
    assert len(set(which)) == questions


def test_notes_and_questions_fall_where_they_should() -> None:
    task = weave(
        FILLER, WORDS, rng=np.random.default_rng(0), length=900, notes=5, questions=5,
        tell_in=(0.0, 0.3), ask_in=(0.9, 1.0),
    )  # fmt: skip
    before = lambda at: (task.tokens[:at] >= FILLER[0]).sum() / (task.tokens >= FILLER[0]).sum()
    assert all(before(value) <= 0.3 for value, _, _ in lines(task, NOTE))
    assert all(before(value) >= 0.89 for value, _, _ in lines(task, RECALL))


@pytest.mark.parametrize(
    ("length", "filler", "how", "says"),
    [
        (100, 1000, dict(notes=5, questions=5), "5 notes and 5 questions do not fit into 100 tokens"),
        (600, 10, dict(notes=2, questions=2), r"\d+ tokens of filler are needed, 10 were given"),
        (600, 1000, dict(notes=2, questions=3, again=False), "3 questions need more than 2 notes: each"),
        (600, 1000, dict(notes=0, questions=1), "1 questions need more than 0 notes"),
    ],
)  # fmt: skip
def test_what_cannot_be_woven(length: int, filler: int, how: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        weave(FILLER[:filler], WORDS, rng=np.random.default_rng(0), length=length, **how)


@pytest.mark.parametrize("bos", [None, 7])
def test_exam(bos: int | None) -> None:
    tasks = exam(FILLER, WORDS, rows=3, length=300, notes=4, questions=3, bos=bos)
    for task in tasks:
        if bos is not None:
            assert task.tokens[0] == bos
            assert not np.any([task.asked[0], task.told[0], task.distance[0]])
            task = Recall(*(part[1:] for part in task))
        assert len(set(check(task, 300 - (bos is not None), 4, 3))) == 3
        assert (task.distance[task.distance > 0] > 50).all()
    assert len({task.tokens.tobytes() for task in tasks}) == 3
    same = exam(FILLER, WORDS, rows=3, length=300, notes=4, questions=3, bos=bos)
    assert [task.tokens.tobytes() for task in tasks] == [task.tokens.tobytes() for task in same]
    other = exam(FILLER, WORDS, rows=3, length=300, notes=4, questions=3, bos=bos, seed=1)
    assert [task.tokens.tobytes() for task in tasks] != [task.tokens.tobytes() for task in other]


def test_an_exam_asks_for_each_note_once() -> None:
    with pytest.raises(ValueError, match="5 questions about 4 notes: each note is asked for once"):
        exam(FILLER, WORDS, rows=1, length=600, notes=4, questions=5)


def test_one_question_at_a_time() -> None:
    """Each row is the context of all, then one question up to the end of its answer, at the distance it then has."""
    for task in exam(FILLER, WORDS, rows=3, length=500, notes=6, questions=4, seed=1, bos=7):
        rows = one_by_one([task], WORDS)
        assert len(rows) == 4
        size = len(RECALL) + len(ARROW) + 2 * WORDS_PER_SIDE
        context = len(rows[0].tokens) - size
        asked = lines(task, RECALL)
        told = {tuple(key): value for value, key, _ in lines(task, NOTE)}
        for row, (_, key, answer) in zip(rows, asked, strict=True):
            assert row.tokens[:context].tolist() == task.tokens[:context].tolist()
            assert row.tokens[context:].tolist() == [*RECALL, *key, *ARROW, *answer]
            (first,) = np.flatnonzero(row.distance)
            assert first == len(row.tokens) - WORDS_PER_SIDE
            assert first - row.distance[first] == told[tuple(key)]
        assert not any(task.distance[:context])


def embedded_exam(**how: int) -> tuple[Decoder, list[Recall]]:
    """The embedded model, and two rows of what it has not seen with questions about facts."""
    from jaxcompress.embedded.corpus import held_out

    loaded = load_embedded()
    model, tokenizer = loaded.model, loaded.tokenizer
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    filler = np.concatenate([encode(document.text) for document in held_out("topics/")[:3]])
    words: Wording = wording(tokenizer.vocabulary(), encode)
    return model, exam(filler, words, rows=2, bos=tokenizer.bos_id, **how)


@pytest.mark.slow
def test_the_embedded_model_answers_from_what_it_holds() -> None:
    from jaxcompress.policies import Full, Window

    model, tasks = embedded_exam(length=256, notes=6, questions=6)
    everything = answers(model, tasks, Full(), 256)
    little = answers(model, tasks, Window(), 16)
    assert everything.right.shape == everything.distance.shape == (12,)
    np.testing.assert_array_equal(everything.distance, little.distance)
    assert (little.distance > 16).all()
    assert little.accuracy <= 1 / 12
    assert everything.accuracy >= little.accuracy + 0.5
    with pytest.raises(ValueError, match="256 tokens do not fit into the 255 slots"):
        answers(model, tasks, Full(), 255)


@pytest.mark.slow
def test_the_embedded_model_and_its_own_policy_keep_facts_where_tova_loses_them() -> None:
    from jaxcompress.policies import TOVA

    model, tasks = embedded_exam(length=1024, seed=5)
    own = answers(model, tasks, load_embedded().policy, 64)
    other = answers(model, tasks, TOVA(), 64)
    assert own.accuracy >= other.accuracy + 0.3, (own.accuracy, other.accuracy)
