"""Loads ModernBERT checkpoints that say which tokens of a text stay.

Three kinds: `ModernBertForTokenClassification` of transformers; OpenProvence, whose config.json holds that of a
ModernBERT; Kompress, whose tensors are `encoder.*`, `token_head.*` and `span_conv.*`, beside the config.json of a
ModernBERT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxcompress.checkpoints._dtype import weights_dtype
from jaxcompress.checkpoints._entries import (
    MOST_LAYERS,
    config_of,
    flag,
    labels_in,
    number,
    object_in,
    said,
    shown,
    text,
    whole,
)
from jaxcompress.checkpoints._experts import View
from jaxcompress.checkpoints._load import Shardings, Surplus, Target, fill, tensors_of
from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.checkpoints._stored_int8 import with_scales
from jaxcompress.checkpoints._weights import Names, named_weights
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.models.modernbert import Kompress, ModernBert, ModernBertClassifier, ModernBertConfig, Provence
from jaxcompress.models.rope import RopeConfig

MODEL_TYPE, PROVENCE = "modernbert", "open_provence"
_ARCHITECTURE = "ModernBertForTokenClassification"
_TOKEN_HEAD = "token_head.weight"
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The defaults of transformers for entries that config.json does not have.
_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
    "norm_eps": 1e-5,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "classifier_pooling": "cls",
    "num_labels": 2,
}
_BIASES = ("norm_bias", "attention_bias", "mlp_bias")


class _Kind(NamedTuple):
    """A kind of checkpoint.

    Attributes:
      module: what its weights become.
      prefix: of the names of the encoder's tensors.
      heads: names of its heads' tensors, by their path in the module.
    """

    module: type[ModernBert]
    prefix: str
    heads: Mapping[str, str]


_CLASSIFIER = _Kind(
    ModernBertClassifier,
    "model.",
    {"head.dense": "head.dense", "head.norm": "head.norm", "head.classes": "classifier"},
)
_PROVENCE = _Kind(
    Provence,
    "ranking_model.model.",
    {
        "pruning": "pruning_head.classifier",
        "ranking.dense": "ranking_model.head.dense",
        "ranking.norm": "ranking_model.head.norm",
        "ranking.classes": "ranking_model.classifier",
    },
)
_KOMPRESS = _Kind(
    Kompress, "encoder.", {"token": "token_head", "span_in": "span_conv.0", "span_out": "span_conv.2"}
)  # fmt: skip


def load_modernbert(
    folder: Path, settings: dict[str, Any], dtype: DTypeLike | None, sharding: Shardings | None
) -> Loaded[ModernBert, ModernBertConfig, EncoderTokenizer]:
    """Reads a folder whose config.json has the `model_type` of ModernBERT or of OpenProvence.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    tensors = with_scales(tensors_of(folder))
    with config_of(folder / "config.json"):
        kind, config = _kind(settings, tensors), modernbert_config(settings)
    names = _names(kind)
    # The first layer has no norm before attention; the module holds a row for it, which it does not use.
    first = names.layer.format(layer=0) + "attn_norm.weight"
    tensors = {first: View((config.hidden_size,), "F32", _ones), **_renamed(tensors, kind)}
    sizes = {
        "vocab_size": config.vocab_size * config.hidden_size,
        "hidden_size": config.num_layers * config.hidden_size**2,
        "intermediate_size": config.num_layers * config.intermediate_size * config.hidden_size,
    }
    target = weights_dtype(dtype, settings, tensors, folder)
    model = fill(
        folder, tensors, lambda: kind.module(config, dtype=target, rngs=nnx.Rngs(0)),
        lambda model: named_weights(model, names), sizes=sizes, surplus=Surplus(lambda name: False),
        into=Target(target, sharding),
    )  # fmt: skip
    return Loaded(model, config, settings, folder, EncoderTokenizer)


