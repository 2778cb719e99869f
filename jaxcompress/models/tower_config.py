"""The shape of a vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxcompress.models.activations import TowerActivation
from jaxcompress.models.choices import check_choices


@dataclass(frozen=True)
class TowerConfig:
    """Shape of a tower. Hashable, so that it can be a static argument under jit.

    Attributes:
      image_size, patch_size: side lengths in pixels.
      special: number of tokens before the patches: 0, 1 (class token), or 2 (class and distillation token, DeiT).
      patch_bias: the patch embedding has a bias.
      pre_norm: a norm stands between the embedding and the first layer (CLIP).
      pooling: `class` (the first token, normed), `attention` (a learned query attends to all tokens, SigLIP) or `mean`.
      labels: number of classes of the classifier, 0 for no classifier.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    channels: int = 3
    norm_eps: float = 1e-6
    activation: TowerActivation = "gelu"
    special: int = 1
    patch_bias: bool = True
    pre_norm: bool = False
    pooling: Literal["class", "attention", "mean"] = "class"
    labels: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.special not in (0, 1, 2):
            raise ValueError(f"a tower has 0 to 2 special tokens (class, distillation), not {self.special}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        if self.patch_size > self.image_size:
            raise ValueError(f"a patch of {self.patch_size} pixels does not fit into an image of {self.image_size}")
        if self.pooling == "class" and not self.special:
            raise ValueError("pooling by the class token needs one: special is 0")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads
