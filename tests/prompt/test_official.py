"""The published LLMLingua-2 code, case by case."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcompress.checkpoints import load_encoder
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.prompt.official import OfficialCompressor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "prompt"
CONTENT = json.loads((FIXTURES / "cases.json").read_text(encoding="utf-8"))
CASES = CONTENT["cases"]
TOKENS = re.compile(r"\w{1,4}|\W")


@pytest.fixture(scope="module")
def compressors() -> dict[str, OfficialCompressor]:
    return {
        kind: OfficialCompressor(
            load_encoder(FIXTURES / name).model, EncoderTokenizer(FIXTURES / name), lambda t: len(TOKENS.findall(t))
        )
        for kind, name in CONTENT["meta"]["models"].items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_as_published(case: dict[str, Any], compressors: dict[str, OfficialCompressor]) -> None:
    compressor = compressors[case["encoder"]]
    if case["exception"]:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            compressor.compress(case["context"], **case["kwargs"])
        assert type(raised.value).__name__ == case["exception"]["type"]
        return
    result = compressor.compress(case["context"], **case["kwargs"])
    assert result.output == case["output"]
    assert (result.words, result.labels, result.chunks) == (case["words"], case["labels"], case["chunks"])
    if "context_probs" in case:
        np.testing.assert_allclose(
            np.array(result.context_probabilities, float), case["context_probs"], atol=2e-5, rtol=0
        )
    ours = [chunk for context in result.probabilities for chunk in context]
    theirs = case.get("trace", {}).get("merge", [])
    for probabilities, record in zip(ours[::-1], theirs[::-1], strict=False):  # the filter of contexts comes first
        np.testing.assert_allclose(probabilities, record["word_probs"], atol=2e-5, rtol=0)


def test_refused(compressors: dict[str, OfficialCompressor]) -> None:
    bert, xlmr = compressors["bert"], compressors["xlmr"]
    with pytest.raises(ValueError, match="range"):
        bert.compress("The motion carries.", rate=0.0)
    with pytest.raises(NotImplementedError, match="'max'"):
        bert.compress("The motion carries.", token_to_word="max")
    with pytest.raises(IndexError):  # nothing that is known
        bert.compress("鑫鑫鑫")
    with pytest.raises(IndexError):  # begins with what continues a word
        xlmr.compress("[NEW0]")
    assert bert.compress([]).output["compressed_prompt"] == ""
