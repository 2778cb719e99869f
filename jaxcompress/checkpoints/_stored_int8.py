"""Encoders stored in int8: a quarter of the size of float32 on disk, and the same module once loaded.

A matrix [N, M] is stored as whole numbers from -127 to 127 and one float32 per row, `<name>_scale` [N]: a number times
its row's scale. Rows are output channels of linear layers, and tokens or positions of embeddings. Vectors stay float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxcompress.checkpoints._dtype import STORED
from jaxcompress.checkpoints._experts import Index, View
from jaxcompress.checkpoints._load import tensors_of

_SCALE = "_scale"
_MOST = 127
_WEIGHTS = "model.safetensors"


def store_in_int8(source: str | Path, folder: str | Path) -> Path:
    """Writes an encoder's folder again with its matrices in int8; `load_encoder` reads it, transformers does not.

    Args:
      source: a folder of `save_encoder`, or any that `load_encoder` reads.
      folder: a new or empty folder.

    Returns:
      The folder.

    Raises:
      FileExistsError: the folder is not empty.
      FileNotFoundError, ValueError: the source has no weights, or they cannot be read.
    """
    source, folder = Path(source).expanduser(), Path(folder).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; write into a new folder")
    tensors = with_scales(tensors_of(source))
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if tensor.get_dtype() not in STORED:  # position ids and the like
            continue
        array = tensor[tuple(slice(0, n) for n in tensor.get_shape())].astype(np.float32)
        if array.ndim == 2:
            scale = np.abs(array).max(axis=1) / _MOST
            whole = np.rint(array / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8)
            written |= {name: whole, name + _SCALE: scale.astype(np.float32)}
        else:
            written[name] = array
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    save_file(written, folder / _WEIGHTS, metadata={"format": "pt"})
    # safetensors makes its files readable by the owner only; the others follow the umask.
    (folder / _WEIGHTS).chmod((folder / "config.json").stat().st_mode)
    return folder


def with_scales(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors, with each pair of whole numbers and scales as the matrix that they stand for."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        scale = tensors.get(name + _SCALE)
        shape = tuple(tensor.get_shape())
        if scale is not None and tensor.get_dtype() == "I8" and len(shape) == 2:
            if tuple(scale.get_shape()) != shape[:1] or scale.get_dtype() not in STORED:
                raise ValueError(f"{name + _SCALE} needs one number for each row of {name} {list(shape)}")
            del found[name + _SCALE]
            found[name] = View(shape, "F32", partial(_read, tensor, scale))
    return found


def _read(whole: Any, scale: Any, index: Index) -> np.ndarray:
    return whole[index].astype(np.float32) * scale[index[:1]].astype(np.float32)[:, None]
