"""A decoder as a Hugging Face folder."""

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
from jaxcompress.checkpoints._config import INTERPRETED, decoder_config, hugging_face_config
from jaxcompress.checkpoints._gguf_folder import as_folder
from jaxcompress.checkpoints._weights import Weight, weights_of
from jaxcompress.models.decoder import Decoder


def save(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes config.json and safetensors that `load` and transformers 5 open; returns the folder.

    The folder appears whole or not at all: everything is written into a hidden sibling, `.<name>.<random>.partial`,
    which is renamed at the end. A process that is killed leaves that sibling behind; it can be deleted.

    Args:
      model: weights of one floating-point dtype, which `load` gives back bit by bit.
      folder: new or empty.
      tokenizer_from: a folder, that of the model before training, say. Its tokenizer, chat templates,
        generation_config.json (what ends a text) and processor configs are copied. Of its config.json, if it is of
        the same architecture, all entries go into ours that say nothing about shapes; else the ids of special tokens.
        Or a GGUF file, whose tokenizer, chat templates and stop tokens are written as such files.
      shard_bytes: a model larger than this becomes several files with model.safetensors.index.json.

    Raises:
      FileExistsError: the folder has something in it.
      FileNotFoundError: `tokenizer_from` is no folder or has no tokenizer.
      ValueError: no Hugging Face architecture has this model's combination of features; weights of several dtypes.

    Example:
      >>> save(model, "trained", tokenizer_from=loaded.folder)  # doctest: +SKIP
    """
    weights, _ = weights_of(model)
    with as_folder(tokenizer_from) as source:
        config = config_like(source, hugging_face_config(model.config), decoder_config, INTERPRETED)
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
    """Writes a checkpoint of any kind, whole or not at all; see `save`.

    Args:
      config: config.json, but for the dtype.
      more: other JSON files, by name; they win over those of `tokenizer_from`.
    """
    folder = Path(folder).expanduser().absolute()
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
    """A folder to write into that becomes `folder` on leaving, or vanishes if something is raised."""
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
    """So that after a power cut, too, a folder with its final name is whole."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _one_dtype(weights: list[Weight]) -> str:
    """Raises ValueError if weights are of several dtypes."""
    dtypes = sorted({weight.array.dtype.name for weight in weights})
    if len(dtypes) > 1:
        raise ValueError(f"the weights are of several dtypes ({', '.join(dtypes)}); a checkpoint has one")
    return dtypes[0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, as the other files of such folders."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(weights: list[Weight], folder: Path, shard_bytes: int) -> None:
    """model.safetensors, or several files with an index. config.json has to be there before."""
    shards = _shards(weights, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {tensor: _on_host(weight, layer) for tensor, (weight, layer) in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        # safetensors lets nobody else read what it writes; our other files are as the umask has them.
        (folder / name).chmod((folder / "config.json").stat().st_mode)
    if len(shards) > 1:
        size = sum(weight.array.nbytes for weight in weights)
        files = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})


def _shards(weights: list[Weight], shard_bytes: int) -> list[dict[str, tuple[Weight, int]]]:
    """Tensor name to weight and layer, for each file."""
    shards: list[dict[str, tuple[Weight, int]]] = [{}]
    filled = 0
    for weight in weights:
        size = weight.array.nbytes // len(weight.tensors)
        for layer, tensor in enumerate(weight.tensors):
            if shards[-1] and filled + size > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][tensor] = (weight, layer)
            filled += size
    return shards


def _on_host(weight: Weight, layer: int) -> np.ndarray:
    array = np.asarray(weight.array[layer] if weight.stacked else weight.array)
    return np.ascontiguousarray(array.T if weight.transposed else array).reshape(weight.tensor_shape)
