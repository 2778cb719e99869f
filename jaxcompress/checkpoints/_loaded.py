"""The contents of a checkpoint, as every `load...` function returns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax

from jaxcompress.checkpoints._policy import SavedPolicy, load_policy
from jaxcompress.checkpoints._policy_of import policy_of
from jaxcompress.checkpoints._processor import image_processor
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.policy import Policy

Model = TypeVar("Model")
Config = TypeVar("Config")
TokenizerOf = TypeVar("TokenizerOf", Tokenizer, EncoderTokenizer)


@dataclass(frozen=True, repr=False, eq=False)
class Loaded(Generic[Model, Config, TokenizerOf]):
    """A checkpoint: the model, and the other contents of its folder.

    Tokenizer, policy and processor are read from the folder on first access, and kept. A pickle holds the attributes
    below, including the weights. The rest is read again from the folder, which then has to exist.

    Attributes:
      model: a module with the weights.
      config: the config of the model, equal to `model.config`.
      settings: config.json as it was read. It includes entries that the model does not need: `eos_token_id`,
        `id2label`, ... For a GGUF file, it is the config.json that is equivalent to the metadata.
      folder: the folder of the files; for GGUF, the file itself.
      tokenizer_type: the class that reads the tokenizer.

    Examples:
      >>> loaded = load_embedded()  # doctest: +SKIP
      >>> tokens = loaded.tokenizer.encode("def main(")[None]  # doctest: +SKIP
      >>> read(loaded.model, tokens, state, loaded.policy)  # doctest: +SKIP
    """

    model: Model
    config: Config
    settings: Mapping[str, Any]
    folder: Path
    tokenizer_type: type[TokenizerOf]

    @cached_property
    def tokenizer(self) -> TokenizerOf:
        """The tokenizer, from text to token ids and back.

        Raises:
          FileNotFoundError: the folder has no tokenizer.json, e.g. the folder of a vision tower.
          ValueError: the files cannot be read as a tokenizer.
        """
        return self.tokenizer_type(self.folder)

    @cached_property
    def saved_policy(self) -> SavedPolicy | None:
        """The policy that was trained for the model, as saved: name, settings and weights. None if there is none.

        It is the one in the folder or, for some models, one that ships with the package (see `policy_of`).

        Raises:
          ValueError: policy.json or policy.safetensors is damaged, or is for another model.
        """
        return policy_of(self.model, self.folder) if isinstance(self.model, Decoder) else load_policy(self.folder)

    @cached_property
    def policy(self) -> Policy | None:
        """The policy that was trained for the model; None if there is none.

        Raises:
          ValueError: the files are damaged, or name an unknown policy.
        """
        return None if self.saved_policy is None else self.saved_policy.make()

    @cached_property
    def processor(self) -> Any:
        """The image processor of the folder, an object of `transformers`.

        Raises:
          FileNotFoundError: the folder has no preprocessor_config.json.
          ValueError: no processor can be made from that file.
          ImportError: Pillow is not installed; the message names what to install.
        """
        return image_processor(self.folder)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.model)
        dtypes = "/".join(sorted({leaf.dtype.name for leaf in leaves}))
        weights = f"{sum(leaf.size for leaf in leaves):,} {dtypes} weights"
        return f"Loaded({type(self.model).__name__} of {weights}, folder={str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
