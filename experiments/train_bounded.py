"""What training through the bounded state gains: one model, trained further in several ways on equal tokens.

    python experiments/train_embedded.py --out runs/embedded
    python experiments/train_bounded.py --model runs/embedded/model --out runs/bounded [--texts folder/]

Every method starts from the model that `train_embedded.py` makes and sees the same rows in the same order: documents
with recall tasks woven into them, as in that script, and nothing held out. The model that ships was trained with
`distilled-retention` on longer rows (docs/results/embedded-model.md).

  untrained        the model as it is given
  full             trained with the full cache
  a policy         trained through a state of 1/8, 1/16 and 1/4 of the context, in turn
  retention        a retention head of the layers of the untrained model; the model is left alone
  distilled-retention  model and retention head together: the model through a state from which the head, as it is by
                   then, decides what goes, and the head from watching the model
  dms              a DMS head beside the model, the share of tokens kept going down to 1/8
  distilled-...    with the untrained model and its full cache as teacher beside the language loss
  full-time        with the full cache for as many seconds as `tova` took
  full-flops       with the full cache for as many floating-point operations as `tova` took

All of them keep the auxiliary loss of the model's last stage (`foresight`). The choice of tokens that a policy keeps
has no gradient, so no other loss keeps attention on tokens that will be needed.

On held-out rows with facts, the script measures the loss at each size of the state and with the full cache, and how
many questions are answered. If a folder of text files is given, it also measures the loss on these. A run that was
stopped continues with the missing methods; models stay in `out`.

The share of the gap that is closed is (untrained - trained) / (untrained - full), in nats at equal slots, where full is
the full cache of the model that was trained with it on as many tokens.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import Command, arguments
from train_embedded import SAMPLED, Batches, Stage, training_texts

import jaxcompress as jc
from jaxcompress import embedded
from jaxcompress.checkpoints import SavedPolicy, save, save_policy
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation.operations import matmul_flops
from jaxcompress.evaluation.perplexity import perplexity
from jaxcompress.evaluation.recall import Recall, answers, exam, wording
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.rope import rotate
from jaxcompress.policies import Full
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.training.data import Batch
from jaxcompress.training.foresight import foresight_loss
from jaxcompress.training.objectives import bounded, causal, distilled, joint_retention
from jaxcompress.training.optimizer import muon_for_decoder, warmup_stable_decay
from jaxcompress.training.policy_objectives import policy_objective
from jaxcompress.training.retention_heads import init_retention, retention_loss
from jaxcompress.training.trainer import init_train_state, make_step


@dataclass(frozen=True)
class Arguments(Command):
    """Trains and measures. A run that was stopped continues with the missing methods."""

    methods: tuple[str, ...] = (
        "untrained", "full", "tova", "distilled-tova", "window+4", "h2o-layer", "retention", "distilled-retention",
        "dms", "full-time", "full-flops",
    )  # fmt: skip
    context: int = 1024
    fractions: tuple[int, ...] = (4, 8, 16)
    steps: int = 150
    rows: int = 4
    """Per step."""
    peak: float = 1e-3
    """Highest learning rate of models; networks that learn to forget use three times as much."""
    segment: int = 256
    bptt_segments: int | None = None
    """Segments over which the gradient goes back; all of them if not given."""
    turns: tuple[int, ...] = (8, 16, 4)
    """Sizes of the state, as fractions of the context, through which training goes in turn; 1, of distilled-retention
    only, is the full cache."""
    foresight: float = 0.3
    """Weight of the auxiliary loss."""
    watched: int = 2
    """Rows of a step for which the auxiliary loss is taken: it costs a pass of its own."""
    text: float = 0.5
    """Share of rows without a task."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: int = 16
    """Held-out rows, the same for all."""
    questions: int = 8
    """Facts in each held-out row, approximately."""
    model: str | None = None
    """Where training starts, a folder with a tokenizer; the model that ships if not given."""
    texts: Path | None = None
    """A folder of text files, on which the loss is measured too."""
    characters: int | None = None
    """Train only on documents up to so many characters in all."""
    out: Path = Path("runs/bounded")


