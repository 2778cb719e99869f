"""Loads weights from a Hugging Face folder directly into arrays that are stacked over layers.

Each tensor, or the part of it that a device needs, is copied once from the mapped file into its place in the stacked
array. Orbax's safetensors layout was measured as an alternative (0.5 GB, two CPU cores). Its arrays have to
be stacked after loading, which took twice the memory and 1.5 times the time. Its import adds 0.3 s to the start.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxcompress.checkpoints._config import architecture_of, decoder_config
from jaxcompress.checkpoints._dtype import STORED, held_in_int8, weights_dtype
from jaxcompress.checkpoints._entries import config_of, shown
from jaxcompress.checkpoints._families import FAMILIES
from jaxcompress.checkpoints._gguf import GGUF, ROPE_FACTORS, read_gguf
from jaxcompress.checkpoints._int8 import check_extra, in_int8
from jaxcompress.checkpoints._known import KNOWN_MODELS, known_model
from jaxcompress.checkpoints._loaded import Loaded, Model
from jaxcompress.checkpoints._weights import Part, Weight, named_weights
from jaxcompress.inputs.gguf import SUFFIX, is_gguf
from jaxcompress.inputs.json import read_object
from jaxcompress.inputs.paths import path_of
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DOWNLOADED = (
    "config.json", "generation_config.json", "model*.safetensors", _INDEX, "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "sentencepiece*", "chat_template*",
    "additional_chat_templates/*", "preprocessor_config.json", "processor_config.json", "policy.*",
)  # fmt: skip

_MOST_NAMED = 100
_ALIGNMENT = 64
"""XLA's alignment of arrays on a CPU, in bytes."""

Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


class Surplus(NamedTuple):
    """Predicates on the names of tensors that a module does not use. Any other unused tensor is an error.

    Attributes:
      ignored: whether a tensor is skipped silently.
      unused: whether a tensor is skipped with a warning.
    """

    ignored: Callable[[str], bool]
    unused: Callable[[str], bool] = lambda name: False


Kept = Callable[[str, jax.Array], Any]
"""(dotted path, array) -> what the module holds in its place."""


def as_it_is(name: str, array: jax.Array) -> jax.Array:
    return array


class Target(NamedTuple):
    """How a module holds its weights.

    Attributes:
      dtype: the dtype that they are read as.
      sharding: as in `load`.
      kept: the array itself, or the same in int8.
    """

    dtype: np.dtype
    sharding: Shardings | None = None
    kept: Kept = as_it_is


class NotFinite(FloatingPointError, ValueError):
    """Weights hold NaN or infinity."""


def load(
    source: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings | None = None
) -> Loaded[Decoder, DecoderConfig, Tokenizer]:
    """Reads the checkpoint of a decoder: a Hugging Face folder or a GGUF file.

    Families: Llama, Mistral, Qwen2, Qwen3, GPT-NeoX (Pythia), Gemma 2, Gemma 3 (text), Phi-3 (Phi-4), OLMo 2, SmolLM3,
    Mixtral, Qwen3-MoE and GPT-OSS; as GGUF, those of `jaxcompress.checkpoints._gguf_config.ARCHITECTURES`.

    Linear weights [out, in] become kernels [L, in, out], stacked over the L layers. If config.json ties the output
    projection to the embedding, but the files hold a different projection, that projection is used and the model is
    not tied.

    The experts of a mixture may be separate or fused in the files; the MXFP4 weights of GPT-OSS become plain numbers.

    Args:
      source: a folder with config.json and safetensors (model.safetensors, or several files with
        model.safetensors.index.json); a GGUF file, with any quantisation (needs `pip install "jaxcompress[gguf]"`); a
        known name (`KNOWN_MODELS`) whose file has been fetched; or, if there is no such folder, a repository of the
        Hugging Face hub, which is downloaded into the hub's cache.
      dtype: the dtype of all weights, or one of its usual names: "bfloat16", "bf16", "half", ... None means the dtype
        of the checkpoint, which is float32 for quantised ones; "auto" likewise, but float32 on a CPU, where narrower
        types are slower. "int8" holds the matrices in int8, with a scale for each output channel, and computes in the
        type of "auto": a quarter of the memory, and on a CPU about twice the speed of decoding. The model can then
        neither be trained nor saved. Needs `pip install "jaxcompress[int8]"`.
      sharding: a `jax.sharding.Sharding` for every array, or a function of an array's name and shape that returns one.
        Names are dotted paths in the module: "embedding", "layers.attention.query.kernel", "head". Each device reads
        only its own part of the files.

    Raises:
      FileNotFoundError: the source is neither a folder nor a repository that can be fetched; the folder has no
        config.json or no weights; the file of a known name has not been fetched.
      ImportError: the source is a GGUF file and the `gguf` package is not installed, or the dtype is "int8" and `qwix`
        is not.
      ValueError: the architecture, activation or RoPE type is unknown; tensors are missing, left over, of a wrong shape
        or not floating-point (the message names all of them); weights are not finite; a file is neither safetensors nor
        GGUF.

    Examples:
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> model = load("Qwen/Qwen3-0.6B", dtype="bfloat16").model  # doctest: +SKIP
      >>> model = load("SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32").model  # doctest: +SKIP
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> columns = NamedSharding(mesh, PartitionSpec(None, None, "model"))
      >>> whole = NamedSharding(mesh, PartitionSpec())
      >>> where = lambda name, shape: columns if name.endswith("kernel") else whole
      >>> model = load("checkpoint", sharding=where).model  # doctest: +SKIP
    """
    folder = find(source)
    kept: Kept = as_it_is
    if held_in_int8(dtype):
        check_extra()
        kept, dtype = in_int8, "auto"
    if is_gguf(folder):
        return _load_gguf(folder, dtype, sharding, kept)
    settings = read_object(folder / "config.json")
    with config_of(folder / "config.json"):
        config = decoder_config(settings)
    family = FAMILIES[architecture_of(settings)]
    names = family.names
    tensors = tensors_of(folder, names.ours)
    target = weights_dtype(dtype, settings, tensors, folder)
    config, tensors = with_own_head(config, tensors, names.single["embedding"], names.single["head"], target)
    # Older checkpoints hold the RoPE frequencies and causal masks, which follow from the config.
    derived = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
    surplus = Surplus(lambda name: name.endswith(derived))
    make = lambda: Decoder(config, dtype=target, rngs=nnx.Rngs(0))
    named = lambda model: named_weights(model, names)
    sizes, tensors = sizes_of(config), family.unpacked(tensors, config)
    into = Target(target, sharding, kept)
    model = fill(folder, tensors, make, named, sizes=sizes, surplus=surplus, into=into)
    return Loaded(model, config, settings, folder, Tokenizer)


