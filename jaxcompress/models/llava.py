"""LLaVA: a vision tower, a two-layer projector, and a decoder that reads patches among words.

LLaVA-1.5 (Liu et al. 2023) encodes a picture once. LLaVA-NeXT (Liu et al. 2024) encodes the whole picture and
its tiles at the best fitting resolution. Patches of the tiles' padding are dropped, and a newline token ends every row
of patches.

    features = model.image_features(pixels)  # [crops, patches, E]
    visual = model.pack(features, index)  # [B, M, E]; index from `visual_index`
    logits = model(tokens, visual)

A table of integers gives the order of the patches; `picture_index` and `visual_index` make it on the host. So all
pictures of a batch go through one compiled program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxcompress.models.activations import gelu
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.patches import Patches, Pixels
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.models.vit import VisionTower
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.state.shapes import Hidden, Logits, Positions, Tokens

NEWLINE, NOTHING = -1, -2
"""Index entries that are not patches: the newline token, and padding."""


@dataclass(frozen=True)
class LlavaConfig:
    """Shape of a LLaVA model. Hashable.

    Attributes:
      image_token: the placeholder token that visual tokens replace.
      feature_layers: number of tower layers that run; their output, without the final norm, goes into the projector.
      keep_special: the tower's special tokens also go into the projector.
      projector_bias: biases in the projector.
      pinpoints: resolutions (height, width) that LLaVA-NeXT cuts into tiles; () for LLaVA-1.5.
      newline: a learned newline token ends every row of patches (LLaVA-NeXT).
    """

    tower: TowerConfig
    decoder: DecoderConfig
    image_token: int
    feature_layers: int
    keep_special: bool = False
    projector_bias: bool = True
    pinpoints: tuple[tuple[int, int], ...] = ()
    newline: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.feature_layers <= self.tower.num_layers:
            raise ValueError(f"the tower has {self.tower.num_layers} layers, feature_layers is {self.feature_layers}")

    @property
    def tokens_per_crop(self) -> int:
        return self.tower.num_patches + self.keep_special * self.tower.special


class Projector(nnx.Module):
    """Maps the tower's width to the decoder's width."""

    def __init__(self, config: LlavaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        small = jax.nn.initializers.normal(0.02)
        linear = lambda n, m: nnx.Linear(
            n, m, use_bias=config.projector_bias, kernel_init=small, param_dtype=dtype, rngs=rngs
        )
        width = config.decoder.hidden_size
        self.up, self.down = linear(config.tower.hidden_size, width), linear(width, width)

    def __call__(self, x: Float[Array, "*B N E"]) -> Float[Array, "*B N F"]:
        return self.down(gelu(self.up(x)))


class Llava(nnx.Module):
    """A vision-language model.

    Attributes:
      config: its shape (static).
      tower, projector, decoder: its parts.
      newline: [E], the newline token of LLaVA-NeXT.
    """

    def __init__(self, config: LlavaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.tower = VisionTower(config.tower, dtype=dtype, rngs=rngs)
        self.projector = Projector(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config.decoder, dtype=dtype, rngs=rngs)
        if config.newline:
            init = jax.nn.initializers.normal(0.02)
            self.newline = nnx.Param(init(rngs.params(), (config.decoder.hidden_size,), dtype))

    def run_tower(self, pixels: Pixels) -> tuple[Patches, AttentionInputs]:
        """The tower's tokens, including special tokens, and the attention inputs of the last layer that ran."""
        return self.tower.run_layers(self.tower.embed(pixels), range(self.config.feature_layers))

    def project(self, hidden: Float[Array, "*B N E"]) -> Float[Array, "*B N F"]:
        """Projects tokens of the tower to tokens of the decoder. The caller removes special tokens."""
        return self.projector(hidden)

    def image_features(self, pixels: Pixels) -> Float[Array, "B N E"]:
        """All visual tokens of every crop, in raster order."""
        special = 0 if self.config.keep_special else self.config.tower.special
        return self.project(self.run_tower(pixels)[0].hidden[:, special:])

    def pack(self, features: Float[Array, "crops N E"], index: Int[Array, "B M"]) -> Float[Array, "B M E"]:
        """The visual tokens of each row of a batch: patches and newlines in the order of its index.

        Args:
          features: features of all crops of all pictures of all rows.
          index: indices into the flattened tokens of the crops, `NEWLINE`, or `NOTHING` for padding (zeros).
        """
        flat = features.reshape(-1, features.shape[-1])
        visual = jnp.where((index >= 0)[..., None], flat[jnp.maximum(index, 0)], 0)
        if self.config.newline:
            visual = jnp.where((index == NEWLINE)[..., None], self.newline[...].astype(visual.dtype), visual)
        return visual

    def embed(self, tokens: Tokens, visual: Float[Array, "B M E"]) -> Hidden:
        """Embeddings, with the nth image token of a row replaced by its nth visual token.

        The number of image tokens is not checked here, where only shapes are known: see `check_placeholders`.
        """
        here = tokens == self.config.image_token
        nth = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, visual.shape[1] - 1)
        words = self.decoder.embed(tokens)
        return jnp.where(
            here[..., None], jnp.take_along_axis(visual, nth[..., None], axis=1).astype(words.dtype), words
        )

    def __call__(self, tokens: Tokens, visual: Float[Array, "B M E"], positions: Positions | None = None) -> Logits:
        """Logits by plain causal attention over words and patches. Positions default to 0..T-1; -1 marks padding."""
        decoder = self.decoder
        return decoder.logits(decoder.norm(decoder.hidden_of(self.embed(tokens, visual), positions)))


