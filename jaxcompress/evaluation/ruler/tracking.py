"""Variable tracking: which names a value was passed on to (RULER, scripts/data/synthetic/variable_tracking.py)."""

from __future__ import annotations

import random
import string

from jaxcompress.evaluation.ruler.needles import NOISE
from jaxcompress.evaluation.ruler.sample import Question, Sample, Sources

HOPS = 4
EXAMPLE_NOISE = 5
"""Repetitions of the filler in the worked example: about 200 tokens. RULER's has up to 500."""

_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_ASKED = "Question: Find all variables that are assigned the value {value} in the text above. "
_PREFIX = (  # "assgined" is how RULER spells it
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are: "
)


def variable_tracking(size: int, rng: random.Random, sources: Sources) -> Sample:
    """One chain of four assignments among filler, after a worked example with other names."""
    example, (asked,) = _chain(EXAMPLE_NOISE, rng, letters=3)
    shown = example + asked.text + asked.prefix + " ".join(asked.answers)
    context, questions = _chain(size, rng, letters=5)
    return Sample(f"{shown}\n\n\n\n{context}", questions)


def _chain(noises: int, rng: random.Random, *, letters: int) -> tuple[str, tuple[Question]]:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = str(rng.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:], strict=False))]
    straw = [NOISE + "\n"] * noises
    if noises <= len(chain):
        straw = [f"{part}." for _ in range(noises) for part in NOISE.split(".") if part.strip()]
    places = sorted(rng.sample(range(len(straw)), len(chain)))
    for passed, (place, line) in enumerate(zip(places, chain, strict=True)):
        straw.insert(place + passed, line)
    text = " ".join(straw).replace(". \n", ".\n")
    question = Question(
        _ASKED.format(value=value), _PREFIX.format(count=len(names), value=value), tuple(names)
    )  # fmt: skip
    return f"{_BEFORE}{text}\n", (question,)
