"""GGUF files of the parity fixtures, written with the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxcompress.checkpoints import load

from .folders import PARITY, tensors_of

KINDS = gguf.GGMLQuantizationType
ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def settings_of(name: str) -> dict[str, Any]:
    return json.loads((PARITY / name / "config.json").read_text())


def write(
    path: Path,
    name: str,
    kind: KINDS = KINDS.F32,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A fixture as a file.

    Args:
      kind: of the matrices whose rows are whole blocks; other tensors are float32.
      tensors: Hugging Face's names; the fixture's if None.
      config: entries of config.json that are other ones.
      metadata: written beside the rest: integers, floats, strings, booleans, lists.
    """
    settings = settings_of(name) | dict(config or {})
    tensors = tensors_of(name) if tensors is None else tensors
    model = ARCHITECTURES.get(settings["model_type"], gguf.MODEL_ARCH.LLAMA)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[model])
    heads = _describe(writer, settings, tensors)
    for key, value in (metadata or {}).items():
        add(writer, key, value)
    names = gguf.get_tensor_name_map(model, settings["num_hidden_layers"])
    for theirs, array in tensors.items():
        base, _, end = theirs.rpartition(".")
        if model is gguf.MODEL_ARCH.LLAMA and any(part in base for part in heads):
            array = permuted(array, next(n for part, n in heads.items() if part in base))
        stored = kind if array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else KINDS.F32
        data = gguf.quantize(np.ascontiguousarray(array, np.float32), stored)
        writer.add_tensor(f"{names.get_name(base)}.{end}", data, raw_dtype=stored)
    _finish(writer)
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _describe(writer: gguf.GGUFWriter, c: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    head = c.get("head_dim") or c["hidden_size"] // heads
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    _describe_rope(writer, c["rope_parameters"], head)
    if window := c.get("sliding_window"):
        writer.add_sliding_window(window)
        if "layer_types" in c:
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in c["layer_types"]])
    return {"q_proj": heads, "k_proj": groups}


def _describe_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any], head: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head))


def llama3_factors(rope: Mapping[str, Any], head: int) -> np.ndarray:
    """`LlamaModel.generate_extra_tensors` of llama.cpp's converter."""
    low, high, factor = (rope[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    old, factors = rope["original_max_position_embeddings"], []
    for i in range(0, head, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantised(folder: Path, path: Path, name: str) -> Path:
    """The same weights as a folder: what the `gguf` package makes of each whole tensor of a file, back in order."""
    from safetensors.numpy import save_file

    settings = settings_of(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    model = ARCHITECTURES.get(settings["model_type"], gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(model, settings["num_hidden_layers"])
    ours = {
        f"{names.get_name(base)}.{end}": theirs
        for theirs in tensors_of(name)
        for base, _, end in [theirs.rpartition(".")]
    }
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    arrays = {ours[key]: array for key, array in found.items() if key in ours}
    for theirs, array in arrays.items():
        heads = settings["num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"]
        if model is gguf.MODEL_ARCH.LLAMA and ("q_proj" in theirs or "k_proj" in theirs):
            half = array.shape[0] // heads // 2
            arrays[theirs] = array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / "model.safetensors")
    assert load(folder)
    return folder
