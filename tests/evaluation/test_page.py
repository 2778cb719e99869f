"""The page: what a browser would read from it is what was given."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.evaluation.lifetimes import KINDS, survival_by_kind, token_kinds
from jaxcompress.evaluation.page import first_ages, fit, page

NASTY = [
    "<s>", "</script>", "<!--", "\"'`&amp;", "&", "\n", "\r", "\r\n", "\t", "  ", "", "😀", "\ufffd", "]]>",
    "{{ 7*7 }}", "{% raw %}", "\\u003c", "${1}", "\u2028", "\x00", "\x85", "é", "</div>", "\ud800", "𝒳",
]  # fmt: skip
SHOWN = {"\x00": "\u2400", "\x85": "\ufffd", "\ud800": "\ufffd"}
"""What HTML cannot hold, and what stands for it."""

VOID = {"meta", "link", "input", "br"}


class Reader(HTMLParser):
    """Texts by element: those in `#text`, those with an id, and the cells of the table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.ids: dict[str, str] = {}
        self.cells: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        inside = [a.get("id") for _, a in self.open]
        if inside[-1:] == ["text"]:
            assert tag == "span"
            self.tokens.append("")
        if "table" in inside and tag == "tr":
            self.cells.append([])
        if "table" in inside and tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = [a.get("id") for _, a in self.open]
        if "text" in inside and inside[-1] != "text":
            self.tokens[-1] += data
        if "table" in inside and self.open[-1][0] in ("td", "th"):
            self.cells[-1][-1] += data
        for name in inside:
            if name:
                self.ids[name] = self.ids.get(name, "") + data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.ids["data"])


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def deaths(*shape: int, seed: int = 0) -> np.ndarray:
    age = np.random.default_rng(seed).geometric(0.2, shape)
    return np.minimum(np.arange(shape[-1]) + age, shape[-1])


def made(death: np.ndarray, texts: list[str] | None = None, **how: Any) -> Reader:
    texts = [f" w{i % 7}" for i in range(death.shape[-1])] if texts is None else texts
    return Reader(page(death, texts, **dict(dict(title="A page"), **how)))


def test_numbers_round_trip() -> None:
    death = deaths(3, 2, 50)
    kinds = np.arange(50) % len(KINDS)
    data = made(death, kinds=kinds).data
    assert (data["tokens"], data["layers"], data["heads"]) == (50, [0, 1, 2], [0, 1])
    assert data["kinds"] == list(KINDS)
    np.testing.assert_array_equal(unpacked(data["death"], "<u2").reshape(3, 2, 50), death)
    np.testing.assert_array_equal(unpacked(data["kind"], "u1"), kinds)


def test_texts_round_trip() -> None:
    html = page(deaths(2, 1, len(NASTY)), NASTY, title="A page")
    assert Reader(html).tokens == [SHOWN.get(text, text) for text in NASTY]
    html.encode("utf-8")


@given(st.lists(st.text(max_size=6), min_size=1, max_size=12))
def test_any_texts_round_trip(texts: list[str]) -> None:
    tokens = made(deaths(1, 1, len(texts)), texts).tokens
    printable = lambda text: re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "", text)
    pictures = str.maketrans("", "", "".join(map(chr, range(0x2400, 0x2422))) + "\ufffd")
    assert [t.translate(pictures) for t in tokens] == [printable(t).translate(pictures) for t in texts]


def test_what_is_told_is_escaped() -> None:
    nasty = "</script><script>alert(1)</script>"
    read = made(deaths(1, 1, 4), [nasty] * 4, title=nasty, about={nasty: nasty, "quote": "\"'"})
    assert sum(tag == "script" for tag, _ in read.tags) == 2
    assert nasty in read.ids["about"]
    assert read.tokens == [nasty] * 4


def test_nothing_comes_from_elsewhere() -> None:
    html = page(deaths(2, 2, 9), ["a"] * 9, title="A page", about=dict(policy="tova"))
    for tag, attributes in Reader(html).tags:
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
        assert not any(name.startswith("on") for name in attributes)
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import|https?://|fetch\(|import\(", html)


def test_controls_have_names() -> None:
    """A label around them, or a name for those who cannot see."""
    html = page(deaths(2, 2, 9), ["a"] * 9, title="A page")
    for control in re.finditer(r"<(?:select|input)[^>]*>", html):
        before = html[: control.start()]
        assert "aria-label" in control[0] or before.rfind("<label>") > before.rfind("</label>")


def test_choices_are_those_there_are() -> None:
    several, one = made(deaths(3, 2, 9)), made(deaths(3, 1, 9))
    assert [part for part in several.ids["layer"].split("\n") if part] == ["mean over all", "0", "1", "2"]
    assert [part for part in several.ids["head"].split("\n") if part] == ["mean over all", "0", "1"]
    assert "head" not in one.ids


