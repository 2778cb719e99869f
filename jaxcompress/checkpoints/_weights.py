"""Which tensors of a Hugging Face checkpoint are which array of a module with stacked layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxcompress.models.decoder import Decoder


class Names(NamedTuple):
    """What a family of checkpoints calls things.

    Attributes:
      single: from arrays that are no linear layer's or norm's, by their dotted path in the module, to tensors.
      modules: from linear layers and norms, by their path ("layers.mlp.up"), to the checkpoint's.
      layer: what comes before those within a layer, with a place for its number.
      leading: of arrays in `single`, how many axes of length 1 the tensor has in front.
    """

    single: Mapping[str, str]
    modules: Mapping[str, str]
    layer: str
    leading: Mapping[str, int] = {}


DECODER = Names(
    {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"},
    {
        "norm": "model.norm",
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
    },
    "model.layers.{layer}.",
)


class Weight(NamedTuple):
    """One array of a module.

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
    return named_weights(model, DECODER)


def named_weights(model: Any, names: Names) -> tuple[list[Weight], Any]:
    """The same for any module with `config.num_layers` layers and the names of its arrays."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    return [weight_named(dotted(path), leaf, model.config.num_layers, names) for path, leaf in leaves], tree


def dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def weight_named(name: str, array: jax.Array | jax.ShapeDtypeStruct, layers: int, names: Names) -> Weight:
    """One array of a module with so many layers, by where it is in the module."""
    if name in names.single:
        tensors = (names.single[name],)
        return Weight(
            name, array, tensors, stacked=False, transposed=name == "head", leading=names.leading.get(name, 0)
        )
    module, leaf = name.rsplit(".", 1)
    tensor = f"{names.modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    stacked = module.startswith("layers.")
    tensors = tuple(names.layer.format(layer=layer) + tensor for layer in range(layers)) if stacked else (tensor,)
    return Weight(name, array, tensors, stacked=stacked, transposed=leaf == "kernel")
