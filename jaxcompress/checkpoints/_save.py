"""Saves a decoder as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxcompress.checkpoints._carried import config_like, files_beside
from jaxcompress.checkpoints._config import INTERPRETED, architecture_of, decoder_config, hugging_face_config
from jaxcompress.checkpoints._families import FAMILIES
from jaxcompress.checkpoints._gguf_folder import as_folder
from jaxcompress.checkpoints._weights import Weight, named_weights
from jaxcompress.inputs.paths import path_of
from jaxcompress.models.decoder import Decoder, check_decoder
from jaxcompress.models.int8 import check_float


def save(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes config.json and safetensors that `load` and transformers 5 open; returns the folder.

    The folder appears complete or not at all: everything is written into a hidden sibling folder,
    `.<name>.<random>.partial`, which is renamed at the end. A killed process leaves that sibling behind; you can delete
    it.

    Args:
      model: a decoder whose weights have one floating-point dtype. `load` restores them bit for bit.
      folder: a new or empty folder.
      tokenizer_from: a folder, e.g. that of the model before training. Its tokenizer, chat templates,
        generation_config.json (which has the end tokens) and processor configs are copied. If its config.json has the
        same architecture, its entries that do not describe the model are taken over; else only the ids of special
        tokens. It may also be a GGUF file, whose tokenizer, chat templates and stop tokens are written as such files.
      shard_bytes: a model larger than this is split into several files with model.safetensors.index.json.

    Raises:
      FileExistsError: the folder is not empty.
      FileNotFoundError: `tokenizer_from` is not a folder or has no tokenizer.
      ValueError: `model` is no decoder, or a path is none; no Hugging Face architecture has this model's combination of
        features; weights have several dtypes or are held in int8.

    Examples:
      >>> save(model, "trained", tokenizer_from=loaded.folder)  # doctest: +SKIP
    """
    check_decoder(model)
    check_float(model, "saved")
    with as_folder(tokenizer_from) as source:
        config = config_like(source, hugging_face_config(model.config), decoder_config, INTERPRETED)
        weights, _ = named_weights(model, FAMILIES[architecture_of(config)].names)
        return write_folder(folder, config, weights, tokenizer_from=source, shard_bytes=shard_bytes)


def write_folder(
    folder: str | Path,
    config: dict[str, Any],
    weights: list[Weight],
    *,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
    more: Mapping[str, dict[str, Any]] = {},
) -> Path:
    """Writes a checkpoint of any kind, completely or not at all; see `save`.

    Args:
      config: the content of config.json, without the dtype.
      more: other JSON files, by name; they take precedence over those of `tokenizer_from`.
    """
    folder = path_of(folder, "the folder to save into").absolute()
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": _one_dtype(weights)}
    copied = files_beside(tokenizer_from)
    with _whole(folder) as partial:
        for name, file in copied.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)
        for name, content in {"config.json": config, **more}.items():
            _write_json(partial / name, content)
        _write_weights(weights, partial, shard_bytes)
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder. On exit it is renamed to `folder`; after an exception it is deleted."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; save into a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _to_disk(file)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _to_disk(file: Path) -> None:
    """Flushes a file to disk, so that a folder with its final name is complete even after a power cut."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _one_dtype(weights: list[Weight]) -> str:
    """The dtype of all weights. Raises ValueError if they have several dtypes."""
    dtypes = sorted({weight.array.dtype.name for weight in weights})
    if len(dtypes) > 1:
        raise ValueError(f"the weights are of several dtypes ({', '.join(dtypes)}); a checkpoint has one")
    return dtypes[0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON with indentation, like the other files of such folders."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(weights: list[Weight], folder: Path, shard_bytes: int) -> None:
    """Writes model.safetensors, or several files with an index. config.json has to exist already."""
    shards = _shards(weights, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {tensor: _on_host(pieces) for tensor, pieces in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        # safetensors makes its files readable by the owner only. Our other files follow the umask, so copy their mode.
        (folder / name).chmod((folder / "config.json").stat().st_mode)
    if len(shards) > 1:
        size = sum(weight.array.nbytes for weight in weights)
        files = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})


Pieces = list[tuple[Weight, int]]
"""The weights that one tensor holds, and its number among the tensors of each."""


def _shards(weights: list[Weight], shard_bytes: int) -> list[dict[str, Pieces]]:
    """For each file, a dict from tensor name to what the tensor holds."""
    whole: dict[str, Pieces] = {}
    for weight in weights:
        for nth, tensor in enumerate(weight.tensors):
            whole.setdefault(tensor, []).append((weight, nth))
    shards: list[dict[str, Pieces]] = [{}]
    filled = 0
    for tensor, pieces in whole.items():
        size = sum(weight.array.nbytes // len(weight.tensors) for weight, _ in pieces)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][tensor] = pieces
        filled += size
    return shards


def _on_host(pieces: Pieces) -> np.ndarray:
    """A tensor as it is written."""
    if len(pieces) == 1:
        return _piece(*pieces[0])
    first = pieces[0][0]
    joined = np.empty(first.tensor_shape, first.array.dtype)
    for weight, nth in pieces:
        assert weight.part is not None
        np.moveaxis(joined, weight.part.axis, 0)[weight.part.rows] = np.moveaxis(
            _piece(weight, nth), weight.part.axis, 0
        )
    return joined


def _piece(weight: Weight, nth: int) -> np.ndarray:
    index = np.unravel_index(nth, weight.array.shape[: weight.stacked])
    array = np.asarray(weight.array[index] if weight.stacked else weight.array)
    array = np.ascontiguousarray(array.T if weight.transposed else array)
    return array if weight.part is not None else array.reshape(weight.tensor_shape)
