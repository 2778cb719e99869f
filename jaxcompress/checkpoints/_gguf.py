"""Reads the weights of a decoder from a GGUF file, llama.cpp's format.

The `gguf` package dequantises blocks, a few rows at a time, directly from the memory map.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcompress._extras import extra
from jaxcompress.checkpoints._config import decoder_config
from jaxcompress.checkpoints._gguf_config import config_of_metadata
from jaxcompress.checkpoints._weights import Names
from jaxcompress.inputs.gguf import Header, TensorPlace, check_places, read_header
from jaxcompress.models.config import DecoderConfig

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

GGUF = Names(
    {"embedding": "token_embd.weight", "head": "output.weight"},
    {
        "norm": "output_norm",
        "layers.attention_norm": "attn_norm",
        "layers.attention.query": "attn_q",
        "layers.attention.key": "attn_k",
        "layers.attention.value": "attn_v",
        "layers.attention.out": "attn_output",
        "layers.attention.query_norm": "attn_q_norm",
        "layers.attention.key_norm": "attn_k_norm",
        "layers.mlp_norm": "ffn_norm",
        "layers.mlp.gate": "ffn_gate",
        "layers.mlp.up": "ffn_up",
        "layers.mlp.down": "ffn_down",
    },
    "blk.{layer}.",
)
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of divisors of the RoPE frequencies. It is part of the config, not a weight."""

_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
_WHOLE = ("I8", "I16", "I32", "I64")
_AT_ONCE = 2**17
"""How many numbers are dequantised at once: few enough that they stay in the CPU cache and that their memory is used
again, enough for NumPy to be efficient."""


class Tensor:
    """One tensor of a file, with the interface of a safetensors slice that `fill` needs. Indexing reads only that part.

    Attributes:
      data: [rows, bytes] uint8, in the memory map.
      shape: [out, in] or [n].
      kind: the storage type of the numbers.
      order: [out], the index of each row in the file; None for the order of the file.
    """

    def __init__(self, data: np.ndarray, shape: tuple[int, ...], kind: GGMLQuantizationType, order: np.ndarray | None):
        self.data, self.shape, self.kind, self.order = data, shape, kind, order

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """The dtype by its safetensors name; blocks become float32."""
        name = self.kind.name
        return name if name in (*_PLAIN, "BF16", *_WHOLE) else "F32"

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The indexed part as floats, with as many axes as the tensor."""
        if len(self.shape) == 1:
            numbers = self._rows(self.data)[0]
            return (numbers if self.order is None else numbers[self.order])[index[0]]
        rows = np.arange(self.shape[0])[index[0]]
        rows = rows if self.order is None else self.order[rows]
        width = self.shape[1]
        columns = len(range(*index[1].indices(width)))
        out = np.empty((len(rows), columns), np.float64 if self.kind.name == "F64" else np.float32)
        step = max(1, _AT_ONCE // width)
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            # Consecutive rows are a view of the memory map, not a copy.
            near = slice(some[0], some[-1] + 1) if self.order is None and some[-1] - some[0] == len(some) - 1 else some
            out[start : start + step] = self._rows(self.data[near])[:, index[1]]
        return out

    def _rows(self, data: np.ndarray) -> np.ndarray:
        """The numbers [n, in] of some rows [n, bytes]."""
        if self.kind.name in _PLAIN:
            return data.view(_PLAIN[self.kind.name])
        from gguf import dequantize

        # Pass all rows as one, since the package loops over rows. No block spans two rows.
        return dequantize(data.reshape(1, -1), self.kind).reshape(len(data), -1)


class Checkpoint(NamedTuple):
    """The contents of a GGUF file.

    Attributes:
      settings: the equivalent of a Hugging Face config.json.
      config: the config of the decoder.
      tensors: the tensors, by their names in the file (`GGUF`).
    """

    settings: dict[str, Any]
    config: DecoderConfig
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> Checkpoint:
    """Reads the config and tensor table of a decoder. Weights are read only when a tensor is indexed.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the `gguf` package is not installed.
      ValueError: the file is not GGUF, is cut off or is damaged; the architecture, a tensor type or the RoPE scaling is
        unknown.
    """
    header = read_header(path)
    metadata = header.metadata
    try:
        tensors = _tensors(header)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        settings = config_of_metadata(metadata, shapes, _factors(tensors))
        config = decoder_config(settings)
        if metadata["general.architecture"] == "llama":
            _unpermute(tensors, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in tokens.items()}
    return Checkpoint({**settings, **ids, "dtype": _stored(tensors)}, config, tensors)


def _tensors(header: Header) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
      ImportError: the `gguf` package is not installed.
      ValueError: a tensor has an unknown type or is not within the file; the file is one of several.
    """
    with extra("gguf"):
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    files = header.metadata.get("split.count", 0)
    if files not in (0, 1):
        raise ValueError(f"one of {files} files that make a model; llama.cpp's llama-gguf-split --merge joins them")
    known = {kind.value: kind for kind in GGMLQuantizationType}
    if unknown := [place for place in header.tensors if place.kind not in known]:
        raise ValueError(f"the tensor {unknown[0].name!r:.80} is of an unknown type, {unknown[0].kind}")

    def row_bytes(place: TensorPlace) -> int:
        numbers, size = GGML_QUANT_SIZES[known[place.kind]]
        width = place.shape[-1] if place.shape else 1
        if width % numbers:
            name = known[place.kind].name
            raise ValueError(f"the tensor {place.name!r:.80} has rows of {width:,}; {name} has blocks of {numbers}")
        return width // numbers * size

    def rows(place: TensorPlace) -> int:
        return int(np.prod(place.shape[:-1], dtype=object))

    check_places(header, lambda place: rows(place) * row_bytes(place))
    data = np.memmap(header.path, np.uint8, "r")
    return {
        place.name: Tensor(
            data[place.start : place.start + rows(place) * row_bytes(place)].reshape(rows(place), row_bytes(place)),
            place.shape,
            known[place.kind],
            None,
        )
        for place in header.tensors
    }


def _factors(tensors: Mapping[str, Tensor]) -> np.ndarray | None:
    found = tensors.get(ROPE_FACTORS)
    if found is None:
        return None
    if len(found.shape) != 1 or found.get_dtype() != "F32":
        raise ValueError(f"{ROPE_FACTORS} must be a list of float32, not {list(found.shape)} {found.kind.name}")
    return found[(slice(None),)]


def _stored(tensors: Mapping[str, Tensor]) -> str:
    """The dtype of the matrices if all are plain numbers of one type. Else float32, which holds blocks without loss."""
    kinds = {tensor.kind.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return {"F16": "float16", "BF16": "bfloat16"}.get(next(iter(kinds)), "float32") if len(kinds) == 1 else "float32"


def _unpermute(tensors: Mapping[str, Tensor], config: DecoderConfig) -> None:
    """Restores the original row order of a Llama's query and key weights, in place.

    llama.cpp rotates neighbouring channels together, and its converter reorders the rows of each head to fit. Here,
    channel i pairs with channel i + D/2. The converter keeps the order of Qwen models.
    """
    half = config.head_dim // 2
    for kind, heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
        order = np.arange(heads * 2 * half).reshape(heads, half, 2).swapaxes(1, 2).ravel()
        for name, tensor in tensors.items():
            if name.split(".")[2:3] == [kind] and tensor.shape[:1] == order.shape:
                tensor.order = order
