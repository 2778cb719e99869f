"""Validates token ids: whole numbers within the model's vocabulary, in the required shape.

Every public function that takes token ids checks them here, before anything is compiled or consumed. Inside a model, an
id outside the vocabulary raises no error: a gather clamps it, or counts it from the end.

No id stands for padding. The ids -1 and -100, which other software uses for padding, are outside every vocabulary and
are refused. For rows of different lengths, pass prompts as one sequence each, and arrays [B, T] with a mask `valid`
[B, T]; ids where the mask is False are not checked. `write` and `generate` pad finished rows with -1. Remove this
padding before you read such tokens again.

Under `jax.jit` values are unknown, so only shape and type are checked. The same holds for the training losses; their
data is checked when it is packed. Callers who make their own batches call `token_rows` on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

TokenIds = Int[np.ndarray, " T"]
IdRows = Int[np.ndarray, "B T"]


def token_ids(tokens: Any, vocabulary: int, what: str, also: int | None = None) -> TokenIds:
    """Validates one sequence of ids and returns it as [T] int32; T may be 0.

    Args:
      tokens: a list of integers, or an array [T].
      vocabulary: the number of tokens in the vocabulary.
      what: the name of the sequence in messages, e.g. "prompt 3".
      also: see `prompt_ids`.

    Raises:
      ValueError: `tokens` is not a sequence of whole numbers within the vocabulary; the message names the first invalid
        one.
    """
    ids = _whole_numbers(tokens, what)
    if ids.ndim != 1:
        raise ValueError(
            f"{what} must be a sequence of token ids [T], not {_shape(ids)}" + "; put it into a list" * (ids.ndim == 0)
        )
    _check_known(ids if also is None else np.where(ids == also, 0, ids), vocabulary, what)
    return ids.astype(np.int32)


def prompt_ids(prompts: Any, vocabulary: int, also: int | None = None) -> list[TokenIds]:
    """Validates a batch of prompts and returns each as [T] int32.

    Args:
      prompts: one sequence of ids per row, of any lengths; or an array [B, T].
      also: one more accepted id, outside the vocabulary: the image token.

    Raises:
      ValueError: there are no prompts, a prompt is empty, or a single prompt is not in a list; also as `token_ids`.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts must be a list of sequences of token ids, not {prompts!r:.80}")
    if not len(prompts):
        raise ValueError("no prompts were given")
    if all(_is_number(prompt) for prompt in prompts):
        raise ValueError(f"prompts must be a list of sequences of token ids; for one prompt write [{prompts!r:.40}]")
    rows = [token_ids(prompt, vocabulary, f"prompt {row}", also) for row, prompt in enumerate(prompts)]
    for row, ids in enumerate(rows):
        if not len(ids):
            raise ValueError(f"prompt {row} is empty; give at least one token (a BOS token will do)")
    return rows


def token_rows(tokens: Any, vocabulary: int, what: str = "tokens", valid: Any = None) -> IdRows:
    """Validates rows of equal length and returns them as [B, T] int32.

    Args:
      tokens: an array [B, T], or a list of B lists of T integers.
      what: the name of the rows in messages.
      valid: [B, T] bool, False for padding; None if there is no padding.

    Raises:
      ValueError: `tokens` has no rows, or is not rows of equal length with whole numbers within the vocabulary; or the
        mask has another shape.
    """
    ids = _whole_numbers(tokens, what)
    _check_rows(ids, what)
    _check_mask(ids, valid, what)
    if not len(ids):
        raise ValueError(f"{what} [B, T] has no rows")
    ids = ids if valid is None else np.where(valid, ids, 0)
    _check_known(ids, vocabulary, what)
    return ids.astype(np.int32)


def check_read(tokens: Any, vocabulary: int, valid: Any = None) -> None:
    """Like `token_rows`, for a pure function that may run under `jax.jit`: values are checked only if they are known.

    Raises:
      ValueError: see `token_rows`.
    """
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise ValueError(f"tokens must be an integer array [B, T], not {tokens!r:.80}")
    _check_kind(tokens.dtype, "tokens")
    _check_rows(tokens, "tokens")
    _check_mask(tokens, valid, "tokens")
    if _known(tokens) and (valid is None or _known(valid)):
        ids = np.asarray(tokens)
        _check_known(ids if valid is None else np.where(valid, ids, 0), vocabulary, "tokens")


def _known(x: Any) -> bool:
    """Whether the values of an array are available here."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def _whole_numbers(tokens: Any, what: str) -> np.ndarray:
    try:
        ids = np.asarray(tokens)
    except ValueError:
        lengths = [len(row) if isinstance(row, Sequence | np.ndarray) else row for row in tokens]
        raise ValueError(
            f"{what} must be rows of equal length, not of {lengths!r:.60}; fill them up and say so in `valid`, or "
            "read them one by one"
        ) from None
    if not ids.size and ids.dtype == np.float64:
        return ids.astype(np.int32)  # NumPy makes an empty list a float array
    if ids.dtype in (object, np.float64) and not hasattr(tokens, "dtype"):
        exact = np.asarray(tokens, object)
        if all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in exact.flat):
            return exact  # some integers exceed 64 bits
    _check_kind(ids.dtype, what, tokens)
    return ids


def _check_kind(dtype: Any, what: str, given: Any = None) -> None:
    kind = np.dtype(dtype).kind
    if kind in "iu":
        return
    if kind in "US":
        raise ValueError(f"{what} must be token ids, not text ({given!r:.40}); encode it first: tokenizer.encode(text)")
    told = f"{given!r:.60}" if kind == "O" else f"{np.dtype(dtype).name}"
    raise ValueError(f"{what} must be token ids, whole numbers, not {told}")


def _check_rows(ids: Any, what: str) -> None:
    if ids.ndim != 2:
        one = f"; for one text give {what}[None]" * (ids.ndim == 1)
        raise ValueError(f"{what} must be rows of token ids [B, T], not {_shape(ids)}{one}")


def _check_mask(ids: Any, valid: Any, what: str) -> None:
    if valid is None:
        return
    if np.shape(valid) != np.shape(ids) or getattr(valid, "dtype", None) != np.dtype(bool):
        given = f"{getattr(valid, 'dtype', type(valid).__name__)} {list(np.shape(valid))}"
        raise ValueError(f"`valid` must be bool {list(np.shape(ids))}, one for each of {what}, not {given}")


def _check_known(ids: np.ndarray, vocabulary: int, what: str) -> None:
    outside = np.asarray((ids < 0) | (ids >= vocabulary), bool)
    if not outside.any():
        return
    at = tuple(map(int, np.argwhere(outside)[0]))
    where = f"index {at[-1]}" if len(at) == 1 or len(ids) == 1 else f"row {at[0]}, index {at[1]}"
    hint = "; leave padding out, or mask it where a function takes `valid`" * (ids[at] in (-1, -100))
    raise ValueError(f"{what}: token id {ids[at]} at {where} is outside the vocabulary 0..{vocabulary - 1}{hint}")


def _is_number(x: Any) -> bool:
    return not isinstance(x, str) and (not hasattr(x, "__len__") or getattr(x, "ndim", 1) == 0)


def _shape(ids: Any) -> str:
    return "a single number" if ids.ndim == 0 else f"{list(ids.shape)}"