QUICK = Arguments(
    quick=True,
    context=128,
    steps=2,
    rows=1,
    segment=64,
    turns=(8,),
    fractions=(8,),
    methods=("untrained", "tova"),
    seeds=(0,),
    tasks=1,
    questions=2,
    characters=20_000,
    watched=1,
    out=Path("runs/quick/bounded"),
)


def training_rows(tokenizer: jc.Tokenizer, seed: int, args: Arguments) -> Batches:
    texts = training_texts(args.characters)
    order = np.random.default_rng(seed).permutation(len(texts))
    encode = lambda text: tokenizer.encode(text, add_bos=False).tolist()
    bos: Any = tokenizer.bos_id
    stream = np.concatenate([[*encode(texts[i]), bos] for i in order]).astype(np.int32)
    return Batches(stream, bos, wording(tokenizer.vocabulary(), encode), 1000 + seed)


def held_out_rows(tokenizer: jc.Tokenizer, args: Arguments) -> list[Recall]:
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    text = np.concatenate([encode(document.text) for document in held_out()])
    words = wording(tokenizer.vocabulary(), lambda text: encode(text).tolist())
    return exam(
        text,
        words,
        rows=args.tasks,
        length=args.context,
        notes=args.questions,
        questions=args.questions,
        seed=7,
        bos=tokenizer.bos_id,
    )


Objectives = list[Callable[[Any, Batch, Any, Any], Any]]


