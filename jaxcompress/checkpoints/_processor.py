"""The image processor of a folder, as transformers makes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxcompress.inputs.json import read_object


def auto(name: str) -> Any:
    """One of `transformers`' classes that open a folder; imported without its advice to install PyTorch."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        import transformers

        return getattr(transformers, name)  # which imports more, and that may give the advice again
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before


_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def image_processor(folder: Path) -> Any:
    """The `transformers` image processor of a folder, through Pillow.

    Raises:
      FileNotFoundError: the folder says nothing about pictures.
      ValueError: what it says cannot be read. Whether it fits the tower is checked by `generation.pictures.process`.
    """
    present = [folder / name for name in _PROCESSORS if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(f"{folder} has no {_PROCESSORS[0]}")
    for path in present:
        read_object(path)
    try:
        return auto("AutoImageProcessor").from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # a class of transformers' makes of a config what it likes
        raise ValueError(f"{present[0]}: no image processor can be made of it: {error}") from error
