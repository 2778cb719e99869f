"""A decoder as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxcompress.checkpoints._config import hugging_face_config
from jaxcompress.checkpoints._weights import Weight, weights_of
from jaxcompress.models.decoder import Decoder

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


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
      tokenizer_from: a folder whose tokenizer files are copied, and the ids of whose special tokens, if it has a
        config.json, are put into ours.
      shard_bytes: a model larger than this becomes several files with model.safetensors.index.json.

    Raises:
      FileExistsError: the folder has something in it.
      FileNotFoundError: `tokenizer_from` is no folder or has no tokenizer.
      ValueError: no Hugging Face architecture has this model's combination of features; weights of several dtypes.

    Example:
      >>> save(model, "trained", tokenizer_from=loaded.folder)  # doctest: +SKIP
    """
    folder = Path(folder).expanduser().absolute()
    weights, _ = weights_of(model)
    config = hugging_face_config(model.config) | _special_tokens(tokenizer_from)
    return write_folder(folder, config, weights, tokenizer_from, shard_bytes)


def write_folder(
    folder: Path, config: dict[str, Any], weights: list[Weight], tokenizer_from: str | Path | None, shard_bytes: int
) -> Path:
    """Writes a checkpoint, whole or not at all; see `save`."""
    config = config | {"dtype": _one_dtype(weights)}
    tokenizer = _tokenizer_files(tokenizer_from)
    with _whole(folder) as partial:
        _write_json(partial / "config.json", config)
        for file in tokenizer:
            shutil.copyfile(file, partial / file.name)
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
        for file in partial.iterdir():
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
    dtypes = sorted({weight.array.dtype.name for weight in weights})
    if len(dtypes) > 1:
        raise ValueError(f"the weights are of several dtypes ({', '.join(dtypes)}); a checkpoint has one")
    return dtypes[0]


def _tokenizer_files(source: str | Path | None) -> list[Path]:
    if source is None:
        return []
    source = Path(source).expanduser()
    files = [source / name for name in _TOKENIZER if (source / name).is_file()]
    if not files:
        raise FileNotFoundError(f"tokenizer_from: {source} is not a folder with tokenizer files")
    return files


def _special_tokens(source: str | Path | None) -> dict[str, Any]:
    """Null unless known: Llama's and Mistral's defaults, 1 and 2, would be wrong for most tokenizers."""
    path = None if source is None else Path(source).expanduser() / "config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    return {key: known.get(key) for key in _SPECIAL}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(weights: list[Weight], folder: Path, shard_bytes: int) -> None:
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
    return np.ascontiguousarray(array.T) if weight.transposed else array
