"""A page for each policy, made from its docstring and from what was measured, and the table over them."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from html import escape
from typing import Any, NamedTuple

import drawings

import jaxcompress as jc
from jaxcompress.policies.labels import spellings
from jaxcompress.policies.names import POLICIES


class One(NamedTuple):
    """A policy that has a page."""

    title: str
    thing: Any

    @property
    def page(self) -> str:
        return f"policies/{self.title.lower()}.md"


@cache
def pages() -> tuple[One, ...]:
    learned = (jc.policies.Retention, jc.policies.DMS, jc.policies.dmc)
    return tuple(One(thing.__name__, thing) for thing in (*POLICIES, *learned))


def page(one: One) -> str:
    """The Markdown of a policy's page."""
    lead = inspect.getdoc(inspect.getmodule(one.thing)) or ""
    alone = sum(other.thing.__module__ == one.thing.__module__ for other in pages()) == 1
    parts = [f"# {one.title}"]
    if inspect.isclass(one.thing):
        names = " or ".join(f"`{name}`" for name in _names(one))
        parts.append(f"In a name: {names}. In Python: `jaxcompress.policies.{one.title}`.")
    if alone:
        parts.append("*" + " ".join(lead.split("\n\n")[0].split()) + "*")
    hidden = "    options: { show_root_heading: false, show_root_toc_entry: true, members: false, heading_level: 2 }"
    parts.append(f"::: jaxcompress.policies.{one.title}\n{hidden}")
    parts += _settings(one.thing) + _kept(one.title) + _cost(one)
    return "\n\n".join(parts) + "\n"


def _names(one: One) -> list[str]:
    if one.thing in POLICIES:
        return list(spellings(one.thing))
    return [f"learned` beside a model that was trained with `--policy {one.thing.label}"]


def _settings(thing: Any) -> list[str]:
    """A table of what can be set."""
    if not dataclasses.is_dataclass(thing):
        return []
    rows = [
        f"| `{field.name}` | {'learned weights' if field.default is dataclasses.MISSING else f'`{field.default!r}`'} "
        f"| `{str(field.type).replace(' | ', ' or ')}` |"
        for field in dataclasses.fields(thing)
        if not (field.metadata.get("leaf") and field.default is not dataclasses.MISSING)
    ]
    return ["## Settings", "\n".join(["| setting | default | type |", "|---|---|---|", *rows])] if rows else []


@cache
def _shown() -> dict[str, list[dict[str, Any]]]:
    """What was measured of each class of policies."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in drawings.data()["policies"]:
        rows.setdefault(row["of"], []).append(row)
    return rows


NOT_TRAINED = """No picture: what it keeps is learned, and no model ships with such weights. After
`jaxcompress train --policy ...`, `jaxcompress retention --policy learned` draws it for your model and text."""


def drawing(svg: str) -> str:
    """An SVG in a page: as wide as the page, but no wider than it was drawn, nor so narrow that words shrink."""
    width = int(svg.partition(' width="')[2].partition('"')[0])
    return f'<div class="drawing" style="--least: {min(width, 600)}px; --most: {width}px">{svg}</div>'


def _kept(title: str) -> list[str]:
    rows, data = _shown().get(title, []), drawings.data()
    if all(row["deaths"] is None for row in rows):
        return ["## What it keeps", NOT_TRAINED]
    count = len(data["tokens"])
    slots = "with as many slots" if title == "Full" else f"in {data['slots']} slots"
    parts = [
        "## What it keeps",
        f"The embedded model reads {count} tokens of a text that it has not seen, one after the other, {slots}. The "
        "stronger its colour, the longer a token was held (mean over layers and heads).",
    ]
    for row in rows:
        parts += [f"### `{row['policy']}`"] if len(rows) > 1 else [f"Policy `{row['policy']}`:"]
        parts.append(coloured(data["tokens"], row["deaths"]))
        parts.append("A column is a token, time runs down: the column ends where the token was forgotten.")
        parts.append(drawing(drawings.lifetimes(row["deaths"], drawings.PAGE)))
    return parts


def coloured(tokens: list[str], deaths: list[list[int]]) -> str:
    """The text; behind each token how much of the time after it the token was held."""
    total, spans = len(tokens), []
    for at, token in enumerate(tokens):
        share = sum(row[at] - at for row in deaths) / len(deaths) / (total - at)
        spans.append(f'<span style="--held:{0.75 * share:.2f}">{_as_html(token)}</span>')
    return f'<div class="kept">{"".join(spans)}</div>'


def _as_html(token: str) -> str:
    """One line of HTML that no Markdown is found in."""
    marks = {"\n": "&#10;", "*": "&#42;", "_": "&#95;", "`": "&#96;", "[": "&#91;", "\\": "&#92;"}
    return "".join(marks.get(letter, escape(letter)) for letter in token)


def _cost(one: One) -> list[str]:
    rows = [row for row in _shown().get(one.title, []) if row["ratio"]]
    if not rows:
        return []
    tova = next(row for row in drawings.data()["policies"] if row["policy"] == "tova")
    lines = [f"| `{row['policy']}` | {row['ratio']:.2f} | {row['kib'] / tova['kib']:.2f} |" for row in rows]
    return [
        "## What it costs",
        f"A decoding step over {drawings.data()['timed_slots']} slots, divided by plain attention over a ring of as "
        "many; and the bytes of the state, divided by TOVA's. Two CPU cores, batch 1, 6 layers of random weights; "
        "repeated runs differ by about 0.1. More in "
        "[results](../results/policies.md#what-a-step-costs).",
        "\n".join(["| | step / attention | state / TOVA's |", "|---|---|---|", *lines]),
    ]


def index() -> str:
    """The page over all policies."""
    measured, tova = _shown(), next(row for row in drawings.data()["policies"] if row["policy"] == "tova")
    lines = []
    for one in pages():
        row = next((row for row in measured.get(one.title, []) if row["ratio"]), None)
        figures = (f"{row['ratio']:.2f}", f"{row['kib'] / tova['kib']:.2f}") if row else ("", "")
        name = spellings(one.thing)[-1] if one.thing in POLICIES else "learned"
        what = (inspect.getdoc(one.thing) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
        where = one.page.removeprefix("policies/")
        scope = getattr(one.thing, "scope", "kv_head")
        lines.append(f"| [{one.title}]({where}) | `{name}` | {what} | `{scope}` | {' | '.join(figures)} |")
    return INDEX.format(table="\n".join(lines))


INDEX = """# Policies

A policy scores the tokens of a layer; the lowest scores go. [Choose one](../guides/choose.md), or
[write one](../guides/write.md). Each page has the definition, the source, what it keeps of one text, and its cost.

| | in a name | | tokens chosen per | step / attention | state / TOVA's |
|---|---|---|---|---|---|
{table}

N is a number. *Step* is a decoding step on two CPU cores, divided by plain attention over as many slots.
What goes around a policy (`every`, `protect`, `adaptive`, ...) is in [the reference](../api/policies.md#combinators).
"""
