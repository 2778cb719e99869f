"""Token lifetimes in the state: how many tokens are held, their age and kind, and where two policies differ.

All results are computed from death times [..., T], such as `trace.death[:, row]`, [L, P, T]. Token j is *held* at step
i if the query at position i sees it: `j <= i < death[j]`. A policy that evicts after a step therefore holds capacity +
1 tokens, and a prompt read at once is held in full until its end. The *age* of token j at step i is i - j. A
token that is held at the last step has death T; estimates treat it as censored.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxcompress.generation.text import TextStream, Tokenizer

KINDS = ("first", "whitespace", "digits", "punctuation", "rare words", "common words", "other")
"""The kinds of tokens; see `token_kinds`."""

AFTER = (16, 64, 256, 1024)
"""Numbers of steps after which tables show the share still held."""


class Ages(NamedTuple):
    """Ages of the tokens held at n steps; NaN where no token was held.

    Attributes:
      mean: [..., n] float64.
      quantiles: [..., n, q] float64, with linear interpolation.
    """

    mean: np.ndarray
    quantiles: np.ndarray


class Survival(NamedTuple):
    """Kaplan-Meier estimate of how long tokens are held.

    Attributes:
      age: [T] int64, n = 1..T.
      share: [T] float64, the share of tokens still held n steps after they arrived; NaN from the age to which no token
        was observed, unless all had died before.
      watched: [T] int64, the number of tokens alive before step n whose death at step n would have been observed.
    """

    age: np.ndarray
    share: np.ndarray
    watched: np.ndarray


class KindSurvival(NamedTuple):
    """How long the tokens of a kind were held, over all given sets.

    Attributes:
      kind: one of `KINDS`, or `all`.
      tokens: number of tokens of this kind in the text.
      after: share held after each requested number of steps (Kaplan-Meier; NaN where no token was observed that long).
      end: share held at the last step, the newest tokens included.
    """

    kind: str
    tokens: int
    after: tuple[float, ...]
    end: float


class Overlap(NamedTuple):
    """The overlap of the tokens that two policies held; means over the sets of a layer.

    Attributes:
      jaccard: [L, T] float64, tokens that both held / tokens that either held, at every step.
      shared: [L, T] float64, tokens that both held / tokens held by the policy that held more.
      since: [L] int64, the first step at which either policy had evicted a token, T if never. Before it, both shares
        are 1.
    """

    jaccard: np.ndarray
    shared: np.ndarray
    since: np.ndarray

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """[L] and [L], `jaccard` and `shared` over the steps from `since` on; 1 if there are no such steps."""
        layers = [(layer, slice(min(since, self.jaccard.shape[1] - 1), None)) for layer, since in enumerate(self.since)]
        over = lambda values: np.array([values[layer, steps].mean() for layer, steps in layers])
        return over(self.jaccard), over(self.shared)


def held(death: np.ndarray, step: int) -> np.ndarray:
    """[..., T] death times -> [..., T] bool, the tokens held at a step.

    Raises:
      ValueError: `death` is no array of death times, or the step is outside 0..T-1.
    """
    death = check_deaths(death)
    total = death.shape[-1]
    if not 0 <= step < total:
        raise ValueError(f"step must be between 0 and {total - 1} for {total} tokens, not {step}")
    return (np.arange(total) <= step) & (step < death)


def occupancy(death: np.ndarray) -> np.ndarray:
    """[..., T] death times -> [..., T] int64, the number of tokens that each set holds at every step.

    Raises:
      ValueError: `death` is no array of death times.
    """
    death = check_deaths(death)
    total = death.shape[-1]
    gone = [np.bincount(one, minlength=total)[:total].cumsum() for one in death.reshape(-1, total)]
    return np.arange(1, total + 1) - np.reshape(gone, death.shape)


def ages(death: np.ndarray, steps: Sequence[int] | np.ndarray, quantiles: Sequence[float] = (0.1, 0.5, 0.9)) -> Ages:
    """Ages of the tokens held at some steps.

    Args:
      death: [..., T].
      steps: n steps in 0..T-1.
      quantiles: q quantiles in 0..1.

    Raises:
      ValueError: `death` is no array of death times, a step is outside the text, or a quantile is outside 0..1.
    """
    death = check_deaths(death)
    wanted = np.asarray(quantiles, float)
    if wanted.ndim != 1 or ((wanted < 0) | (wanted > 1)).any():
        raise ValueError(f"quantiles must be a list of numbers between 0 and 1, not {quantiles}")
    means, levels = [], []
    for step in steps:
        alive = held(death, step)
        count = alive.sum(-1)[..., None]
        age = np.where(alive, step - np.arange(death.shape[-1]), 0)
        with np.errstate(invalid="ignore"):
            means.append(age.sum(-1) / np.where(count, count, np.nan)[..., 0])
        age = np.sort(np.where(alive, age, death.shape[-1]), axis=-1)
        place = wanted * np.maximum(count - 1, 0)
        low, high = (np.take_along_axis(age, edge(place).astype(int), axis=-1) for edge in (np.floor, np.ceil))
        levels.append(np.where(count, low + (high - low) * (place - np.floor(place)), np.nan))
    return Ages(
        np.stack(means, axis=-1) if means else np.zeros((*death.shape[:-1], 0)),
        np.stack(levels, axis=-2) if levels else np.zeros((*death.shape[:-1], 0, len(wanted))),
    )


def survival(death: np.ndarray, tokens: np.ndarray | None = None) -> Survival:
    """Kaplan-Meier estimate of the share of tokens held n steps after they arrived, over all sets together.

    Args:
      death: [..., T].
      tokens: [T] bool, the tokens to include; all if not given.

    Raises:
      ValueError: `death` is no array of death times, or `tokens` is no [T] bool.
    """
    death = check_deaths(death)
    total = death.shape[-1]
    age, died = death - np.arange(total), death < total
    if tokens is not None:
        if np.shape(tokens) != (total,) or np.asarray(tokens).dtype != bool:
            given = f"{np.asarray(tokens).dtype} {list(np.shape(tokens))}"
            raise ValueError(f"tokens must be bool [{total}], one for each token of the death times, not {given}")
        age, died = age[..., tokens], died[..., tokens]
    # A death at the end of the text cannot be distinguished from survival, so the last step of a censored token does
    # not count as watched.
    last = np.where(died, age, age - 1).ravel()
    deaths = np.bincount(age[died].ravel(), minlength=total + 1)
    before = np.concatenate([[0], np.bincount(np.maximum(last, 0), minlength=total + 1).cumsum()[:-1]])
    watched = last.size - before
    share = np.cumprod(1 - deaths / np.maximum(watched, 1))
    share = np.where((watched == 0) & (share > 0), np.nan, share)
    return Survival(np.arange(1, total + 1), share[1:], watched[1:])


def token_texts(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """The text that each token of ids [T] adds; the joined texts are the whole text.

    Marks such as <s> are spelt out. A character that several tokens spell belongs to the last of them; the others are
    "". Bytes that are not UTF-8 appear as U+FFFD.
    """
    stream = TextStream(tokenizer, skip_special=False)
    texts = [stream.push(token) for token in ids]
    if texts:
        texts[-1] += stream.finish()
    return texts


def token_kinds(
    texts: Sequence[str],
    *,
    first: int = 4,
    rare: float = 1e-3,
    counts: Mapping[str, int] | None = None,
    marks: Sequence[bool] | np.ndarray = (),
) -> np.ndarray:
    """[T] int8, the index in `KINDS` of every token's kind. The kind is the first of these that fits:

      first         one of the first `first` tokens of the sequence
      other         a mark such as <s>, or no text of its own: "", or bytes that are no character
      whitespace    only white space, including line breaks
      rare words    has a letter, and its word is rare
      common words  has a letter, and its word is not rare
      digits        has a digit
      punctuation   anything else: punctuation, operators, emoji

    A word is a maximal run of letters, digits and underscores, in lower case. A token belongs to the word that contains
    its first letter; it may be only a part of that word. A word is rare if it occurs at most once, or if its share of
    all words is at most `rare`.

    Args:
      texts: T texts that, joined, are the text (see `token_texts`).
      first: the number of first tokens, which form their own kind.
      rare: a share of the counted words.
      counts: the number of occurrences of each word (lower case) in a larger text; a word missing from it is rare. If
        not given, words are counted in the text itself.
      marks: T, whether a token is a mark and not text (`Tokenizer.is_special`); by default no token is a mark.

    Raises:
      ValueError: a plain string was given in place of a list, `first` or `rare` is negative, or `marks` has another
        number of tokens.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list with the text of every token, not one string {texts[:20]!r}")
    if first < 0 or rare < 0:
        raise ValueError(f"first and rare must not be negative, not {first} and {rare}")
    if len(marks) not in (0, len(texts)):
        raise ValueError(f"marks must be one for each of {len(texts)} tokens, not {len(marks)}")
    if len(marks):
        texts = ["\ufffd" if mark else piece for piece, mark in zip(texts, marks, strict=True)]
    text = "".join(texts)
    classes = [unicodedata.category(character)[0] for character in text]  # L, M: letters and their marks; N: digits
    in_word = "".join(
        "w" if name in "LMN" or character == "_" else " " for character, name in zip(text, classes, strict=True)
    )
    spans = [run.span() for run in re.finditer("w+", in_word)]
    words = [text[start:end].lower() for start, end in spans]
    starts = [start for start, _ in spans]
    counts = Counter(words) if counts is None else counts
    most = max(1, rare * sum(counts.values()))
    kinds, offset = [], 0
    for position, piece in enumerate(texts):
        inside = classes[offset : offset + len(piece)]
        letter = next((i for i, name in enumerate(inside) if name in "LM"), None)
        if position < first:
            kind = "first"
        elif not piece or "\ufffd" in piece:
            kind = "other"
        elif piece.isspace():
            kind = "whitespace"
        elif letter is not None:
            word = words[bisect_right(starts, offset + letter) - 1]
            kind = "rare words" if counts.get(word, 0) <= most else "common words"
        else:
            kind = "digits" if "N" in inside else "punctuation"
        kinds.append(KINDS.index(kind))
        offset += len(piece)
    return np.array(kinds, np.int8)