def picture_index(config: LlavaConfig, size: tuple[int, int]) -> Int[np.ndarray, " n"]:
    """The visual tokens of one picture: indices into the flattened tokens of its crops. `NEWLINE` ends a row.

    Crop 0 is the whole picture, the others are its tiles, row by row.

    Args:
      size: (height, width) of the picture before processing, `image_sizes` of transformers' processor.

    Raises:
      ValueError: a side of the picture is 0.
    """
    n, grid = config.tokens_per_crop, config.tower.grid
    whole = np.arange(n)
    if not config.pinpoints:
        return whole
    if config.keep_special and config.tower.special:
        raise ValueError("tiles cannot be laid out with special tokens among their patches; use the strategy 'default'")
    rows, columns = (side // config.tower.image_size for side in best_resolution(size, config.pinpoints))
    tiles = n + np.arange(rows * columns * n).reshape(rows, columns, grid, grid)
    patches = _unpad(tiles.swapaxes(1, 2).reshape(rows * grid, columns * grid), size)
    if config.newline:
        patches = np.concatenate([patches, np.full((len(patches), 1), NEWLINE)], axis=1)
    return np.concatenate([whole, patches.reshape(-1)])


def crops_of(config: LlavaConfig, size: tuple[int, int]) -> int:
    """Number of crops that the tower sees of a picture of this size (height, width)."""
    if not config.pinpoints:
        return 1
    height, width = best_resolution(size, config.pinpoints)
    return 1 + (height // config.tower.image_size) * (width // config.tower.image_size)


def best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The resolution (height, width) that keeps the most pixels of a picture; ties go to the one that wastes least.

    Raises:
      ValueError: a side of the picture is 0.
    """
    height, width = (int(side) for side in size)
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height} x {width} pixels has nothing to see")

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(pinpoints, key=merit)  # the first on a tie, as in transformers


def _unpad(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Drops the rows or columns that show only the padding bars of a picture of this size (height, width)."""
    height, width = (int(side) for side in size)
    rows, columns = patches.shape
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return patches[bar : rows - bar]
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return patches[:, bar : columns - bar]


def visual_index(
    rows: Sequence[Sequence[np.ndarray]], crops: Sequence[Sequence[int]], tokens_per_crop: int
) -> Int[np.ndarray, "B M"]:
    """The index of `Llava.pack` for a batch, from the indices of single pictures.

    Args:
      rows: for each row of the batch, the indices of its pictures (`picture_index`).
      crops: number of crops of each of these pictures, in the same order.
      tokens_per_crop: number of tokens of each crop in the features.
    """
    lines, at = [], 0
    for pictures, counts in zip(rows, crops, strict=True):
        line = [np.zeros(0, np.int64)]
        for index, count in zip(pictures, counts, strict=True):
            line.append(np.where(index >= 0, index + at * tokens_per_crop, index))
            at += count
        lines.append(np.concatenate(line))
    out = np.full((len(lines), max([1, *map(len, lines)])), NOTHING, np.int32)
    for row, line in zip(out, lines, strict=True):
        row[: len(line)] = line
    return out


def expand_placeholders(
    tokens: Sequence[int] | np.ndarray, image_token: int, counts: Sequence[int]
) -> Int[np.ndarray, " T"]:
    """Repeats every image token of a prompt, one per picture, as often as its picture has visual tokens.

    Raises:
      ValueError: the prompt does not have one image token per picture.
    """
    ids = np.asarray(tokens, np.int64).reshape(-1)
    here = ids == image_token
    if here.sum() != len(counts):
        raise ValueError(
            f"the prompt has {here.sum()} image tokens (id {image_token}) for {len(counts)} pictures; "
            "write one where each picture stands"
        )
    times = np.ones(len(ids), np.int64)
    times[here] = counts
    return np.repeat(ids, times)


def check_placeholders(tokens: Any, image_token: int, counts: Sequence[int]) -> None:
    """Raises ValueError if a row of tokens [B, T] does not have as many image tokens as visual tokens (`counts`)."""
    found = (np.asarray(tokens) == image_token).sum(1)
    for row, (have, need) in enumerate(zip(found, counts, strict=True)):
        if have != need:
            raise ValueError(
                f"row {row} has {have} image tokens (id {image_token}), its pictures have {need} visual tokens; "
                "`expand_placeholders` makes one placeholder per picture as many as are needed"
            )
