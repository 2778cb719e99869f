"""Trains a model to say with a small state what it says with the full cache (distillation).

python examples/distill.py --out runs/distilled
python examples/distill.py --data books/ --model smollm2 --slots 256 --length 1024 --steps 200

The teacher is the model itself before training, with every token in its cache. Nothing of it is copied.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import tyro

import jaxcompress as jc
from jaxcompress.embedded.corpus import documents, held_out
from jaxcompress.training import (
    PackedRows,
    adamw_for_decoder,
    batches,
    distilled,
    init_train_state,
    make_step,
    pack,
    read_documents,
    warmup_cosine,
)


def main(
    model: str | None = None,
    data: Path | None = None,
    policy: str = "window+4",
    slots: int = 64,
    length: int = 512,
    rows: int = 4,
    steps: int = 40,
    out: Path = Path("distilled"),
) -> None:
    texts = read_documents(data) if data else [one.text for one in documents() if not one.held_out][:100]
    loaded = jc.load(model, dtype="float32") if model else jc.load_embedded()
    teacher, tokenizer, evict = loaded.model, loaded.tokenizer, jc.get_policy(policy)
    packed = PackedRows(pack(texts, tokenizer, vocab_size=teacher.config.vocab_size), length)
    test = tokenizer.encode(max((one.text for one in held_out("topics/")), key=len))[None, : 2 * length]
    loss = lambda student: jc.perplexity(student, test, evict, slots).nats

    optimizer = adamw_for_decoder(warmup_cosine(3e-4, steps))
    step = make_step(distilled(evict, slots, segment=length // 2, bptt_segments=1, teacher=teacher), optimizer)
    state = init_train_state(teacher, optimizer)
    print(f"held-out loss with {slots} slots: {loss(teacher):.3f} nats per token")
    for n, batch in enumerate(islice(batches(packed, batch=rows, seed=0), steps), 1):
        state, metrics = step(state, batch)
        print(f"step {n}: {metrics['divergence']:.4f} nats from the teacher")
    print(f"held-out loss with {slots} slots: {loss(state.params):.3f} nats per token")
    print(f"written to {jc.save(state.params, out, tokenizer_from=loaded.folder)}")


if __name__ == "__main__":
    tyro.cli(main)
