"""Trains a small word classifier from nothing, as the one that shipped before.

    python experiments/train_prompt_compressor.py --data google_sentcomp_9k.jsonl --out runs/compressor

Two kinds of labelled words, half of the rows each:

- people's: sentences and their compressions by deleting words, JSON lines with "sentence" and "compression"
  (Filippova and Altun 2013, made from news headlines); the last --held-out lines are never trained on;
- our own rules': documentation topics and docstrings that every Python installation carries. Of each piece, --rule-rate
  of the words stay: by half of no function words, by half of what the embedded language model did not expect.
"""

from __future__ import annotations

import ast
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from command import Command, arguments, stop
from flax import nnx
from sentences import write_sentences
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxcompress.checkpoints import load_embedded, save_encoder
from jaxcompress.embedded.corpus import documents
from jaxcompress.models.encoder import Encoder, EncoderConfig
from jaxcompress.prompt import WORDS, keep
from jaxcompress.prompt.baselines import content_words
from jaxcompress.prompt.dataset import Example, Pair, label, read_examples, write_examples
from jaxcompress.prompt.information import Reader, self_information
from jaxcompress.prompt.learning import PackedRows, batches, classification, label_losses, rows_of
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.teacher import cut_for_teacher
from jaxcompress.prompt.word_scores import mixed
from jaxcompress.training import Checkpoints, MetricsFile, fit, init_train_state, make_step, muon_for_decoder
from jaxcompress.training.optimizer import warmup_stable_decay

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Stage(NamedTuple):
    """A number of steps, rows per step and tokens per row."""

    steps: int
    rows: int
    length: int


STAGES = (Stage(400, 48, 64), Stage(200, 24, 128))
POSITIONS = 128  # texts are read in chunks of at most so many tokens, which begin with a sentence


@dataclass(frozen=True)
class Arguments(Command):
    """Trains the compressor; writes checkpoints, a log and the model folder under `out`."""

    data: Path | None = None
    """JSON lines with "sentence" and "compression"; required, except with `--quick`, which makes some up."""
    out: Path = Path("runs/compressor")
    seed: int = 0
    vocabulary: int = 4096
    width: int = 160
    layers: int = 4
    stages: tuple[Stage, ...] = STAGES
    peak: float = 3e-3
    """Highest learning rate."""
    held_out: int = 1000
    """Held-out lines: the last of `data`."""
    rule_rate: float = 0.45
    rule_characters: int = 1_200_000
    """Characters of documentation and docstrings."""
    people: float = 0.65
    """Share of the rows whose labels are people's."""


QUICK = Arguments(
    quick=True,
    out=Path("runs/quick/compressor"),
    data=None,
    vocabulary=400,
    width=32,
    layers=1,
    stages=(Stage(2, 2, 32),),
    held_out=4,
    rule_characters=4_000,
)


def read_people(path: Path, held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Sentences to train on, and the last ones."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = [Pair("people", at, line["sentence"], line["compression"]) for at, line in enumerate(lines)]
    return pairs[:-held_out], pairs[-held_out:]


def prose(characters: int, seed: int, held_out: bool = False) -> list[str]:
    """Documentation topics, then docstrings in a random order, in pieces, up to so many characters."""
    chosen = [document for document in documents() if document.held_out == held_out]
    topics = [document.text for document in chosen if document.name.startswith("topics/")]
    strings = [text for document in chosen if document.name.endswith(".py") for text in docstrings(document.text)]
    np.random.default_rng(seed).shuffle(strings)
    pieces, total = [], 0
    for text in [*topics, *strings]:
        for piece in cut_for_teacher(text, limit=120):
            pieces.append(piece)
            total += len(piece)
        if total >= characters:
            break
    return pieces


def docstrings(source: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) > 120]


