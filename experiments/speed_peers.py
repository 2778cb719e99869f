"""This library beside transformers and kvpress on one model: prefill, decoding and peak memory, as ratios of one run.

    pip install "torch==2.13.0" transformers kvpress
    python experiments/speed_peers.py --model smollm2

Each side runs in a process of its own, with the same weights, float32 if not said otherwise, and the same random
tokens. All sides of a cell are loaded and warmed up first. Then they take turns, so that a slow moment of the machine
meets all of them. A figure is the median over the turns. Peak memory is that of the side's process, weights included.

  full        this library, everything kept, the prompt read one-shot
  streaming   this library, TOVA, 1/8 of the context, the prompt read token by token, exactly as decoding does
  oneshot     this library, TOVA (or another policy), 1/8 of the context, the prompt read with one selection
  int8:...    the same as any of these, with weights in int8
  torch       transformers with its own cache, everything kept
  kvpress     transformers with kvpress's TOVA, 1/8 of the context, one selection after the prompt

Sides whose packages are not installed are left out, and said to be.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import jax
import numpy as np
from command import OfModel, arguments

import jaxcompress as jc
from jaxcompress.checkpoints import save
from jaxcompress.cli.runtime import peak_memory
from jaxcompress.generation import decode, init_decode_state, prefill
from jaxcompress.models.modes import Mode

KEPT = 8
"""The context divided by the number of slots."""
SIDES = {
    "torch": ("torch", "transformers"),
    "kvpress": ("torch", "transformers", "kvpress"),
    "full": (),
    "streaming": (),
    "oneshot": (),
    "oneshot:snapkv+32": (),
    "oneshot:h2o": (),
    "int8:streaming": ("qwix",),
    "int8:oneshot": ("qwix",),
}
"""The modules that each side needs beyond the library's own."""


@dataclass(frozen=True, kw_only=True)
class Arguments(OfModel):
    """Prints one JSON line per cell and side, and the ratios to transformers."""

    contexts: tuple[int, ...] = (1024, 4096, 8192)
    """Tokens of the prompts."""
    batches: tuple[int, ...] = (1, 4, 8)
    """Rows. Batches above 1 are measured up to `widest` tokens of context."""
    widest: int = 4096
    steps: int = 16
    """Tokens that are decoded."""
    turns: int = 3
    sides: tuple[str, ...] = tuple(SIDES)
    out: Path | None = None
    """Also write the results here (JSON)."""
    worker: str = ""
    """Used by the script itself: the side that this process is."""
    folder: str = ""
    """Used by the script itself: the model's folder."""


QUICK = Arguments(
    quick=True, contexts=(64,), batches=(2,), steps=4, turns=1, sides=("full", "streaming", "int8:oneshot")
)


