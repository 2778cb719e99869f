"""Random against designed scores: right answers about drawings over visual tokens kept.

    python experiments/random_against_designed.py --out docs/images/random_against_designed.png

The first claim of the position paper (Liu et al. 2025, section 4): a method that chooses tokens has to beat random
choice and an even spread. The script measures the embedded vision-language model on held-out pictures. Random is the
mean of several seeds, with their range.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from command import Command, arguments
from matplotlib.figure import Figure

from jaxcompress.checkpoints import load_embedded_vision
from jaxcompress.evaluation.visual import Examiner, Outcome, exam, guessing
from jaxcompress.vision import Method, get_method
from jaxcompress.vision.encoders import random_score, top_patches


@dataclass(frozen=True)
class Arguments(Command):
    """Draws accuracy over tokens kept, and over FLOPs."""

    out: Path = Path("docs/images/random_against_designed.png")
    tokens: tuple[int, ...] = (64, 36, 16, 9)
    methods: tuple[str, ...] = ("grid", "pool", "fastervlm", "visionzip", "fastv", "mustdrop")
    pictures: int = 48
    seeds: int = 3


QUICK = Arguments(
    quick=True,
    out=Path("runs/quick/random_against_designed.png"),
    tokens=(16,),
    methods=("fastervlm", "fastv"),
    pictures=2,
    seeds=1,
)


def main(args: Arguments) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    loaded = load_embedded_vision()
    tokenizer = loaded.tokenizer
    asked = exam(loaded.model, tokenizer, loaded.processor, pictures=args.pictures)
    examiner = Examiner(loaded.model, asked)
    rows: dict[str, list[Outcome]] = {name: [] for name in ["random", *args.methods]}
    whole = examiner(get_method("full"))
    print(
        f"full: {whole.word_accuracy:.1%}; guessing {guessing(asked):.1%}; {len(asked.answers)} questions", flush=True
    )
    spread: list[tuple[float, float]] = []
    for n in args.tokens:
        drawn = [
            examiner(Method("random", top_patches(random_score(seed), n), lambda config, n=n: n))
            for seed in range(args.seeds)
        ]
        right = [one.word_accuracy for one in drawn]
        spread.append((min(right), max(right)))
        rows["random"].append(drawn[0]._replace(word_accuracy=float(np.mean(right))))
        for name in args.methods:
            rows[name].append(examiner(get_method(name, n)))
        print(n, {name: round(row[-1].word_accuracy, 3) for name, row in rows.items()}, flush=True)
    draw(rows, whole, spread, guessing(asked), args)


def draw(
    rows: dict[str, list[Outcome]], whole: Outcome, spread: list[tuple[float, float]], chance: float, args: Arguments
) -> None:
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for name, row in rows.items():
            style = dict(marker="o", markersize=4, color="0.4" if name == "random" else None, label=name)
            right_answers = [one.word_accuracy for one in row]
            line = left.plot(args.tokens, right_answers, **style)[0]
            right.plot(
                [one.flops / 1e6 for one in row],
                [one.word_accuracy for one in row],
                **style | {"color": line.get_color()},
            )
        low, high = zip(*spread, strict=True)
        left.fill_between(args.tokens, low, high, color="0.4", alpha=0.2, linewidth=0)
        left.set(xlabel=f"visual tokens left in the end, of {whole.tokens}", ylabel="right answers", xscale="log")
        left.set(xticks=args.tokens, xticklabels=list(map(str, args.tokens)))
        left.minorticks_off()
        right.set(xlabel="MFLOPs of a prompt in the decoder (matrix products)", xscale="log")
        for axes in (left, right):
            axes.axhline(whole.word_accuracy, color="k", linestyle="--", linewidth=1, label="every token")
            axes.axhline(chance, color="0.7", linestyle=":", linewidth=1, label="guessing without looking")
            axes.grid(alpha=0.25)
        left.legend(frameon=False)
        figure.suptitle(f"{len(whole.kept)} questions about {args.pictures} drawings, embedded vision-language model")
        figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main(arguments(QUICK))
