"""The rules that split a text before byte-level BPE, by their name in GGUF files (`tokenizer.ggml.pre`).

The patterns are those of the models' own tokenizer.json. Names are grouped as llama.cpp groups them
(`llama_vocab::impl::load`).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple


class Split(NamedTuple):
    """The steps that are applied to a text before BPE joins tokens.

    Attributes:
      patterns: regular expressions; each one splits the pieces of the one before.
      nfc: whether to compose characters first (Unicode's normal form C).
      whole_words: whether a piece that is a token is taken as it is, without being joined from its parts.
      begins: whether a text begins with the `bos` token if the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS_OR_PATH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS_OR_PATH}|{_SPACES}"
_GPT4O = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_SIGNS_OR_PATH}|{_SPACES}"
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_GROUPS: dict[Split, tuple[str, ...]] = {
    Split((_GPT2,)): ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"),
    Split((r"\p{N}", _GPT2)): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum", "mellum2",
    ),
    Split((_LLAMA3,), whole_words=True, begins=True): (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    ),
    Split((_LLAMA3,)): ("dbrx", "smaug-bpe"),
    Split((_QWEN2,), nfc=True): ("qwen2",),
    Split((_QWEN2,)): ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
    Split((_QWEN35,), nfc=True): ("qwen35",),
    Split((_TEKKEN,), whole_words=True, begins=True): ("tekken",),
    Split((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie"),
    Split(_DEEPSEEK_CODER): ("deepseek-coder",),
    Split(_DEEPSEEK3): ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
}  # fmt: skip
SPLITS = {name: split for split, names in _GROUPS.items() for name in names}
"""The split for each value of `tokenizer.ggml.pre`."""


def split_named(name: str, architecture: str) -> Split:
    """The split with a given name.

    Files from before 2024 have no name ("" or "default"). For them, the architecture's usual split is used, with a
    warning.

    Raises:
      ValueError: the name is unknown.
    """
    if name in ("", "default"):
        usual = "qwen2" if architecture.startswith("qwen") else "gpt-2"
        warnings.warn(
            f"the GGUF file does not say how a text is split before its tokens (tokenizer.ggml.pre): taken as {usual}; "
            "a file that was converted anew says it",
            stacklevel=6,
        )
        return SPLITS[usual]
    if name not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r:.80}; known: {', '.join(SPLITS)}")
    return SPLITS[name]
