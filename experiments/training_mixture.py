"""Writes the text on which retention heads of an instruction-tuned model are trained, as rows of token ids.

    python experiments/training_mixture.py --model smollm2 --texts novels/ wikitext.txt stories.jsonl \
        --hold-out Dracula Frankenstein --out mixture.jsonl

Half of the rows are text as it is: the given files, and the sources of this Python. The others are dialogues in the
model's chat format, whose filler is the given text:

  needles   a context with needles (RULER's generators) and a question about each, one after the other
  diary     facts are told between passages of text, and asked for in random order at any time later
  repeat    a passage that the model is asked to repeat, and does

A file that `--hold-out` names is never read. Every row has `length` tokens with the marks that
`jaxcompress.training.pack` adds, so a row of the trainer (`--length`) is a row here, and no dialogue is cut.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from command import OfModel, arguments, stop

import jaxcompress as jc
from jaxcompress.embedded.corpus import documents
from jaxcompress.evaluation.ruler.prompts import largest
from jaxcompress.evaluation.ruler.sample import Sources
from jaxcompress.evaluation.ruler.tasks import get_task
from jaxcompress.evaluation.ruler.words import random_word
from jaxcompress.inputs.text import json_lines, read_text
from jaxcompress.inputs.whole_file import whole_file

NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Arguments(OfModel):
    """Writes rows of token ids (JSON Lines) for `jaxcompress train --data`."""

    texts: tuple[Path, ...] = ()
    """UTF-8 files, JSONL files, or folders of .txt files; only this Python's sources if not given."""
    field: str = "document"
    """The key of a text in JSONL files."""
    hold_out: tuple[str, ...] = ()
    """Names of files, without their endings, that are not read."""
    rows: int = 1000
    length: int = 2048
    """Tokens of a row, as the trainer's --length."""
    dialogues: tuple[tuple[str, float], ...] = (("needles", 0.2), ("diary", 0.2), ("repeat", 0.1))
    """Kinds of dialogues, and the share of rows of each; the rest is text as it is."""
    seed: int = 0
    out: Path = Path("runs/mixture.jsonl")


QUICK = Arguments(quick=True, rows=12, length=320, out=Path("runs/quick/mixture.jsonl"))


def files_of(texts: Sequence[Path], hold_out: Sequence[str]) -> list[Path]:
    """The files of --texts without those of --hold-out. Ends the script if one of either is not there."""
    found: list[Path] = []
    for path in texts:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            stop(f"there is no text in {path.absolute()}: --texts takes files, or folders with .txt files")
        found += files
    names = {file.stem for file in found}
    if missing := [name for name in hold_out if name not in names]:
        stop(
            f"--hold-out names no file of --texts: {', '.join(missing)}; they are {', '.join(sorted(names)) or 'none'}"
        )
    return [file for file in found if file.stem not in hold_out]


def texts_in(file: Path, key: str) -> list[str]:
    """The texts of a JSONL file. Ends the script at a line that has none under the key."""
    texts = []
    for _, where, value in json_lines(file):
        text = value.get(key) if isinstance(value, dict) else None
        if not isinstance(text, str):
            keys = (", ".join(value) or "no keys") if isinstance(value, dict) else f"a {type(value).__name__}"
            stop(f"{where}: no text under {key!r} (--field); the line has {keys}")
        texts.append(text)
    return texts


