"""Phrases and sentences of a text, found by rules without a model of a language."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxcompress.prompt.surface import Word, is_word, words_of

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about above after again all also am an and any are as at be because been before being below between both but
        by can could did do does doing down during each few for from further had has have having he her here hers him
        his how i if in into is it its itself just me more most my no nor not now of off on once only or other our ours
        out over own same she should so some such than that the their theirs them then there these they this those
        through to too under until up very was we were what when where which while who whom why will with would you your
        yours""",
    )
)
"""English articles, pronouns, prepositions, conjunctions, auxiliaries and a few adverbs."""

_WIDE = frozenset("。！？")  # end a sentence whatever follows
_ENDS = _WIDE | frozenset(".!?…")
_CLOSING = frozenset("\"'”’»)]}")


def phrases(text: str) -> list[Word]:
    """Runs of words that belong together: content words with the function words before them; a punctuation mark and a
    line break end one.

    A stand-in for noun chunks: "the city council" is one phrase, "will vote" another.
    """
    groups: list[list[Word]] = []
    content = False  # the current phrase has a content word
    for at, word in enumerate(words := words_of(text)):
        spelled = text[word.start : word.end]
        mark = not is_word(spelled)
        function = spelled.lower() in FUNCTION_WORDS
        broken = at > 0 and "\n" in text[words[at - 1].end : word.start]
        if not groups or mark or broken or (function and content) or _is_mark(text, groups[-1][-1]):
            groups.append([])
            content = False
        groups[-1].append(word)
        content |= not function and not mark
    return _spans(groups)


def sentences(text: str) -> list[Word]:
    """Sentences end with . ! ? … before white space and with 。！？, with the quotes and brackets that close there, and
    at a line break. URLs, versions and names with points are whole."""
    groups: list[list[Word]] = []
    over = wide = False
    for at, word in enumerate(words := words_of(text)):
        spelled = text[word.start : word.end]
        before = text[words[at - 1].end if at else 0 : word.start]
        closing = over and not before and spelled in _CLOSING
        ends = over and (wide or before) and not closing and spelled not in _ENDS
        if ends or "\n" in before or not groups:
            groups.append([])
        groups[-1].append(word)
        wide = spelled in _WIDE or (wide and (closing or spelled in _ENDS))
        over = spelled in _ENDS or closing
    return _spans(groups)


def _is_mark(text: str, word: Word) -> bool:
    return not is_word(text[word.start : word.end])


def _spans(groups: Sequence[Sequence[Word]]) -> list[Word]:
    return [Word(group[0].start, group[-1].end) for group in groups]
