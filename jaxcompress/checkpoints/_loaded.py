"""What a checkpoint holds: the one result of everything that loads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from jaxcompress.checkpoints._policy import SavedPolicy, load_policy
from jaxcompress.checkpoints._processor import image_processor
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.policies.policy import Policy

Model = TypeVar("Model")
Config = TypeVar("Config")
TokenizerOf = TypeVar("TokenizerOf", Tokenizer, EncoderTokenizer)


@dataclass(frozen=True)
class Loaded(Generic[Model, Config, TokenizerOf]):
    """What a checkpoint holds. Tokenizer, policy and processor are read when first asked for.

    Attributes:
      model: the weights.
      config: their shape; the same as `model.config`.
      settings: config.json as it was read, for what the model does not need: `eos_token_id`, `id2label`, ...; of a
        GGUF file, the config.json that its metadata amounts to.
      folder: where the files are; of a GGUF file, the file.
    """

    model: Model
    config: Config
    settings: dict[str, Any]
    folder: Path
    tokenizer_type: type[TokenizerOf]

    @cached_property
    def tokenizer(self) -> TokenizerOf:
        """From text to token ids and back.

        Raises:
          FileNotFoundError, ValueError: as the class of the tokenizer.
        """
        return self.tokenizer_type(self.folder)

    @cached_property
    def saved_policy(self) -> SavedPolicy | None:
        """The policy that the model was trained to be read with, as it was saved: its name, settings and weights."""
        return load_policy(self.folder)

    @cached_property
    def policy(self) -> Policy | None:
        """The policy that the model was trained to be read with; None if it was saved without one."""
        return None if self.saved_policy is None else self.saved_policy.make()

    @cached_property
    def processor(self) -> Any:
        """The `transformers` image processor of this checkpoint.

        Raises:
          FileNotFoundError, ValueError: there is none, or it cannot be read.
        """
        return image_processor(self.folder)
