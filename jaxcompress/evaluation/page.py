"""A page that shows how long a policy held each token of a text: one HTML file without a server or other files.

Death times are embedded as 16-bit integers. The browser keeps one element per token and reads all death times whenever
a slider moves, so both numbers are bounded. The page states what it omits.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape

from jaxcompress.evaluation.lifetimes import AFTER, KINDS, check_layers, survival_by_kind, token_kinds

MOST_TOKENS = 8192
"""Maximum number of tokens on a page; later tokens are omitted."""

MOST_NUMBERS = 2**21
"""Maximum number of death times on a page (4 MiB). To stay below it, heads and then layers are omitted evenly."""

_COLOURS = 8  # of the page, besides the colour for zero


class PageView(NamedTuple):
    """The part of the death times that fits on a page.

    Attributes:
      death: [l, p, t]; tokens held at token t count as held at the end.
      layers, heads: [l] and [p], the indices of the shown layers and heads.
    """

    death: np.ndarray
    layers: np.ndarray
    heads: np.ndarray


def fit(death: np.ndarray, most_tokens: int = MOST_TOKENS, most_numbers: int = MOST_NUMBERS) -> PageView:
    """Omits the last tokens, then heads, then layers, until [L, P, T] death times are within the bounds."""
    tokens = min(death.shape[2], most_tokens)
    heads = _spread(death.shape[1], most_numbers // (death.shape[0] * tokens))
    layers = _spread(death.shape[0], most_numbers // (len(heads) * tokens))
    return PageView(np.minimum(death[layers][:, heads, :tokens], tokens), layers, heads)


def _spread(count: int, most: int) -> np.ndarray:
    """Indices of `most` of `count`, at least one, evenly spread from the first to the last."""
    return np.linspace(0, count - 1, min(count, max(most, 1))).round().astype(int)


def page(
    death: np.ndarray,
    texts: Sequence[str],
    *,
    title: str,
    about: Mapping[str, Any] | None = None,
    kinds: np.ndarray | None = None,
    after: Sequence[int] = AFTER,
    most_tokens: int = MOST_TOKENS,
    most_numbers: int = MOST_NUMBERS,
) -> str:
    """The text as HTML, with every token coloured by how long it was held.

    The reader can choose a layer and a head or the mean over all, the tokens held at any step, and a kind of token.
    Pointing at a token shows how long each layer held it. A table below shows survival by kind, over all layers and
    heads.

    Args:
      death: [L, P, T], such as `trace.death[:, row]`.
      texts: T texts (see `token_texts`).
      title: heading of the page.
      about: facts to show at the top, such as the policy and its slots.
      kinds: [T] (see `token_kinds`); computed from the texts if not given.
      after: numbers of steps, columns of the table.
      most_tokens, most_numbers: bounds of the shown part. The table covers everything.

    Raises:
      ValueError: `death` is not an array of death times of this shape, or texts or kinds have another number of tokens.
    """
    death = check_layers(death)
    layers, heads, total = death.shape
    if isinstance(texts, str) or len(texts) != total:
        raise ValueError(f"texts must be a list of {total}, one for each token of the death times, not {len(texts)}")
    if not 1 <= most_tokens < 2**16:
        raise ValueError(f"most_tokens must be between 1 and 65535 (they are kept in 16 bits), not {most_tokens}")
    kinds = token_kinds(texts) if kinds is None else kinds
    table = survival_by_kind(death, kinds, after)
    shown = fit(death, most_tokens, most_numbers)
    count = shown.death.shape[2]
    data = dict(
        tokens=count,
        layers=shown.layers.tolist(),
        heads=shown.heads.tolist(),
        ages=first_ages(shown.death).tolist(),
        kinds=KINDS,
        death=_packed(shown.death, "<u2"),
        kind=_packed(kinds[:count], "u1"),
    )
    template = files("jaxcompress.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    return _environment().from_string(template).render(
        title=title,
        about=dict(about or {}),
        left_out=_left_out(shown, layers, heads, total),
        data=data,
        tokens=[_marked(text) for text in texts[:count]],
        kinds=[(i, kind) for i, kind in enumerate(KINDS) if (kinds[:count] == i).any()],
        after=list(after),
        table=table,
        layers=layers,
        heads=heads,
    )  # fmt: skip


def first_ages(death: np.ndarray, colours: int = _COLOURS) -> np.ndarray:
    """[n] int64, at most `colours`: the smallest age of each colour.

    Every colour spans the same factor, from the age that 95 % of the tokens reach to the length of the text. All layers
    and heads share this scale, which covers the ages that occur.
    """
    total = death.shape[-1]
    usual = max(np.quantile(death - np.arange(total), 0.05), 1)
    steps = np.ceil(np.geomspace(usual, total + 1, colours + 1)[1:-1]).astype(int)
    return np.unique([1, *np.minimum(steps, total)])


def _left_out(shown: PageView, layers: int, heads: int, total: int) -> list[str]:
    told = []
    if (count := shown.death.shape[2]) < total:
        told.append(f"the first {count:,} of {total:,} tokens; what was held then is shown as held to the end")
    if len(shown.heads) < heads:
        told.append(f"{len(shown.heads)} of {heads} heads, evenly spread; means are over these")
    if len(shown.layers) < layers:
        told.append(f"{len(shown.layers)} of {layers} layers, evenly spread; means are over these")
    return told


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _marked(text: str) -> Markup:
    """A token as HTML with all characters visible; the text of the element is the text of the token.

    Only characters that HTML cannot hold are replaced, by symbols that depict them.
    """
    if not text:
        return Markup('<i class="part"></i>')  # the style sheet draws it
    return Markup("").join(_character(character) for character in text)


def _character(character: str) -> Markup:
    if character == "\n":
        return Markup("<i></i>\n")
    if character == "\r":
        return Markup("&#13;")  # HTML would read a bare carriage return as a line feed
    if character != "\t" and unicodedata.category(character) in ("Cc", "Cs"):
        code = ord(character)
        return Markup(chr(0x2400 + code) if code < 32 else "\u2421" if code == 127 else "\ufffd")
    return escape(character)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
