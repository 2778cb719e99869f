"""Trims the numbers that kvpress gave on two tiny random Llamas to what the tests compare with.

    python experiments/make_kvpress_fixtures.py FOLDER [--to tests/fixtures/kvpress]

FOLDER holds full dumps made with kvpress 0.5.5 (see tests/fixtures/kvpress/README.md). Only numbers are copied: for
each method and layer the scores, the positions kept and, where a method changes keys or values, what it made of them.
Weights and tokens are those of tests/fixtures/official.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

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

Dump = np.lib.npyio.NpzFile


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
    """All that is kept of one model's dump."""
    kept = {}
    for layer in range(LAYERS):
        kept |= {f"full/{x}{layer}": dump[f"full/{x}{layer}"] for x in "kv"}
        for name in SCORERS:
            kept[f"{name}/score{layer}"] = dump[f"{name}/score{layer}"].astype(np.float32)
        for name, base in WRAPPERS.items():
            score = dump[f"{name}/score{layer}"]  # of chunk_knorm: of the last chunk alone
            assert np.allclose(score, dump[f"{base}/score{layer}"][..., -score.shape[-1] :], rtol=1e-6)
        for name in [*SCORERS, *WRAPPERS]:
            if name == "adakv_snapkv":
                kept[f"{name}/keepmask{layer}"] = dump[f"{name}/keepmask{layer}"]
            else:
                kept[f"{name}/keep{layer}"] = positions(dump, f"{name}/keep{layer}")
        kept[f"merge_knorm/v{layer}"] = merged_values(dump, layer)
        kept[f"rerotate_streaming/k{layer}"] = dump[f"rerotate_streaming/k{layer}"]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "tests" / "fixtures" / "kvpress")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    for name, source in MODELS.items():
        path = args.to / f"{name}.npz"
        np.savez_compressed(path, **trimmed(np.load(args.folder / f"{source}.npz")))
        print(f"{path.name:20s} {path.stat().st_size:9,d} bytes")


if __name__ == "__main__":
    main()
