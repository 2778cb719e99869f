"""Trims the outputs of the policies' official code to the numbers that the tests use.

    python experiments/make_official_fixtures.py FOLDER [--to tests/fixtures/official]

FOLDER holds full dumps made with the authors' programs (see tests/fixtures/official/README.md). Only numbers are
copied: weights and tokens of two tiny random Llamas, what they answer with a full cache, and for each step of each
policy the positions held and the logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from command import Command, arguments

LAYERS = 3
CONFIG = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings"),
    *("tie_word_embeddings", "model_type"),
]


@dataclass(frozen=True)
class Arguments(Command):
    """Writes the trimmed files; `--quick` trims dumps of random numbers."""

    folder: Annotated[Path, tyro.conf.Positional]
    to: Path = Path(__file__).parents[1] / "tests" / "fixtures" / "official"


QUICK = Arguments(quick=True, folder=Path("runs/quick/official_dumps"), to=Path("runs/quick/official"))


def small(x: np.ndarray) -> np.ndarray:
    """Converts to 16 bits, into which tokens and positions fit."""
    if not np.issubdtype(x.dtype, np.integer):
        return x
    trimmed = x.astype(np.int16)
    assert (trimmed == x).all()
    return trimmed


def model(dump: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights under their Hugging Face names, the configuration, and what the full cache gives."""
    config = json.loads(str(dump["config_json"]))
    kept = {name: dump[name] for name in dump if name.startswith("w/")}
    kept["config_json"] = np.array(json.dumps({key: config[key] for key in CONFIG}))
    for name in ("input_ids", "cont_ids", "full/prompt_logits", "full/cont_logits"):
        kept[name] = small(dump[name])
    return kept


def steps(dump: Mapping[str, np.ndarray], runs: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The named arrays of each run."""
    return {f"{run}/{name}": small(dump[f"{run}/{name}"]) for run, names in runs.items() for name in names}


HELD = tuple(f"pos{layer}" for layer in range(LAYERS))
TOVA = {"long_prompt": ("logits", *HELD), "short_prompt": ("logits", *HELD)}
H2O = {"h2o": ("logits", "hh_recent", *HELD)}
STREAMING = {"stream": ("start_recent",), "stream_ppl": ("logits",), "stream_space": ("logits",)}


def write_random_dumps(folder: Path) -> None:
    """Writes dumps with the names of the authors' arrays and random numbers."""
    numbers = np.arange(6).reshape(2, 3)
    config = np.array(json.dumps(dict.fromkeys(CONFIG, 1)))
    names = ("w/embedding", "input_ids", "cont_ids", "full/prompt_logits", "full/cont_logits")
    models = dict.fromkeys(names, numbers) | dict(config_json=config)
    runs = lambda *all_of: {f"{run}/{x}": numbers for one in all_of for run, given in one.items() for x in given}
    folder.mkdir(parents=True, exist_ok=True)
    for name, dump in {
        "oracle_seed6": models,
        "oracle_mha_seed6": models,
        "tova_seed6": runs(TOVA),
        "h2o_streaming_seed6": runs(H2O, STREAMING),
    }.items():
        np.savez_compressed(folder / f"{name}.npz", **dump)  # pyright: ignore[reportArgumentType]


def main(args: Arguments) -> None:
    if args.quick:
        write_random_dumps(args.folder)
    load = lambda name: np.load(args.folder / f"{name}.npz")
    outputs = {
        "llama_gqa": model(load("oracle_seed6")),
        "llama_mha": model(load("oracle_mha_seed6")),
        "tova": steps(load("tova_seed6"), TOVA),
        "h2o": steps(load("h2o_streaming_seed6"), H2O),
        "streaming_llm": steps(load("h2o_streaming_seed6"), STREAMING),
    }
    args.to.mkdir(parents=True, exist_ok=True)
    for name, arrays in outputs.items():
        path = args.to / f"{name}.npz"
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{path.name:20s} {path.stat().st_size:9,d} bytes")


if __name__ == "__main__":
    main(arguments(QUICK))
