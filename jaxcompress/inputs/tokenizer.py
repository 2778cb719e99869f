"""The tokenizer of a model folder, or of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.inputs.chat import render
from jaxcompress.inputs.gguf import is_gguf
from jaxcompress.inputs.gguf_tokenizer import read_gguf_tokenizer
from jaxcompress.inputs.paths import path_of
from jaxcompress.inputs.text import clean, masked
from jaxcompress.inputs.token_bytes import bytes_reader
from jaxcompress.inputs.tokenizer_files import id_array, read_tokenizer

TokenIds = Int[np.ndarray, "T"]

_WITH_TOOLS = "tool_use"
"""The name of the template for conversations with tools, as `transformers` has it."""


class Tokenizer:
    """The tokenizer of a model, read from a folder (as `transformers` does) or from a GGUF file.

    Attributes:
      folder: the folder or file that it was read from.
      bos_id: the token that begins a text, or None.
      eos_ids: the tokens that end a text: those of generation_config.json (else config.json), and the tokenizer's own.
      pad_id: the token that pads batches, from the tokenizer or the model. If there is none, the end token or 0, since
        padding is never read.
      adds_bos: whether special tokens, usually `bos_id`, are put before a text. Only the post-processor of
        tokenizer.json decides this.
      vocab_size: the number of tokens; a model may have more logits, as padding.
    """

    def __init__(self, folder: str | Path):
        """Reads tokenizer.json and, where present, the configs beside it; or the metadata of a GGUF file.

        Raises:
          FileNotFoundError: the folder has no tokenizer.json.
          ValueError: a file cannot be read, or gives a token an invalid id; a GGUF file has a tokenizer of an unknown
            kind.
        """
        self.folder = path_of(folder, "the folder of a tokenizer")
        files = read_gguf_tokenizer(self.folder) if is_gguf(self.folder) else read_tokenizer(self.folder)
        self._fast, self._named, self._templates, said = files
        self._special = frozenset(
            token for token, added in self._fast.get_added_tokens_decoder().items() if added.special
        )
        own = {name: _known([self._fast.token_to_id(token)]) for name, token in self._named.items()}
        of = lambda name: own.get(name, ())
        self.bos_id = next(iter(of("bos_token") + said.get("bos_token_id", ())), None)
        self.eos_ids = tuple(dict.fromkeys(said.get("eos_token_id", ()) + of("eos_token")))
        self.pad_id = (*of("pad_token"), *said.get("pad_token_id", ()), *self.eos_ids, 0)[0]
        self.vocab_size = self._fast.get_vocab_size()
        self._opening = _opening(self._fast)
        self.adds_bos = bool(self._opening)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.folder)!r})"

    def vocabulary(self) -> dict[str, int]:
        """The id of each token, by the tokenizer's spelling of the token."""
        return self._fast.get_vocab()

    def encode(self, text: str, add_bos: bool = True) -> TokenIds:
        """Encodes a text as token ids [T] int32.

        Names of special tokens in the text become those tokens, as with Hugging Face.

        Args:
          text: any string; lone surrogates are read as U+FFFD (see `jaxcompress.inputs.text`).
          add_bos: whether to begin with the tokens that the model expects, usually `bos_id` (`adds_bos`). A chat
            template writes them itself, so pass False for its output. No end token is ever added.
        """
        ids = self._fast.encode(clean(text), add_special_tokens=False).ids
        return id_array(self.opening(add_bos) + ids)

    def encode_with_places(self, text: str) -> tuple[TokenIds, Int[np.ndarray, "T 2"]]:
        """Token ids [T] without `opening`, and the offsets (start, end) of each token in the text, [T, 2].

        A token stands for text[start:end]. Each surrogate is read as one U+FFFD, also within a pair.
        """
        encoding = self._fast.encode(masked(text), add_special_tokens=False)
        return id_array(encoding.ids), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def encode_after(self, context: str, text: str) -> TokenIds:
        """Token ids [T] int32 of a text that continues `context`. The tokens of `context` are left out.

        The context keeps the tokenizer from treating `text` as a beginning, where SentencePiece would add a space.
        """
        context = clean(context)
        encoding = self._fast.encode(context + clean(text), add_special_tokens=False)
        start = len(context)
        pairs = [*zip(encoding.ids, encoding.offsets, strict=True)]
        across = [token for token, (first, end) in pairs if first < start < end]
        # A token that ends the context by itself too has only taken white space of the text along, as special tokens
        # with `rstrip` do. Any other one joins both, and its part of the text would be lost.
        if across and across != self._fast.encode(context, add_special_tokens=False).ids[-len(across) :]:
            return self.encode(text, add_bos=False)
        return id_array(token for token, (first, _) in pairs if first >= start)

    def opening(self, add_bos: bool = True) -> list[int]:
        """The ids before the first token of a text: usually `bos_id`, or none."""
        return list(self._opening) if add_bos else []

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        """Decodes token ids [T] to text.

        Bytes that are not UTF-8 appear as U+FFFD. Special tokens are left out, and so is -1, the padding of finished
        rows.

        Raises:
          ValueError: `ids` is not a sequence of whole numbers of at least -1.
        """
        given = np.asarray(ids)
        if given.ndim != 1 or (
            given.size and (given.dtype.kind not in "iu" or given.min() < -1 or given.max() >= 2**31)
        ):
            raise ValueError(
                f"token ids are whole numbers from 0, and -1 for nothing, in a sequence [T], not {ids!r:.60}"
            )
        return self._fast.decode(given[given >= 0].tolist(), skip_special_tokens=skip_special)

    def token_bytes(self, token: int | np.integer) -> bytes:
        """The bytes of one token: of a part of a character too, and with the space before a word."""
        return self._read_bytes(int(token))

    @cached_property
    def _read_bytes(self) -> Callable[[int], bytes]:
        return bytes_reader(self._fast)

    def is_special(self, token: int | np.integer) -> bool:
        """Whether a token is special (begin, end, turn, ...) and not text."""
        return token in self._special

    def special_tokens(self) -> dict[str, int]:
        """The ids of special tokens, by name."""
        return {added.content: token for token, added in self._fast.get_added_tokens_decoder().items() if added.special}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **arguments: Any
    ) -> str:
        """Renders a conversation as a prompt with the model's own chat template.

        Args:
          messages: e.g. `[{"role": "user", "content": "Hello"}]`.
          add_generation_prompt: whether to end with the text that opens the model's turn.
          arguments: further arguments of this template, such as `enable_thinking=False` or `tools=[...]`. With `tools`
            the template named "tool_use" is applied, if the model has one.

        Returns:
          Text for `encode(text, add_bos=False)`.

        Raises:
          ValueError: the folder has no chat template, or has several but none for this conversation; the template
            refuses the messages.
        """
        if not self._templates:
            raise ValueError(
                f"{self.folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json "
                "or chat_template.json; in a GGUF file tokenizer.chat_template); pass a plain prompt to encode(), or "
                "use an instruction-tuned model"
            )
        template = self._template(arguments.get("tools"))
        if template is None:
            names = ", ".join(sorted(self._templates))
            raise ValueError(
                f"{self.folder} has several chat templates and none of them is the default: {names}"
                + f"; {_WITH_TOOLS} is applied where tools=[...] are given" * (_WITH_TOOLS in self._templates)
            )
        return render(template, messages, self._named, add_generation_prompt, arguments)

    def _template(self, tools: Any = None) -> str | None:
        """The template for a conversation with these tools; None if there is none."""
        usual = self._templates.get("default")
        return usual if tools is None else self._templates.get(_WITH_TOOLS, usual)

    @property
    def chat_template(self) -> str | None:
        """The template that `apply_chat_template` applies where no tools are given, in Jinja; None if there is none."""
        return self._template()

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` has a template to apply where no tools are given."""
        return self.chat_template is not None


def _opening(fast: FastTokenizer) -> list[int]:
    """The ids that the post-processor puts before a text."""
    of_text = fast.encode("a", add_special_tokens=False).ids
    encoding = fast.encode("a" if of_text else "")
    if not of_text:  # ids before and after cannot be told apart, so take at most one
        return encoding.ids[:1]
    places = zip(encoding.ids, encoding.sequence_ids, strict=True)
    return [token for token, _ in takewhile(lambda place: place[1] is None, places)]


def _known(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(index for index in ids if index is not None)
