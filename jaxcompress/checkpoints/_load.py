"""Weights from a Hugging Face folder, straight into arrays stacked over layers.

The files are memory-mapped by safetensors, and each tensor, or the part of it that a device needs, is copied once: into
its place in the stacked array. Orbax's safetensors layout was measured instead (0.5 GB, two CPU cores): its arrays have
to be stacked after loading, which took twice the memory and 1.5 times the time, and its import adds 0.3 s to the start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from jaxcompress.checkpoints._config import decoder_config
from jaxcompress.checkpoints._policy import SavedPolicy, load_policy
from jaxcompress.checkpoints._weights import Weight, weights_of
from jaxcompress.models.decoder import Decoder, DecoderConfig

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DOWNLOADED = (
    "config.json", "generation_config.json", "model*.safetensors", _INDEX, "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "sentencepiece*", "chat_template*",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


class NotFinite(FloatingPointError, ValueError):
    """Weights hold NaN or infinity."""


class Loaded(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      model: the decoder.
      config: its shape; the same as `model.config`.
      settings: config.json as it was read, for what the decoder does not need: `eos_token_id`, ...
      folder: where the files are; `folder / "tokenizer.json"` is there if the checkpoint has a fast tokenizer.
    """

    model: Decoder
    config: DecoderConfig
    settings: dict[str, Any]
    folder: Path

    def tokenizer(self) -> Any:
        """The `transformers` tokenizer of this checkpoint. Imports transformers, which takes a second."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def policy(self) -> SavedPolicy:
        """What the model was trained to be read with, and that policy's own weights.

        Raises:
          ValueError: it was saved without a policy (`load_policy(folder)` gives None then).
        """
        saved = load_policy(self.folder)
        if saved is None:
            raise ValueError(
                f"the model in {self.folder} was saved without a policy of its own; use one by name, such as "
                "jaxcompress.named('tova')"
            )
        return saved


def load(source: str | Path, *, dtype: Any = None, sharding: Shardings | None = None) -> Loaded:
    """Reads a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

    Linear weights [out, in] become kernels [L, in, out], stacked over the L layers.

    Args:
      source: a folder with config.json and safetensors (model.safetensors, or several files with
        model.safetensors.index.json); or, if there is no such folder, a repository of the Hugging Face hub, which is
        downloaded into the hub's cache.
      dtype: of all weights; the checkpoint's own if None.
      sharding: a `jax.sharding.Sharding` for every array, or a function of an array's name and shape that returns one.
        Names are dotted paths in the module: "embedding", "layers.attention.query.kernel", "head". Each device reads
        its own part of the files only.

    Raises:
      FileNotFoundError: neither a folder nor a repository that can be fetched; a folder without config.json or weights.
      ValueError: an unknown architecture, activation or RoPE type; tensors that are missing, left over, of a wrong
        shape or no floats (all named at once); weights that are not finite; a file that is no safetensors.

    Example:
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> model = load("Qwen/Qwen3-0.6B", dtype=jnp.bfloat16).model  # doctest: +SKIP
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> columns = NamedSharding(mesh, PartitionSpec(None, None, "model"))
      >>> whole = NamedSharding(mesh, PartitionSpec())
      >>> where = lambda name, shape: columns if name.endswith("kernel") else whole
      >>> model = load("checkpoint", sharding=where).model  # doctest: +SKIP
    """
    folder = find(source)
    settings = read_json(folder / "config.json")
    config = decoder_config(settings)
    # Older checkpoints hold the RoPE frequencies, and some tied ones the embedding twice.
    ignored = lambda name: name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")
    make = lambda dtype: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    model = fill(folder, settings, make, weights_of, ignored=ignored, dtype=dtype, sharding=sharding)
    return Loaded(model, config, settings, folder)


def fill(
    folder: Path,
    settings: Mapping[str, Any],
    make: Callable[[Any], Any],
    weights_of: Callable[[Any], tuple[list[Weight], Any]],
    *,
    ignored: Callable[[str], bool],
    renamed: Callable[[str], str] = lambda name: name,
    dtype: Any,
    sharding: Shardings | None,
) -> Any:
    """A module with the weights of a folder.

    Args:
      settings: its config.json.
      make: (dtype) -> the module; it is not run, only its shapes are asked for.
      weights_of: (module) -> its arrays with their names in a checkpoint, and the tree to put them back.
      ignored: whether a tensor, by name, may be left over.
      renamed: a tensor's name in the files -> as `weights_of` has it.
      dtype, sharding: as in `load`.

    Raises:
      ValueError, FileNotFoundError: as `load`.
    """
    with _open(_weight_files(folder)) as files:
        tensors = {renamed(name): tensor for name, tensor in files.items()}
        target = _dtype(dtype, settings, tensors)
        weights, tree = weights_of(jax.eval_shape(lambda: make(target)))
        _check(weights, tensors, ignored, folder)
        not_finite: set[str] = set()
        arrays = [_array(weight, tensors, target, sharding, not_finite) for weight in weights]
    if not_finite:
        raise NotFinite(f"{folder} has weights that are not finite as {target.name}: {', '.join(sorted(not_finite))}")
    return jax.tree_util.tree_unflatten(tree, arrays)


def find(source: str | Path) -> Path:
    """A checkpoint's folder, downloaded if it is a hub id. Raises FileNotFoundError."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    if isinstance(source, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a repository of the Hugging Face hub that could be fetched: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        files = [folder / name for name in sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder} lacks files that {_INDEX} names: {', '.join(absent)}")
        return files
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
    there = f" (it has {', '.join(others)})" if others else ""
    raise FileNotFoundError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}{there}")


