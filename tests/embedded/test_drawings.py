"""Drawings and questions: the same at every call, true, and not to be answered without looking."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from jaxcompress.embedded.drawings import (
    CELLS,
    COLOURS,
    DIGITS,
    KINDS,
    SHAPES,
    SIDE,
    Drawing,
    draw,
    patch_labels,
    present,
    questions,
    words,
)


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [draw(number) for number in range(60)]


def test_a_number_is_a_picture_and_those_held_out_are_others() -> None:
    again, other = draw(3), draw(3, held_out=True)
    np.testing.assert_array_equal(draw(3).pixels, again.pixels)
    assert draw(3).things == again.things
    assert not np.array_equal(again.pixels, other.pixels)
    assert len({draw(number, held_out=held).pixels.tobytes() for number in range(30) for held in (False, True)}) == 60


def test_things_lie_in_their_cells_and_have_their_colour(drawings: list[Drawing]) -> None:
    width = SIDE // CELLS
    for drawing in drawings:
        assert 3 <= len(drawing.things) <= 7
        assert len({(t.row, t.column) for t in drawing.things}) == len(drawing.things)
        for nth, thing in enumerate(drawing.things):
            rows, columns = np.nonzero(drawing.owner == nth)
            assert (rows // width == thing.row).all()
            assert (columns // width == thing.column).all()
            mean = drawing.pixels[rows, columns].astype(float).mean(0)
            assert np.abs(mean - COLOURS[thing.colour]).max() < 40


def true_answer(text: str, drawing: Drawing) -> str:
    """Answered anew from the words alone."""
    asked = text.split()
    fits = [
        t for t in drawing.things
        if all(word in (t.colour, t.name) for word in asked if word in (*COLOURS, *SHAPES))
        and (t.name in DIGITS if "number" in asked else True)
    ]  # fmt: skip
    shapes = [t for t in fits if t.name in SHAPES]
    if asked[0] == "how":
        return str(len(fits))
    if asked[0] == "is":
        return "yes" if shapes else "no"
    if asked[1] == "number":
        (thing,) = fits
        return thing.name
    (thing,) = shapes
    return {"colour": thing.colour, "shape": thing.name, "row": str(thing.row + 1), "column": str(thing.column + 1)}[
        asked[1]
    ]


def test_answers_are_true(drawings: list[Drawing]) -> None:
    rng = np.random.default_rng(0)
    for drawing in drawings:
        for question in questions(drawing, rng, 12):
            assert question.answer == true_answer(question.text, drawing), (question, drawing.things)


def test_no_kind_can_be_guessed(drawings: list[Drawing]) -> None:
    rng = np.random.default_rng(1)
    asked = [question for drawing in drawings for question in questions(drawing, rng, 20)]
    counts = Counter(question.kind for question in asked)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > len(asked) / len(KINDS) / 1.6
    for kind, most in {
        "exists": 0.62,
        "count": 0.65,
        "colour": 0.25,
        "number": 0.25,
        "shape": 0.3,
        "row": 0.45,
    }.items():
        answers = Counter(question.answer for question in asked if question.kind == kind)
        assert max(answers.values()) / answers.total() < most, kind


def test_words_are_all_there_are(drawings: list[Drawing]) -> None:
    rng, known = np.random.default_rng(2), set(words())
    used = {
        word
        for drawing in drawings
        for question in questions(drawing, rng, 20)
        for word in f"{question.text} {question.answer}".split()
    }
    assert used <= known
    assert known - used <= {"8", "9", "7", "6"}
    assert len(words()) == len(known)


def test_labels_of_patches(drawings: list[Drawing]) -> None:
    names = (*SHAPES, *DIGITS)
    for drawing in drawings[:10]:
        name, colour = patch_labels(drawing, 8)
        assert ((name > 0) == (colour > 0)).all()
        for patch in np.flatnonzero(name):
            row, column = divmod(int(patch), SIDE // 8)
            inside = drawing.owner[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            most = Counter(inside[inside >= 0].tolist()).most_common(1)[0][0]
            assert names[name[patch] - 1] == drawing.things[most].name
            assert list(COLOURS)[colour[patch] - 1] == drawing.things[most].colour
        assert present(drawing).sum() == len({(t.name, t.colour) for t in drawing.things})