class Library:
    """This library as a side."""

    def __init__(self, side: str, folder: str, rows: np.ndarray) -> None:
        int8 = side.startswith("int8:")
        kind, _, policy = side.removeprefix("int8:").partition(":")
        self.model = jc.load(folder, dtype="int8" if int8 else "float32").model
        self.policy = jc.get_policy("full" if kind == "full" else policy or "tova")
        self.mode: Mode = "streaming" if kind == "streaming" else "oneshot"
        self.rows, self.slots = rows, max(rows.shape[1] // KEPT, 1)

    def prefill(self, steps: int) -> None:
        slots = self.rows.shape[1] + 2 * steps if not self.policy.evicts else self.slots
        state = init_decode_state(self.model, self.policy, slots, batch=len(self.rows))
        self.state = prefill(self.model, list(self.rows), state, mode=self.mode)
        jax.block_until_ready(self.state.logits)

    def decode(self, steps: int) -> None:
        tokens, self.state = decode(self.model, self.state, steps)
        jax.block_until_ready(tokens)


class Torch:
    """transformers as a side, with a press of kvpress or without."""

    def __init__(self, side: str, folder: str, rows: np.ndarray) -> None:
        import torch  # type: ignore[import-not-found]
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.rows, self.press = torch.from_numpy(rows.astype(np.int64)), None
        if side == "kvpress":
            from kvpress import TOVAPress  # type: ignore[import-not-found]

            self.press = TOVAPress(compression_ratio=1 - 1 / KEPT)

    def prefill(self, steps: int) -> None:
        from contextlib import nullcontext

        from transformers import DynamicCache

        self.cache = DynamicCache()
        with self.torch.no_grad(), nullcontext() if self.press is None else self.press(self.model):
            out = self.model(self.rows, past_key_values=self.cache, logits_to_keep=1, use_cache=True)
        self.token, self.at = out.logits[:, -1:].argmax(-1), self.rows.shape[1]

    def decode(self, steps: int) -> None:
        with self.torch.no_grad():
            for _ in range(steps):
                at = self.torch.full((len(self.rows), 1), self.at)
                out = self.model(self.token, past_key_values=self.cache, use_cache=True, position_ids=at)
                self.token, self.at = out.logits[:, -1:].argmax(-1), self.at + 1


def work(args: Arguments) -> None:
    """A side: answers each line on standard input with the seconds of a prefill and of a decoding."""
    context, batch = args.contexts[0], args.batches[0]
    rows = (
        np.random.default_rng(0).integers(5, 2000 if args.model is None else 40000, (batch, context)).astype(np.int32)
    )
    side = (Torch if args.worker in ("torch", "kvpress") else Library)(args.worker, args.folder, rows)
    for _ in sys.stdin:
        begun = perf_counter()
        side.prefill(args.steps)
        middle = perf_counter()
        side.decode(args.steps)
        print(json.dumps([middle - begun, perf_counter() - middle, peak_memory()]), flush=True)


def cell(args: Arguments, folder: str, context: int, batch: int) -> Iterator[dict[str, Any]]:
    """The rows of the table for one context and batch."""
    command = [sys.executable, __file__, "--folder", folder, "--contexts", str(context), "--batches", str(batch)]
    command += ["--steps", str(args.steps), *(["--model", args.model] if args.model else [])]
    here = [side for side in args.sides if all(map(find_spec, SIDES[side]))]
    start = partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    running = {side: start([*command, "--worker", side]) for side in here}

    def turn(side: str) -> list[float]:
        process = running[side]
        print(file=process.stdin, flush=True)
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise SystemExit(f"{side} failed with {context} tokens and {batch} rows; its message is above")
        return json.loads(line)

    for side in here:
        turn(side)  # loads, compiles and warms up
    times = {side: [] for side in here}
    for _ in range(args.turns):
        for side in here:
            times[side].append(turn(side))
    for process in running.values():
        process.communicate()
    medians = {side: [statistics.median(column) for column in zip(*rows, strict=True)] for side, rows in times.items()}
    for side, (read, wrote, peak) in medians.items():
        row = dict(
            context=context, batch=batch, side=side, prefill=round(batch * context / read, 1),
            decode=round(batch * args.steps / wrote, 1), peak_mib=round(peak / 2**20),
        )  # fmt: skip
        if "torch" in medians and side != "torch":
            theirs = medians["torch"]
            row |= dict(
                prefill_ratio=round(theirs[0] / read, 2), decode_ratio=round(theirs[1] / wrote, 2),
                peak_ratio=round(peak / theirs[2], 2),
            )  # fmt: skip
        yield row


def main(args: Arguments) -> None:
    if args.worker:
        work(args)
        return
    for side in args.sides:
        if missing := [module for module in SIDES[side] if find_spec(module) is None]:
            print(f"{side} is left out: {' and '.join(missing)} not installed", file=sys.stderr)
    rows = []
    with TemporaryDirectory() as folder:
        loaded = args.load()
        save(loaded.model, folder, tokenizer_from=loaded.folder)
        del loaded
        for context in args.contexts:
            for batch in args.batches:
                if batch > 1 and context > args.widest:
                    continue
                for row in cell(args, folder, context, batch):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(arguments(QUICK))
