"""Maps the tensors of a Hugging Face checkpoint to the arrays of a module with stacked layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np


class Names(NamedTuple):
    """The tensor names of a family of checkpoints.

    Attributes:
      single: tensor names of arrays outside linear layers and norms, by the dotted path of the array in the module.
      modules: names of linear layers and norms in the checkpoint, by their path in the module ("layers.mlp.up").
      layer: the prefix of names within a layer, with a placeholder for the layer number.
      leading: the number of leading axes of length 1 in the tensor, by array in `single`.
      shared: where several arrays share a tensor (query, key and value; gate and up), what follows in turn in its rows:
        each array as a whole, in the order in which they are listed, a head of each, or a channel of each.
      aliases: parts of names in other versions of the format -> those here.
      arrays: names within a layer of arrays outside linear layers and norms, by their path in the module. A name with a
        placeholder for the expert is that of a tensor [out, in] for each expert.
    """

    single: Mapping[str, str]
    modules: Mapping[str, str]
    layer: str
    leading: Mapping[str, int] = {}
    shared: Literal["array", "head", "channel"] = "array"
    aliases: Mapping[str, str] = {}
    arrays: Mapping[str, str] = {}

    def ours(self, name: str) -> str:
        """The name here of a tensor in the files."""
        for other, mine in self.aliases.items():
            name = name.replace(other, mine)
        return name


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
    shared="head",
    aliases={"lm_head.weight": "embed_out.weight"},
)
MIXTRAL = DECODER._replace(
    modules={**DECODER.modules, "layers.mlp.router": "block_sparse_moe.gate"},
    aliases={".mlp.": ".block_sparse_moe."},
    arrays={
        "layers.mlp.gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "layers.mlp.up": "block_sparse_moe.experts.{expert}.w3.weight",
        "layers.mlp.down": "block_sparse_moe.experts.{expert}.w2.weight",
    },
)
QWEN3_MOE = DECODER._replace(
    modules={**DECODER.modules, "layers.mlp.router": "mlp.gate"},
    arrays={
        "layers.mlp.gate": "mlp.experts.{expert}.gate_proj.weight",
        "layers.mlp.up": "mlp.experts.{expert}.up_proj.weight",
        "layers.mlp.down": "mlp.experts.{expert}.down_proj.weight",
    },
)
GPT_OSS = DECODER._replace(
    modules={**DECODER.modules, "layers.mlp.router": "mlp.router"},
    shared="channel",
    arrays={
        "layers.attention.sinks": "self_attn.sinks",
        **dict.fromkeys(["layers.mlp.gate", "layers.mlp.up"], "mlp.experts.gate_up_proj"),
        "layers.mlp.down": "mlp.experts.down_proj",
        **dict.fromkeys(["layers.mlp.gate_bias", "layers.mlp.up_bias"], "mlp.experts.gate_up_proj_bias"),
        "layers.mlp.down_bias": "mlp.experts.down_proj_bias",
    },
)


class Part(NamedTuple):
    """The part of a tensor that an array holds, where several arrays share the tensor.

    Attributes:
      rows: the rows of the tensor, ascending, in the order of the array's outputs.
      of: how many rows the tensor has.
      axis: the tensor's axis of rows: 0 of [out, in], -1 of [..., in, out].
    """

    rows: np.ndarray
    of: int
    axis: int


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
      part: the part of each tensor; None for all of it.
    """

    name: str
    array: Any
    tensors: tuple[str, ...]
    stacked: int
    transposed: bool
    leading: int = 0
    part: Part | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in the checkpoint."""
        shape = self.array.shape[self.stacked :]
        shape = [1] * self.leading + list(shape[::-1] if self.transposed else shape)
        if self.part is not None:
            shape[self.part.axis] = self.part.of
        return tuple(shape)


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
    order = [*names.modules, *names.arrays]
    path = lambda weight: weight.name if weight.name in names.arrays else weight.name.rsplit(".", 1)[0]
    sharing: dict[str, list[int]] = {}
    for index, weight in enumerate(weights):
        sharing.setdefault(weight.tensors[0], []).append(index)
    weights = list(weights)
    for group in filter(lambda group: len(group) > 1, sharing.values()):
        group.sort(key=lambda index: order.index(path(weights[index])))
        sizes = np.array([weights[index].array.shape[-1] for index in group])
        turns = {"array": 1, "head": heads, "channel": sizes[0]}[names.shared]
        rows = np.split(np.arange(sizes.sum()).reshape(turns, -1), np.cumsum(sizes // turns)[:-1], axis=1)
        for index, mine in zip(group, rows, strict=True):
            axis = 0 if weights[index].transposed else -1
            weights[index] = weights[index]._replace(part=Part(mine.reshape(-1), int(sizes.sum()), axis))
    return weights


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
