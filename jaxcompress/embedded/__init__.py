"""The small models that ship with the package, for text, prompts and pictures, and what they were made from."""

from __future__ import annotations

from pathlib import Path


def decoder_folder() -> Path:
    """Where the embedded language model lies: a Hugging Face folder (see `jaxcompress.load_embedded`)."""
    return Path(__file__).parent / "model"


def policies_folder() -> Path:
    """Where policies lie that were trained for models of others, each in a folder with the model's name."""
    return Path(__file__).parent / "policies"


def policy_folders() -> list[Path]:
    """The folders of all policies, that of the embedded model first: each has a policy.json that names its model."""
    own = policies_folder()
    return [decoder_folder(), *(sorted(own.iterdir()) if own.is_dir() else [])]


def compressor_folder() -> Path:
    """Where the embedded prompt compressor lies: a Hugging Face folder of a BERT that classifies tokens."""
    return Path(__file__).parent / "compressor"


def vision_folder() -> Path:
    """Where the embedded vision-language model lies: a Hugging Face folder (see
    `jaxcompress.checkpoints.load_embedded_vision`)."""
    return Path(__file__).parent / "vision_model"
