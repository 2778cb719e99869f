"""What training through the bounded state gains: the embedded model, trained further in several ways on equal tokens.

    python experiments/train_bounded.py --out runs/bounded

Every method starts from the model that ships and sees the same rows in the same order (documents and recall tasks woven
into them, as in `train_embedded.py`; nothing held out is read).

  untrained        the model as it ships
  full             trained with the full cache
  a policy         trained through a state of 1/4, 1/8 and 1/16 of the context, in turn
  retention        a retention head of the layers of the untrained model; the model is left alone
  retention+model  half of the steps for that, half for the model through a state with this policy
  dms              model and DMS head together, the share of tokens kept going down to 1/8
  distilled-...    as a policy, with the untrained model and its full cache as teacher beside the language loss

All of them keep the auxiliary loss of the model's last stage (`foresight`): which tokens a policy keeps has no
gradient, so that nothing else asks attention to stay on what will be needed.

Measured on held-out rows with facts: loss at each size of the state and with the full cache, and how many questions are
answered.

The share of the gap that is closed is (untrained - trained) / (untrained - full), in nats at equal slots, where full is
the full cache of the model that was trained with it on as many tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from train_embedded import SAMPLED, Batches, Stage

import jaxcompress as jc
from jaxcompress.attention import causal_attention
from jaxcompress.embedded.corpus import documents, held_out
from jaxcompress.evaluation.recall import Recall, answers, exam, wording
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.rope import rotate
from jaxcompress.naming import named
from jaxcompress.policies import full
from jaxcompress.policies.learned import dms, retention
from jaxcompress.training.data import Batch
from jaxcompress.training.foresight import foresight_loss
from jaxcompress.training.forgetting import init_retention, retention_loss
from jaxcompress.training.learning import learning
from jaxcompress.training.objectives import bounded, causal, distilled
from jaxcompress.training.optimizer import muon_for_decoder, warmup_stable_decay
from jaxcompress.training.trainer import init_train_state, make_step


@dataclass(frozen=True)
class Arguments:
    """Trains and measures; a run that was stopped goes on with what is missing."""

    methods: tuple[str, ...] = (
        "untrained", "full", "tova", "retention", "retention+model", "window+4", "h2o-layer", "distilled-tova", "dms",
    )  # fmt: skip
    context: int = 1024
    fractions: tuple[int, ...] = (4, 8, 16)
    steps: int = 150
    rows: int = 4
    """Per step."""
    peak: float = 1e-3
    """Highest learning rate of models; networks that learn to forget take three times as much."""
    segment: int = 256
    reach: int | None = None
    """Segments over which the gradient goes back; all of them if not given."""
    foresight: float = 0.3
    """Weight of the auxiliary loss."""
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


Objectives = list[Callable[[Any, Batch, Any, Any], Any]]


def through_states(policy: jc.Policy, args: Arguments, **how: Any) -> Objectives:
    """One objective for each size of the state."""
    how |= dict(segment=args.segment, reach=args.reach)
    make = distilled if "teacher" in how else bounded
    return [make(policy, args.context // fraction, **how) for fraction in args.fractions]


def with_foresight(objective: Callable[..., Any], weight: float) -> Callable[..., Any]:
    """An objective of a decoder, and the auxiliary loss of a plain pass over the same rows."""
    if not weight:
        return objective

    def short(model: Decoder, tokens: jax.Array, sample: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

        def attend(q, k, v, positions, layer, index, carry, xs):
            q, k = (rotate(x, positions[..., None], model.config.rope) for x in (q, k))
            return causal_attention(q, k, v, positions), carry, foresight_loss(q, k, positions, sample)

        return model.run_layers(model.embed(tokens), positions, attend)[2].mean()

    def both(model: Decoder, batch: Batch, step: Any, key: Any) -> tuple[dict[str, Any], Any]:
        metrics, slope = objective(model, batch, step, key)
        # Where answers are given, and anywhere.
        noise = jax.random.uniform(key, batch.weights.shape)
        answers = jax.lax.top_k(batch.weights + 0.1 * noise, SAMPLED[1])[1]
        anywhere = jax.lax.top_k(noise, SAMPLED[0])[1]
        sample = jnp.sort(jnp.concatenate([answers, anywhere], axis=1), axis=1).astype(jnp.int32)
        apart, more = jax.value_and_grad(short)(model, batch.tokens[:, :-1], sample)
        return metrics | {"foresight": apart}, jax.tree.map(lambda a, b: a + weight * b, slope, more)

    return both


def watching(model: Decoder) -> Objectives:
    """A retention head watches the model read."""

    def objective(head: Any, batch: Batch, step: Any, key: Any) -> tuple[dict[str, Any], Any]:
        loss, slope = jax.value_and_grad(lambda head: retention_loss(model, head, batch.tokens[:, :-1], scope="layer"))(
            head
        )
        return {"loss": loss}, slope

    return [objective]


def train(model: Decoder, method: str, batches: Batches, args: Arguments) -> tuple[Decoder, jc.Policy | None, float]:
    """The trained model, the policy it is to be read with, and seconds without compilation."""
    run = partial(optimise, batches, args)
    also = lambda objectives: [with_foresight(objective, args.foresight) for objective in objectives]
    if method == "full":
        model, seconds = run(model, also([causal()]), args.steps)
        return model, None, seconds
    if method.startswith("retention"):
        half = args.steps // 2 if method == "retention+model" else args.steps
        head = init_retention(model.config, jax.random.key(0))
        head, seconds = run(head, watching(model), half, adam=True)
        policy = retention(head, "layer")
        if half < args.steps:
            model, more = run(model, also(through_states(policy, args)), args.steps - half, start=half)
            seconds += more
        return model, policy, seconds
    if method == "dms":
        learned = learning("dms", model, jax.random.key(0), steps=args.steps, ratio=8.0)
        params, seconds = run(learned.params, [learned.objective], args.steps)
        model, head = learned.parts(params)
        return model, dms(head, **learned.settings), seconds
    policy = named(method.removeprefix("distilled-"))
    teacher: dict[str, Any] = dict(teacher=model, language=0.5) if method.startswith("distilled-") else {}
    model, seconds = run(model, also(through_states(policy, args, **teacher)), args.steps)
    return model, policy, seconds


def optimise(
    batches: Batches,
    args: Arguments,
    params: Any,
    objectives: Objectives,
    steps: int,
    *,
    start: int = 0,
    adam: bool = False,
) -> tuple[Any, float]:
    """`steps` steps on the rows from step `start` on; the objectives take turns."""
    schedule = warmup_stable_decay(3 * args.peak if adam else args.peak, steps, warmup=max(steps // 10, 1), decay=0.5)
    optimizer = optax.adam(schedule) if adam else muon_for_decoder(schedule)
    state, times = init_train_state(params, optimizer), []
    turns = [make_step(objective, optimizer) for objective in objectives]
    stage = Stage(args.steps, args.rows, args.context, args.text)
    for number in range(steps):
        tokens, weights = batches(start + number, stage)
        batch = Batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(weights, jnp.float32))
        begun = time.perf_counter()
        state, metrics = turns[number % len(turns)](state, batch)
        told = {name: round(float(value), 3) for name, value in metrics.items()}
        times.append(time.perf_counter() - begun)
        if not np.isfinite(told["loss"]):
            raise FloatingPointError(f"the loss is {told['loss']} at step {number + 1}")
        if (number + 1) % 25 == 0:
            print(f"  step {number + 1}: {told}", flush=True)
    return state.params, float(np.median(times)) * steps


def measure(model: Decoder, policies: list[jc.Policy], tasks: list[Recall], args: Arguments) -> list[dict[str, Any]]:
    """Loss and recall at each size of the state, and with the full cache."""
    rows = []
    for policy, slots in [(full(), args.context)] + [(p, args.context // f) for p in policies for f in args.fractions]:
        given = answers(model, tasks, policy, slots)
        rows.append(dict(policy=policy.name, slots=slots, nats=float(given.nats.mean()), recall=given.accuracy))
    return rows


UNLEARNED = "window+4", "h2o-layer", "tova"


def main(args: Arguments) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = jc.load_embedded()
    tasks = held_out_rows(tokenizer, args)
    unlearned = [named(name) for name in UNLEARNED]
    for seed in args.seeds:
        batches = training_rows(tokenizer, seed)
        for method in args.methods:
            file = args.out / f"{method.replace('/', '_')}-{seed}.json"
            if file.exists() or (method == "untrained" and seed != args.seeds[0]):
                continue
            now, policy, seconds = (model, None, 0.0) if method == "untrained" else train(model, method, batches, args)
            rows = measure(now, unlearned if policy is None else [policy], tasks, args)
            found = dict(method=method, seed=seed, seconds=seconds, rows=rows)
            file.write_text(json.dumps(found, indent=2) + "\n")
            print(method, seed, f"{seconds:.0f} s", *(
                f"{r['policy']}@{r['slots']} {r['nats']:.3f} {r['recall']:.0%}" for r in rows
            ), flush=True)  # fmt: skip
            jax.clear_caches()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