def _load_gguf(
    path: Path, dtype: DTypeLike | None, sharding: Shardings | None, kept: Kept
) -> Loaded[Decoder, DecoderConfig, Tokenizer]:
    settings, config, tensors = read_gguf(path)
    target = weights_dtype(dtype, settings, tensors, path)
    make = lambda: Decoder(config, dtype=target, rngs=nnx.Rngs(0))
    named = lambda model: named_weights(model, GGUF)
    surplus = Surplus(lambda name: name == ROPE_FACTORS)
    sizes = sizes_of(config)
    into = Target(target, sharding, kept)
    model = fill(path, tensors, make, named, sizes=sizes, surplus=surplus, into=into)
    return Loaded(model, config, settings, path, Tokenizer)


def with_own_head(
    config: DecoderConfig, tensors: Mapping[str, Any], embedding: str, head: str, dtype: np.dtype
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Resolves a tied config whose files hold an output projection (head). Returns the config and the tensors.

    The rules are those of transformers. If the head equals the embedding, the head is left out. If it differs, the head
    is used and the model is not tied. If the embedding is missing, the head is used as the embedding.

    Args:
      tensors: the tensors, by their names in the files.
      embedding: the name of the embedding in the files.
      head: the name of the output projection in the files.
      dtype: the dtype of the model, in which both are compared.
    """
    if not config.tied or head not in tensors:
        return config, dict(tensors)
    others = {name: tensor for name, tensor in tensors.items() if name != head}
    if embedding not in tensors:
        return config, {**others, embedding: tensors[head]}
    if _equal(tensors[embedding], tensors[head], dtype):
        return config, others
    return replace(config, tied=False), dict(tensors)


def _equal(a: Any, b: Any, dtype: np.dtype) -> bool:
    """Whether two tensors [V, E] are equal after conversion to `dtype`. Reads a few rows at a time."""
    if a.get_shape() != b.get_shape() or not {a.get_dtype(), b.get_dtype()} <= STORED.keys():
        return False
    if len(a.get_shape()) != 2:
        return False
    rows, width = a.get_shape()
    step = max(1, 2**22 // max(width, 1))
    blocks = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    with np.errstate(over="ignore"):
        return all(np.array_equal(a[block].astype(dtype), b[block].astype(dtype)) for block in blocks)


def sizes_of(config: DecoderConfig) -> dict[str, int]:
    """The smallest number of elements in a decoder's arrays, by the config entries that determine it."""
    hidden = config.hidden_size
    width = config.intermediate_size * (config.experts.count if config.experts else 1)
    return {
        "vocab_size": config.vocab_size * hidden,
        "intermediate_size": config.num_layers * width * hidden,
        "num_attention_heads and head_dim": config.num_layers * config.num_heads * config.head_dim * hidden,
    }


def fill(
    folder: Path,
    tensors: Mapping[str, Any],
    make: Callable[[], Model],
    weights_of: Callable[[Model], tuple[list[Weight], Any]],
    *,
    sizes: Mapping[str, int],
    surplus: Surplus,
    into: Target,
) -> Model:
    """Builds a module with the weights of a folder or file.

    Args:
      tensors: the tensors of the files, by the names that `weights_of` uses.
      make: () -> the module; it is only traced for its shapes, not run.
      weights_of: (module) -> its arrays with their names in a checkpoint, and the tree that restores the module.
      sizes: the smallest number of elements in arrays, by the config entries that determine it.
      surplus: the tensors that the module does not use.

    Raises:
      ValueError, FileNotFoundError: as `load`.
    """
    _check_sizes(sizes, tensors, folder)
    weights, tree = weights_of(jax.eval_shape(make))
    _check(weights, tensors, surplus, folder)
    not_finite: set[str] = set()
    array = lambda weight: _array(weight, tensors, into.dtype, into.sharding, not_finite)
    arrays = [into.kept(weight.name, array(weight)) for weight in weights]
    if not_finite:
        names = ", ".join(sorted(not_finite))
        raise NotFinite(f"{folder} has weights that are not finite as {into.dtype.name}: {names}")
    return jax.tree_util.tree_unflatten(tree, arrays)


def find(source: str | Path) -> Path:
    """Finds a checkpoint: a folder, a GGUF file, or a hub repository, which is downloaded.

    Raises:
      FileNotFoundError: as `load`.
      ValueError: the source is neither a string nor a path.
    """
    folder = path_of(source, "the source of a checkpoint")
    if folder.is_dir() and not (folder / "config.json").is_file():
        inner = next(iter(sorted(folder.glob("*/config.json"))), None)
        hint = "" if inner is None else f"; {inner.parent} has one"
        raise FileNotFoundError(f"{folder} has no config.json, so it is not the folder of a model{hint}")
    if folder.is_dir() or is_gguf(folder):
        return folder
    name = str(source)
    if name.lower().endswith(SUFFIX):
        raise FileNotFoundError(f"there is no file {folder}")
    if isinstance(source, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {folder}")
    if (known := known_model(name)) is not None:
        return known
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
    except (OSError, ValueError) as error:
        reason, near = str(error).strip().split("\n")[0], get_close_matches(name.lower(), KNOWN_MODELS, n=1)
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a .gguf file, nor {' or '.join(KNOWN_MODELS)}"
            f"{f' (did you mean {near[0]}?)' if near else ''}, nor a repository of the Hugging Face hub that could be "
            f"fetched: {reason}"
        ) from error


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The weight files of a folder, and the index from tensors to files ({} if there is no index)."""
    if (folder / _SINGLE).is_file():
        return [_SINGLE], {}
    if not (folder / _INDEX).is_file():
        others = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        )
        there = f" (it has {', '.join(others)})" if others else ""
        if gguf := [name for name in others if name.endswith(SUFFIX)]:
            there += f"; a GGUF file is given by its own path, {folder / gguf[0]}"
        raise FileNotFoundError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}{there}")
    where = read_object(folder / _INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{folder / _INDEX} needs a weight_map from tensors to files, not {shown(where)}")
    files = sorted(set(where.values()))
    if outside := [name for name in files if PurePath(name).is_absolute() or ".." in PurePath(name).parts]:
        raise ValueError(f"{folder / _INDEX} names files outside of the folder: {', '.join(map(shown, outside))}")
    # Unlike `Path.is_file`, `os.path.isfile` returns False for names that no file system accepts.
    if absent := [name for name in files if not os.path.isfile(folder / name)]:
        names = (name if name.isprintable() and len(name) <= 200 else shown(name) for name in absent)
        raise FileNotFoundError(f"{folder} lacks files that {_INDEX} names: {', '.join(names)}")
    return files, where


def tensors_of(folder: Path, renamed: Callable[[str], str] = lambda name: name) -> dict[str, Any]:
    """The tensors of a folder, which read nothing until they are indexed.

    If several files hold a tensor, the file that the index names counts.

    Args:
      renamed: (name of a tensor in the files) -> its name here.

    Raises:
      FileNotFoundError, ValueError: as `load`; also if two tensors would have the same name.
    """
    tensors: dict[str, Any] = {}
    files, where = _weight_files(folder)
    for file in files:
        for name, tensor in _tensors(folder / file).items():
            if where.get(name, file) != file:
                continue
            if renamed(name) in tensors:
                raise ValueError(f"{folder} has two tensors {renamed(name)}, one of them as {name} in {file}")
            tensors[renamed(name)] = tensor
    return tensors


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file, with the interface of safetensors' slices; indexing reads.

    The file is mapped into memory during each read only: otherwise all of its pages would count as memory in use until
    the last one is read.
    """

    path: Path
    name: str
    shape: list[int]
    dtype: str

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        with safe_open(self.path, framework="numpy") as file:
            return file.get_slice(self.name)[index]


def _tensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not iterable
            return {name: _Tensor(path, name, x.get_shape(), x.get_dtype()) for name, x in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from error


def _check_sizes(sizes: Mapping[str, int], tensors: Mapping[str, Any], folder: Path) -> None:
    """Checks that the files hold as many numbers as the config requires, before anything is allocated."""
    held = sum(math.prod(tensor.get_shape()) for tensor in tensors.values())
    if larger := [f"{entry} ({size:,})" for entry, size in sizes.items() if size > held]:
        raise ValueError(
            f"the tensors in {folder} do not fit its {_described(folder)}: they hold {held:,} numbers, fewer than it "
            f"takes for {', '.join(larger)}"
        )


def _check(
    weights: list[Weight],
    tensors: Mapping[str, Any],
    surplus: Surplus,
    folder: Path,
) -> None:
    shapes = {name: weight.tensor_shape for weight in weights for name in weight.tensors}
    found = {name: tuple(tensors[name].get_shape()) for name in shapes if name in tensors}
    others = sorted(name for name in tensors if name not in shapes and not surplus.ignored(name))
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "left over": [name for name in others if not surplus.unused(name)],
        "of another shape": [
            f"{name} {list(shape)}, not {list(shapes[name])}" for name, shape in found.items() if shape != shapes[name]
        ],
        "not floats": [f"{name} ({kind})" for name in found if (kind := tensors[name].get_dtype()) not in STORED],
    }
    if any(problems.values()):
        lines = [f"  {what}: {_listed(names)}" for what, names in problems.items() if names]
        if any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in problems["missing"]):
            lines.append("  if the output projection is the embedding, set tie_word_embeddings to true in config.json")
        raise ValueError("\n".join([f"the tensors in {folder} do not fit its {_described(folder)}:", *lines]))
    if others:
        warnings.warn(f"{folder} has tensors that this model has no use for: {_listed(others)}", stacklevel=4)


