"""Trains the language model that ships with the package, from a seed, on text that every Python carries.

    python experiments/train_embedded.py --out runs/embedded

Held-out documents are never read (see `jaxcompress.embedded.corpus`). Half of the tokens are recall tasks woven into
the text, since heads that look far back do not form in a few million tokens of text alone. The run goes from many
short contexts to few long ones; it can be stopped and started again.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import Command, arguments
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxcompress.checkpoints import save
from jaxcompress.embedded.corpus import documents
from jaxcompress.evaluation.recall import Recall, Wording, weave, wording
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.training.foresight import foresight_loss
from jaxcompress.training.loss import token_losses
from jaxcompress.training.optimizer import muon_for_decoder, warmup_stable_decay

BOS = "<|bos|>"
VOCABULARY = 2048
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY, hidden_size=192, intermediate_size=576, num_layers=4, num_heads=6, num_kv_heads=3,
    head_dim=32, rope=RopeConfig(theta=10000.0), qk_norm=True, tied=True, max_position=2048,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A number of steps, rows and tokens per row. `text` is the share of rows without a task. `foresight` is the weight
    of the loss that keeps attention on tokens that will be needed."""

    steps: int
    rows: int
    length: int
    text: float
    foresight: float = 0.0


STAGES = (
    Stage(900, 16, 256, 0.35),
    Stage(500, 8, 512, 0.5),
    Stage(200, 4, 1024, 0.4, foresight=0.1),
    Stage(700, 2, 2048, 0.4, foresight=0.3),
)
SAMPLED = 96, 64  # queries of a row at which foresight looks: anywhere, and where answers are given


@dataclass(frozen=True)
class Arguments(Command):
    """Trains the embedded model; writes checkpoints and a log under `out`."""

    out: Path = Path("runs/embedded")
    seed: int = 0
    peak: float = 4e-3
    """Highest learning rate."""
    save_every: int = 100
    stop_at: int | None = None
    """Stop after so many steps and export the model; the schedule stays that of the whole run."""
    stages: tuple[Stage, ...] = STAGES
    characters: int | None = None
    """Read only documents up to so many characters in all."""


QUICK = Arguments(
    quick=True,
    out=Path("runs/quick/embedded"),
    characters=20000,
    stages=(Stage(1, 1, 192, 0.35), Stage(1, 1, 192, 0.4, foresight=0.1)),
)


def training_texts(characters: int | None = None) -> list[str]:
    """Documents that are not held out; the first ones, up to so many characters in all."""
    texts = [d.text for d in documents() if not d.held_out]
    if characters is None:
        return texts
    ends = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(ends, characters)) + 1]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; digits stand alone, so that numbers are spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return tokenizer


