"""Maps the tensors of a Hugging Face checkpoint to the arrays of a module with stacked layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Names(NamedTuple):
    """The tensor names of a family of checkpoints.

    Attributes:
      single: tensor names of arrays outside linear layers and norms, by the dotted path of the array in the module.
      modules: names of linear layers and norms in the checkpoint, by their path in the module ("layers.mlp.up").
      layer: the prefix of names within a layer, with a placeholder for the layer number.
      leading: the number of leading axes of length 1 in the tensor, by array in `single`.
      arrays: names within a layer of arrays outside linear layers and norms, by their path in the module. A name with a
        placeholder for the expert is that of a tensor [out, in] for each expert.
    """

    single: Mapping[str, str]
    modules: Mapping[str, str]
    layer: str
    leading: Mapping[str, int] = {}
    arrays: Mapping[str, str] = {}


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
      name: the dotted path of the array in the module, e.g. "layers.attention.query.kernel".
      array: the array, or its shape and dtype.
      tensors: its tensor names in a checkpoint.
      stacked: the number of first axes along which the array is made of several tensors: 1 for one per layer, 2 for one
        per layer and expert, 0 for one tensor.
      transposed: whether the tensor is [out, in] and the array is [in, out].
      leading: the number of axes of length 1 that a tensor has before the axes of the array.
    """

    name: str
    array: Any
    tensors: tuple[str, ...]
    stacked: int
    transposed: bool
    leading: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the checkpoint."""
        shape = self.array.shape[self.stacked :]
        return (1,) * self.leading + (shape[::-1] if self.transposed else shape)


def named_weights(model: Any, names: Names) -> tuple[list[Weight], Any]:
    """The arrays of a module (real or abstract) with `config.num_layers` layers, with their tensor names, and the tree
    that restores the module."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    return [weight_named(dotted(path), leaf, model.config.num_layers, names) for path, leaf in leaves], tree


def dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def weight_named(name: str, array: jax.Array | jax.ShapeDtypeStruct, layers: int, names: Names) -> Weight:
    """The `Weight` of an array, from its path in a module with `layers` layers."""
    if name in names.single:
        tensors = (names.single[name],)
        return Weight(name, array, tensors, stacked=0, transposed=name == "head", leading=names.leading.get(name, 0))
    if name in names.arrays:
        inside = names.layer + names.arrays[name]
        by_expert = "{expert}" in inside
        experts = range(array.shape[1] if by_expert else 1)
        tensors = tuple(inside.format(layer=layer, expert=expert) for layer in range(layers) for expert in experts)
        return Weight(name, array, tensors, stacked=1 + by_expert, transposed=by_expert)
    module, leaf = name.rsplit(".", 1)
    tensor = f"{names.modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    stacked = module.startswith("layers.")
    tensors = tuple(names.layer.format(layer=layer) + tensor for layer in range(layers)) if stacked else (tensor,)
    return Weight(name, array, tensors, stacked=int(stacked), transposed=leaf == "kernel")