@contextmanager
def _open(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The tensors of all files as safetensors slices, which read nothing until they are indexed."""
    tensors: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{path} is not a safetensors file, or damaged: {error}") from error
            tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not iterable
        yield tensors


def _dtype(asked: Any, settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> np.dtype:
    if asked is None:
        asked = settings.get("dtype") or settings.get("torch_dtype")
    if asked is None:
        asked = _DTYPES.get(next(iter(tensors.values())).get_dtype(), "float32")
    dtype = jax.dtypes.canonicalize_dtype(asked)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating-point type, not {dtype.name}")
    return dtype


def _check(weights: list[Weight], tensors: Mapping[str, Any], ignored: Callable[[str], bool], folder: Path) -> None:
    shapes = {name: weight.tensor_shape for weight in weights for name in weight.tensors}
    found = {name: tuple(tensors[name].get_shape()) for name in shapes if name in tensors}
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "left over": sorted(name for name in tensors if name not in shapes and not ignored(name)),
        "of another shape": [
            f"{name} {list(shape)}, not {list(shapes[name])}" for name, shape in found.items() if shape != shapes[name]
        ],
        "not floats": [f"{name} ({kind})" for name in found if (kind := tensors[name].get_dtype()) not in _DTYPES],
    }
    if any(problems.values()):
        lines = [f"  {what}: {', '.join(names)}" for what, names in problems.items() if names]
        raise ValueError("\n".join([f"the tensors in {folder} do not fit its config.json:", *lines]))


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
    """The part `index` of a weight, filled tensor by tensor so that little more than the part is ever in memory."""
    out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, weight.array.shape, strict=True)], dtype)
    blocks, names, inner = [out], weight.tensors, index
    if weight.stacked:
        blocks, names, inner = list(out), weight.tensors[index[0]], index[1:]
    inner = (0,) * weight.leading + (inner[::-1] if weight.transposed else inner)
    for block, name in zip(blocks, names, strict=True):
        part = tensors[name][inner]
        with np.errstate(over="ignore"):
            block[...] = part.T if weight.transposed else part
        if not np.isfinite(block).all():
            not_finite.add(name)
    return out
