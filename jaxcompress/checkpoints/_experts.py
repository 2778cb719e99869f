"""The tensors of experts in Hugging Face checkpoints.

Mixtral and Qwen3-MoE have one tensor [out, in] per expert on the hub, and transformers 5 writes them so. Its modules
hold them fused, gate_up_proj [X, 2F, E] and down_proj [X, E, F], and so may folders that other tools write. GPT-OSS has
gate_up_proj [X, E, 2F], in which the channels of gate and up alternate, and down_proj [X, F, E], plain or as MXFP4.

`apart` shows tensors of any of these layouts as the parts that `Names` name; nothing is read until they are indexed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxcompress.checkpoints._experts_config import GPT_OSS, MIXTRAL, QWEN3_MOE, architecture_of_experts
from jaxcompress.checkpoints._weights import DECODER, Names, Weight, named_weights
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder

EVEN, ODD = "[..., ::2]", "[..., 1::2]"
"""The channels of gate and of up in a tensor of GPT-OSS that has both, as part of the names here."""

_ROUTER = {MIXTRAL: "block_sparse_moe.gate", QWEN3_MOE: "mlp.gate", GPT_OSS: "mlp.router"}
_ARRAYS = {
    MIXTRAL: {
        "layers.mlp.gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "layers.mlp.up": "block_sparse_moe.experts.{expert}.w3.weight",
        "layers.mlp.down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    QWEN3_MOE: {
        "layers.mlp.gate": "mlp.experts.{expert}.gate_proj.weight",
        "layers.mlp.up": "mlp.experts.{expert}.up_proj.weight",
        "layers.mlp.down": "mlp.experts.{expert}.down_proj.weight",
    },
    GPT_OSS: {
        "layers.attention.sinks": "self_attn.sinks",
        "layers.mlp.gate": "mlp.experts.gate_up_proj" + EVEN,
        "layers.mlp.up": "mlp.experts.gate_up_proj" + ODD,
        "layers.mlp.down": "mlp.experts.down_proj",
        "layers.mlp.gate_bias": "mlp.experts.gate_up_proj_bias" + EVEN,
        "layers.mlp.up_bias": "mlp.experts.gate_up_proj_bias" + ODD,
        "layers.mlp.down_bias": "mlp.experts.down_proj_bias",
    },
}


def decoder_names(config: DecoderConfig) -> Names:
    """The tensor names of a decoder in Hugging Face checkpoints."""
    architecture = architecture_of_experts(config)
    if architecture is None:
        return DECODER
    modules = {**DECODER.modules, "layers.mlp.router": _ROUTER[architecture]}
    return DECODER._replace(modules=modules, arrays=_ARRAYS[architecture])


def weights_of(model: Decoder) -> tuple[list[Weight], Any]:
    """The arrays of a decoder (real or abstract) with their tensor names, and the tree that restores the module."""
    return named_weights(model, decoder_names(model.config))


Index = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """A part of a tensor, or what follows from several, with the interface of a safetensors slice that `fill` needs.

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


def apart(tensors: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The tensors of a decoder by the names of `decoder_names`, whatever the layout of its experts.

    A tensor of an unexpected shape is left as it is: it is then left over, and its parts are missing.
    """
    architecture = architecture_of_experts(config)
    if architecture is None or config.experts is None:
        return dict(tensors)
    count = config.experts.count
    if architecture == GPT_OSS:
        return _alternating(_dequantised(tensors))
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if architecture == MIXTRAL else name
        found |= _by_expert(name, tensor, count, architecture) or {name: tensor}
    return found


def _by_expert(name: str, tensor: Any, count: int, architecture: str) -> dict[str, Any]:
    """A fused tensor as one per expert; empty for any other tensor."""
    prefix, _, kind = name.rpartition(".")
    shape = tuple(tensor.get_shape())
    if not prefix.endswith(".experts") or len(shape) != 3 or shape[0] != count or 0 in shape:
        return {}
    half = shape[1] // 2
    gate, up, down = ("w1", "w3", "w2") if architecture == MIXTRAL else ("gate_proj", "up_proj", "down_proj")
    parts = {"gate_up_proj": {gate: (0, half), up: (half, shape[1])}, "down_proj": {down: (0, shape[1])}}.get(kind, {})
    return {
        f"{prefix}.{expert}.{part}.weight": _rows(tensor, expert, *rows)
        for part, rows in parts.items()
        for expert in range(count)
    }


def _rows(tensor: Any, expert: int, start: int, stop: int) -> Part:
    """Some rows of one expert's matrix in a tensor [X, out, in]."""

    def read(index: Index) -> np.ndarray:
        rows, columns = index
        return tensor[expert : expert + 1, start + rows.start : start + rows.stop, columns][0]

    return Part((stop - start, tensor.get_shape()[2]), tensor.get_dtype(), read)


def _alternating(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Gate and up of GPT-OSS as two tensors."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.get_shape())
        if name.endswith((".experts.gate_up_proj", ".experts.gate_up_proj_bias")) and shape and shape[-1] % 2 == 0:
            found |= {name + EVEN: _every_other(tensor, 0), name + ODD: _every_other(tensor, 1)}
        else:
            found[name] = tensor
    return found


def _every_other(tensor: Any, first: int) -> Part:
    """Every second channel of the last axis."""

    def read(index: Index) -> np.ndarray:
        last = index[-1]
        return tensor[(*index[:-1], slice(2 * last.start, 2 * last.stop))][..., first::2]

    *outer, channels = tensor.get_shape()
    return Part((*outer, channels // 2), tensor.get_dtype(), read)


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_BLOCK = 32
"""The numbers of MXFP4 that share a scale: 16 bytes of two each."""


def _dequantised(tensors: Mapping[str, Any]) -> dict[str, Any]:
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
            found[whole] = Part((shape[0], shape[2] * _BLOCK, shape[1]), "BF16", read)
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


class Alternating:
    """Gate and up as one array [L, ..., 2F] in which their channels alternate. A layer of it is made when indexed."""

    def __init__(self, gate: jax.Array, up: jax.Array):
        self.gate, self.up = gate, up
        self.shape, self.dtype = (*gate.shape[:-1], 2 * gate.shape[-1]), gate.dtype
        self.nbytes = gate.nbytes + up.nbytes

    def __getitem__(self, index: Any) -> np.ndarray:
        both = np.stack([np.asarray(self.gate[index]), np.asarray(self.up[index])], axis=-1)
        return both.reshape(*both.shape[:-2], -1)


def joined(weights: list[Weight]) -> list[Weight]:
    """The weights as a checkpoint has them: the inverse of `apart` for GPT-OSS."""
    by_name = {weight.tensors[0]: weight for weight in weights}
    done = []
    for first, weight in by_name.items():
        if first.endswith(EVEN):
            up = by_name[first.removesuffix(EVEN) + ODD]
            names = tuple(name.removesuffix(EVEN) for name in weight.tensors)
            done.append(weight._replace(array=Alternating(weight.array, up.array), tensors=names))
        elif not first.endswith(ODD):
            done.append(weight)
    return done
