"""Compressing a context before its questions are known: KVzip beside scores that look at the context once.

    python experiments/context_reconstruction.py --out runs/context_reconstruction.json

Facts are told in the first half of a context. The context is read in full and reduced once to a fixed number of tokens
per head. The questions come after that, and nothing more is evicted. So the methods differ only in the tokens kept.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from command import OfModel, arguments

from jaxcompress.budgets.allocate import from_scores
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation import exam, wording
from jaxcompress.evaluation.perplexity import predictions
from jaxcompress.generation import init_decode_state, prefill
from jaxcompress.generation.reconstruction import Growing, Repeat, asking, read_whole, reconstruct, shrink
from jaxcompress.models.modes import calls
from jaxcompress.policies import H2O, TOVA, Policy, Window
from jaxcompress.state.kv_state import State


@dataclass(frozen=True)
class Arguments(OfModel):
    """Reduces contexts by several scores and asks afterwards."""

    out: Path = Path("runs/context_reconstruction.json")
    context: int = 2048
    """Tokens of a context with its questions."""
    rows: int = 4
    """Contexts."""
    questions: int = 8
    """Facts in each row, approximately."""
    slots: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens kept per head."""
    chunk: int = 256
    """Tokens repeated at a time: the repetition must not lie beyond the context that the model was trained on."""


QUICK = Arguments(
    quick=True,
    out=Path("runs/quick/context_reconstruction.json"),
    rows=1,
    questions=2,
    context=256,
    slots=(32,),
    chunk=64,
)


def main(args: Arguments) -> None:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    context, bos = args.context, tokenizer.bos_id
    encode = lambda text: tokenizer.encode(text, add_bos=False).tolist()
    text = np.concatenate([encode(document.text) for document in held_out()])
    words = wording(tokenizer.vocabulary(), encode)
    tasks = exam(text, words, rows=args.rows, length=context, notes=args.questions, questions=args.questions, bos=bos)
    tokens, asked = np.stack([x.tokens for x in tasks]), np.stack([x.asked for x in tasks])
    read = int(context * 0.74)  # questions come after that
    contexts, batch = list(tokens[:, :read]), len(tokens)
    say = lambda *what: print(*what, flush=True)

    def stats(policy: Policy) -> jnp.ndarray:
        """The scores of a policy after the whole context, before any eviction: one-shot compression."""
        now = init_decode_state(model, policy, whole[0].capacity, batch=batch)
        (part,) = prefill(model, contexts, now, mode="chunked", chunk=256, segment=256).kv
        return jnp.broadcast_to(part.stats, scores_shape)

    begun = time.perf_counter()
    whole = read_whole(model, contexts).kv
    reading = time.perf_counter() - begun
    scores_shape = (model.config.num_layers, batch, model.config.num_kv_heads, whole[0].positions.shape[-1])
    scores: dict[str, jnp.ndarray] = {}
    for name, repeat in {"kvzip": asking(encode), "kvzip, nothing said": Repeat()}.items():
        begun = time.perf_counter()
        scores[name] = reconstruct(model, contexts, whole, repeat, chunk=args.chunk)
        say(f"{name}: {time.perf_counter() - begun:.0f} s after {reading:.0f} s of reading, compilation included")
    scores["tova"] = stats(TOVA())
    scores["tova-kv_head"] = stats(TOVA("kv_head"))
    scores["h2o-kv_head"] = stats(H2O(0, "kv_head"))
    held = whole[0].positions
    newest = jnp.where((held >= 0) & (held < 4), jnp.inf, held * 1.0)
    scores[Window(4).name] = newest
    table, plan = [], calls("streaming", context - 1, chunk=1, segment=context - 1, start=read)
    say(f"\n{'score':22}{'shared':10}{'slots':>6}{'after':>12}{'recall':>8}")

    def line(name: str, shared: str, slots: int, state: State) -> None:
        parts = list(predictions(model, tokens, state, Growing(), plan))
        right = np.concatenate([part.right for part in parts], axis=1)  # of the token after each
        losses = np.concatenate([part.losses for part in parts], axis=1)
        given = right[asked[:, read + 1 :]].reshape(-1, 2).all(1)
        row = dict(
            score=name, shared=shared, slots=slots, perplexity=math.exp(losses.mean()), recall=float(given.mean())
        )
        table.append(row)
        say(f"{name:22}{shared:10}{slots:6}{row['perplexity']:12.2f}{row['recall']:8.0%}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(table, indent=1))

    room = context - read
    line("all", "", read, shrink(model, whole, newest, Growing(), read, room=room))
    for slots in args.slots:
        for name, score in scores.items():
            shares: dict[str, Any] = {"uniform": slots}
            if name == "kvzip":
                shares["by score"] = from_scores(score, slots, least=8)
            for shared, given in shares.items():
                line(name, shared, slots, shrink(model, whole, score, Growing(), given, room=room))


if __name__ == "__main__":
    main(arguments(QUICK))
