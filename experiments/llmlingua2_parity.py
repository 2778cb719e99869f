"""How many runs of the published LLMLingua-2 code come out equal.

    python experiments/llmlingua2_parity.py FOLDER [--cases cases_dev.json]

FOLDER holds encoders and a file of cases: what the published package returned for a context and options, its chunks,
words, labels and probabilities, with tokens of the target model counted by a regular expression.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from command import Command, arguments

from jaxcompress.checkpoints import load_encoder
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.prompt.official import OfficialCompressor

_TOKENS = re.compile(r"\w{1,4}|\W")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Arguments(Command):
    """Prints the cases that differ and how many are equal."""

    folder: Annotated[Path, tyro.conf.Positional]
    cases: str = "cases_dev.json"
    most: int | None = None
    """How many cases to run, evenly spread; all if not given."""


QUICK = Arguments(
    quick=True, folder=Path(__file__).parents[1] / "tests" / "fixtures" / "prompt", cases="cases.json", most=6
)


def count(text: str) -> int:
    """Counts tokens as the recorded runs did in place of the target model's tokenizer."""
    return len(_TOKENS.findall(text))


def differences(case: dict[str, Any], compressor: OfficialCompressor) -> list[str]:
    """The differences from the record; empty if all values are equal."""
    try:
        result = compressor.compress(case["context"], **case["kwargs"])
    except Exception as error:
        expected = case["exception"] and case["exception"]["type"]
        return [] if expected == type(error).__name__ else [f"raised {error!r}, not {expected}"]
    if case["exception"]:
        return [f"did not raise {case['exception']['type']}"]
    found = [f"output[{key!r}]" for key, value in case["output"].items() if result.output.get(key) != value]
    found += [] if set(result.output) == set(case["output"]) else ["keys of output"]
    for name in ("words", "labels", "chunks"):
        if case.get(name) is not None and getattr(result, name) != case[name]:
            found.append(name)
    if case.get("context_probs") and not np.allclose(
        np.array(result.context_probabilities, float), case["context_probs"], atol=TOLERANCE, rtol=0
    ):
        found.append("context probabilities")
    ours = [chunk for context in result.probabilities for chunk in context]
    records = (case.get("trace") or {}).get("merge") or []
    for probabilities, record in zip(ours[::-1], records[::-1], strict=False):  # the compress pass comes last
        theirs = np.array(record["word_probs"], float)
        if len(theirs) != len(probabilities) or np.abs(theirs - probabilities).max(initial=0) > TOLERANCE:
            found.append("probabilities")
    return found


def main(args: Arguments) -> None:
    content = json.loads((args.folder / args.cases).read_text(encoding="utf-8"))
    models = {
        kind: OfficialCompressor(load_encoder(args.folder / name).model, EncoderTokenizer(args.folder / name), count)
        for kind, name in content["meta"]["models"].items()
    }
    cases = content["cases"]
    if args.most is not None:
        cases = cases[:: -(-len(cases) // args.most)]
    equal, start = 0, time.perf_counter()
    for case in cases:
        found = differences(case, models[case["encoder"]])
        equal += not found
        if found:
            print(f"{case['id']}: {', '.join(found)}")
    print(f"{equal} of {len(cases)} cases are equal ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main(arguments(QUICK))
