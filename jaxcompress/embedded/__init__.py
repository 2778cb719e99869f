"""The small models that ship with the package, and the text they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.prompt.word_scores import Scorer


def folder() -> Path:
    """Where the embedded model lies: a Hugging Face folder."""
    return Path(__file__).parent / "model"


def load_embedded(dtype: Any = "float32") -> tuple[Decoder, Tokenizer]:
    """The embedded model and its tokenizer: Qwen3 shape, context of 2,048 tokens, Python documentation and sources."""
    from jaxcompress.checkpoints import load
    from jaxcompress.generation.text import Tokenizer

    return load(folder(), dtype=dtype).model, Tokenizer(folder())


def compressor_folder() -> Path:
    """Where the classifier for prompt compression lies that ships with the package: a Hugging Face folder.

    Raises:
      FileNotFoundError: this build of the package has none.
    """
    path = Path(__file__).parent / "compressor"
    if not (path / "config.json").is_file():
        raise FileNotFoundError("no prompt compressor ships with this build; give the folder or hub id of an encoder")
    return path


def load_compressor() -> Scorer:
    """The same as a scorer of words, to be mixed and compared with others (see docs/prompt_data.md)."""
    from jaxcompress.prompt.classifier import token_classifier
    from jaxcompress.prompt.compressor import Compressor

    return token_classifier(Compressor.load(dtype="float32"), name="embedded classifier")
