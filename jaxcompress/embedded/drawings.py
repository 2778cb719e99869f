"""Pictures of coloured shapes and small digits, drawn here, and questions about them.

The embedded vision-language model is trained on some and measured on others. A picture follows from its number alone.
Training pictures are drawn from even seeds, held-out pictures from odd seeds.

Some questions need little of a picture (the colour of a large shape), some one small place (a digit in one or two
patches), some the whole picture (how many), so the answers show what a method dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

SIDE = 96
"""Pixels along a side."""
CELLS = 4
"""Things stand in a grid of so many rows and columns, moved about inside their cells."""
COLOURS = {
    "red": (220, 30, 30), "green": (30, 150, 40), "blue": (35, 60, 220), "yellow": (240, 220, 40),
    "purple": (130, 30, 160), "orange": (250, 140, 20), "white": (250, 250, 250), "black": (10, 10, 10),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
DIGITS = tuple("0123456789")
KINDS = ("colour", "shape", "number", "row", "column", "count", "exists")
"""Of questions."""

_FILLERS = (
    "a", "are", "colour", "column", "how", "in", "is", "many", "no", "number", "row", "shape", "the", "there", "things",
    "what", "which", "yes", "?",
)  # fmt: skip
# Three columns of five rows, bit by bit.
_GLYPHS = (0x7B6F, 0x2C97, 0x73E7, 0x72CF, 0x5BC9, 0x79CF, 0x79EF, 0x7252, 0x7BEF, 0x7BCF)
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.86,
    "triangle": lambda u, v: (abs(u) <= (v + 0.95) / 1.9) & (v <= 0.9),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.3),
    "diamond": lambda u, v: abs(u) + abs(v) <= 1,
}


class Thing(NamedTuple):
    """A shape or a digit in a picture.

    Attributes:
      name: one of `SHAPES` or `DIGITS`.
      colour: one of `COLOURS`.
      row, column: its cell, from 0.
    """

    name: str
    colour: str
    row: int
    column: int


class Drawing(NamedTuple):
    """A picture and what is in it.

    Attributes:
      pixels: [SIDE, SIDE, 3].
      things: what was drawn.
      owner: [SIDE, SIDE], which thing each pixel belongs to, -1 for the ground.
    """

    pixels: UInt8[np.ndarray, "side side 3"]
    things: tuple[Thing, ...]
    owner: Int[np.ndarray, "side side"]


class Question(NamedTuple):
    """A question of known kind with its answer, one word."""

    kind: str
    text: str
    answer: str


def draw(number: int, *, held_out: bool = False) -> Drawing:
    """The picture with this number (of the training pictures, or of those held out)."""
    rng = np.random.default_rng((2 * number + held_out, 7))
    ground = rng.uniform(90, 190, 3) + np.linspace(-25, 25, SIDE)[:, None, None] * rng.uniform(-1, 1, 3)
    pixels = ground + rng.normal(0, 6, (SIDE, SIDE, 3))
    owner = np.full((SIDE, SIDE), -1, np.int8)
    things = []
    for nth, cell in enumerate(rng.permutation(CELLS**2)[: rng.integers(3, 8)]):
        row, column = divmod(int(cell), CELLS)
        name = str(rng.choice(DIGITS if rng.uniform() < 0.35 else SHAPES))
        colour = str(rng.choice(list(COLOURS)))
        inside = _digit(int(name), int(rng.integers(2, 4))) if name in DIGITS else _shape(name, rng.uniform(4, 11))
        high, wide = inside.shape
        width = SIDE // CELLS
        top = row * width + int(rng.integers(0, width - high + 1))
        left = column * width + int(rng.integers(0, width - wide + 1))
        pixels[top : top + high, left : left + wide][inside] = COLOURS[colour] + rng.normal(0, 8, 3)
        owner[top : top + high, left : left + wide][inside] = nth
        things.append(Thing(name, colour, row, column))
    return Drawing(pixels.clip(0, 255).astype(np.uint8), tuple(things), owner)


def _shape(name: str, radius: float) -> Bool[np.ndarray, "n n"]:
    at = np.arange(int(2 * radius)) - (int(2 * radius) - 1) / 2
    return _INSIDE[name](at / radius, (at / radius)[:, None])


def _digit(value: int, scale: int) -> Bool[np.ndarray, "h w"]:
    bits = (_GLYPHS[value] >> np.arange(14, -1, -1) & 1).astype(bool).reshape(5, 3)
    return bits.repeat(scale, 0).repeat(scale, 1)


def questions(drawing: Drawing, rng: np.random.Generator, n: int) -> list[Question]:
    """So many questions, of all kinds that can be asked about this picture, each of which equally often."""
    things = drawing.things
    by_kind = {kind: choices for kind in KINDS if (choices := _asked(kind, things))}
    out = []
    for _ in range(n):
        kind = str(rng.choice(list(by_kind)))
        if kind in ("exists", "count"):
            out.append(_exists(things, rng) if kind == "exists" else _count(things, rng))
        else:
            choices = by_kind[kind]
            out.append(choices[int(rng.integers(len(choices)))])
    return out


def _asked(kind: str, things: tuple[Thing, ...]) -> list[Question]:
    """All questions of a kind about a thing that is the only one that fits; one blank for kinds that always fit."""
    shapes = [thing for thing in things if thing.name in SHAPES]
    digits = [thing for thing in things if thing.name in DIGITS]
    only = lambda of, key: [t for t in of if sum(key(t) == key(other) for other in of) == 1]
    if kind == "colour":
        return [Question(kind, f"what colour is the {t.name} ?", t.colour) for t in only(shapes, lambda t: t.name)]
    if kind == "shape":
        return [Question(kind, f"what shape is {t.colour} ?", t.name) for t in only(shapes, lambda t: t.colour)]
    if kind == "number":
        return [Question(kind, f"what number is {t.colour} ?", t.name) for t in only(digits, lambda t: t.colour)]
    if kind in ("row", "column"):
        place = lambda t: str((t.row if kind == "row" else t.column) + 1)
        alone = only(shapes, lambda t: (t.name, t.colour))
        return [Question(kind, f"which {kind} is the {t.colour} {t.name} in ?", place(t)) for t in alone]
    return [Question(kind, "", "")]


def _exists(things: tuple[Thing, ...], rng: np.random.Generator) -> Question:
    """Half of the time yes. Where the answer is no, shape and colour mostly occur, but not together."""
    there = sorted({(t.colour, t.name) for t in things if t.name in SHAPES})
    absent = [pair for pair in product(COLOURS, SHAPES) if pair not in there]
    near = [
        (c, n) for c, n in absent if any(c == other for other, _ in there) and any(n == other for _, other in there)
    ]
    yes = bool(there) and rng.uniform() < 0.5
    pairs = there if yes else near if near and rng.uniform() < 0.7 else absent
    colour, name = pairs[int(rng.integers(len(pairs)))]
    return Question("exists", f"is there a {colour} {name} ?", "yes" if yes else "no")


def _count(things: tuple[Thing, ...], rng: np.random.Generator) -> Question:
    """Of a shape or a colour; three times out of four of one that occurs."""
    of_shape = rng.uniform() < 0.5
    there = sorted({t.name if of_shape else t.colour for t in things if not of_shape or t.name in SHAPES})
    anything = list(SHAPES if of_shape else COLOURS)
    what = str(rng.choice(there if there and rng.uniform() < 0.75 else anything))
    n = sum((t.name if of_shape else t.colour) == what for t in things)
    return Question("count", f"how many {what} things are there ?", str(n))


def words() -> list[str]:
    """Every word of questions and answers."""
    return sorted({*_FILLERS, *COLOURS, *SHAPES, *DIGITS})


def patch_labels(drawing: Drawing, patch: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """What each patch shows most of, if at least a tenth of it is covered: name and colour, from 1; 0 for the ground.

    Names are numbered as in (*SHAPES, *DIGITS).
    """
    side = SIDE // patch
    cells = drawing.owner.reshape(side, patch, side, patch).swapaxes(1, 2).reshape(side * side, -1)
    covered = np.stack([(cells == nth).sum(1) for nth in range(len(drawing.things))], 1)
    most = covered.argmax(1)
    there = covered.max(1) >= patch * patch / 10
    names, colours = (*SHAPES, *DIGITS), list(COLOURS)
    name = np.array([names.index(t.name) + 1 for t in drawing.things])[most]
    colour = np.array([colours.index(t.colour) + 1 for t in drawing.things])[most]
    return np.where(there, name, 0).astype(np.int32), np.where(there, colour, 0).astype(np.int32)


def present(drawing: Drawing) -> Float[np.ndarray, " n"]:
    """1 for each (name, colour) that occurs; names are numbered as in (*SHAPES, *DIGITS)."""
    names, colours = (*SHAPES, *DIGITS), list(COLOURS)
    out = np.zeros((len(names), len(colours)), np.float32)
    for thing in drawing.things:
        out[names.index(thing.name), colours.index(thing.colour)] = 1
    return out.reshape(-1)
