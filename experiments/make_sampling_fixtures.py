"""Writes tests/fixtures/sampling.npz: what Hugging Face's logits processors do with a few rows of logits.

Needs torch and transformers, which the library itself does not:

    python experiments/make_sampling_fixtures.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from command import Command, arguments, need

need("torch", install='pip install -e ".[parity]"')
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCABULARY = 32  # a power of two, so that the probabilities of equal logits add up without rounding
# In the order in which `generate` applies them.
PROCESSORS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
SETTINGS: list[dict[str, float | int]] = [
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.6, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.05},
    {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.7, "temperature": 2.5, "top_k": 5, "top_p": 0.35, "min_p": 0.3},
]


@dataclass(frozen=True)
class Arguments(Command):
    """Writes the file."""

    out: Path = Path(__file__).parents[1] / "tests" / "fixtures" / "sampling.npz"


QUICK = Arguments(quick=True, out=Path("runs/quick/sampling.npz"))


def rows() -> np.ndarray:
    """Plain rows, and hard ones: ties, a peak, all equal, tokens that are already excluded."""
    rng = np.random.default_rng(0)
    plain = 3 * rng.standard_normal((3, VOCABULARY))
    ties = np.round(2 * rng.standard_normal((2, VOCABULARY)))
    peak = np.where(np.arange(VOCABULARY) == 11, 60.0, rng.standard_normal(VOCABULARY))
    equal = np.full(VOCABULARY, 0.5)
    ruled_out = np.where(rng.random(VOCABULARY) < 0.7, -np.inf, rng.standard_normal(VOCABULARY))
    return np.concatenate([plain, ties, [peak, equal, ruled_out]]).astype(np.float32)


def main(args: Arguments) -> None:
    logits = rows()
    history = np.random.default_rng(1).integers(0, VOCABULARY, (len(logits), 9)).astype(np.int32)
    # Beyond 16 elements torch orders ties by chance unless told otherwise, and top-p would cut among them by chance.
    torch.sort = partial(torch.sort, stable=True)
    expected = []
    for setting in SETTINGS:
        chain = LogitsProcessorList([PROCESSORS[name](setting[name]) for name in PROCESSORS if name in setting])
        expected.append(chain(torch.tensor(history, dtype=torch.int64), torch.tensor(logits)).numpy())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.out,
        logits=logits,
        history=history,
        settings=[json.dumps(setting) for setting in SETTINGS],
        expected=np.stack(expected),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
    )


if __name__ == "__main__":
    main(arguments(QUICK))
