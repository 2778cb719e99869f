"""Files and config entries that a saved model takes over from the folder of its source model.

These are the tokenizer, the ids that end a text, the chat template, the image processor's config, and the entries of
config.json that this library does not interpret.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jaxcompress.inputs.json import read_object_if_there
from jaxcompress.inputs.paths import path_of

# Patterns of file names, relative to the folder.
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template.*", "additional_chat_templates/*.jinja",
)  # fmt: skip
_BESIDE = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_TIED = "tie_word_embeddings"
_NESTED = "text_config"


def files_beside(source: str | Path | None) -> dict[str, Path]:
    """The files that are copied from a folder, by their relative name.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
    """
    if source is None:
        return {}
    source = path_of(source, "tokenizer_from")
    files = _matching(source, _TOKENIZER)
    if not files:
        raise FileNotFoundError(f"tokenizer_from: {source} is not a folder with tokenizer files")
    return files | _matching(source, _BESIDE)


def _matching(folder: Path, patterns: Collection[str]) -> dict[str, Path]:
    found = (file for pattern in patterns for file in sorted(folder.glob(pattern)))
    return {str(file.relative_to(folder)): file for file in found if file.is_file()}


def config_like(
    source: str | Path | None,
    ours: Mapping[str, Any],
    reader: Callable[[Mapping[str, Any]], Any],
    interpreted: Collection[str],
) -> dict[str, Any]:
    """Merges `ours` with the config.json of a folder; `ours` takes precedence.

    If the folder's config.json describes the same model, its spelling is kept. If it describes another architecture,
    only the ids of special tokens are taken over.

    Args:
      reader: maps a config.json to the config of a model.
      interpreted: the entries that describe the model.

    Raises:
      ValueError: the folder's config.json cannot be read.
    """
    theirs = {} if source is None else read_object_if_there(path_of(source, "tokenizer_from") / "config.json")
    theirs.pop("quantization_config", None)  # saved weights are plain numbers
    if _NESTED in ours:
        inner = theirs.get(_NESTED)
        tokens = {key: theirs.get(key) for key in _SPECIAL} | (inner if isinstance(inner, dict) else {})
        ours = {**ours, _NESTED: _special(tokens) | ours[_NESTED]}
    else:
        ours = {**_special(theirs), **ours}
    as_theirs = _tied_like(theirs, ours)
    try:
        if reader(as_theirs) == reader(ours):
            return as_theirs
    except ValueError:  # theirs describes another kind of model
        return dict(ours)
    return _merged(theirs, ours, interpreted)


def _special(known: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens, null if unknown. Llama's and Mistral's defaults, 1 and 2, suit few tokenizers."""
    return {key: known.get(key) for key in _SPECIAL}


def _tied_like(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Their config with our `tie_word_embeddings`, since the weight files may contradict theirs."""
    told = dict(theirs)
    if _TIED in ours and bool(ours[_TIED]) != bool(theirs.get(_TIED)):
        told[_TIED] = ours[_TIED]
    if _NESTED in ours and isinstance(theirs.get(_NESTED), dict):
        told[_NESTED] = _tied_like(theirs[_NESTED], ours[_NESTED])
    return told


def _merged(theirs: Mapping[str, Any], ours: Mapping[str, Any], interpreted: Collection[str]) -> dict[str, Any]:
    """Our config plus their other entries if both are of the same kind. Nested configs are merged likewise."""
    kinds = [key for key in ("model_type", "architectures") if key in theirs and key in ours]
    if not kinds or any(theirs[key] != ours[key] for key in kinds):
        return dict(ours)
    merged = {key: value for key, value in theirs.items() if key not in interpreted} | dict(ours)
    parts = {key: value for key, value in ours.items() if key.endswith("_config") and isinstance(theirs.get(key), dict)}
    return merged | {key: _merged(theirs[key], value, interpreted) for key, value in parts.items()}
