"""The prompt compressor that ships."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcompress import embedded
from jaxcompress.cli import main
from jaxcompress.prompt import WORDS, Compressor, keep
from jaxcompress.prompt.baselines import content_words, random_words, tf_idf
from jaxcompress.prompt.dataset import Pair, label
from jaxcompress.prompt.recovery import recovery


@pytest.fixture(scope="module")
def scorer() -> Any:
    return Compressor.load(dtype="float32")


def test_is_small() -> None:
    files = [path for path in embedded.compressor_folder().rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 12_000_000


TEXTS = ["", " \n", "word", "会议将于10月开始。", "👩\u200d👩\u200d👧 Grüße 회의", "x" * 3000, "a b " * 400]


@pytest.mark.parametrize("text", TEXTS)
def test_scores_any_text(scorer: Any, text: str) -> None:
    found = scorer(text)
    assert found.scores.shape == (len(found.words),)
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


def test_keeps_what_a_sentence_is_about(scorer: Any) -> None:
    text = "A woman was seriously injured by a falling tree in the north of the city, according to the police."
    kept = keep(scorer(text), WORDS, rate=0.5).text
    assert "woman" in kept
    assert "injured" in kept


def test_report_of_what_is_recovered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "The council of 12 members will vote on the budget of 3.5 million on Monday, said the mayor of the city."
    file = tmp_path / "text.txt"
    file.write_text(text)
    assert main(["compress-prompt", "--file", str(file), "--rate", "0.5", "--report"]) == 0
    told = capsys.readouterr()
    assert f"recovered {recovery(text, told.out)}" in told.err
    assert main(["compress-prompt", "--file", str(file), "--budget", "official", "--report"]) == 0
    assert "recovered" in capsys.readouterr().err
    assert main(["compress-prompt", "--file", str(file), "--stream", "--report"]) == 0
    told = capsys.readouterr().err
    assert "to compress" in told
    assert "recovered" not in told  # the text is gone by then


def test_agrees_with_people_more_than_what_needs_no_training(scorer: Any) -> None:
    assets = os.environ.get("JAXCOMPRESS_ASSETS")
    path = Path(assets or "", "compress", "google_sentcomp_9k.jsonl")
    if not assets or not path.exists():
        pytest.skip("needs labelled sentence compressions: set JAXCOMPRESS_ASSETS")
    lines = path.read_text(encoding="utf-8").splitlines()[-150:]  # held out
    pairs = [Pair("", at, line["sentence"], line["compression"]) for at, line in enumerate(map(json.loads, lines))]
    examples, _ = label(pairs, variation=100.0, gap=100.0)

    def agreement(scorer: Any) -> float:
        shares = [
            np.array(one.labels)[keep(scorer(one.text), WORDS, tokens=sum(one.labels)).labels].mean()
            for one in examples
            if any(one.labels)
        ]  # fmt: skip
        return float(np.mean(shares))

    ours = agreement(scorer)
    assert ours > max(agreement(other) for other in (tf_idf(), random_words(0), content_words())) + 0.05
