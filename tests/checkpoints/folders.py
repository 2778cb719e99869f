"""Checkpoint folders for these tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxcompress.models.decoder import Decoder

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "fixtures" / "parity"
NAMES = sorted(folder.name for folder in PARITY.iterdir() if folder.is_dir())


def tensors_of(name: str) -> dict[str, np.ndarray]:
    return load_file(PARITY / name / "model.safetensors")


def changed(
    folder: Path,
    name: str,
    *,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """A copy of a fixture in `folder`: config entries replaced (None removes one), tensors changed in place."""
    shutil.copytree(PARITY / name, folder)
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if tensors is not None:
        changing = tensors_of(name)
        tensors(changing)
        save_file(changing, folder / "model.safetensors")
    return folder


def split(folder: Path, files: int) -> None:
    """Turns model.safetensors into several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same_bits(a: Decoder, b: Decoder) -> None:
    for (at, x), (where, y) in zip(*map(jax.tree.leaves_with_path, (a, b)), strict=True):
        assert (at, x.dtype, x.shape) == (where, y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
