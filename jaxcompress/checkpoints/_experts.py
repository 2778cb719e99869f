"""Forms in which Hugging Face checkpoints hold experts.

Mixtral and Qwen3-MoE have one tensor [out, in] per expert on the hub, and transformers 5 writes them so. Its modules
hold them fused, gate_up_proj [X, 2F, E] and down_proj [X, E, F], and so may folders that other tools write. GPT-OSS has
gate_up_proj [X, E, 2F] and down_proj [X, F, E], plain or as MXFP4.

The functions show tensors of these forms as those that `jaxcompress.checkpoints._weights` names; nothing is read until
they are indexed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxcompress.models.config import DecoderConfig

Index = tuple[slice, ...]


@dataclass(frozen=True)
class View:
    """A part of a tensor, or what follows from several, with the interface of a safetensors slice.

    Attributes:
      shape: its shape.
      dtype: its type by safetensors' name.
      read: (a slice for each axis) -> that part.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[Index], np.ndarray]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.read(tuple(slice(*one.indices(n)) for one, n in zip(index, self.shape, strict=True)))


def mixtral_experts_apart(tensors: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Fused tensors as one for each expert."""
    return _apart(tensors, config, "w1", "w3", "w2")


def qwen3_experts_apart(tensors: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Fused tensors as one for each expert."""
    return _apart(tensors, config, "gate_proj", "up_proj", "down_proj")


def _apart(tensors: Mapping[str, Any], config: DecoderConfig, gate: str, up: str, down: str) -> dict[str, Any]:
    """A tensor of an unexpected shape is left as it is: it is then left over, and its parts are missing."""
    assert config.experts is not None
    count = config.experts.count
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        shape = tuple(tensor.get_shape())
        parts: dict[str, tuple[int, int]] = {}
        if prefix.endswith(".experts") and len(shape) == 3 and shape[0] == count and 0 not in shape:
            half, rows = shape[1] // 2, shape[1]
            parts = {"gate_up_proj": {gate: (0, half), up: (half, rows)}, "down_proj": {down: (0, rows)}}.get(kind, {})
        found |= {
            f"{prefix}.{expert}.{part}.weight": _rows(tensor, expert, *rows)
            for part, rows in parts.items()
            for expert in range(count)
        } or {name: tensor}
    return found


def _rows(tensor: Any, expert: int, start: int, stop: int) -> View:
    """Some rows of one expert's matrix in a tensor [X, out, in]."""

    def read(index: Index) -> np.ndarray:
        rows, columns = index
        return tensor[expert : expert + 1, start + rows.start : start + rows.stop, columns][0]

    return View((stop - start, tensor.get_shape()[2]), tensor.get_dtype(), read)


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_BLOCK = 32
"""The numbers of MXFP4 that share a scale: 16 bytes of two each."""


def dequantised(tensors: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The tensors, with each pair of `_blocks` and `_scales` (MXFP4) as the tensor that they stand for."""
    found = dict(tensors)
    for name in tensors:
        whole = name.removesuffix("_blocks")
        blocks, scales = tensors[name], tensors.get(whole + "_scales")
        if whole == name or scales is None:
            continue
        shape = tuple(blocks.get_shape())
        plain = len(shape) == 4 and shape[3] == _BLOCK // 2 and tuple(scales.get_shape()) == shape[:3]
        if plain and blocks.get_dtype() == scales.get_dtype() == "U8":
            del found[name], found[whole + "_scales"]
            read = partial(_read_mxfp4, blocks, scales)
            found[whole] = View((shape[0], shape[2] * _BLOCK, shape[1]), "BF16", read)
    return found


def _read_mxfp4(blocks: Any, scales: Any, index: Index) -> np.ndarray:
    """A part of [X, in, out] from blocks [X, out, in / 32, 16] and scales [X, out, in / 32] (OCP MX, version 1.0).

    A byte has two numbers, the first in its lower half. A scale is a power of two, stored plus 127.
    """
    experts, inner, outer = index
    out = np.empty([len(range(*one.indices(one.stop))) for one in index], np.float32)
    groups = slice(inner.start // _BLOCK, -(-inner.stop // _BLOCK))
    within = slice(inner.start - groups.start * _BLOCK, inner.stop - groups.start * _BLOCK)
    for row, expert in zip(out, range(experts.start, experts.stop), strict=True):
        codes = blocks[expert : expert + 1, outer, groups, :][0]
        numbers = _FP4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*codes.shape[:2], _BLOCK)
        power = scales[expert : expert + 1, outer, groups][0].astype(np.int32) - 127
        numbers = np.ldexp(numbers, power[..., None]).reshape(codes.shape[0], -1)
        row[...] = numbers[:, within].T
    return out
