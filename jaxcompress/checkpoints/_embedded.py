"""The small models that ship with the package."""

from __future__ import annotations

from jax.typing import DTypeLike

from jaxcompress import embedded
from jaxcompress.checkpoints._load import load
from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.checkpoints._vision import load_llava
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.llava import Llava, LlavaConfig


def load_embedded(*, dtype: DTypeLike = "float32") -> Loaded[Decoder, DecoderConfig, Tokenizer]:
    """Loads the embedded language model.

    The model has Qwen3's architecture and a context of 2,048 tokens. It was trained on Python documentation and
    sources. Its `policy` was trained with it: a retention head with one set of slots per layer.

    Args:
      dtype: the dtype of all weights, as for `load`; they are stored as bfloat16.
    """
    return load(embedded.decoder_folder(), dtype=dtype)


def load_embedded_vision(*, dtype: DTypeLike = "float32") -> Loaded[Llava, LlavaConfig, Tokenizer]:
    """Loads the embedded vision-language model.

    The model has LLaVA's architecture with 144 patches. It answers questions about drawings.

    Args:
      dtype: the dtype of all weights, as for `load`; they are stored as bfloat16.
    """
    return load_llava(embedded.vision_folder(), dtype=dtype)
