"""A token classifier as a scorer of the words of a text as it is written."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array
from tokenizers import Tokenizer as FastTokenizer

from jaxcompress.prompt.learning import Classifier, special_ids
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.word_scores import Scored, Scorer
from jaxcompress.prompt.words import align, of_words

_ROWS = 4


def token_classifier(
    model: Classifier, tokenizer: FastTokenizer, *, length: int = 256, overlap: int = 32, name: str = "classifier"
) -> Scorer:
    """Scores a word by the mean probability, over its subwords, that it stays.

    Long texts are read in windows that overlap; each token counts in the window in which it stands deepest. All windows
    have one shape, so that no prompt compiles anything. A word that the tokenizer does not know has the probability of
    the unknown token where it stands.

    Args:
      length: tokens of a window, special tokens included.
      overlap: tokens that two windows share.

    Raises:
      ValueError: windows of such a length and overlap do not advance.
    """
    room = length - 2
    if not 0 <= overlap < room:
        raise ValueError(f"windows of {length} tokens hold {room} of the text and cannot share {overlap}")
    opening, closing, pad = special_ids(tokenizer)

    def score(text: str) -> Scored:
        words = words_of(text)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        probabilities = _over_windows(np.array(encoding.ids, np.int32))
        groups = align(np.array(words, np.int64).reshape(-1, 2), places)
        return Scored(text, words, of_words(probabilities, groups), name)

    def _over_windows(ids: np.ndarray) -> np.ndarray:
        starts = list(range(0, max(len(ids) - overlap, 1), room - overlap))
        rows = np.full((-(-len(starts) // _ROWS) * _ROWS, length), pad, np.int32)
        valid = np.zeros(rows.shape, bool)
        for row, start in enumerate(starts):
            window = np.concatenate([[opening], ids[start : start + room], [closing]])
            rows[row, : len(window)], valid[row, : len(window)] = window, True
        valid[len(starts) :, 0] = True  # a row of padding sees something
        batches = range(0, len(rows), _ROWS)
        scores = np.concatenate(
            [np.asarray(_kept(model, rows[at : at + _ROWS], valid[at : at + _ROWS])) for at in batches]
        )
        out = np.zeros(len(ids), np.float32)
        for row, start in enumerate(starts):
            skipped = overlap // 2 if row else 0  # the first half of what two windows share is the earlier one's
            out[start + skipped : start + room] = scores[row, 1 + skipped : 1 + min(room, len(ids) - start)]
        return out

    return score


@jax.jit
def _kept(model: Classifier, ids: Array, valid: Array) -> Array:
    return jax.nn.softmax(model(ids, valid).astype("float32"), axis=-1)[..., 1]
