"""Reads a file of any length through a fixed number of slots, then asks about it. Memory does not grow with the file.

python examples/ask_long_file.py
python examples/ask_long_file.py --file book.txt --question "Who tells the story?" --model smollm2 --slots 1024

Without a file, it reads 100,000 tokens of Python's own documentation and sources. The embedded model has a context of
2,048 tokens and writes only what looks like Python, so a sensible answer takes another model.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import tyro

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.generation import TextUntil, decode_stream, encode_stream, init_decode_state, prefill, prefill_stream


def main(
    file: Path | None = None,
    question: str = "What is an assignment?",
    model: str | None = None,
    slots: int = 256,
    tokens: int = 100_000,
    max_new_tokens: int = 64,
) -> None:
    loaded = jc.load(model) if model else jc.load_embedded()
    decoder, tokenizer = loaded.model, loaded.tokenizer
    # "slot": distances stay within what the model was trained on, however far apart two tokens were in the file.
    state = init_decode_state(decoder, jc.get_policy("tova"), slots, placement="slot")
    print(f"the state takes {sum(part.nbytes for part in state.kv) / 2**20:.1f} MiB")

    count = 0
    text = io.StringIO("\n".join(document.text for document in held_out()))
    with open(file, "rb") if file else text as source:
        reading = prefill_stream(decoder, encode_stream(source, tokenizer), state)
        for count, state in reading:  # noqa: B007  the last one is used
            print(f"\r{count:,} tokens read", end="", file=sys.stderr)
            if file is None and count >= tokens:
                break

    asked = tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:", add_bos=False)
    state = prefill(decoder, [asked], state)
    answer = TextUntil(tokenizer, stop=["\n\n"], stop_ids=tokenizer.eos_ids, after=asked)
    print(f"\n{count:,} tokens read\n{question}")
    for new in decode_stream(decoder, state, max_new_tokens, stream_every=8):
        print("".join(answer.push(token) for token in new[0] if token >= 0), end="", flush=True)
        if answer.stopped:
            break
    print(answer.finish())


if __name__ == "__main__":
    tyro.cli(main)
