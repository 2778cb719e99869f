"""Reads a file of any length through a fixed number of slots, then asks about it. Memory does not grow with the file.

python examples/ask_long_file.py
python examples/ask_long_file.py --file book.txt --question "Who tells the story?" --model smollm2 --slots 1024

Without a file, it reads 100,000 tokens of Python's own documentation and sources. An answer is as good as the model:
the embedded one goes on with Python, and SmolLM2 with its 135 million weights is often wrong with all tokens, too.
"""

from __future__ import annotations

import io
from itertools import chain
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
    source = file.open("rb") if file else io.StringIO("\n".join(document.text for document in held_out()))
    loaded = jc.load(model) if model else jc.load_embedded()
    decoder, tokenizer = loaded.model, loaded.tokenizer
    before, after = "", f"\n\nQuestion: {question}\nAnswer:"
    if chat := tokenizer.has_chat_template:  # then it says what stands around a message: the file, and the question
        before, after = tokenizer.apply_chat_template([dict(role="user", content=f"\0\n\n{question}")]).split("\0")
    opening, asked = tokenizer.encode(before, add_bos=not chat), tokenizer.encode(after, add_bos=False)

    # "slot": distances stay within what the model was trained on, however far apart two tokens were in the file.
    state = init_decode_state(decoder, jc.get_policy("tova"), slots, placement="slot")
    with source:
        ids = chain([opening], encode_stream(source, tokenizer, add_bos=False))
        reading = prefill_stream(decoder, ids, state)
        for count, state in reading:
            print(f"\r{count:,} tokens read, the state has {sum(kv.nbytes for kv in state.kv) / 2**20:.1f} MiB", end="")
            if file is None and count >= tokens:
                break

    print(f"\n{question}")
    state = prefill(decoder, [asked], state)
    answer = TextUntil(tokenizer, stop=["\n\n"], stop_ids=tokenizer.eos_ids, after=asked)
    for new in decode_stream(decoder, state, max_new_tokens, stream_every=8):
        print(answer.push(new[0]), end="", flush=True)
        if answer.stopped:
            break
    print(answer.finish())


if __name__ == "__main__":
    tyro.cli(main)
