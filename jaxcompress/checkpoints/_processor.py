"""Loads the image processor of a folder with transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jaxcompress._extras import extra
from jaxcompress.inputs.json import read_object

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def image_processor(folder: Path) -> Any:
    """The `transformers` image processor of a folder, with the Pillow backend.

    Whether the processor fits the tower is checked by `generation.pictures.process`.

    Raises:
      FileNotFoundError: the folder has no processor config.
      ValueError: the processor config cannot be read.
      ImportError: Pillow is not installed; the message names what to install.
    """
    present = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    if not present:
        raise FileNotFoundError(f"{folder} has no {PROCESSOR_FILES[0]}")
    for path in present:
        read_object(path)
    with extra("vision"):
        import PIL  # noqa: F401  the error of transformers is less clear
    auto = _from_transformers("AutoImageProcessor")
    try:
        return auto.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # transformers may raise any exception for a bad config
        raise ValueError(f"{present[0]}: no image processor can be made of it: {error}") from error


def _from_transformers(name: str) -> Any:
    """A class of transformers. This is the only place that imports transformers.

    Without PyTorch, transformers prints "PyTorch was not found" on import. Nothing here needs PyTorch, so this advice
    is turned off during the import, and only then.
    """
    before = os.environ.get(_NO_ADVICE)
    os.environ[_NO_ADVICE] = "1"
    try:
        import transformers

        return getattr(transformers, name)  # imports more of the package
    finally:
        if before is None:
            del os.environ[_NO_ADVICE]
        else:
            os.environ[_NO_ADVICE] = before
