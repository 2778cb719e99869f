"""What commands share: the compilation cache, the model, the text, progress and JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jaxcompress.checkpoints import Loaded
    from jaxcompress.evaluation.recall import Wording
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.policies import Policy

StateDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4"]
"""`jaxcompress.storage.DTYPES`, for the parser, which knows nothing of arrays."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxcompress" / "compiled"


def prepare() -> None:
    """Keeps compiled programs on disk (JAX_COMPILATION_CACHE_DIR overrides where)."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def open_weights(model: str | None, dtype: str | None = None) -> Loaded:
    """A Hugging Face folder or hub id, or the embedded model if None."""
    prepare()
    from jaxcompress import embedded
    from jaxcompress.checkpoints import load

    return load(embedded.folder() if model is None else model, dtype=dtype)


def open_model(model: str | None, dtype: str | None = None) -> tuple[Decoder, Tokenizer]:
    """The same with its tokenizer."""
    from jaxcompress.generation.text import Tokenizer

    loaded = open_weights(model, dtype)
    return loaded.model, Tokenizer(loaded.folder)


def policy_named(name: str, folder: Path) -> Policy:
    """A policy by name; `own` is the one that was saved with the model in a folder.

    Raises:
      ValueError: an unknown name, or none was saved.
    """
    from jaxcompress.checkpoints import load_policy
    from jaxcompress.naming import named

    if name.split("/")[0] != "own":
        return named(name)
    saved = load_policy(folder)
    if saved is None:
        raise ValueError(f"the model in {folder} was saved without a policy of its own; name another one")
    return named(name, own=saved.make())


def read_text(path: Path | None) -> str:
    """A UTF-8 file, or standard input for None and `-`.

    Raises:
      ValueError: not UTF-8; names the byte.
    """
    data = sys.stdin.buffer.read() if path is None or str(path) == "-" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path or 'standard input'} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}"
        ) from None


def words_of(tokenizer: Tokenizer) -> Wording:
    """What recall tasks are made of, in a tokenizer's words."""
    from jaxcompress.evaluation.recall import wording

    return wording(tokenizer.vocabulary(), lambda text: tokenizer.encode(text, add_bos=False).tolist())


@contextmanager
def progress(total: int | None, what: str, unit: str = "tok") -> Iterator[Callable[[int], None]]:
    """A bar on standard error, only where that is a terminal; yields a function to call with what has been done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(n: int) -> None:
            bar.update(n)

        yield advance


def write_json(value: Any, path: Path | None = None) -> None:
    """To a file, whole or not at all, or to standard output."""
    text = json.dumps(value, indent=2) + "\n"
    if path is None:
        print(text, end="")
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
