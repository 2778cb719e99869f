"""Prompt compression beside the published package, run alternately in one process.

    pip install torch==2.13.0 transformers==4.57.6 llmlingua==0.2.2 accelerate
    python experiments/speed_prompt.py FOLDER...

Each FOLDER holds an encoder. Its name has to contain `bert-base-multilingual-cased` or `xlm-roberta-large`, by which
the package recognises the encoder. The text is the documentation in this Python installation. Tokens are the encoder's
tokens of the whole input. The target model's tokens are counted by a regular expression on both sides, because tiktoken
needs a download.
With `--width` an encoder of that width and random weights is made from the first folder's tokenizer.
"""

from __future__ import annotations

import importlib
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import jax
import tyro
from command import Command, arguments, need
from flax import nnx

from jaxcompress.checkpoints import save_encoder
from jaxcompress.embedded import compressor_folder
from jaxcompress.embedded.corpus import documents
from jaxcompress.models.encoder import Encoder, EncoderConfig
from jaxcompress.prompt import Compressor

_TOKENS = re.compile(r"\w{1,4}|\W")


@dataclass(frozen=True)
class Arguments(Command):
    """Prints tokens per second and ratios, medians."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    words: int = 1000
    """Words of a prompt."""
    batches: tuple[int, ...] = (1, 32)
    """Prompts per call."""
    repeats: int = 5
    rate: float = 0.5
    width: int | None = None
    layers: int = 6
    package: bool = True
    """Also run the published package, not only this library's two ways."""
    dtype: str | None = None
    """Dtype of this library's weights and products, such as `bfloat16`; the package uses float32."""


QUICK = Arguments(quick=True, folders=(compressor_folder(),), words=40, batches=(1, 2), repeats=1, package=False)


def main(args: Arguments) -> None:
    folders = args.folders if args.width is None else (_wide(args),)
    words = " ".join(d.text for d in documents() if d.name.startswith("topics/")).split(" ")
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}; {args.words:,} words each, rate {args.rate}")
    for folder in folders:
        theirs = _package(folder) if args.package else None
        for batch in args.batches:
            prompts = [" ".join(words[n * args.words : (n + 1) * args.words]) for n in range(batch)]
            compare(folder, theirs, prompts, args)


def compare(folder: Path, theirs: Any, prompts: list[str], args: Arguments) -> None:
    """The package, its algorithm here, and the default here, in turn over the same prompts."""
    compressor = Compressor.load(folder, dtype=args.dtype)
    ours = replace(compressor, count=_count).official
    package = {} if theirs is None else dict(package=lambda: theirs.compress_prompt_llmlingua2(prompts, rate=args.rate))
    runs: dict[str, Callable[[], Any]] = package | {
        "official": lambda: ours.compress(prompts, rate=args.rate),
        "exact": lambda: compressor.compress(prompts, rate=args.rate),
    }
    first = {name: run() for name, run in runs.items()}  # compiled before it is timed
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(map(compressor.tokenizer.count, prompts))
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    told = ", ".join(f"{name} {value:,.0f} tok/s" for name, value in speed.items())
    if theirs is not None:
        outputs = first["package"], first["official"].output
        same = sum(a == b for a, b in zip(*(x["compressed_prompt_list"] for x in outputs), strict=True))
        told += f"; {same}/{len(prompts)} texts the same" + "".join(
            f", {name} / package {speed[name] / speed['package']:.2f}" for name in ("official", "exact")
        )
    print(f"{folder.name:44} batch {len(prompts):2} ({tokens:,} tokens): {told}", flush=True)


def _package(folder: Path) -> Any:
    need("llmlingua", "tiktoken", "torch", install="pip install torch==2.13.0 llmlingua==0.2.2 accelerate")
    tiktoken: Any = importlib.import_module("tiktoken")
    tiktoken.encoding_for_model = lambda name: SimpleNamespace(encode=_TOKENS.findall)
    package = importlib.import_module("llmlingua").PromptCompressor
    return package(str(folder), device_map="cpu", use_llmlingua2=True)


def _count(text: str) -> int:
    return len(_TOKENS.findall(text))


def _wide(args: Arguments) -> Path:
    source = args.folders[0]
    small = Compressor.load(source).encoder.config
    assert args.width is not None
    config = EncoderConfig(
        small.vocab_size, args.width, 4 * args.width, args.layers, args.width // 64, max_position=small.max_position,
        token_types=small.token_types, norm_eps=small.norm_eps, padding_id=small.padding_id,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp()) / f"width-{args.width}-{source.name}"
    encoder = jax.jit(lambda: Encoder(config, rngs=nnx.Rngs(0)))()
    return save_encoder(encoder, folder, tokenizer_from=source)


if __name__ == "__main__":
    main(arguments(QUICK))
