"""What training through the bounded state gains: the embedded model, trained further in several ways on equal tokens.

    python experiments/train_bounded.py --out runs/bounded

Every method starts from the model that ships and sees the same rows in the same order (documents and recall tasks woven
into them, as in `train_embedded.py`; nothing held out is read). `full` is trained with the full cache; the policies
through a state of 1/4, 1/8 and 1/16 of the context, in turn. `untrained` is the model as it ships. Measured on held-out
rows with facts: loss at each size of the state and with the full cache, and how many questions are answered.

The share of the gap that is closed is (untrained - trained) / (untrained - full), in nats at equal slots, where full is
the full cache of the model that was trained with it on as many tokens.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from train_embedded import Batches, Stage

import jaxcompress as jc
from jaxcompress.embedded.corpus import documents, held_out
from jaxcompress.evaluation.recall import Recall, answers, exam, wording
from jaxcompress.models.decoder import Decoder
from jaxcompress.naming import named
from jaxcompress.training.data import Batch
from jaxcompress.training.objectives import bounded, causal
from jaxcompress.training.optimizer import muon_for_decoder, warmup_stable_decay
from jaxcompress.training.trainer import init_train_state, make_step


@dataclass(frozen=True)
class Arguments:
    """Trains and measures; a run that was stopped goes on with what is missing."""

    methods: tuple[str, ...] = ("untrained", "full", "window+4", "h2o-layer", "tova")
    context: int = 1024
    fractions: tuple[int, ...] = (4, 8, 16)
    steps: int = 150
    rows: int = 4
    """Per step."""
    peak: float = 1e-3
    """Highest learning rate."""
    segment: int = 256
    reach: int = 2
    """Segments over which the gradient goes back."""
    text: float = 0.5
    """Share of rows without a task."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: int = 16
    """Held-out rows, the same for all."""
    out: Path = Path("runs/bounded")


def training_rows(tokenizer: jc.Tokenizer, seed: int) -> Batches:
    texts = [d.text for d in documents() if not d.held_out]
    order = np.random.default_rng(seed).permutation(len(texts))
    encode = lambda text: tokenizer.encode(text, add_bos=False).tolist()
    bos: Any = tokenizer.bos_id
    stream = np.concatenate([[*encode(texts[i]), bos] for i in order]).astype(np.int32)
    return Batches(stream, bos, wording(tokenizer.vocabulary(), encode), 1000 + seed)


def held_out_rows(tokenizer: jc.Tokenizer, args: Arguments) -> list[Recall]:
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    text = np.concatenate([encode(document.text) for document in held_out()])
    words = wording(tokenizer.vocabulary(), lambda text: encode(text).tolist())
    return exam(text, words, rows=args.tasks, length=args.context, seed=7, bos=tokenizer.bos_id)


def train(model: Decoder, method: str, batches: Batches, args: Arguments) -> tuple[Decoder, float]:
    """The trained model, and seconds without compilation."""
    optimizer = muon_for_decoder(warmup_stable_decay(args.peak, args.steps, warmup=args.steps // 10, decay=0.5))
    state = init_train_state(model, optimizer)
    if method == "full":
        objectives = [causal()]
    else:
        objectives = [
            bounded(named(method), args.context // fraction, segment=args.segment, reach=args.reach)
            for fraction in args.fractions
        ]
    steps = [make_step(objective, optimizer) for objective in objectives]
    stage, seconds = Stage(args.steps, args.rows, args.context, args.text), 0.0
    for number in range(args.steps):
        tokens, weights = batches(number, stage)
        batch = Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(weights, jnp.float32))
        begun = time.perf_counter()
        state, metrics = steps[number % len(steps)](state, batch)
        loss = float(metrics["loss"])
        if number >= len(steps):
            seconds += time.perf_counter() - begun
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {number + 1} of {method}")
        if (number + 1) % 25 == 0:
            print(f"  {method} step {number + 1}: {loss:.3f}", flush=True)
    return state.params, seconds * args.steps / max(args.steps - len(steps), 1)


def measure(model: Decoder, policies: list[str], tasks: list[Recall], args: Arguments) -> list[dict[str, Any]]:
    """Loss and recall at each size of the state, and with the full cache."""
    rows = []
    for policy, slots in [("full", args.context)] + [(p, args.context // f) for p in policies for f in args.fractions]:
        given = answers(model, tasks, named(policy), slots)
        rows.append(dict(policy=policy, slots=slots, nats=float(given.nats.mean()), recall=given.accuracy))
    return rows


def main(args: Arguments) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = jc.load_embedded()
    tasks = held_out_rows(tokenizer, args)
    trained = [method for method in args.methods if method not in ("untrained", "full")]
    for seed in args.seeds:
        batches = training_rows(tokenizer, seed)
        for method in args.methods:
            file = args.out / f"{method.replace('/', '_')}-{seed}.json"
            if file.exists() or (method == "untrained" and seed != args.seeds[0]):
                continue
            now, seconds = (model, 0.0) if method == "untrained" else train(model, method, batches, args)
            policies = trained if method in ("untrained", "full") else [method]
            rows = measure(now, policies, tasks, args)
            found = dict(method=method, seed=seed, seconds=seconds, rows=rows)
            file.write_text(json.dumps(found, indent=2) + "\n")
            print(method, seed, f"{seconds:.0f} s", *(
                f"{r['policy']}@{r['slots']} {r['nats']:.3f} {r['recall']:.0%}" for r in rows
            ), flush=True)  # fmt: skip
            jax.clear_caches()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
