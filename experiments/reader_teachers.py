"""What a reader needs of a text, as scores of its words: teachers for a compressor that need no people.

Beside the headlines of people (`finetune_prompt_compressor.py --data`) two signals can be had from a language model:

  repeated  the attention that a word gets while the model repeats the text (KVzip's score, Kim et al. 2025)
  left-out  how much worse the model foresees what follows in the text when the word is left out

They see the text only, not what will be asked about it. `prompt_tables.py` measures them as compressors, which bounds
what a classifier could learn from them. As labels for training they are written by

    python experiments/reader_teachers.py --model smollm2 --texts books/ --teacher repeated --out labels.jsonl
    python experiments/finetune_prompt_compressor.py --base FOLDER --data ... --more labels.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from command import OfModel, arguments, stop
from prompt_continuation import best_words
from training_mixture import files_of

from jaxcompress.embedded.corpus import documents
from jaxcompress.generation.reconstruction import asking, read_whole, reconstruct
from jaxcompress.inputs.text import read_text
from jaxcompress.policies import Full
from jaxcompress.prompt import ScoredWords, Scorer, segment
from jaxcompress.prompt.dataset import Example, write_examples
from jaxcompress.prompt.information import Context, Reader
from jaxcompress.prompt.surface import Word, words_of
from jaxcompress.prompt.words import align, of_words

BLOCK, ROWS = 16, 17  # words that share a window; rows read at once: these, and the window as it is


@dataclass(frozen=True, kw_only=True)
class Arguments(OfModel):
    """Writes labelled words, one piece of text in a line (`jaxcompress.prompt.dataset.write_examples`)."""

    texts: tuple[Path, ...] = ()
    """UTF-8 files, or folders of .txt files; Python's documentation and sources if not given."""
    hold_out: tuple[str, ...] = ()
    """Names of files, without their endings, that are not read."""
    teacher: Literal["repeated", "left-out"] = "repeated"
    rate: float = 0.5
    """Share of the words of a piece that are labelled as kept."""
    words: int = 128
    """Words of a piece."""
    pieces: int = 400
    """Evenly spread over the texts and over each."""
    out: Path = Path("runs/reader_labels.jsonl")


QUICK = Arguments(quick=True, words=24, pieces=1, out=Path("runs/quick/reader_labels.jsonl"))


def repeated(reader: Reader) -> Scorer:
    """The highest attention from any query while the model repeats the text, mean over layers and heads."""
    repeat = asking(lambda text: reader.tokenizer.encode(text, add_bos=False).tolist())

    def score(text: str) -> ScoredWords:
        ids, places = reader.tokenizer.encode_with_places(text)
        scores = reconstruct(reader.model, [ids], read_whole(reader.model, [ids]).kv, repeat, sinks=0)
        spans = segment(text)
        of_tokens = np.asarray(scores.mean((0, 2)))[0, : len(ids)]
        return ScoredWords(text, spans, of_words(of_tokens, align(spans, places)), "repeated")

    return score


def left_out(reader: Reader, before: int = 32, after: int = 32) -> Scorer:
    """The sum of the losses of the next tokens without the word, less that with it, in nats.

    Args:
      before, after: tokens that are read before a block of words, and tokens after a word whose loss counts.
    """

    def score(text: str) -> ScoredWords:
        ids, places = reader.tokenizer.encode_with_places(text)
        spans = segment(text)
        first, last = align(spans, places)
        scores = np.zeros(len(spans), np.float32)
        for start in range(0, len(spans), BLOCK):
            block = range(start, min(start + BLOCK, len(spans)))
            begin, end = max(int(first[start]) - before, 0), int(last[block[-1]]) + after
            window = ids[begin:end]
            rows = [window, *(np.delete(window, slice(first[at] - begin, last[at] - begin)) for at in block)]
            losses = losses_of(reader, rows)
            for row, at in zip(losses[1:], block, strict=True):
                gone, there = int(first[at]) - begin, int(last[at]) - begin
                count = min(len(window) - there, after)
                scores[at] = row[gone : gone + count].sum() - losses[0][there : there + count].sum()
        return ScoredWords(text, spans, scores, "left-out")

    return score


def losses_of(reader: Reader, rows: list[np.ndarray]) -> np.ndarray:
    """The loss of each token of each row, with everything before it; 0 for the first."""
    width = -(-max(map(len, rows)) // 64) * 64  # few programs are compiled
    tokens = np.full((ROWS, width), -1, np.int32)
    for at, row in enumerate(rows):
        tokens[at, : len(row)] = row
    whole = replace(reader, policy=Full(), slots=width, segment=width)
    losses, _ = whole.losses(Context(whole.begin(ROWS).state, np.full(ROWS, -1, np.int32)), tokens)
    return np.nan_to_num(losses[: len(rows)])


TEACHERS = {"repeated": repeated, "left-out": left_out}


def labelled(scored: ScoredWords, rate: float) -> Example:
    """The words of the best scores are kept."""
    kept = best_words(scored, round(rate * len(scored.spans)))
    return Example(scored.text, [Word(*span) for span in scored.spans.tolist()], kept.tolist())


def pieces_of(texts: Sequence[str], count: int, size: int) -> list[str]:
    """So many pieces of so many words. If they cannot be dealt evenly, the first texts have one more."""
    found = []
    each, more = divmod(count, len(texts))
    for number, text in enumerate(texts):
        words = words_of(text)
        for at in np.linspace(0, max(len(words) - size, 0), each + (number < more)).astype(int):
            found.append(text[words[at].start : words[min(at + size, len(words)) - 1].end])
    return found


def main(args: Arguments) -> None:
    if not 0 < args.rate < 1 or min(args.words, args.pieces) < 1:
        stop("--rate is a share between 0 and 1, --words and --pieces are 1 or more")
    loaded: Any = args.load()
    scorer = TEACHERS[args.teacher](Reader(loaded.model, loaded.tokenizer))
    texts = [read_text(file) for file in files_of(args.texts, args.hold_out)]
    pieces = pieces_of(texts or [one.text for one in documents() if not one.held_out], args.pieces, args.words)

    def examples() -> Iterator[Example]:
        for number, piece in enumerate(pieces, 1):
            yield labelled(scorer(piece), args.rate)
            if number % 20 == 0:
                print(f"{number} of {len(pieces)} pieces", flush=True)

    write_examples(examples(), args.out)
    print(f"{len(pieces)} pieces: {args.out}")


if __name__ == "__main__":
    main(arguments(QUICK))