def survival_by_kind(death: np.ndarray, kinds: np.ndarray, after: Sequence[int] = AFTER) -> list[KindSurvival]:
    """How long each kind of token was held: a row for every kind in the text in the order of `KINDS`, then a row `all`.

    Args:
      death: [..., T].
      kinds: [T], indices into `KINDS` (see `token_kinds`).
      after: numbers of steps, at least 1.

    Raises:
      ValueError: `death` is no array of death times, `kinds` is of another text, or a number of steps is below 1.
    """
    death = check_deaths(death)
    total = death.shape[-1]
    if np.shape(kinds) != (total,):
        raise ValueError(f"kinds must be [{total}], one for each token of the death times, not {list(np.shape(kinds))}")
    if len(wrong := np.setdiff1d(kinds, np.arange(len(KINDS)))):
        raise ValueError(f"kinds must be indices into the {len(KINDS)} KINDS, not {wrong[0]}")
    if any(steps < 1 for steps in after):
        raise ValueError(f"after must be numbers of steps, at least 1, not {tuple(after)}")
    kinds = np.asarray(kinds)
    groups = {kind: kinds == i for i, kind in enumerate(KINDS)} | {"all": np.ones(total, bool)}
    rows = []
    for kind, tokens in groups.items():
        if tokens.any():
            share = survival(death, tokens).share
            known = tuple(float(share[steps - 1]) if steps <= total else _beyond(share) for steps in after)
            rows.append(KindSurvival(kind, int(tokens.sum()), known, float((death[..., tokens] == total).mean())))
    return rows