def by_rules(pieces: list[str], rate: float) -> list[Example]:
    """Examples labelled by our own rules."""
    loaded = load_embedded()
    reader = Reader(loaded.model, loaded.tokenizer, slots=128, segment=256)
    scorer = mixed((0.5, content_words()), (0.5, self_information(reader)))
    examples = []
    for piece in pieces:
        scored = scorer(piece)
        if len(scored.spans) > 3:
            kept = keep(scored, WORDS, rate=rate)
            examples.append(Example(piece, words_of(piece), kept.labels.tolist()))
    return examples


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """WordPiece, cased."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=SPECIAL, limit_alphabet=160, continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer


def export(model: Encoder, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder (BertForTokenClassification): bfloat16 weights and the tokenizer."""
    marks = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    settings = dict(tokenizer_class="BertTokenizerFast", do_lower_case=False, model_max_length=512, **marks)
    with tempfile.TemporaryDirectory() as source:
        tokenizer.save(f"{source}/tokenizer.json", pretty=False)
        Path(source, "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
        saved = save_encoder(half, folder, tokenizer_from=source)
    size = sum(file.stat().st_size for file in saved.iterdir())
    print(f"{saved}: {size / 1e6:.1f} MB", flush=True)


def main(args: Arguments) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None and not args.quick:
        stop('give labelled sentences with --data (JSON lines with "sentence" and "compression")')
    data = write_sentences(args.out / "sentences.jsonl") if args.data is None else args.data
    train, held_out = read_people(data, args.held_out)
    people, report = label(train)
    print(f"people's: {report}", flush=True)
    pieces = prose(args.rule_characters, args.seed)
    cached = args.out / "rules.jsonl"
    if not cached.exists():
        write_examples(by_rules(pieces, args.rule_rate), cached)
    rules = read_examples(cached)
    print(f"by our rules: {len(rules)} pieces, {sum(len(example.words) for example in rules):,} words", flush=True)
    if not (args.out / "tokenizer.json").exists():
        texts = [example.text for example in people] + pieces
        train_tokenizer(texts, args.vocabulary).save(str(args.out / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    order = np.random.default_rng(args.seed)
    shuffled = lambda examples: [examples[at] for at in order.permutation(len(examples))]
    own, theirs = shuffled(rules), shuffled(people)
    tests = rows_of(label(held_out, variation=100.0, gap=100.0)[0], tokenizer, POSITIONS)

    config = EncoderConfig(
        tokenizer.get_vocab_size(), args.width, 4 * args.width, args.layers, args.width // 32, max_position=POSITIONS
    )
    model = Encoder(config, rngs=nnx.Rngs(args.seed))
    total = sum(stage.steps for stage in args.stages)
    optimizer = muon_for_decoder(warmup_stable_decay(args.peak, total, warmup=total // 12, decay=0.5))
    step = make_step(classification(mask=tokenizer.token_to_id("[UNK]"), masked=0.08), optimizer)
    print(f"{sum(x.size for x in jax.tree.leaves(model)):,} weights, {total} steps", flush=True)
    with Checkpoints(args.out / "checkpoints", keep=1) as checkpoints:
        state, where, end = init_train_state(model, optimizer, seed=args.seed), None, 0
        if checkpoints.latest:
            state, where = checkpoints.restore(state)
        tell = lambda number, numbers: None if number % 20 else print(number, numbers, flush=True)
        for stage in args.stages:
            begin, end = end, end + stage.steps
            if int(state.step) >= end:
                continue
            sources = [rows_of(examples, tokenizer, stage.length) for examples in (theirs, own)]
            rows = batches(*sources, shares=(args.people, 1 - args.people), batch=stage.rows, seed=args.seed)
            if where is not None and int(state.step) > begin:
                rows.set_state(where)
            print(
                f"rows of {stage.length}: {len(sources[0])} of people's labels, {len(sources[1])} of ours", flush=True
            )
            with MetricsFile(args.out / "metrics.jsonl", after=int(state.step)) as lines:
                log = [lines, tell]
                state = fit(state, step, rows, steps=end, checkpoints=checkpoints, save_every=50, log=log, bar=False)
    export(state.params, tokenizer, args.out / "model")
    print("held-out people's labels:", evaluate(state.params, tests), flush=True)


def evaluate(model: Any, rows: PackedRows) -> dict[str, float]:
    """Loss and accuracy over subwords."""

    @jax.jit
    def measure(model: Any, batch: Any) -> Any:
        ids, valid, labels = batch.tokens
        return label_losses(model(ids, valid), labels, batch.weights)

    total = np.zeros(3)
    for at in range(len(rows)):
        batch = jax.tree.map(lambda x: x[None], rows[at])
        weight = batch.weights.sum()
        total += [float(x) * weight for x in (*measure(model, batch), 1.0)]
    return dict(loss=total[0] / total[2], accuracy=total[1] / total[2])


if __name__ == "__main__":
    main(arguments(QUICK))
