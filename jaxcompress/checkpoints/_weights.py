"""Which tensors of a Hugging Face checkpoint are which array of a `Decoder`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxcompress.models.decoder import Decoder

_MODULES = {
    "layers.attention_norm": "input_layernorm",
    "layers.attention.query": "self_attn.q_proj",
    "layers.attention.key": "self_attn.k_proj",
    "layers.attention.value": "self_attn.v_proj",
    "layers.attention.out": "self_attn.o_proj",
    "layers.attention.query_norm": "self_attn.q_norm",
    "layers.attention.key_norm": "self_attn.k_norm",
    "layers.mlp_norm": "post_attention_layernorm",
    "layers.mlp.gate": "mlp.gate_proj",
    "layers.mlp.up": "mlp.up_proj",
    "layers.mlp.down": "mlp.down_proj",
}
_SINGLE = {"embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head": "lm_head.weight"}


class Weight(NamedTuple):
    """One array of a decoder.

    Attributes:
      name: where it is in the module: "layers.attention.query.kernel".
      array: the array, or its shape and dtype.
      tensors: its names in a checkpoint, one per layer if the array is stacked, else one.
      stacked: whether the first axis is the layer.
      transposed: whether a tensor is [out, in] where the array is [in, out].
      leading: how many axes of length 1 a tensor has in front of the array's.
    """

    name: str
    array: Any
    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool
    leading: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the checkpoint."""
        shape = self.array.shape[1:] if self.stacked else self.array.shape
        return (1,) * self.leading + (shape[::-1] if self.transposed else shape)


def weights_of(model: Decoder) -> tuple[list[Weight], Any]:
    """The arrays of a decoder (real or abstract) with their names in a checkpoint, and the tree to put them back."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    return [decoder_weight(dotted(path), leaf, model.config.num_layers) for path, leaf in leaves], tree


def dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def decoder_weight(name: str, array: Any, layers: int) -> Weight:
    """One array of a decoder with `layers` layers, by where it is in the module."""
    if name in _SINGLE:
        return Weight(name, array, (_SINGLE[name],), stacked=False, transposed=name == "head")
    module, leaf = name.rsplit(".", 1)
    kind = "bias" if leaf == "bias" else "weight"
    tensors = tuple(f"model.layers.{layer}.{_MODULES[module]}.{kind}" for layer in range(layers))
    return Weight(name, array, tensors, stacked=True, transposed=leaf == "kernel")
