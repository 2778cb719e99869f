"""Which words rate patches, from the embeddings of a prompt (SparseVLM)."""

from __future__ import annotations

from jaxtyping import Array, Bool

from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.vision.choose import take
from jaxcompress.vision.layer_view import split
from jaxcompress.vision.sparsevlm import above_mean, rater_mass


def text_raters(block: HiddenBlock, words: int) -> Bool[Array, "B W"]:
    """The words after the picture that the patches are more like than like the average word.

    Args:
      block: before the first layer.
      words: how many tokens of a row are no patches.
    """
    patches, present, others, follows = split(block, words)
    mass = rater_mass(take(block.hidden, patches), take(block.hidden, others), present, follows)
    return above_mean(mass, follows)
