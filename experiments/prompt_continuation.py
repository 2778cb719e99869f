"""What the embedded language model loses when its context is shortened, for several ways to choose the words.

    python experiments/prompt_continuation.py --data google_sentcomp_9k.jsonl

Prints two tables: F1 of kept words on held-out human compressions (with --data), and the loss on the continuation of
held-out documents as the rate falls. A document gives a context and the text after it. The context is shortened to an
exact share of its words. The loss is always over the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command import Command, arguments
from sentences import write_sentences

from jaxcompress.checkpoints._embedded import load_embedded
from jaxcompress.embedded.corpus import held_out
from jaxcompress.inputs.text import json_lines
from jaxcompress.policies import Full
from jaxcompress.prompt import WORDS, Compressor, keep
from jaxcompress.prompt.baselines import content_words, evenly_spread, first_words, random_words, tf_idf
from jaxcompress.prompt.dataset import Pair, label
from jaxcompress.prompt.information import Reader, self_information
from jaxcompress.prompt.llmlingua import llmlingua
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.word_scores import ScoredWords, Scorer

ROWS = 8


@dataclass(frozen=True)
class Arguments(Command):
    """Measures the shipped compressor and its peers."""

    data: Path | None = None
    """JSON lines with "sentence" and "compression"; the last `--held-out` lines are used. `--quick` makes some up."""
    held_out: int = 500
    rates: tuple[float, ...] = (1.0, 0.8, 0.65, 0.5, 0.35, 0.2)
    contexts: int = 32
    words: int = 220
    """Words of a context."""
    tokens: int = 96
    """Tokens of a continuation."""
    seeds: int = 3
    """Seeds of random words."""
    kind: str = "topics/"
    """Prefix of the held-out documents' names."""
    out: Path | None = None
    """JSON."""


QUICK = Arguments(quick=True, held_out=8, contexts=2, words=40, tokens=16, rates=(1.0, 0.5), seeds=1)


def scorers(reader: Reader) -> dict[str, Scorer]:
    return {
        "shipped classifier": Compressor.load(dtype="float32"),
        "self-information": self_information(reader),
        "llmlingua": llmlingua(reader),
        "tf-idf": tf_idf(),
        "content words": content_words(),
        "uniform": evenly_spread(),
        "first words": first_words(),
    }


def f1(kept: np.ndarray, gold: np.ndarray) -> float:
    """2 |kept and gold| / (|kept| + |gold|); 1 if both are empty."""
    total = int(kept.sum() + gold.sum())
    return 2 * int((kept & gold).sum()) / total if total else 1.0


def best_words(scored: ScoredWords, n: int) -> np.ndarray:
    """Labels of the n best words."""
    return keep(scored, WORDS, tokens=n).labels if n else np.zeros(len(scored.spans), bool)


def agreement(data: Path, last: int, chosen: Mapping[str, Scorer], seeds: int) -> dict[str, float]:
    """Mean F1 of kept words over sentences; each method keeps as many words as people did."""
    known = [given for _, _, given in json_lines(data)][-last:]
    pairs = [Pair("", at, given["sentence"], given["compression"]) for at, given in enumerate(known)]
    examples, _ = label(pairs, variation=100.0, gap=100.0)
    every = dict(chosen) | {f"random {seed}": random_words(seed) for seed in range(seeds)}
    table = {}
    for name, scorer in every.items():
        found = [f1(best_words(scorer(one.text), sum(one.labels)), np.array(one.labels)) for one in examples]
        table[name] = float(np.mean(found))
    random = [table.pop(f"random {seed}") for seed in range(seeds)]
    return table | {"random": float(np.mean(random))}


def places(args: Arguments) -> list[tuple[str, str]]:
    """(context, continuation) of held-out documents, evenly spread."""
    found = []
    for document in held_out(args.kind):
        words = words_of(document.text)
        step = args.words + 120
        for at in range(0, len(words) - step, step):
            middle = words[at + args.words].start
            context = document.text[words[at].start : middle].rstrip() + "\n"
            found.append((context, document.text[middle : words[at + step].start]))
    chosen = np.linspace(0, len(found) - 1, min(args.contexts, len(found))).astype(int)
    return [found[at] for at in chosen]


def continuation_losses(reader: Reader, contexts: list[str], rests: list[np.ndarray]) -> float:
    """The mean loss of equally long continuations, each after its context."""
    losses = []
    for first in range(0, len(contexts), ROWS):
        part = slice(first, first + ROWS)
        encoded = [reader.tokenizer.encode_with_places(context)[0] for context in contexts[part]]
        tokens = np.full((ROWS, max(1, *map(len, encoded))), -1, np.int32)
        rest = np.full((ROWS, len(rests[0])), -1, np.int32)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)], rest[row] = ids, rests[first + row]
        _, state = reader.losses(reader.begin(ROWS), tokens)
        losses.append(reader.losses(state, rest)[0][: len(encoded)])
    return float(np.concatenate(losses).mean())


def main(args: Arguments) -> None:
    loaded = load_embedded()
    model, tokenizer = loaded.model, loaded.tokenizer
    scoring = Reader(model, tokenizer, slots=256, segment=64)
    judge = Reader(model, tokenizer, Full(), slots=1024, segment=128)
    chosen = scorers(scoring)
    result: dict[str, object] = {}
    data = write_sentences(Path("runs/quick/sentences.jsonl")) if args.data is None and args.quick else args.data
    if data is not None:
        table = agreement(data, args.held_out, chosen, args.seeds)
        result["f1"] = table
        for name, value in sorted(table.items(), key=lambda row: -row[1]):
            print(f"{name:22}{value:8.3f}", flush=True)
    pieces = places(args)
    rests = [tokenizer.encode_with_places(rest)[0][: args.tokens] for _, rest in pieces]
    measured: dict[str, float] = {}

    def loss(contexts: list[str]) -> float:
        key = json.dumps(contexts)
        if key not in measured:
            measured[key] = continuation_losses(judge, contexts, rests)
        return measured[key]

    print(f"{len(pieces)} contexts of {args.words} words; without any context {loss([''] * len(pieces)):.3f} nats")
    print(f"{'rate':22}" + "".join(f"{rate:8.2f}" for rate in args.rates))
    losses: dict[str, list[float]] = {}
    for name, scorer in (chosen | {f"random {seed}": random_words(seed) for seed in range(args.seeds)}).items():
        scored = [scorer(context) for context, _ in pieces]
        losses[name] = [
            loss([keep(one, WORDS, rate=rate, force=["\n"]).text + "\n" for one in scored]) for rate in args.rates
        ]
        if not name.startswith("random"):
            print(f"{name:22}" + "".join(f"{value:8.3f}" for value in losses[name]), flush=True)
    random = np.mean([losses.pop(f"random {seed}") for seed in range(args.seeds)], axis=0)
    losses["random"] = random.tolist()
    print(f"{'random':22}" + "".join(f"{value:8.3f}" for value in random))
    if args.out is not None:
        result |= dict(rates=args.rates, losses=losses, without_context=loss([""] * len(pieces)))
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(arguments(QUICK))
