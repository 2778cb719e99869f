"""How RULER scores (scripts/eval/synthetic/constants.py): what of the answers stands in what the model wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def match_all(written: str, answers: Sequence[str]) -> float:
    """The share of the answers that stand in the text, in any case (`string_match_all`), 0 to 1."""
    text = _plain(written)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def match_any(written: str, answers: Sequence[str]) -> float:
    """1 if one of the answers stands in the text, in any case (`string_match_part`), else 0."""
    text = _plain(written)
    return float(any(answer.lower() in text for answer in answers))


def _plain(written: str) -> str:
    return _CONTROL.sub("\n", written.strip()).strip().lower()