class Batches:
    """Rows of BOS and text, some with tasks woven in; the i-th batch depends on the seed and i only."""

    def __init__(self, stream: np.ndarray, bos: int, words: Wording, seed: int):
        self.stream, self.bos, self.words, self.seed = stream, bos, words, seed

    def __call__(self, step: int, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [rows, length + 1] and the weight of predicting each but the first."""
        rng = np.random.default_rng((self.seed, step))
        rows = [self._row(rng, stage) for _ in range(stage.rows)]
        return np.stack([tokens for tokens, _ in rows]), np.stack([weights for _, weights in rows])

    def _text(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = rng.integers(len(self.stream) - length)
        return self.stream[start : start + length]

    def _row(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        t = stage.length
        filler, kind = self._text(rng, t), rng.uniform()
        if kind < stage.text:
            tokens, weights = filler, np.ones(t)
        elif kind < stage.text + 0.15:
            tokens, weights = self._repeats(rng, filler)
        else:
            tokens, weights = self._recall(rng, filler, t)
        return np.concatenate([[self.bos], tokens]), weights

    def _recall(self, rng: np.random.Generator, filler: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
        dense = rng.uniform() < 0.4
        most = max(2, t // (36 if dense else 80))
        notes, questions = int(rng.integers(1, most)), int(rng.integers(2, most + 1))
        # Half of the rows tell first and ask late, so that every distance up to the whole context occurs.
        early = rng.uniform() < 0.5
        told = (0.0, 0.35) if early else (0.0, 0.8)
        asked = (rng.uniform(0.3, 0.9), 1.0) if early else (0.1, 1.0)
        task: Recall = weave(
            filler, self.words, rng=rng, length=t, notes=notes, questions=questions, tell_in=told, ask_in=asked
        )
        return task.tokens, np.where(task.told, 0.0, np.where(task.asked, 2.0, 1.0))

    def _repeats(self, rng: np.random.Generator, filler: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spans, of the text or of random words, that come again later, verbatim."""
        tokens, weights, t = filler.copy(), np.ones(len(filler)), len(filler)
        for _ in range(max(1, t // 256)):
            n = int(rng.integers(8, t // 6))
            first, second = sorted(rng.integers(0, t - 2 * n, 2))
            second += n
            if rng.uniform() < 0.5:
                tokens[first : first + n] = rng.choice(self.words.words, n)
                weights[first : first + n] = 0.0
            tokens[second : second + n] = tokens[first : first + n]
            weights[second : second + n], weights[second] = 1.0, 0.0
        return tokens, weights


def sample_queries(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """Queries sampled for foresight, [B, R]: random positions, and those from which answers are predicted."""
    rows = []
    for row in weights:
        answers = np.flatnonzero(row > 1)[: SAMPLED[1]]
        anywhere = rng.choice(len(row), SAMPLED[0] + SAMPLED[1] - len(answers), replace=False)
        rows.append(np.sort(np.concatenate([answers, anywhere])))
    return np.stack(rows).astype(np.int32)


@partial(jax.jit, static_argnames=("graph", "optimizer", "foresight"), donate_argnames=("params", "state"))
def train_step(
    params: Any,
    state: Any,
    tokens: Any,
    weights: Any,
    sample: Any,
    *,
    graph: Any,
    optimizer: optax.GradientTransformation,
    foresight: float,
):
    """One step of the optimizer; returns weights, optimizer state, loss, foresight loss and gradient norm."""

    def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        model = nnx.merge(graph, params)
        inputs = tokens[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)

        def attend(q, k, v, positions, layer, index, carry, xs):
            q, k = (rotate(x, positions[..., None], CONFIG.rope) for x in (q, k))
            short = foresight_loss(q, k, positions, sample) if foresight else jnp.zeros(())
            return causal_attention(q, k, v, positions), carry, short

        x, _, short = model.run_layers(model.embed(inputs), positions, attend)
        losses = token_losses(model.logits(model.norm(x)), tokens[:, 1:])
        main = (losses * weights).sum() / weights.sum()
        return main + foresight * short.mean(), (main, short.mean())

    (_, (main, short)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, main, short, optax.global_norm(grads)


def main(args: Arguments) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    texts = training_texts(args.characters)
    if (args.out / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts)
        tokenizer.save(str(args.out / "tokenizer.json"))
    bos = tokenizer.get_vocab()[BOS]
    order = np.random.default_rng(args.seed).permutation(len(texts))
    stream = np.concatenate([[*tokenizer.encode(texts[i], add_special_tokens=False).ids, bos] for i in order]).astype(
        np.int32
    )
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters, {len(stream):,} tokens", flush=True)
    batches = Batches(
        stream,
        bos,
        wording(tokenizer.get_vocab(), lambda text: tokenizer.encode(text, add_special_tokens=False).ids),
        args.seed,
    )

    total = sum(stage.steps for stage in args.stages)
    optimizer = muon_for_decoder(warmup_stable_decay(args.peak, total))
    graph, params = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(args.seed)))
    state = optimizer.init(params)
    saved = sorted(args.out.glob("step-*"))
    done = 0
    if saved:
        done = int(saved[-1].name.removeprefix("step-"))
        leaves, tree = jax.tree.flatten((params, state))
        params, state = jax.tree.unflatten(tree, ocp.load(str(saved[-1].absolute()), leaves))
        print(f"going on from step {done}", flush=True)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} weights, {total} steps", flush=True)

    plan = [stage for stage in args.stages for _ in range(stage.steps)]
    started, seen, losses = time.time(), 0, []
    with open(args.out / "log.jsonl", "a") as log:
        for step in range(done, min(total, args.stop_at or total)):
            tokens, weights = batches(step, plan[step])
            stage = plan[step]
            sample = sample_queries(np.random.default_rng((args.seed, step, 1)), weights)
            params, state, loss, short, norm = train_step(
                params, state, tokens, weights.astype(np.float32), sample, graph=graph, optimizer=optimizer,
                foresight=stage.foresight,
            )  # fmt: skip
            losses.append(float(loss))
            seen += weights.size
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {step}")
            if (step + 1) % 20 == 0:
                speed = seen / (time.time() - started)
                row = dict(
                    step=step + 1, length=stage.length, loss=round(float(np.mean(losses[-20:])), 4),
                    foresight=round(float(short), 3), norm=round(float(norm), 3), tokens_per_second=round(speed),
                )  # fmt: skip
                print(json.dumps(row), flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
            if (step + 1) % args.save_every == 0 or step + 1 == total:
                ocp.save(str((args.out / f"step-{step + 1:06d}").absolute()), jax.tree.leaves((params, state)))
    export(nnx.merge(graph, params), tokenizer, args)


def export(model: Decoder, tokenizer: Tokenizer, args: Arguments) -> None:
    """Writes the Hugging Face folder that ships: bfloat16 weights and the tokenizer, which puts BOS first."""
    bos = tokenizer.get_vocab()[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    special = dict(bos_token=BOS, eos_token=BOS, pad_token=BOS)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json", pretty=False)
        for name, content in {
            "tokenizer_config.json": dict(tokenizer_class="PreTrainedTokenizerFast", **special),
            "config.json": dict(bos_token_id=bos, eos_token_id=bos, pad_token_id=bos),
        }.items():
            Path(folder, name).write_text(json.dumps(content))
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
        saved = save(half, args.out / "model", tokenizer_from=folder)
    size = sum(file.stat().st_size for file in saved.iterdir())
    print(f"{saved}: {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main(arguments(QUICK))
