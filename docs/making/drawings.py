"""The drawings of the README and of the concepts, as SVG.

    python docs/making/drawings.py      # writes docs/images/state-light.svg and state-dark.svg, for the README

On the site they stand within the page and take its colours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / "policies.json"
"""Made by `python experiments/policy_pages.py --out docs/making/policies.json`."""


@dataclass(frozen=True)
class Palette:
    """Colours of a drawing: ink for words, faint for lines, accent for what is held, warm for what is new."""

    ink: str
    faint: str
    accent: str
    warm: str


PAGE = Palette("var(--jc-ink)", "var(--jc-faint)", "var(--jc-accent)", "var(--jc-warm)")
LIGHT = Palette("#1f2328", "#d1d9e0", "#3949ab", "#e8590c")
DARK = Palette("#f0f6fc", "#3d444d", "#9fa8da", "#ff922b")


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A drawing on one line, so that Markdown takes it as it is."""
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>{body}</svg>'
    )


def box(x: float, y: float, w: float, h: float, fill: str, opacity: float = 1, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" fill-opacity="{opacity:g}" {more}/>'


def word(x: float, y: float, text: str, colour: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def line(x: float, y: float, to_x: float, to_y: float, colour: str, more: str = "") -> str:
    return f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{colour}" fill="none" {more}/>'


def state_over_time(colours: Palette) -> str:
    """What each slot holds after each token: the embedded model, one layer, five slots, TOVA."""
    drawn = data()["state"]
    held, tokens = drawn["held"], [text.strip() for text in drawn["tokens"]]
    step, row, left, top = 44, 26, 58, 74
    rows = len(held[0])
    right, bottom = left + step * len(tokens), top + row * rows
    parts = [word(left - 8, top - 6, "reads", colours.ink, "end", 'opacity=".7"')]
    for at, text in enumerate(tokens):
        x = left + step * at + step / 2
        parts.append(word(x, top - 8, text, colours.ink, "start", f'transform="rotate(-40 {x:g} {top - 8})"'))
    for slot in range(rows):
        y = top + row * slot
        parts.append(word(left - 8, y + 17, f"slot {slot + 1}", colours.ink, "end", 'opacity=".7"'))
        holds = [after[slot] for after in held]
        free = "".join(f"M{left + step * at} {y + row / 2:g}h{step}" for at, token in enumerate(holds) if token < 0)
        parts.append(f'<path d="{free}" stroke="{colours.faint}" fill="none"/>')
        for token, (first, last) in stays(holds).items():
            x, width = left + step * first, step * (last - first + 1)
            parts.append(box(x + 1, y + 3, width - 2, row - 6, colours.accent, 0.28, 'rx="4"'))
            parts.append(box(x + 1, y + 3, 4, row - 6, colours.warm, 1, 'rx="2"'))
            parts.append(word(x + 9, y + 17, tokens[token], colours.ink))
    parts.append(word(left, bottom + 18, "time →", colours.ink, "start", 'opacity=".7"'))
    parts.append(box(left + 78, bottom + 8, 4, 12, colours.warm, 1, 'rx="2"'))
    parts.append(word(left + 88, bottom + 18, "written", colours.ink))
    parts.append(box(left + 150, bottom + 8, 26, 12, colours.accent, 0.28, 'rx="3"'))
    parts.append(word(left + 182, bottom + 18, "held; its key and value never move", colours.ink))
    parts.append(word(right, bottom + 18, "a line: the slot is free", colours.ink, "end"))
    title = f"A state of {rows - 1} slots, and one for the token that comes, while a model reads {len(tokens)} tokens"
    return svg(right + 24, bottom + 30, title, parts)


def stays(slot: Sequence[int]) -> dict[int, tuple[int, int]]:
    """token -> first and last step at which a slot held it."""
    found: dict[int, tuple[int, int]] = {}
    for step, token in enumerate(slot):
        if token >= 0:
            found[token] = (found.get(token, (step, step))[0], step)
    return found


WORTH = (9, 2, 5, 1, 6, 3, 8, 2.5, 4, 7, 1.5, 3.5, 6.5, 2.2, 5.5, 4.5)
"""Scores of 16 tokens in the drawings of the ways to read; here they never change."""
PROMPT, CAPACITY, CHUNK = 12, 4, 4


def visible(mode: str) -> list[set[int]]:
    """The tokens that each query sees: a prompt of 12 tokens, then four written ones, in a state of four slots."""
    block = {"streaming": 1, "chunked": CHUNK, "oneshot": PROMPT}[mode]
    kept: list[int] = []
    seen: list[set[int]] = []
    at = 0
    while at < len(WORTH):
        size = block if at < PROMPT else 1
        new = list(range(at, at + size))
        seen += [{*kept, *(token for token in new if token <= query)} for query in new]
        kept = sorted(sorted([*kept, *new], key=lambda token: WORTH[token])[-CAPACITY:])
        at += size
    return seen


def mask(seen: list[set[int]], x: float, y: float, cell: float, colours: Palette) -> list[str]:
    """Rows are queries, columns are the tokens that they see; what a query may not see is pale."""
    parts = []
    for query, tokens in enumerate(seen):
        for token in range(query + 1):
            there = token in tokens
            colour = colours.warm if token == query else colours.accent if there else colours.faint
            parts.append(box(x + cell * token, y + cell * query, cell - 1, cell - 1, colour, 0.85 if there else 0.35))
    return parts


def three_ways(colours: Palette) -> str:
    """The same text and scores, read in the three modes."""
    cell, side, gap, top = 13, 13 * len(WORTH), 34, 44
    parts = []
    for number, (mode, what) in enumerate({
        "streaming": "select after every token",
        "chunked": "select after every chunk",
        "oneshot": "select at the prompt's end",
    }.items()):  # fmt: skip
        x = number * (side + gap)
        parts.append(word(x, 16, mode, colours.ink, more='font-weight="600"'))
        parts.append(word(x, 33, what, colours.ink, more='opacity=".75"'))
        parts += mask(visible(mode), x, top, cell, colours)
        y = top + cell * PROMPT - 0.5
        parts.append(line(x, y, x + side, y, colours.ink, 'stroke-dasharray="3 3" opacity=".6"'))
        parts.append(word(x + side, y - 5, "prompt", colours.ink, "end", 'font-size="11" opacity=".75"'))
    return svg(3 * side + 2 * gap, top + side + 4, "The tokens that each query sees, in three modes", parts)


def death_times(colours: Palette) -> str:
    """The streaming mask again, with the death time of three tokens."""
    cell, left, top, tokens = 19, 74, 46, len(WORTH)
    seen, side = visible("streaming"), 19 * len(WORTH)
    parts = [word(left, 16, "token j →", colours.ink, more='opacity=".75"')]
    parts += [
        word(left + cell * at + cell / 2, top - 8, str(at), colours.ink, "middle", 'font-size="10" opacity=".75"')
        for at in range(tokens)
    ]
    parts += [
        word(left - 8, top + cell * at + 14, f"query {at}" if at in (0, tokens - 1) else str(at), colours.ink, "end",
             'font-size="10" opacity=".75"') for at in range(tokens)
    ]  # fmt: skip
    parts += mask(seen, left, top, cell, colours)
    for token in (2, 4, 9):
        death = next((query for query in range(token, tokens) if token not in seen[query]), tokens)
        x, y = left + cell * token, top + cell * death
        parts.append(line(x - 1, y - 0.5, x + cell, y - 0.5, colours.ink, 'stroke-width="2.5"'))
        alive = death == tokens
        label = f"death[{token}] = {death}" + (", still held" if alive else "")
        if alive:
            parts.append(word(x + cell / 2, y + 16, label, colours.ink, "middle"))
        else:
            far = left + side + 14
            parts.append(line(x + cell + 2, y - 0.5, far - 4, y - 0.5, colours.ink, 'stroke-dasharray="2 4"'))
            parts.append(word(far, y + 4, label, colours.ink))
    return svg(left + side + 110, top + side + 24, "Death times on the mask of streaming attention", parts)


def lifetimes(deaths: Sequence[Sequence[int]], colours: Palette) -> str:
    """How long each token is held: time runs down, a column is a token, the shade is the share of layers and heads.

    Args:
      deaths: [quantiles, tokens], each at most the number of tokens.
    """
    tokens, cell, left, top = len(deaths[0]), 3, 50, 22
    side = cell * tokens
    parts = [
        word(left, 14, "token →", colours.ink, more='opacity=".75"'),
        word(left - 6, top + 10, "step ↓", colours.ink, "end", 'opacity=".75"'),
        box(left, top, side, side, colours.faint, 0.18),
    ]
    for row in deaths:
        bars = "".join(
            f"M{left + cell * at} {top + cell * at}h{cell}v{cell * (death - at)}h-{cell}z"
            for at, death in enumerate(row)
            if death > at
        )
        parts.append(f'<path d="{bars}" fill="{colours.accent}" fill-opacity="{1 / len(deaths) + 0.05:.2f}"/>')
    return svg(left + side, top + side + 4, "How long each token of the text is held", parts)


DRAWINGS: dict[str, Callable[[Palette], str]] = {
    "state": state_over_time, "three-ways": three_ways, "death-times": death_times,
}  # fmt: skip
"""Drawings by the name that pages call them by."""


def data() -> dict[str, Any]:
    """What the drawings and the pages of policies show."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def for_readme() -> dict[Path, str]:
    """The files that the README shows, and what they hold."""
    folder = HERE.parent / "images"
    return {
        folder / f"state-{name}.svg": state_over_time(colours) + "\n"
        for name, colours in (("light", LIGHT), ("dark", DARK))
    }


if __name__ == "__main__":
    for path, drawing in for_readme().items():
        path.write_text(drawing, encoding="utf-8")
        print(path)