def texts_of(args: Arguments) -> list[str]:
    """The given texts, and as many characters of Python's sources as a third of theirs, at least."""
    texts = []
    for file in files_of(args.texts, args.hold_out):
        if file.suffix == ".jsonl":
            texts += texts_in(file, args.field)
        else:
            texts.append(read_text(file))
    own = [one.text for one in documents() if not one.held_out]
    random.Random(args.seed).shuffle(own)
    ends = np.cumsum([len(text) for text in own])
    return texts + own[: 1 + int(np.searchsorted(ends, max(sum(map(len, texts)) // 3, 200_000)))]


@dataclass
class Rows:
    """Makes rows of `length` tokens.

    Attributes:
      stream: token ids of all texts, one after the other.
      sources: the prose that stands between needles and facts.
    """

    tokenizer: jc.Tokenizer
    stream: np.ndarray
    sources: Sources
    length: int
    made: Counter[str] = field(default_factory=Counter)

    def text(self, rng: random.Random) -> np.ndarray:
        start = rng.randrange(max(len(self.stream) - self.length, 1))
        return self.stream[start : start + self.length]

    def needles(self, rng: random.Random) -> np.ndarray:
        task, seed = rng.choice(NEEDLES), rng.random()
        make, least = get_task(task).make, get_task(task).least

        def dialogue(size: int) -> Messages:
            sample = make(size, random.Random(seed), self.sources)
            said: Messages = []
            for question in sample.questions:
                before = "" if said else sample.context
                said.append(dict(role="user", content=before + question.text))
                said.append(dict(role="assistant", content=f"{question.prefix} {', '.join(question.answers)}."))
            return said

        return self._fitted(dialogue, least, rng)

    def diary(self, rng: random.Random) -> np.ndarray:
        seed = rng.random()

        def dialogue(size: int) -> Messages:
            rng = random.Random(seed)
            said: Messages = []
            facts: list[tuple[str, str]] = []
            for _ in range(rng.randint(3, 8)):
                fact = random_word(rng), str(rng.randint(10**4, 10**6)) if rng.random() < 0.5 else random_word(rng)
                facts.append(fact)
                passage = self.sources.sentences(max(size * rng.randint(5, 15) // 10, 8), rng)
                passage.insert(rng.randrange(len(passage) + 1), f"Remember that the {fact[0]} is {fact[1]}.")
                said.append(dict(role="user", content=" ".join(passage)))
                said.append(dict(role="assistant", content="I will remember it."))
                for key, value in rng.sample(facts, min(len(facts), rng.randint(0, 2))):
                    said.append(dict(role="user", content=f"What is the {key}?"))
                    said.append(dict(role="assistant", content=f"The {key} is {value}."))
            for key, value in rng.sample(facts, len(facts)):
                said.append(dict(role="user", content=f"What is the {key}?"))
                said.append(dict(role="assistant", content=f"The {key} is {value}."))
            return said

        return self._fitted(dialogue, 4, rng)

    def repeat(self, rng: random.Random) -> np.ndarray:
        seed = rng.random()

        def dialogue(size: int) -> Messages:
            passage = " ".join(self.sources.sentences(size, random.Random(seed)))
            asked = f"{passage}\n\nRepeat the text above exactly."
            return [dict(role="user", content=asked), dict(role="assistant", content=passage)]

        return self._fitted(dialogue, 8, rng)

    def _fitted(self, dialogue: Callable[[int], Messages], least: int, rng: random.Random) -> np.ndarray:
        """The longest dialogue that fits, and text after it up to the length; text alone if none fits."""
        encode = lambda size: self.tokenizer.encode(
            self.tokenizer.apply_chat_template(dialogue(size), add_generation_prompt=False), add_bos=False
        )
        fits = lambda size: len(encode(size)) <= self.length
        ids = encode(largest(least, fits)) if fits(least) else np.zeros(0, np.int32)
        begins = len(ids) and ids[0] == self.tokenizer.bos_id  # a row begins with BOS, which is not said twice
        return np.concatenate([ids[1 if begins else 0 :], self.text(rng)])[: self.length]

    def row(self, rng: random.Random, dialogues: tuple[tuple[str, float], ...]) -> np.ndarray:
        names = [name for name, _ in dialogues] + ["text"]
        shares = [share for _, share in dialogues]
        name = rng.choices(names, [*shares, 1 - sum(shares)])[0]
        self.made[name] += 1
        return getattr(self, name)(rng)


def main(args: Arguments) -> None:
    tokenizer = args.load().tokenizer
    texts = texts_of(args)
    prose = [text for text in texts if text.count(". ") > len(text) / 400]
    marks = len({mark for mark in (tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)) if mark is not None})
    stream = np.concatenate([tokenizer.encode(text, add_bos=False) for text in texts])
    sources = Sources("\n\n".join(prose) or texts[0], args.length)
    rows, rng = Rows(tokenizer, stream, sources, args.length - marks), random.Random(args.seed)
    known = [name for name, _ in args.dialogues if not hasattr(rows, name)]
    if known or sum(share for _, share in args.dialogues) > 1:
        stop(f"--dialogues takes needles, diary and repeat with shares that sum to at most 1, not {args.dialogues}")
    if not tokenizer.has_chat_template:
        print("the tokenizer has no chat template: all rows are text as it is")
    dialogues = args.dialogues if tokenizer.has_chat_template else ()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(args.out) as part, part.open("w", encoding="utf-8") as file:
        for _ in range(args.rows):
            file.write(json.dumps(dict(tokens=rows.row(rng, dialogues).tolist())) + "\n")
    kinds = ", ".join(f"{count} {name}" for name, count in rows.made.most_common())
    print(
        f"{len(texts)} texts of {len(stream):,} tokens -> {args.rows:,} rows of {args.length:,} ({kinds}): {args.out}"
    )


if __name__ == "__main__":
    main(arguments(QUICK))
