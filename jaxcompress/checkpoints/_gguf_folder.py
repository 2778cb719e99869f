"""Writes the tokenizer and settings of a GGUF file as the files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxcompress.checkpoints._known import known_model
from jaxcompress.inputs.gguf import is_gguf
from jaxcompress.inputs.gguf_tokenizer import read_gguf_tokenizer
from jaxcompress.inputs.paths import path_of


@contextmanager
def as_folder(source: str | Path | None) -> Iterator[Path | None]:
    """A folder with a tokenizer: the given folder, or a temporary folder with the tokenizer of a GGUF file.

    Raises:
      FileNotFoundError: the source is a known name whose file has not been fetched.
      ValueError: the source is no path; the file is not GGUF, or has no tokenizer of a known kind.
    """
    if source is None:
        yield None
        return
    path = path_of(source, "tokenizer_from")
    if not path.exists() and isinstance(source, str):
        path = known_model(source) or path
    if not is_gguf(path):
        yield path
        return
    with TemporaryDirectory(prefix="jaxcompress-") as folder:
        _write(path, Path(folder))
        yield Path(folder)


def _write(path: Path, folder: Path) -> None:
    fast, named, templates, ids = read_gguf_tokenizer(path)
    fast.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    said: dict[str, Any] = {key: found[0] if len(found) == 1 else [*found] for key, found in ids.items() if found}
    for name, content in {"tokenizer_config": config, "generation_config": said, "config": said}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
