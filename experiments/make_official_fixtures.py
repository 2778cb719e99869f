"""Trims the numbers that the policies' official code gave to what the tests compare with.

    python experiments/make_official_fixtures.py FOLDER [--to tests/fixtures/official]

FOLDER holds full dumps made with the authors' programs (see tests/fixtures/official/README.md). Only numbers are
copied: weights and tokens of two tiny random Llamas, what they answer with a full cache, and for each step of each
policy the positions held and the logits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

LAYERS = 3
CONFIG = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings"),
    *("tie_word_embeddings", "model_type"),
]


def small(x: np.ndarray) -> np.ndarray:
    """Tokens and positions fit in 16 bits."""
    if not np.issubdtype(x.dtype, np.integer):
        return x
    trimmed = x.astype(np.int16)
    assert (trimmed == x).all()
    return trimmed


def model(dump: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    """Weights under their Hugging Face names, the configuration, and what the full cache gives."""
    config = json.loads(str(dump["config_json"]))
    kept = {name: dump[name] for name in dump.files if name.startswith("w/")}
    kept["config_json"] = np.array(json.dumps({key: config[key] for key in CONFIG}))
    for name in ("input_ids", "cont_ids", "full/prompt_logits", "full/cont_logits"):
        kept[name] = small(dump[name])
    return kept


def steps(dump: np.lib.npyio.NpzFile, runs: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The named arrays of each run."""
    return {f"{run}/{name}": small(dump[f"{run}/{name}"]) for run, names in runs.items() for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "tests" / "fixtures" / "official")
    args = parser.parse_args()
    held = tuple(f"pos{layer}" for layer in range(LAYERS))
    load = lambda name: np.load(args.folder / f"{name}.npz")
    tova = {"long_prompt": ("logits", *held), "short_prompt": ("logits", *held)}
    h2o = {"h2o": ("logits", "hh_recent", *held)}
    streaming = {"stream": ("start_recent",), "stream_ppl": ("logits",), "stream_space": ("logits",)}
    outputs = {
        "llama_gqa": model(load("oracle_seed6")),
        "llama_mha": model(load("oracle_mha_seed6")),
        "tova": steps(load("tova_seed6"), tova),
        "h2o": steps(load("h2o_streaming_seed6"), h2o),
        "streaming_llm": steps(load("h2o_streaming_seed6"), streaming),
    }
    args.to.mkdir(parents=True, exist_ok=True)
    for name, arrays in outputs.items():
        path = args.to / f"{name}.npz"
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{path.name:20s} {path.stat().st_size:9,d} bytes")


if __name__ == "__main__":
    main()
