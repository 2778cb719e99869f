"""Maps the tensors of a Hugging Face checkpoint to the arrays of a module with stacked layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Names(NamedTuple):
    """The tensor names of a family of checkpoints.

    Attributes:
      single: tensor names of arrays outside linear layers and norms, by the dotted path of the array in the module.
      modules: names of linear layers and norms in the checkpoint, by their path in the module ("layers.mlp.up").
      layer: the prefix of names within a layer, with a placeholder for the layer number.
      leading: the number of leading axes of length 1 in the tensor, by array in `single`.
      by_head: where several modules share a tensor (query, key and value; gate and up): whether its rows are in order
        of the heads, each with the rows of all modules, not in order of the modules, as they are listed.
      aliases: other names of tensors, in other versions of the format -> the names here.
    """

    single: Mapping[str, str]
    modules: Mapping[str, str]
    layer: str
    leading: Mapping[str, int] = {}
    by_head: bool = False
    aliases: Mapping[str, str] = {}


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
OLMO2 = DECODER._replace(
    modules={
        **{path: name for path, name in DECODER.modules.items() if not path.endswith(("attention_norm", "mlp_norm"))},
        "layers.attention_out_norm": "post_attention_layernorm",
        "layers.mlp_out_norm": "post_feedforward_layernorm",
    }
)
GEMMA = DECODER._replace(
    modules={
        **DECODER.modules,
        "layers.attention_out_norm": "post_attention_layernorm",
        "layers.mlp_norm": "pre_feedforward_layernorm",
        "layers.mlp_out_norm": "post_feedforward_layernorm",
    }
)
PHI3 = DECODER._replace(
    modules={
        **DECODER.modules,
        **dict.fromkeys([f"layers.attention.{name}" for name in ("query", "key", "value")], "self_attn.qkv_proj"),
        **dict.fromkeys(["layers.mlp.gate", "layers.mlp.up"], "mlp.gate_up_proj"),
    }
)
NEOX = Names(
    {"embedding": "gpt_neox.embed_in.weight", "head": "embed_out.weight"},
    {
        "norm": "gpt_neox.final_layer_norm",
        "layers.attention_norm": "input_layernorm",
        **dict.fromkeys(
            [f"layers.attention.{name}" for name in ("query", "key", "value")], "attention.query_key_value"
        ),
        "layers.attention.out": "attention.dense",
        "layers.mlp_norm": "post_attention_layernorm",
        "layers.mlp.up": "mlp.dense_h_to_4h",
        "layers.mlp.down": "mlp.dense_4h_to_h",
    },
    "gpt_neox.layers.{layer}.",
    by_head=True,
    aliases={"lm_head.weight": "embed_out.weight"},
)


class Part(NamedTuple):
    """The part of a tensor that an array holds, where several arrays share the tensor.

    Attributes:
      rows: the rows of the tensor, in the order of the array's outputs.
      of: how many rows the tensor has.
    """

    rows: np.ndarray
    of: int


class Weight(NamedTuple):
    """One array of a module.

    Attributes:
      name: the dotted path of the array in the module, e.g. "layers.attention.query.kernel".
      array: the array, or its shape and dtype.
      tensors: its tensor names in a checkpoint: one per layer if the array is stacked, else one.
      stacked: whether the first axis is the layer.
      transposed: whether the tensor is [out, in] and the array is [in, out].
      leading: the number of axes of length 1 that a tensor has before the axes of the array.
      part: the part of each tensor; None for all of it.
    """

    name: str
    array: Any
    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool
    leading: int = 0
    part: Part | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the checkpoint."""
        shape = self.array.shape[1:] if self.stacked else self.array.shape
        shape = (1,) * self.leading + (shape[::-1] if self.transposed else shape)
        return shape if self.part is None else (self.part.of, *shape[1:])


def named_weights(model: Any, names: Names) -> tuple[list[Weight], Any]:
    """The arrays of a module (real or abstract) with their tensor names, and the tree that restores the module.

    Args:
      model: a module with `config.num_layers` layers.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    weights = [weight_named(dotted(path), leaf, model.config.num_layers, names) for path, leaf in leaves]
    return _with_parts(weights, names, model.config.num_heads), tree


def _with_parts(weights: list[Weight], names: Names, heads: int) -> list[Weight]:
    """The same weights, with the rows of the tensors that several of them share."""
    order = list(names.modules)
    sharing: dict[str, list[int]] = {}
    for index, weight in enumerate(weights):
        sharing.setdefault(weight.tensors[0], []).append(index)
    weights = list(weights)
    for group in filter(lambda group: len(group) > 1, sharing.values()):
        group.sort(key=lambda index: order.index(weights[index].name.rsplit(".", 1)[0]))
        sizes = [weights[index].array.shape[-1] for index in group]
        if names.by_head:
            rows = list(np.arange(sum(sizes)).reshape(heads, len(group), -1).swapaxes(0, 1).reshape(len(group), -1))
        else:
            rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        for index, mine in zip(group, rows, strict=True):
            weights[index] = weights[index]._replace(part=Part(mine, sum(sizes)))
    return weights


def dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def weight_named(name: str, array: jax.Array | jax.ShapeDtypeStruct, layers: int, names: Names) -> Weight:
    """The `Weight` of an array, from its path in a module with `layers` layers."""
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
