"""What of a text must not be broken: code, quotations, URLs, paths, identifiers, numbers and negations.

    protected_spans("Do not run rm -rf /tmp/x at 9:45", ("paths", "negations"))  # [[3, 6], [14, 20]]

Each kind is found by rules, in time proportional to the text's length, whatever the text. In the patterns a class that
is repeated within a repeated group is repeated itself (`(?: [ab]++ | x )++`): memory then goes with the groups, and a
word of 10 MB is read too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args
from unicodedata import normalize

import numpy as np
import regex
from jaxtyping import Int

Kind = Literal["code", "quotes", "urls", "paths", "identifiers", "numbers", "negations"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LONGEST = 200
"""Characters between quotation marks or backticks: what is longer is a passage, not a name or a value."""

_Span = tuple[int, int]
_UNSEEN = "\u00ad\u200c\u200d\u2060\ufeff"  # inside words: a soft hyphen, joiners
# Letters, digits and marks of scripts with spaces between words; a name may follow a Han character directly.
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_{_UNSEEN}]--[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}]]"
# A quotation mark after one of these does not open, and before one it does not close.
_SPACED = r"[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]]"


def _pattern(text: str, flags: int = 0, **parts: str) -> regex.Pattern[str]:
    """A pattern in which names in capitals stand for its parts; a part may hold those that are named after it."""
    for name, part in {**parts, "LETTER": _LETTER, "SPACED": _SPACED}.items():
        text = text.replace(name, part)
    return regex.compile(text, regex.VERBOSE | regex.VERSION1 | flags)


# A line that opens or closes a block of code, also in lists and block quotes.
_FENCE = _pattern(
    r"""
    ^ [\x20\t]*+ (?P<line> (?: (?: > | [*+\-] [\x20\t] | \d{1,9}+ [.)] [\x20\t] ) [\x20\t]*+ )*+
    (?: (?P<mark> `{3,} ) (?P<rest> [^`\n]*+ ) | (?P<mark> ~{3,} ) (?P<rest> [^\n]*+ ) ) ) $
    """,
    regex.M,
)
_BACKTICKS = regex.compile(r"`++|\n")
_QUOTES = _pattern(
    r"""
    (?<! \\ ) OPENS " (?: (?: INSIDE | \\[^\n] )*+ CLOSES | (?: INSIDE | (?! ESCAPED ) \\[^\n] )*+ ESCAPED )
    | (?<![\p{L}\p{N}\\]) ' (?: [^'\\\n] | \\[^\n] | '(?=\p{L}) ){0,200}+ ' (?![\p{L}\p{N}])
    | “ [^“”\n]*+ ” | „ [^„“”\n]*+ [“”] | « [^«»\n]*+ » | 「 [^「」\n]*+ 」 | 『 [^『』\n]*+ 』
    | ‘ (?: [^‘’\n] | ’(?=\p{L}) ){0,200}+ ’
    """,
    INSIDE=r"""(?: [^"\\\n]++ | (?! OPENS ) " (?= SPACED ) )""",
    OPENS=r"(?: (?<! SPACED ) | (?<= (?<! SPACED ) [BbFfLRrUu]{1,2} ) )",  # not 15" but f"..."
    ESCAPED=r"""(?: \\" (?= \s | \Z ) )""",  # closes where no other mark does: "C:\tmp\"
    CLOSES=r"""(?: "(?! SPACED ) | (?<= [.,;!?…\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}] ) " )""",
)
_URLS = _pattern(
    r"""
    (?: (?<![A-Za-z0-9+.\-]) [A-Za-z] [A-Za-z0-9+.\-]{0,20}+ :// | (?<!LETTER) www\. )
    (?: (?: [A-Za-z0-9\-]++ | UNSPACED ) \. )*+ (?: UNSPACED (?= [/:] ) )?+               # a host of any script
    (?: [[\x21-\x7e\p{L}\p{N}\p{M}]--[<>"'`\\{}|\p{Han}\p{Hiragana}\p{Katakana}]]++ | \{ [\w.:*$\-]{1,64}+ \} )++
    | (?<![A-Za-z0-9._%+\-]) [A-Za-z0-9._%+\-]{1,64}+ @ (?: [A-Za-z0-9\-]++ \. ){1,127} [A-Za-z]{2,}+  # DNS has no more
      (?: : (?= [\w.~\-]*+ / ) [\w.~\-/]++ )?+                                            # git@a.b:c/d.git
    """,
    UNSPACED=r"(?: [\p{Han}\p{Hiragana}\p{Katakana}] [\p{L}\p{M}\p{N}\-]*+ )",
)
_SPACELESS = regex.compile(r"\S++")
_PATHS = _pattern(
    r"""
    (?<![\w.@%+=~\-/\\<:]) (?: [\w\-]++ = )?+ FROM_ROOT (?: : FROM_ROOT )*+ AT
    | (?<! BEFORE ) PART / (?: PART / )++ PART?+ (?: : FROM_ROOT )*+ AT
    | (?<! BEFORE ) [\w.@%+=~\-*]++ / [\w.@%+=~\-*]+ \. [A-Za-z]\w{0,7}+ AT
    | (?<!LETTER) [A-Za-z] :[\\/] [^\s<>"'`|?*:,;]++
    | (?<![\w\\]) \\\\ [\w.$\-]++ (?: \\ [\w.$\-]++ )++
    """,
    BEFORE=r"[\w.@%+=~\-/\\<:*\}]",
    FROM_ROOT=r"(?! /\*++ (?! [\w./\{] ) ) (?: ~[\w\-]*+ | \.\.? )?+ (?: / PART )++ /?+",  # not /* of a comment
    PART=r"(?: :?+ (?: [\w.@%+=~\-*]++ | \{ [\w.:*,\-]{1,64}+ \} )++ )",  # *.gz {id} :id
    AT=r"(?: :\d++ ){0,2}+",
)
_IDENTIFIERS = _pattern(
    r"""
    (?<![\p{L}\p{N}_\-]) --? [A-Za-z] (?: [\w\-]*+ )                                      # --rate -v
    | (?<! LETTER ) [$@\#] (?: \{ [\w.:\-]{1,64}+ \} | [A-Za-z_] \w*+ )                   # $HOME ${x} @name #tag
    | (?<! LETTER ) (?:
        (?= [\p{L}_] ) (?! SHORT ) LETTER++ (?: (?: \. | :: | -> ) LETTER++ )++ (?: \( \) )?+  # self.x a::b a.b.c
        | (?: __ LETTER++ | _*+ [LETTER--[_]]++ (?: _++ [LETTER--[_]]++ )++ _*+ ) (?: \( \) )?+  # snake_case __init__
        | LETTER* (?: \p{Ll}\p{Lu} | \p{Lu}{2}\p{Ll} ) LETTER*+ (?: \( \) )?+             # camelCase HTTPServer
        | (?= LETTER* \p{N} ) (?= [\p{N}_]*+ \p{L} ) LETTER++ (?: - LETTER++ )*+            # 3f-e29b
        | \p{Lu}[\p{Lu}_]*+ (?: - (?= LETTER* \p{N} ) LETTER++ )++                         # ABC-1234
        | [A-Za-z_] \w*+ \( \)                                                            # run()
    )
    """,
    SHORT=r"LETTER (?: \. LETTER (?! \.?+ LETTER | :: | -> | \(\) ) | (?: \. LETTER ){1,5}+ \. (?! LETTER ) )",  # e.g.
)
_NUMBERS = _pattern(
    r"""
    (?: (?<![\p{L}\p{N}_)\]]) [+\-−±＋－] )?+ (?: \p{Sc} (?: GAP (?= \p{N} ) )?+ | \# )?+
    (?: (?<! [\p{L}\p{N}_.,)\]] ) [.,] (?= \p{N} ) | (?<! LETTER ) )
    (?: [Vv]?+ \p{N}++ (?: \. \p{N}++ ){2,}+ - [A-Za-z] [A-Za-z0-9]*+ (?: [.\-+] [A-Za-z0-9]++ )*+  # 1.0.0-rc.1
      | LETTER* \p{N} LETTER*+ (?: (?: [.,:/\-'’–．，：／～〜٫٬] | (?<= \p{N}[eE] ) [+−] ) LETTER* \p{N} LETTER*+ )*+
    )
    (?: [%‰％٪] | ° [CF]?+ | \p{Sc} | GAP (?: [%‰％٪] | ° [CF] | \p{Sc} ) (?! [.,]?+ [\p{L}\p{N}] ) )?+
    """,
    GAP=r"[\x20\u00a0\u202f]",
)
_SAYS_NO = frozenset(
    regex.findall(
        r"\w+",
        """
        no not never none nothing nobody nowhere neither nor without cannot unless except isnt arent wasnt werent dont
        doesnt didnt hasnt havent cant wont wouldnt shouldnt
        aint couldnt hadnt mightnt mustnt neednt oughtnt shant nope
        nicht nichts nie niemals niemand niemanden nirgends ohne weder kein keine keinen keinem keiner keines keinerlei
        keineswegs keinesfalls
        ne pas jamais rien aucun aucune aucuns aucunes sans ni non
        nunca jamás nada nadie ningún ninguno ninguna ningunos ningunas tampoco sin nessun nessuno nessuna niente nulla
        neanche nemmeno neppure senza
        não ninguém nenhum nenhuma nenhuns nenhumas nem sem niet niets geen nooit nergens bez nigdy nic nikt żaden żadna
        żadne
        не нет ни никогда ничего ничто никто никого нигде никакой никакая никакие без нельзя""",
    )
)
_AS_LISTED = {ord("’"): "'", ord("ʼ"): "'", **dict.fromkeys(map(ord, _UNSEEN))}
_WORDS = _pattern("LETTER++ (?: ['’] LETTER++ )*+")
_EAST_ASIAN_NO = _pattern(
    r"""
    [不没沒無无未非勿] | (?<! \p{Hiragana} ) \p{Hiragana}* (?: ない | なかった | ません | なく ) \p{Hiragana}*+
    | (?<! \p{Hangul} ) \p{Hangul}* [않못없] \p{Hangul}*+
    | (?<! \p{Hangul} ) (?: 안 (?! \p{Hangul} ) | 아니 \p{Hangul}*+ )
    """
)


def protected_spans(text: str, kinds: Sequence[Kind]) -> Int[np.ndarray, "N 2"]:
    """Start and end of everything of these kinds, in characters [N, 2]; spans may overlap.

      code         fenced by lines of ``` or ~~~, also in lists and block quotes (an open fence ends with the text), or
                   between as many backticks on one line
      quotes       in quotation marks, on one line
      urls         scheme://..., www...., e-mail addresses
      paths        /a/b ~/a ./a a/b/c a/b.py C:\\a \\\\host\\a /a/*.gz /a/{b} /a:/b, with :line:column
      identifiers  snake_case camelCase a.b.c a::b a->b run() $HOME @name --flag ABC-1234 3f2e-77
      numbers      every word with a digit, with its sign, currency, %, and what joins it to the next (9:45, 1.2.3)
      negations    of English, German, French, Spanish, Italian, Portuguese, Dutch, Russian, Polish, Chinese, Japanese
                   and Korean, where a word or a sign alone says so

    Raises:
      ValueError: an unknown kind.
      TypeError: a string instead of a sequence of kinds.
    """
    found = [span for kind in checked_kinds(kinds) for span in _FINDERS[kind](text)]
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def checked_kinds(kinds: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds, each once. Raises TypeError and ValueError as `protected_spans`."""
    if isinstance(kinds, str):
        raise TypeError(f"protect is a list of kinds, such as ['numbers', 'urls'], not {kinds!r}")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r} to protect; known: {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def open_fence(text: str, opened: str | None = None) -> str | None:
    """The mark of the fence of code that is open at the end of a text; None if none is.

    Args:
      opened: the mark of the fence that is open at its beginning.
    """
    for line in _FENCE.finditer(text):
        if opened is None:
            opened = line["mark"]
        elif _closes(line, opened):
            opened = None
    return opened


def end_of_fence(text: str, opened: str) -> int | None:
    """Where the line ends that closes a fence that is open at the beginning of a text; None without such a line."""
    return next((line.end() for line in _FENCE.finditer(text) if _closes(line, opened)), None)


def _closes(line: regex.Match[str], opened: str) -> bool:
    """Whether a line closes a fence: it has the mark alone, and begins no item of a list."""
    return line["mark"].startswith(opened) and not line["rest"].strip() and line["line"][0] in ">`~"


def _matches(pattern: regex.Pattern[str]) -> Callable[[str], Iterable[_Span]]:
    return lambda text: (match.span() for match in pattern.finditer(text))


def _code(text: str) -> Iterator[_Span]:
    opened: regex.Match[str] | None = None
    for line in _FENCE.finditer(text):
        if opened is None:
            opened = line
        elif _closes(line, opened["mark"]):
            yield opened.start("line"), line.end("mark")
            opened = None
    if opened is not None:
        yield opened.start("line"), len(text.rstrip())
    yield from _inline(text)


def _inline(text: str) -> Iterator[_Span]:
    """Between two runs of equally many backticks on one line."""
    runs = [match.span() for match in _BACKTICKS.finditer(text)] if "`" in text else []
    same: list[int | None] = [None] * len(runs)  # the next run of this line that is as long
    nearest: dict[int, int] = {}
    for n in range(len(runs) - 1, -1, -1):
        start, end = runs[n]
        if text[start] == "\n":
            nearest.clear()
        else:
            same[n], nearest[end - start] = nearest.get(end - start), n
    n = 0
    while n < len(runs):
        if (last := same[n]) is not None:
            if runs[last][0] - runs[n][1] <= LONGEST:
                yield runs[n][0], runs[last][1]
            n = last
        n += 1


def _short(pattern: regex.Pattern[str], text: str) -> Iterator[_Span]:
    return (match.span() for match in pattern.finditer(text) if match.end() - match.start() <= LONGEST + 2)


def _urls(text: str) -> Iterator[_Span]:
    """Without the punctuation of the sentence, and without brackets that close more than the URL opens."""
    for match in _URLS.finditer(text):
        found, end = match[0], len(match[0])
        more = {close: found.count(close) - found.count(opens) for opens, close in ("()", "[]")}
        while end and (found[end - 1] in ".,;:!?*_" or more.get(found[end - 1], 0) > 0):
            end -= 1
            if found[end] in more:
                more[found[end]] -= 1
        yield match.start(), match.start() + end


def _paths(text: str) -> Iterator[_Span]:
    """Looked for in words that have a slash: white space is in no path."""
    for word in _SPACELESS.finditer(text):
        if "/" in word[0] or "\\" in word[0]:
            for match in _PATHS.finditer(text, word.start(), word.end()):
                yield match.start(), match.start() + len(match[0].rstrip("."))


def _negations(text: str) -> Iterator[_Span]:
    for match in _WORDS.finditer(text):
        word = match[0].lower()
        word = word if word.isascii() else normalize("NFC", word.translate(_AS_LISTED))
        if not _SAYS_NO.isdisjoint(word.split("'")) or word.endswith("n't") or word.startswith("n'"):
            yield match.span()
    if not text.isascii():
        yield from _matches(_EAST_ASIAN_NO)(text)


_FINDERS: dict[Kind, Callable[[str], Iterable[_Span]]] = {
    "code": _code, "quotes": lambda text: _short(_QUOTES, text), "urls": _urls, "paths": _paths,
    "identifiers": _matches(_IDENTIFIERS), "numbers": _matches(_NUMBERS), "negations": _negations,
}  # fmt: skip