def _beyond(share: np.ndarray) -> float:
    """The share held after more steps than the text has: NaN, unless all tokens had died."""
    return 0.0 if share[-1] == 0 else float("nan")


def overlap(first: np.ndarray, second: np.ndarray) -> Overlap:
    """The overlap of the tokens that two policies held on one text.

    If one policy has a set per layer and the other a set per head, or one a set per kv head and the other a set per
    query head, each head is compared with the set that it reads.

    Args:
      first, second: [L, P, T] and [L, P', T], where P is a multiple of P' or P' of P.

    Raises:
      ValueError: the arrays are no death times, or belong to different models or texts.
    """
    first, second = check_layers(first), check_layers(second)
    if (first.shape[0], first.shape[2]) != (second.shape[0], second.shape[2]):
        raise ValueError(
            "death times to compare must be [L, P, T] of one model and one text, not "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    sets = max(first.shape[1], second.shape[1])
    if sets % first.shape[1] or sets % second.shape[1]:
        raise ValueError(f"{first.shape[1]} sets per layer cannot be matched with {second.shape[1]}")
    first, second = (np.repeat(x, sets // x.shape[1], axis=1) for x in (first, second))
    both, either = occupancy(np.minimum(first, second)), occupancy(np.maximum(first, second))
    more = np.maximum(occupancy(first), occupancy(second))
    total = first.shape[-1]
    ratio = lambda whole: np.where(whole, both / np.maximum(whole, 1), 1.0).mean(1)
    since = np.minimum(first, second).min((1, 2))
    return Overlap(ratio(either), ratio(more), np.minimum(since, total).astype(np.int64))


def check_deaths(death: np.ndarray) -> np.ndarray:
    """Checks death times and returns them.

    Raises:
      ValueError: the death times are not integers, are empty, or lie before a token's arrival or after the end.
    """
    death = np.asarray(death)
    if not np.issubdtype(death.dtype, np.integer) or death.ndim < 1 or not death.size:
        raise ValueError(f"death times must be integers [..., T], not {death.dtype} {list(death.shape)}")
    total = death.shape[-1]
    wrong = (death < np.arange(total)) | (death > total)
    if wrong.any():
        *_, token = where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"death[{', '.join(map(str, where))}] is {death[where]}; the death of token {token} of {total} lies "
            f"between {token} and {total}"
        )
    return death


def check_layers(death: np.ndarray) -> np.ndarray:
    """As `check_deaths`, for the layers of a model, [L, P, T].

    Raises:
      ValueError: the array holds no death times, or has other axes.
    """
    death = check_deaths(death)
    if death.ndim != 3:
        raise ValueError(
            f"death times must be [L, P, T], not {list(death.shape)}; of a trace, take one row: trace.death[:, row]"
        )
    return death