def test_table() -> None:
    death, texts = deaths(2, 2, 40), [" a", ".", "\n", " b"] * 10
    death[0, 0, 0] = 40
    header, *rows = made(death, texts, after=(1, 5, 1000)).cells
    assert header == ["kind", "tokens", "after 1", "after 5", "after 1,000", "at the end"]
    expected = survival_by_kind(death, token_kinds(texts), (1, 5, 1000))
    shares = [[f"{share:.1%}".replace("nan%", "–") for share in (*row.after, row.end)] for row in expected]
    told = [[row.kind, str(row.tokens), *cells] for row, cells in zip(expected, shares, strict=True)]
    assert rows == told
    assert rows[0][4] == "–"


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_can_be_read_on_every_colour(mode: str) -> None:
    """WCAG 2: a contrast of 4.5 for text, 3 for marks; and each colour is further from the page than the one before."""
    html = page(deaths(1, 1, 3), ["a"] * 3, title="A page")
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light if mode == "light" else dark))
    contrast = lambda a, b: (max(pair := (luminance(a), luminance(b))) + 0.05) / (min(pair) + 0.05)
    for ground, text in [(f"c{i}", f"t{i}") for i in range(9)] + [
        ("page", "ink"),
        ("page", "quiet"),
        ("panel", "quiet"),
    ]:
        assert contrast(colours[ground], colours[text]) >= 4.5, ground
    assert contrast(colours["page"], colours["mark"]) >= 3
    far = [contrast(colours["page"], colours[f"c{i}"]) for i in range(9)]
    assert far[0] == 1
    assert far == sorted(far)


class TestFit:
    """What is left out, and that it is said."""

    def test_everything_where_it_fits(self) -> None:
        death = deaths(3, 2, 20)
        shown = fit(death)
        np.testing.assert_array_equal(shown.death, death)
        assert "left-out" not in made(death).ids

    def test_last_tokens(self) -> None:
        death = deaths(2, 1, 20)
        read = made(death, most_tokens=12)
        np.testing.assert_array_equal(
            unpacked(read.data["death"], "<u2").reshape(2, 1, 12), np.minimum(death[..., :12], 12)
        )
        assert len(read.tokens) == 12
        assert "the first 12 of 20 tokens" in read.ids["left-out"]
        assert read.cells[-1][:2] == ["all", "20"]

    def test_heads_then_layers(self) -> None:
        death = deaths(8, 4, 10)
        read = made(death, most_numbers=8 * 3 * 10)
        assert (read.data["heads"], read.data["layers"]) == ([0, 2, 3], list(range(8)))
        shown = unpacked(read.data["death"], "<u2").reshape(8, 3, 10)
        np.testing.assert_array_equal(shown, death[:, [0, 2, 3]])
        assert "3 of 4 heads" in read.ids["left-out"]
        few = made(death, most_numbers=35)
        assert (few.data["heads"], few.data["layers"]) == ([0], [0, 4, 7])
        assert "1 of 4 heads" in few.ids["left-out"]
        assert "3 of 8 layers" in few.ids["left-out"]

    def test_a_large_model_stays_small(self) -> None:
        """4,096 tokens, 32 layers, 8 heads: all of it, in less than 4 MB."""
        age = np.random.default_rng(0).geometric(0.01, (32, 8, 4096))
        death = np.minimum(np.arange(4096) + age, 4096)
        html = page(death, [" word"] * 4096, title="A page")
        assert len(html) < 4e6
        assert 'id="left-out"' not in html


@given(st.integers(1, 3), st.integers(1, 60), st.integers(0, 3))
def test_colours_grow_with_age(sets: int, total: int, seed: int) -> None:
    first = first_ages(deaths(1, sets, total, seed=seed))
    assert first[0] == 1
    assert len(first) <= 8
    assert (np.diff(first) > 0).all()
    assert first[-1] <= total


def test_colours_are_spent_where_the_ages_are() -> None:
    first = first_ages(np.minimum(np.arange(2000) + 100 + np.arange(2000) % 500, 2000)[None, None])
    assert first[1] > 100
    assert len(first) == 8


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(death=deaths(2, 9)), r"must be \[L, P, T\], not \[2, 9\]"),
        (dict(texts=["a"] * 8), "a list of 9, one for each token of the death times, not 8"),
        (dict(texts="abcdefghi"), "must be a list of 9"),
        (dict(kinds=np.zeros(8, int)), r"kinds must be \[9\]"),
        (dict(most_tokens=70_000), "between 1 and 65535"),
    ],
)
def test_what_is_refused(how: dict[str, Any], says: str) -> None:
    given = dict(dict(death=deaths(2, 1, 9), texts=["a"] * 9), **how)
    with pytest.raises(ValueError, match=says):
        page(**given, title="A page")