def through_states(policy: jc.Policy, args: Arguments, **how: Any) -> Objectives:
    """One objective for each size of the state."""
    how |= dict(segment=args.segment, bptt_segments=args.bptt_segments)
    make = distilled if "teacher" in how else bounded
    return in_turn(lambda fraction: make(policy, args.context // fraction, **how), args)


def in_turn(make: Callable[[int], Callable[..., Any]], args: Arguments) -> Objectives:
    """One objective for each turn. Turns of one size share the objective and its compiled step."""
    by_size = {fraction: make(fraction) for fraction in args.turns}
    return [by_size[fraction] for fraction in args.turns]


def with_foresight(objective: Callable[..., Any], args: Arguments) -> Callable[..., Any]:
    """Adds to a decoder's objective the auxiliary loss of a plain pass over some of the rows."""
    if not args.foresight:
        return objective

    def short(model: Decoder, tokens: jax.Array, sample: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

        def attend(q, k, v, positions, layer, index, carry, xs):
            q, k = (rotate(x, positions[..., None], model.config.rope) for x in (q, k))
            return (
                causal_attention(q, k, v, positions),
                carry,
                foresight_loss(q, k, positions, sample, among=args.context // max(args.fractions)),
            )

        return model.run_layers(model.embed(tokens), positions, attend)[2].mean()

    def both(model: Decoder, batch: Batch, step: Any, key: Any) -> tuple[dict[str, Any], Any]:
        metrics, slope = objective(model, batch, step, key)
        # Sample queries at answers and at random positions.
        tokens, weights = batch.tokens[: args.watched, :-1], batch.weights[: args.watched]
        noise = jax.random.uniform(key, weights.shape)
        answers = jax.lax.top_k(weights + 0.1 * noise, SAMPLED[1])[1]
        anywhere = jax.lax.top_k(noise, SAMPLED[0])[1]
        sample = jnp.sort(jnp.concatenate([answers, anywhere], axis=1), axis=1).astype(jnp.int32)
        apart, more = jax.value_and_grad(short)(model, tokens, sample)
        return metrics | {"foresight": apart}, jax.tree.map(lambda a, b: a + args.foresight * b, slope, more)

    return both


def watching(model: Decoder) -> Objectives:
    """The objective of a retention head that is trained on the model's attention."""

    def objective(head: Any, batch: Batch, step: Any, key: Any) -> tuple[dict[str, Any], Any]:
        watch = lambda head: retention_loss(model, batch.tokens[:, :-1], head, scope="layer")
        loss, slope = jax.value_and_grad(watch)(head)
        return {"loss": loss}, slope

    return [objective]


def with_retention(teacher: Decoder, args: Arguments) -> Objectives:
    """Objectives of a model and a retention head, for each size of the state in turn."""

    def at(fraction: int) -> Callable[..., Any]:
        how: dict[str, Any] = dict(
            segment=args.segment, bptt_segments=args.bptt_segments, teacher=teacher, language=0.5
        )
        through = lambda policy: with_foresight(
            causal() if fraction == 1 else distilled(policy, args.context // fraction, **how), args
        )
        return joint_retention(through, scope="layer", watched=args.watched)

    return in_turn(at, args)


class Trained(NamedTuple):
    """The result of training.

    Attributes:
      policy: the policy for reading with the model; None: any.
      seconds: time of all steps, without compilation.
    """

    model: Decoder
    policy: SavedPolicy | None
    seconds: float


def train(model: Decoder, method: str, batches: Batches, args: Arguments, *, steps: int) -> Trained:
    run = partial(optimise, batches, args)

    def also(objectives: Objectives) -> Objectives:
        each = {objective: with_foresight(objective, args) for objective in objectives}
        return [each[objective] for objective in objectives]

    if method.startswith("full"):
        model, seconds = run(model, also([causal()]), steps)
        return Trained(model, None, seconds)
    if method.endswith("retention"):
        head = init_retention(model.config, jax.random.key(0))
        if method == "retention":
            head, seconds = run(head, watching(model), steps, how=heads)
        else:
            both = lambda peak: optax.partition({"model": models(peak), "head": heads(peak)}, ("model", "head"))
            (model, head), seconds = run((model, head), with_retention(model, args), steps, how=both)
        return Trained(model, SavedPolicy("retention", {"scope": "layer"}, head._asdict()), seconds)
    if method == "dms":
        learned = policy_objective(model, "dms", jax.random.key(0), steps=steps, ratio=8.0)
        head, seconds = run(learned.params, [learned.objective], steps, how=heads)
        return Trained(model, SavedPolicy("dms", learned.settings, head._asdict()), seconds)
    name = method.removeprefix("distilled-")
    teacher: dict[str, Any] = dict(teacher=model, language=0.5) if method.startswith("distilled-") else {}
    model, seconds = run(model, also(through_states(get_policy(name), args, **teacher)), steps)
    return Trained(model, SavedPolicy(name, {}, {}), seconds)


def models(peak: Callable[[float], optax.Schedule]) -> optax.GradientTransformation:
    return muon_for_decoder(peak(1))


def heads(peak: Callable[[float], optax.Schedule]) -> optax.GradientTransformation:
    """The optimizer of networks that learn to forget, which start untrained."""
    return optax.adam(peak(3))


def optimise(
    batches: Batches,
    args: Arguments,
    params: Any,
    objectives: Objectives,
    steps: int,
    *,
    how: Callable[[Callable[[float], optax.Schedule]], optax.GradientTransformation] = models,
) -> tuple[Any, float]:
    """`steps` steps; the objectives take turns."""
    optimizer = how(lambda times: warmup_stable_decay(times * args.peak, steps, warmup=max(steps // 10, 1), decay=0.5))
    state, times = init_train_state(params, optimizer), []
    made = {objective: make_step(objective, optimizer) for objective in objectives}
    turns = [made[objective] for objective in objectives]
    stage = Stage(args.steps, args.rows, args.context, args.text)
    for number in range(steps):
        tokens, weights = batches(number, stage)
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


def measure(
    model: Decoder, policies: list[jc.Policy], tasks: list[Recall], texts: np.ndarray | None, args: Arguments
) -> list[dict[str, Any]]:
    """Loss and recall at each size of the state, and with the full cache."""
    rows = []
    for policy, slots in [(Full(), args.context)] + [(p, args.context // f) for p in policies for f in args.fractions]:
        given = answers(model, tasks, policy, slots)
        row = dict(policy=policy.name, slots=slots, nats=float(given.nats.mean()), recall=given.accuracy)
        if texts is not None:
            row["text"] = perplexity(model, texts, policy, slots).nats
        rows.append(row)
    return rows


def text_rows(tokenizer: jc.Tokenizer, folder: Path, args: Arguments) -> np.ndarray:
    """As many rows as there are tasks, from the middles of the files in turn."""
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise ValueError(f"there are no .txt files in {folder}")
    each = -(-args.tasks // len(files))
    rows = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        middle = text[len(text) // 2 :][: each * args.context * 8]
        tokens = tokenizer.encode(middle, add_bos=False)[: each * (args.context - 1)]
        rows += [np.r_[tokenizer.bos_id, row] for row in tokens.reshape(each, -1)]
    return np.stack(rows[: args.tasks]).astype(np.int32)


def steps_of(method: str, seed: int, model: Decoder, args: Arguments) -> int:
    """The number of steps: as given, or as many as cost the same as `tova`."""
    if method == "full-time":
        tova, plain = (
            json.loads((args.out / f"{name}-{seed}.json").read_text())["seconds"] for name in ("tova", "full")
        )
        return round(args.steps * tova / plain)
    if method == "full-flops":
        batch = Batch(jnp.zeros((args.rows, args.context + 1), jnp.int32), jnp.ones((args.rows, args.context)))
        count = lambda objective: matmul_flops(lambda *a: objective(*a, 0, jax.random.key(0)), model, batch)
        each = [count(with_foresight(objective, args)) for objective in through_states(get_policy("tova"), args)]
        return round(args.steps * sum(each) / len(each) / count(with_foresight(causal(), args)))
    return args.steps


UNLEARNED = "window+4", "h2o-layer", "tova"


def main(args: Arguments) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    source = embedded.decoder_folder() if args.model is None else args.model
    loaded = jc.load(source, dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    tasks = held_out_rows(tokenizer, args)
    texts = None if args.texts is None else text_rows(tokenizer, args.texts, args)
    unlearned = [get_policy(name) for name in UNLEARNED]
    for seed in args.seeds:
        batches = training_rows(tokenizer, seed, args)
        for method in args.methods:
            name = f"{method.replace('/', '_')}-{seed}"
            file, folder = args.out / f"{name}.json", args.out / name
            if file.exists() or (method == "untrained" and seed != args.seeds[0]):
                continue
            steps = steps_of(method, seed, model, args)
            now = Trained(model, None, 0.0)
            if method != "untrained":
                now = train(model, method, batches, args, steps=steps)
                shutil.rmtree(folder, ignore_errors=True)
                save(jax.tree.map(lambda x: x.astype(jnp.bfloat16), now.model), folder, tokenizer_from=loaded.folder)
                if now.policy is not None:
                    save_policy(now.policy, folder)
            policies = unlearned if now.policy is None else [now.policy.make()]
            if method in ("full-time", "full-flops"):
                policies = [get_policy("tova")]
            rows = measure(now.model, policies, tasks, texts, args)
            file.write_text(
                json.dumps(dict(method=method, seed=seed, steps=steps, seconds=now.seconds, rows=rows)) + "\n"
            )
            print(method, seed, f"{steps} steps, {now.seconds:.0f} s", *(
                f"{r['policy']}@{r['slots']} {r['nats']:.3f} {r['recall']:.0%}" for r in rows
            ), flush=True)  # fmt: skip
            jax.clear_caches()
    table(args)


def table(args: Arguments) -> None:
    """Means over seeds and their spread (largest - smallest), and the share of the gap that is closed, at each size."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for file in sorted(args.out.glob("*.json")):
        one = json.loads(file.read_text())
        for row in one["rows"]:
            found.setdefault((one["method"], row["policy"], row["slots"]), []).append(row)
    mean = lambda rows, what: float(np.mean([row[what] for row in rows]))
    spread = lambda rows, what: float(np.ptp([row[what] for row in rows]))
    best = mean(found["full", "full", args.context], "nats") if ("full", "full", args.context) in found else None
    print(f"\n{'method':20}{'policy':12}{'slots':>6}{'seeds':>6}{'nats':>16}{'recall':>14}{'closed':>8}{'text':>8}")
    for (method, policy, slots), rows in found.items():
        nats, recall = mean(rows, "nats"), mean(rows, "recall")
        before = found.get(("untrained", policy if policy in UNLEARNED else "tova", slots))
        closed = ""
        if best is not None and before is not None and method != "untrained":
            was = mean(before, "nats")
            closed = f"{(was - nats) / (was - best):.0%}"
        text = f"{mean(rows, 'text'):.3f}" if "text" in rows[0] else ""
        print(
            f"{method:20}{policy:12}{slots:6}{len(rows):6}{nats:10.3f} ±{spread(rows, 'nats') / 2:.3f}"
            f"{recall:8.0%} ±{spread(rows, 'recall') / 2:4.0%}{closed:>8}{text:>8}"
        )


if __name__ == "__main__":
    main(arguments(QUICK))
