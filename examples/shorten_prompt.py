"""Shortens a prompt before it is read: words are dropped first, then the state drops tokens. Both ratios are told.

python examples/shorten_prompt.py --file minutes.txt --question "When do they meet again?" --model smollm2

The embedded model writes only what looks like Python or its documentation; a sensible answer takes another model.
"""

from __future__ import annotations

from pathlib import Path

import tyro

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.generation import TextStream, decode_stream, init_decode_state
from jaxcompress.prompt import Compressor, read_shortened


def main(
    file: Path | None = None,
    question: str = "What does the text say?",
    model: str | None = None,
    rate: float = 0.5,
    slots: int = 128,
    characters: int = 4000,
    max_new_tokens: int = 32,
) -> None:
    text = file.read_text(encoding="utf-8") if file else held_out("topics/assignment")[0].text[:characters]
    loaded = jc.load(model) if model else jc.load_embedded()

    compressor = Compressor.load()  # the one that ships; or the folder of a token classifier
    state = init_decode_state(loaded.model, jc.get_policy("tova"), slots)
    read = read_shortened(
        loaded.model, loaded.tokenizer, text, compressor, state, rate=rate, after=f"\n\n{question}\n"
    )  # the question is read as it is
    print(read.kept.text)
    print(f"\n{read.report}\n")

    written = TextStream(loaded.tokenizer)
    for tokens in decode_stream(loaded.model, read.state, max_new_tokens, stream_every=8):
        print(written.push(tokens[0]), end="", flush=True)
    print(written.finish())


if __name__ == "__main__":
    tyro.cli(main)
