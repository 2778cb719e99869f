"""What a method is: where it drops visual tokens, and how many it keeps.

A method may act in three places. Each may be left out:

  encode         in the tower or at its end: fewer visual tokens reach the decoder
  prune_steps    after some of the decoder's layers, while the prompt is read
  decode_policy  in the KV state, while the answer is written

How many tokens are left after each of them follows from shapes alone, so that a whole method is one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.patches import Pixels
from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.policies.full import Full
from jaxcompress.policies.policy import Policy
from jaxcompress.vision.choose import take
from jaxcompress.vision.layer_view import PruneRule


class Encoded(NamedTuple):
    """The visual tokens of one picture in each row, as the decoder gets them.

    Attributes:
      visual: [B, M, E].
      place: [B, M] int32, the patch in raster order at which each token stands, crop after crop; -1 for none. Special
        tokens that the decoder gets (`LlavaConfig.keep_special`) count as patches before those of their crop.
      size: [B, M], how many patches each token stands for; 0 where there is no token.
      key: [B, M] bool, the key tokens, which later stages drop last.
    """

    visual: Float[Array, "B M E"]
    place: Int[Array, "B M"]
    size: Float[Array, "B M"]
    key: Bool[Array, "B M"]

    def in_raster_order(self, patches: int) -> Encoded:
        """The same tokens in the order of their places. A token without a place gets that of the last of `patches`."""
        place = jnp.where(self.place < 0, patches - 1, self.place)
        order = jnp.argsort(place, axis=1, stable=True)
        return Encoded(*(take(x, order) for x in self._replace(place=place)))


class PruneStep(NamedTuple):
    """After a layer of the decoder, counted from 0, visual tokens are pruned until `keep` are left.

    A rule that keeps a different number in each row keeps the shape, and leaves empty places.
    """

    layer: int
    keep: int
    rule: PruneRule


class Method(NamedTuple):
    """One way to keep fewer visual tokens. Hashable: a static argument under jit.

    Attributes:
      name: for tables.
      encode: (model, pixels of single crops) -> their tokens.
      tokens_per_crop: (config) -> how many tokens `encode` leaves of each crop.
      prune_steps: (config, visual tokens before the first layer) -> where the decoder prunes, in the order of layers.
      raters: (embeddings, how many tokens are words) -> [B, W], the words that rate patches; None: all words rate.
      asks: whether the words after the picture say which visual tokens stay. A prompt without such words is refused.
      decode_policy: (first, last) -> the policy while the answer is written, where visual tokens stand at positions
        first..last - 1; by default everything stays.
    """

    name: str
    encode: Callable[[Llava, Pixels], Encoded]
    tokens_per_crop: Callable[[LlavaConfig], int] = lambda config: config.tokens_per_crop
    prune_steps: Callable[[DecoderConfig, int], tuple[PruneStep, ...]] = lambda config, tokens: ()
    raters: Callable[[HiddenBlock, int], Bool[Array, "B W"]] | None = None
    asks: bool = False
    decode_policy: Callable[[int, int], Policy] = lambda first, last: Full()

    def tokens_per_layer(self, config: LlavaConfig, crops: int = 1, *, tokens: int | None = None) -> tuple[int, ...]:
        """How many visual tokens of a row each layer of the decoder holds after the prompt was read.

        Args:
          crops: of the picture.
          tokens: visual tokens before the first layer, where they do not follow from the crops.
        """
        tokens = self.tokens_per_crop(config) * crops if tokens is None else tokens
        keep = {step.layer: step.keep for step in self.prune_steps(config.decoder, tokens)}
        out = []
        for layer in range(config.decoder.num_layers):
            out.append(tokens)
            tokens = keep.get(layer, tokens)
        return tuple(out)

    def mean_tokens(self, config: LlavaConfig, crops: int = 1) -> float:
        """Visual tokens per layer, the mean over layers: what papers call the number retained."""
        counts = self.tokens_per_layer(config, crops)
        return sum(counts) / len(counts)


def combined(first: Method, second: Method, name: str) -> Method:
    """The encoding of the first method, the prune steps of the second, and the decode policy of either."""
    default = Method._field_defaults["decode_policy"]
    policy = first.decode_policy if second.decode_policy is default else second.decode_policy
    return second._replace(name=name, encode=first.encode, tokens_per_crop=first.tokens_per_crop, decode_policy=policy)
