"""Texts read for a question: what the encoder sees, which sentences stay, and long texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxcompress.cli import main
from jaxcompress.prompt import WORDS, Compressor, Contexts, keep, keep_above
from jaxcompress.prompt.scoring import read_rows
from jaxcompress.prompt.units import sentences

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "modernbert" / "provence"
QUESTION = "Who signed the contract?"
TEXT = (
    "The mayor signed it on Monday. Rain fell all night. Nobody knew why the lights went out!\n"
    "- a list without a full stop\n- and its second line\nDid the harbour master agree? He did not say."
)


@pytest.fixture(scope="module")
def pruner() -> Compressor:
    return Compressor.load(FOLDER, unit="sentence").asking(QUESTION)


def test_a_row_is_question_and_text(pruner: Compressor) -> None:
    tokenizer = pruner.tokenizer
    question, text = tokenizer.encode(QUESTION).ids, tokenizer.encode(TEXT[:60])
    row = np.concatenate([[tokenizer.opening], question, [tokenizer.closing], text.ids, [tokenizer.closing]])
    ((keep, relevance),) = read_rows(pruner.encoder, [row.astype(np.int32)])
    scored = pruner(TEXT[:60])
    assert scored.relevance == pytest.approx(relevance, abs=1e-6)
    start, end = scored.spans[0]  # the mean over the subwords of a sentence
    inside = keep[len(question) + 2 : -1][(text.offsets[:, 1] > start) & (text.offsets[:, 0] < end)]
    assert scored.scores[0] == pytest.approx(inside.mean(), abs=1e-6)
    assert scored.words == ["The mayor signed it on Monday.", "Rain fell all night.", "Nobody k"]


def test_another_question_another_answer(pruner: Compressor) -> None:
    other = pruner.asking("Why was it dark?")
    assert np.abs(other(TEXT).scores - pruner(TEXT).scores).max() > 1e-3


def test_long_texts_are_read_in_windows_of_whole_words(pruner: Compressor) -> None:
    long = " ".join(f"Sentence {n} has a few more words in it." for n in range(60))
    scored = pruner(long)
    assert scored.chunks is not None
    assert int(scored.chunks.max()) > 5
    assert scored.words == [long[one.start : one.end] for one in sentences(long)]
    cuts = np.flatnonzero(np.diff(scored.chunks)) + 1
    assert all(long[: scored.spans[cut, 0]].rstrip().endswith(".") for cut in cuts)
    narrow = Compressor.load(FOLDER, unit="word", window=40).asking(QUESTION)
    words = narrow("x" * 30 + " " + long)
    assert words.chunks is not None
    assert int(words.chunks.max()) > int(scored.chunks.max())


def test_what_is_above_a_threshold_stays(pruner: Compressor) -> None:
    scores = pruner(TEXT).scores
    threshold = float(np.median(scores))
    result = pruner.prune([TEXT, "", "  "], threshold=threshold)
    (kept, *empty) = result.documents
    assert kept.labels.tolist() == (scores > threshold).tolist()
    assert [one.text for one in empty] == ["", ""]
    expected = [word for word, stays in zip(kept.scored.words, kept.labels, strict=True) if stays]
    at = [result.text.index(sentence) for sentence in expected]
    assert at == sorted(at)
    assert result.tokens_after == pruner.tokens(result.text)
    assert pruner.prune(TEXT, threshold=0.0).text == TEXT
    assert pruner.prune(TEXT, threshold=0.999).text == ""
    forced = pruner.prune(TEXT, threshold=0.999, protect=["negations"])
    assert forced.text.endswith("He did not say.")
    assert forced.forced == forced.tokens_after
    with pytest.raises(ValueError, match="not 'Rain'; use protect"):
        pruner.prune(TEXT, force=["Rain", "\n"])


def test_budgets_of_whole_sentences(pruner: Compressor) -> None:
    result = pruner.compress([TEXT, TEXT[:52]], tokens=30, filter=Contexts(count=1))
    assert result.tokens_after <= 30
    relevance = [one.scored.relevance for one in result.documents]
    assert [one.text == "" for one in result.documents].index(False) == int(np.argmax(np.array(relevance)))
    assert all(word in TEXT for one in result.documents for word in one.scored.words)


def test_words_above_a_threshold() -> None:
    compressor = Compressor.load(FIXTURES / "prompt" / "bert")
    scored = compressor(TEXT)
    threshold = float(np.sort(scored.scores)[-5])
    few = keep_above(scored, WORDS, threshold, protect=["negations"])
    assert few.labels.sum() == few.tokens_after == 4 + few.forced == 7
    assert "did not" in few.text
    assert keep(scored, WORDS, tokens=4).tokens_after == 4
    with pytest.raises(ValueError, match="finite"):
        keep_above(scored, WORDS, float("nan"))


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="does not read a question"):
        Compressor.load(FIXTURES / "prompt" / "bert").asking(QUESTION)
    provence = Compressor.load(FOLDER)
    with pytest.raises(ValueError, match="give it with `asking`"):
        provence(TEXT)
    with pytest.raises(ValueError, match="ask a shorter one"):
        provence.asking("why " * 90)
    with pytest.raises(ValueError, match="the question is empty"):
        provence.asking(" ")
    with pytest.raises(ValueError, match="3 to 96 tokens"):
        Compressor.load(FOLDER, window=97)
    with pytest.raises(ValueError, match="BERT and XLM-RoBERTa"):
        _ = provence.official


def test_on_the_command_line(
    pruner: Compressor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "as it is")
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    start = ["compress-prompt", "--model", str(FOLDER), "--file", str(file)]
    asked = [*start, "--question", QUESTION]
    assert main(asked) == 0
    assert capsys.readouterr().out == pruner.prune(TEXT).text + "\n"
    assert main([*asked, "--threshold", "0.5"]) == 0
    assert capsys.readouterr().out == pruner.prune(TEXT, threshold=0.5).text + "\n"
    assert main([*asked, "--tokens", "30"]) == 0
    assert capsys.readouterr().out == pruner.compress(TEXT, tokens=30).text + "\n"
    wrong = (
        (start, "--question"),
        ([*asked, "--threshold", "1"], "--threshold"),
        ([*asked, "--threshold", "0.5", "--rate", "0.5"], "or --rate"),
        ([*asked, "--stream", "--threshold", "0.5"], "stream"),
    )
    for command, why in wrong:
        assert main(command) == 2
        assert why in capsys.readouterr().err
