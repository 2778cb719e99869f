"""Writes tests/fixtures/gguf/sentencepiece.json: a vocabulary that SentencePiece learnt, and its ids of a few texts.

pip install sentencepiece
python experiments/make_gguf_fixtures.py
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from command import Command, arguments, need

from jaxcompress.embedded.corpus import held_out

need("sentencepiece", install="pip install sentencepiece")
import sentencepiece  # noqa: E402

TEXTS = [
    "", "hello", " two  spaces ", "   three", "a\n b\n\n  c\t", "naïve 你好 😀", "x", "def main(argument: int):",
    "        return self.value", "The quick brown fox jumps.", "aaaaaaa    aaaaaaaa", "1234567",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Make(Command):
    out: Path = Path(__file__).parents[1] / "tests" / "fixtures" / "gguf"
    """The folder to write into."""


QUICK = Make(quick=True, out=Path("runs"))


def main(args: Make) -> None:
    lines = [line for document in held_out("topics/") for line in document.text.splitlines()]
    learnt = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines[: 300 if args.quick else None]),
        model_writer=learnt,
        model_type="bpe",
        vocab_size=330 if args.quick else 600,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=learnt.getvalue())
    every = range(pieces.get_piece_size())
    tests = ((2, pieces.is_unknown), (3, pieces.is_control), (5, pieces.is_unused), (6, pieces.is_byte))
    fixture = {
        "tokens": [pieces.id_to_piece(index) for index in every],
        "scores": [pieces.get_score(index) for index in every],
        "kinds": [next((kind for kind, holds in tests if holds(index)), 1) for index in every],
        "texts": {text: pieces.encode(text) for text in TEXTS},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sentencepiece.json").write_text(json.dumps(fixture) + "\n", encoding="utf-8")
    print(f"{len(fixture['tokens'])} tokens, {len(TEXTS)} texts")


if __name__ == "__main__":
    main(arguments(QUICK))
