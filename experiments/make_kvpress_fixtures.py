"""Trims the outputs of kvpress on two tiny random Llamas to the numbers that the tests use.

    python experiments/make_kvpress_fixtures.py FOLDER [--to tests/fixtures/kvpress]

FOLDER holds full dumps made with kvpress 0.5.5 (see tests/fixtures/kvpress/README.md). Only numbers are copied: for
each method and layer the scores, the positions kept and, where a method changes keys or values, what it made of them.
Weights and tokens are those of tests/fixtures/official.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from command import Command, arguments

LAYERS = 3
MODELS = {"llama_gqa": "oracle_seed6", "llama_mha": "oracle_mha_seed6"}
SCORERS = [
    *("tova", "tova_eager", "h2o_observed", "snapkv", "pyramidkv", "critical_snapkv", "expected_attention"),
    *("streaming_llm", "window", "knorm", "keydiff", "lagkv", "lagkv_cross", "cur"),
]
# These choose by another method's score, which is not copied twice.
WRAPPERS = {
    "chunkkv_snapkv": "snapkv",
    "adakv_snapkv": "snapkv",
    "chunk_knorm": "knorm",
    "merge_knorm": "knorm",
    "rerotate_streaming": "streaming_llm",
}

Dump = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Arguments(Command):
    """Writes a file for each model; `--quick` trims dumps of random numbers."""

    folder: Annotated[Path, tyro.conf.Positional]
    to: Path = Path(__file__).parents[1] / "tests" / "fixtures" / "kvpress"


QUICK = Arguments(quick=True, folder=Path("runs/quick/kvpress_dumps"), to=Path("runs/quick/kvpress"))


def positions(dump: Dump, name: str) -> np.ndarray:
    """[B, K, n] ascending; they fit in 16 bits."""
    kept = dump[name]
    assert (np.diff(kept) > 0).all()
    return kept.astype(np.int16)


def merged_values(dump: Dump, layer: int) -> np.ndarray:
    """[B, K, n, D] in the order of the positions: the dump has them in the order of falling scores."""
    score, kept = dump[f"merge_knorm/score{layer}"], dump[f"merge_knorm/keep{layer}"]
    order = np.argsort(-score, -1, kind="stable")[..., : kept.shape[-1]]
    rank = np.argsort(order, -1)
    assert (np.take_along_axis(order, rank, -1) == kept).all()
    return np.take_along_axis(dump[f"merge_knorm/v{layer}"], rank[..., None], -2)


def trimmed(dump: Dump) -> dict[str, np.ndarray]:
    """The trimmed arrays of one model's dump."""
    kept = {}
    for layer in range(LAYERS):
        kept |= {f"full/{x}{layer}": dump[f"full/{x}{layer}"] for x in "kv"}
        for name in SCORERS:
            kept[f"{name}/score{layer}"] = dump[f"{name}/score{layer}"].astype(np.float32)
        for name, base in WRAPPERS.items():
            score = dump[f"{name}/score{layer}"]  # chunk_knorm's score covers the last chunk only
            assert np.allclose(score, dump[f"{base}/score{layer}"][..., -score.shape[-1] :], rtol=1e-6)
        for name in [*SCORERS, *WRAPPERS]:
            if name == "adakv_snapkv":
                kept[f"{name}/keepmask{layer}"] = dump[f"{name}/keepmask{layer}"]
            else:
                kept[f"{name}/keep{layer}"] = positions(dump, f"{name}/keep{layer}")
        kept[f"merge_knorm/v{layer}"] = merged_values(dump, layer)
        kept[f"rerotate_streaming/k{layer}"] = dump[f"rerotate_streaming/k{layer}"]
    return kept


def write_random_dumps(folder: Path) -> None:
    """Writes random dumps with kvpress's names and constraints: 1 row, 2 heads, 3 of 6 tokens kept."""
    rng = np.random.default_rng(0)
    score = rng.random((1, 2, 6))
    best = np.argsort(-score, -1, kind="stable")[..., :3]
    dump = {}
    for layer in range(LAYERS):
        dump |= {f"full/{x}{layer}": rng.random((1, 2, 6, 4)) for x in "kv"}
        for name in [*SCORERS, *WRAPPERS]:
            dump |= {f"{name}/score{layer}": score, f"{name}/keep{layer}": np.sort(best, -1)}
        dump[f"adakv_snapkv/keepmask{layer}"] = score > 0.5
        dump |= {f"merge_knorm/v{layer}": rng.random((1, 2, 3, 4)), f"rerotate_streaming/k{layer}": score}
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS.values():
        np.savez_compressed(folder / f"{name}.npz", **dump)


def main(args: Arguments) -> None:
    if args.quick:
        write_random_dumps(args.folder)
    args.to.mkdir(parents=True, exist_ok=True)
    for name, source in MODELS.items():
        path = args.to / f"{name}.npz"
        np.savez_compressed(path, **trimmed(np.load(args.folder / f"{source}.npz")))
        print(f"{path.name:20s} {path.stat().st_size:9,d} bytes")


if __name__ == "__main__":
    main(arguments(QUICK))
