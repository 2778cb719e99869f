"""The log-likelihoods of our model in lm-evaluation-harness against those of the harness's own model in PyTorch.

    python experiments/lm_eval_parity.py --model folder

Both get the same requests: continuations of contexts of different lengths, with and without a chat template, and whole
texts that are read in windows. Our model keeps the full cache, so the two differ by rounding only. What must agree is
their model with its option softmax_dtype=float64: by default it takes the logarithm of the softmax in float32, which is
off by 4e-3 in a text of 512 tokens of SmolLM2 when all else is float64, and ours by 1e-4. The difference from that
default is printed too.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import Command, arguments, need, stop

need("torch", "lm_eval", install='pip install -e ".[parity,lm-eval]"')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from jaxcompress import embedded  # noqa: E402
from jaxcompress.embedded.corpus import held_out  # noqa: E402
from jaxcompress.evaluation.harness import HarnessModel  # noqa: E402


@dataclass(frozen=True)
class Arguments(Command):
    """Prints the largest difference of each kind of request, and both times (JSON)."""

    model: Path | None = None
    """A folder in Hugging Face's format; the embedded model if not given."""
    pairs: int = 24
    """Contexts with a continuation."""
    texts: int = 4
    """Whole texts."""
    words: int = 160
    """Words of the longest context; a text has four times as many."""
    window: int = 512
    """Tokens of a window of a text."""
    most: float = 1e-3
    """End with exit code 2 if a log-likelihood differs by more."""


QUICK = Arguments(quick=True, pairs=4, texts=1, words=20, window=64)


def requests(args: Arguments, chat: Any) -> dict[str, list[tuple[str, ...]]]:
    """What is asked, by kind."""
    words = " ".join(document.text for document in held_out("topics/")).split()
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(args.pairs):
        length, at = 1 + (number + 1) * args.words // args.pairs, int(rng.integers(len(words) - 5 * args.words))
        context, after = " ".join(words[at : at + length]), " ".join(words[at + length : at + length + 1 + number % 5])
        pairs.append((context, f" {after}"))
    starts = rng.integers(len(words) - 5 * args.words, size=args.texts)
    asked: dict[str, list[tuple[str, ...]]] = {
        "loglikelihood": [*pairs, ("", pairs[0][1].strip())],
        "loglikelihood_rolling": [(" ".join(words[at : at + 4 * args.words]),) for at in starts.tolist()],
    }
    if chat is not None:
        asked["loglikelihood, chat"] = [(chat([dict(role="user", content=a)]), b.strip()) for a, b in pairs]
    return asked


def main(args: Arguments) -> None:
    logging.disable(logging.WARNING)
    folder = str(embedded.decoder_folder() if args.model is None else args.model)
    how: dict[str, Any] = dict(dtype="float32", batch_size=4, max_length=args.window)
    ours, theirs = HarnessModel(folder, "full", **how), HFLM(folder, device="cpu", softmax_dtype="float64", **how)
    chat = ours.apply_chat_template if ours.loaded.tokenizer.has_chat_template else None
    told: dict[str, Any] = {}
    for kind, asked in requests(args, chat).items():
        name = kind.partition(",")[0]
        given = [Instance(name, {}, one, number) for number, one in enumerate(asked)]  # type: ignore[arg-type]
        scores, seconds = [], []
        for one, softmax in ((ours, None), (theirs, torch.float64), (theirs, None)):
            theirs.softmax_dtype = softmax
            begun = time.perf_counter()
            scores.append(getattr(one, name)(given))
            seconds.append(round(time.perf_counter() - begun, 1))
        flat = [np.array([s[0] if isinstance(s, tuple) else s for s in some]) for some in scores]
        greedy = [[s[1] for s in some if isinstance(s, tuple)] for some in scores[:2]]
        told[kind] = dict(
            requests=len(asked), largest_difference=float(np.abs(flat[0] - flat[1]).max()),
            from_their_default=float(np.abs(flat[0] - flat[2]).max()),
            largest=float(np.abs(flat[1]).max()), greedy_differs=sum(a != b for a, b in zip(*greedy, strict=True)),
            seconds=dict(ours=seconds[0], theirs=seconds[1]),
        )  # fmt: skip
    print(json.dumps(told, indent=1))
    worst = max(one["largest_difference"] for one in told.values())
    if worst > args.most:
        stop(f"log-likelihoods differ by up to {worst:.2g}, more than {args.most:.2g}")


if __name__ == "__main__":
    main(arguments(QUICK))
