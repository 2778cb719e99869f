"""The small models that ship with the package, for text, prompts and pictures, and what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcompress.checkpoints import LoadedLlava
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.policies import Policy
    from jaxcompress.prompt.word_scores import Scorer


def folder() -> Path:
    """Where the embedded model lies: a Hugging Face folder."""
    return Path(__file__).parent / "model"


def load_embedded(dtype: Any = "float32") -> tuple[Decoder, Tokenizer]:
    """The embedded model and its tokenizer: Qwen3 shape, context of 2,048 tokens, Python documentation and sources."""
    from jaxcompress.checkpoints import load
    from jaxcompress.generation.text import Tokenizer

    return load(folder(), dtype=dtype).model, Tokenizer(folder())


def load_embedded_policy() -> Policy:
    """The policy that learnt beside the embedded model: a retention head, one set of slots per layer. `own` on the
    command line."""
    from jaxcompress.checkpoints import load_policy

    saved = load_policy(folder())
    assert saved is not None
    return saved.make()


def compressor_folder() -> Path:
    """Where the prompt compressor lies that ships with the package: a Hugging Face folder of a BERT that classifies
    tokens."""
    return Path(__file__).parent / "compressor"


def load_compressor() -> Scorer:
    """The same as a scorer of words, to be mixed and compared with others (see docs/prompt_data.md)."""
    from jaxcompress.prompt.classifier import token_classifier
    from jaxcompress.prompt.compressor import Compressor

    return token_classifier(Compressor.load(dtype="float32"), name="embedded classifier")


def vision_folder() -> Path:
    """Where the embedded vision-language model lies: a Hugging Face folder."""
    return Path(__file__).parent / "vision_model"


def load_embedded_vision(dtype: Any = "float32") -> tuple[LoadedLlava, Tokenizer]:
    """The embedded vision-language model and its tokenizer: LLaVA's shape, 144 patches, questions about drawings."""
    from jaxcompress.checkpoints import load_llava
    from jaxcompress.generation.text import Tokenizer

    return load_llava(vision_folder(), dtype=dtype), Tokenizer(vision_folder())