def _described(folder: Path) -> str:
    """The part of a checkpoint that describes its tensors, for messages."""
    return "metadata" if is_gguf(folder) else "config.json"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _array(
    weight: Weight,
    tensors: Mapping[str, Any],
    dtype: np.dtype,
    sharding: Shardings | None,
    not_finite: set[str],
) -> jax.Array:
    shape = weight.array.shape
    read = lambda index: _read(weight, index, tensors, dtype, not_finite)
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    where = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(weight.name, shape)
    return jax.make_array_from_callback(shape, where, read)


def _read(
    weight: Weight, index: tuple[slice, ...], tensors: Mapping[str, Any], dtype: np.dtype, not_finite: set[str]
) -> np.ndarray:
    """Reads the part `index` of a weight. It is filled tensor by tensor, so little more than the part is in memory."""
    out = _aligned([len(range(*s.indices(n))) for s, n in zip(index, weight.array.shape, strict=True)], dtype)
    depth = weight.stacked
    blocks = out.reshape(-1, *out.shape[depth:])
    names = np.ravel(np.array(weight.tensors, object).reshape(weight.array.shape[:depth])[index[:depth]])
    inner = index[depth:]
    inner = (0,) * weight.leading + (inner[::-1] if weight.transposed else inner)

    def fill_block(block: np.ndarray, name: str) -> None:
        part = tensors[name][inner] if weight.part is None else _rows(tensors[name], inner, weight.part)
        with np.errstate(over="ignore"):
            block[...] = part.T if weight.transposed else part
        if not np.isfinite(block).all():
            not_finite.add(name)

    # NumPy lets other threads run while it copies and converts. Each thread holds one tensor.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        deque(pool.map(fill_block, blocks, names), maxlen=0)
    return out


def _rows(tensor: Any, index: tuple[Any, ...], part: Part) -> np.ndarray:
    """Some rows of a tensor, out of those of a part. Rows that follow each other, or every other row, are one read."""
    axis, where, read = part.axis, list(index), []
    rows = part.rows[index[axis]]
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 2) + 1):
        where[axis] = slice(int(run[0]), int(run[-1]) + 1)
        whole = tensor[tuple(where)]
        read.append(whole if whole.shape[axis] == len(run) else np.take(whole, run - run[0], axis))
    return np.concatenate(read, axis)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array without values which JAX takes on a CPU as it is: it copies those that begin elsewhere."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    first = -room.ctypes.data % _ALIGNMENT
    return room[first : first + size].view(dtype).reshape(shape)
