"""Resolves the dtype of loaded weights from the names that users and config.json give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcompress.checkpoints._entries import config_of

STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""From the dtype names of safetensors to those of NumPy."""

_ALIASES = {
    "bf16": "bfloat16", "half": "float16", "fp16": "float16", "f16": "float16", "float": "float32", "fp32": "float32",
    "f32": "float32", "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip
_KNOWN = "float32 (fp32, float), bfloat16 (bf16), float16 (fp16, half), auto for the float that is fast here"


def held_in_int8(asked: DTypeLike | None) -> bool:
    """Whether int8 is asked for: matrices in int8, computed with in a floating-point dtype."""
    name = asked.strip().lower() if isinstance(asked, str) else asked
    return name in ("int8", jnp.int8, np.dtype(np.int8))


def weights_dtype(
    asked: DTypeLike | None, settings: Mapping[str, Any], tensors: Mapping[str, Any], folder: Path
) -> np.dtype:
    """The dtype that the weights of a folder are loaded as.

    Args:
      asked: a dtype or its name; None for the dtype of config.json; "auto" likewise, but float32 on a CPU in place of
        narrower types. There XLA converts narrow weights at each product, which is slower: bfloat16 decodes
        SmolLM2-135M at a sixth of the speed.
      settings: config.json. If it has no dtype, or "auto", the first floating-point tensor in the files decides.
      tensors: the files' slices, by name.
      folder: the folder, for messages.

    Raises:
      ValueError: the name is unknown or the type is not floating-point; the message names the origin of the dtype.
    """
    if not _auto(asked):
        return dtype_named(asked, "dtype")
    own = _own_dtype(settings, tensors, folder)
    narrow = asked is not None and own.itemsize < 4 and jax.default_backend() == "cpu"
    return np.dtype(np.float32) if narrow else own


def _own_dtype(settings: Mapping[str, Any], tensors: Mapping[str, Any], folder: Path) -> np.dtype:
    """The dtype of a checkpoint."""
    with config_of(folder / "config.json"):
        said = config_dtype(settings)
    if said is not None:
        return said
    stored = (tensor.get_dtype() for tensor in tensors.values())
    return dtype_named(next((STORED[kind] for kind in stored if kind in STORED), "float32"), "the files' dtype")


def config_dtype(settings: Mapping[str, Any]) -> np.dtype | None:
    """The dtype of the weights in a config.json; None if it has none, or "auto".

    Raises:
      ValueError: as `weights_dtype`.
    """
    key = next((key for key in ("dtype", "torch_dtype") if not _auto(settings.get(key))), None)
    if key is None:
        return None
    if not isinstance(settings[key], str):
        raise ValueError(f"{key} must be the name of a type, such as 'float32', not {settings[key]!r:.80}")
    return dtype_named(settings[key], key)


def dtype_named(name: DTypeLike | None, what: str) -> np.dtype:
    """A floating-point dtype by any of its usual names, in upper or lower case, with or without `torch.`.

    Args:
      what: the origin of the name, for messages.

    Raises:
      ValueError: the name is unknown, or the type is not floating-point.
    """
    plain = name.strip().lower().removeprefix("torch.") if isinstance(name, str) else name
    try:
        dtype = jax.dtypes.canonicalize_dtype(_ALIASES.get(plain, plain) if isinstance(plain, str) else plain)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be a floating-point type, not {name!r:.80}; known: {_KNOWN}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{what} must be a floating-point type, not {dtype.name}; known: {_KNOWN}")
    return dtype


def _auto(name: Any) -> bool:
    return name is None or (isinstance(name, str) and name.strip().lower() == "auto")