def modernbert_config(settings: Mapping[str, Any]) -> ModernBertConfig:
    """The ModernBERT that a config.json describes, by itself or as the base of an OpenProvence checkpoint.

    Raises:
      ValueError: entries are missing, of another type or out of range, or the model has biases.
    """
    raw, longest, labels = settings, None, 2
    if settings.get("model_type") == PROVENCE:
        raw = object_in(settings, "base_model_config")
        if raw.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"the base of this OpenProvence checkpoint is {shown(raw.get('model_type'))}; known: '{MODEL_TYPE}'"
            )
        longest = whole({"max_length": 512, **said(settings)}, "max_length", least=4)
        labels = whole({"num_pruning_labels": 2, **said(settings)}, "num_pruning_labels")
    if missing := [key for key in _REQUIRED if raw.get(key) is None]:
        raise ValueError(f"the config of this encoder lacks {', '.join(missing)}")
    c = {**_DEFAULTS, **said(raw)}
    if biased := [key for key in _BIASES if flag(c, key)]:
        raise ValueError(f"{', '.join(biased)}: a ModernBERT with such biases is not known")
    if c["classifier_pooling"] not in ("cls", "mean"):
        raise ValueError(f"classifier_pooling is {shown(c['classifier_pooling'])}; known: 'cls', 'mean'")
    positions = whole(c, "max_position_embeddings", least=4)
    return ModernBertConfig(
        vocab_size=whole(c, "vocab_size"),
        hidden_size=whole(c, "hidden_size"),
        intermediate_size=whole(c, "intermediate_size"),
        num_heads=whole(c, "num_attention_heads"),
        attends_to_all=_attends_to_all(c),
        reach=whole(c, "local_attention", least=2) // 2,
        global_rope=RopeConfig(_theta(c, "full_attention", "global_rope_theta")),
        local_rope=RopeConfig(_theta(c, "sliding_attention", "local_rope_theta")),
        max_length=positions if longest is None else min(positions, longest),
        norm_eps=number(c, "norm_eps"),
        activation=text(c, "hidden_activation"),
        head_activation=text(c, "classifier_activation"),
        head_bias=flag(c, "classifier_bias"),
        pooling=c["classifier_pooling"],
        num_labels=labels if longest is not None else labels_in(c),
    )


def _attends_to_all(c: Mapping[str, Any]) -> tuple[bool, ...]:
    layers = whole(c, "num_hidden_layers", most=MOST_LAYERS)
    types = c.get("layer_types")
    if types is None:
        every = whole(c, "global_attn_every_n_layers")
        return tuple(layer % every == 0 for layer in range(layers))
    known = {"full_attention": True, "sliding_attention": False}
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(x, str) and x in known for x in types):
        raise ValueError(f"layer_types needs one of {', '.join(known)} for each of {layers} layers, not {shown(types)}")
    return tuple(known[kind] for kind in types)


def _theta(c: Mapping[str, Any], kind: str, older: str) -> float:
    """The RoPE base of a kind of layers; transformers 4 wrote it as an entry of its own."""
    given = said(object_in(object_in(c, "rope_parameters"), kind))
    if given.get("rope_type", "default") != "default" or object_in(c, "rope_scaling"):
        raise ValueError(f"rope type {shown(given.get('rope_type'))} of a ModernBERT is not known; only 'default' is")
    return number(given, "rope_theta") if "rope_theta" in given else number(c, older)


def _kind(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> _Kind:
    if settings.get("model_type") == PROVENCE:
        return _PROVENCE
    if _TOKEN_HEAD in tensors:
        return _KOMPRESS
    architectures = settings.get("architectures")
    if architectures != [_ARCHITECTURE]:
        raise ValueError(
            f"architectures is {shown(architectures)}, and there is no tensor {_TOKEN_HEAD}; a ModernBERT that says "
            f"which tokens stay is a {_ARCHITECTURE}, an OpenProvence or a Kompress checkpoint"
        )
    return _CLASSIFIER


def _renamed(tensors: Mapping[str, Any], kind: _Kind) -> dict[str, Any]:
    """The tensors by the names of `kind`. Older OpenProvence checkpoints have no prefix `ranking_model.`."""
    start = "ranking_model."
    if kind is not _PROVENCE or any(name.startswith(start) for name in tensors):
        return dict(tensors)
    return {name if name.startswith("pruning_head.") else start + name: x for name, x in tensors.items()}


def _names(kind: _Kind) -> Names:
    encoder = {
        "embedding_norm": f"{kind.prefix}embeddings.norm",
        "norm": f"{kind.prefix}final_norm",
        "layers.attention_norm": "attn_norm",
        **dict.fromkeys([f"layers.{name}" for name in ("query", "key", "value")], "attn.Wqkv"),
        "layers.out": "attn.Wo",
        "layers.mlp_norm": "mlp_norm",
        **dict.fromkeys(["layers.gate", "layers.up"], "mlp.Wi"),
        "layers.down": "mlp.Wo",
    }
    single = {"embedding": f"{kind.prefix}embeddings.tok_embeddings.weight"}
    return Names(single, {**encoder, **kind.heads}, kind.prefix + "layers.{layer}.")


def _ones(index: tuple[slice, ...]) -> np.ndarray:
    return np.ones([len(range(one.start, one.stop, one.step)) for one in index], np.float32)
