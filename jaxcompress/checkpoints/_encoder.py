"""Loads and saves encoders that classify tokens: BERT and XLM-RoBERTa as `...ForTokenClassification`, and loads those
of `jaxcompress.checkpoints._modernbert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxcompress.checkpoints._carried import config_like
from jaxcompress.checkpoints._dtype import weights_dtype
from jaxcompress.checkpoints._entries import (
    MOST_LAYERS,
    architecture_in,
    config_of,
    labels_in,
    number,
    said,
    shown,
    text,
    whole,
)
from jaxcompress.checkpoints._experts import View
from jaxcompress.checkpoints._load import Shardings, Surplus, Target, fill, find, tensors_of
from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.checkpoints._modernbert import MODEL_TYPE, PROVENCE, load_modernbert
from jaxcompress.checkpoints._save import write_folder
from jaxcompress.checkpoints._stored_int8 import with_scales
from jaxcompress.checkpoints._weights import Names, named_weights
from jaxcompress.inputs.described import described
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.json import read_object
from jaxcompress.models.encoder import Encoder, EncoderConfig

_PREFIX = {"bert": "bert", "xlm-roberta": "roberta", "roberta": "roberta"}
_ARCHITECTURES = {"bert": "BertForTokenClassification", "xlm-roberta": "XLMRobertaForTokenClassification"}
_KNOWN = {**{name: kind for kind, name in _ARCHITECTURES.items()}, "RobertaForTokenClassification": "roberta"}
_POSITION_IDS = "embeddings.position_ids"
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The defaults of transformers for entries that config.json does not have.
_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "num_labels": 2,
}
_INTERPRETED = frozenset(
    {
        "architectures", "model_type", "dtype", "torch_dtype", "id2label", "label2id", "pad_token_id",
        *_REQUIRED, *_DEFAULTS,
    }
)  # fmt: skip


def load_encoder(
    source: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings | None = None
) -> Loaded[Any, Any, EncoderTokenizer]:
    """Reads a checkpoint that classifies tokens.

    BERT and XLM-RoBERTa (such as those of LLMLingua-2) give an `Encoder`; ModernBERT gives a `ModernBertClassifier`, an
    OpenProvence checkpoint a `Provence`, and one of Kompress a `Kompress`. Matrices may be stored in int8
    (`store_in_int8`).

    Args:
      source, dtype, sharding: as for `load`.

    Raises:
      FileNotFoundError, ValueError: as `load`.

    Examples:
      >>> name = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
      >>> encoder = load_encoder(name).model  # doctest: +SKIP
    """
    folder = find(source)
    settings = read_object(folder / "config.json")
    if settings.get("model_type") in (MODEL_TYPE, PROVENCE):
        return load_modernbert(folder, settings, dtype, sharding)
    with config_of(folder / "config.json"):
        config, names = encoder_config(settings), _names(_PREFIX[_kind(settings)])
    surplus = Surplus(lambda name: name.endswith(_POSITION_IDS), lambda name: ".pooler." in name)
    return _filled(folder, with_scales(tensors_of(folder)), settings, config, names, surplus, dtype, sharding)


def load_backbone(
    source: str | Path, *, num_labels: int = 2, dtype: DTypeLike | None = None, sharding: Shardings | None = None
) -> Loaded[Encoder, EncoderConfig, EncoderTokenizer]:
    """Reads a BERT or RoBERTa checkpoint of any task as an encoder to be trained to classify tokens.

    What the checkpoint has beside its embeddings and layers, such as a pooler or a language model's head, is left out.
    The new head is 0, so every class has the same probability.

    Args:
      num_labels: the number of classes.
      source, dtype, sharding: as for `load`.

    Raises:
      FileNotFoundError, ValueError: as `load`.

    Examples:
      >>> encoder = load_backbone("sentence-transformers/all-MiniLM-L6-v2").model  # doctest: +SKIP
    """
    folder = find(source)
    settings = read_object(folder / "config.json")
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in _PREFIX:
        raise ValueError(f"{folder / 'config.json'}: model_type is {shown(kind)}; known: {', '.join(_PREFIX)}")
    labels = {"id2label": None, "label2id": None, "num_labels": num_labels}
    settings = {**settings, **labels, "architectures": [_ARCHITECTURES.get(kind, "RobertaForTokenClassification")]}
    with config_of(folder / "config.json"):
        config = encoder_config(settings)
    tensors = with_scales(tensors_of(folder))
    # A checkpoint of the encoder alone has names without the prefix.
    prefix = _PREFIX[kind] if any(name.startswith(f"{_PREFIX[kind]}.") for name in tensors) else ""
    names = _names(prefix)
    own = tuple(".".join(filter(None, (prefix, part))) + "." for part in ("embeddings", "encoder"))
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(own)}
    shapes = {"classifier.weight": (num_labels, config.hidden_size), "classifier.bias": (num_labels,)}
    head = {name: View(shape, "F32", _zeros) for name, shape in shapes.items()}
    surplus = Surplus(lambda name: name.endswith(_POSITION_IDS))
    return _filled(folder, inside | head, settings, config, names, surplus, dtype, sharding)


def _zeros(index: tuple[slice, ...]) -> np.ndarray:
    return np.zeros([len(range(one.start, one.stop, one.step)) for one in index], np.float32)


def _filled(
    folder: Path, tensors: Mapping[str, Any], settings: dict[str, Any], config: EncoderConfig, names: Names,
    surplus: Surplus, dtype: DTypeLike | None, sharding: Shardings | None,
) -> Loaded[Encoder, EncoderConfig, EncoderTokenizer]:  # fmt: skip
    sizes = {
        "vocab_size": config.vocab_size * config.hidden_size,
        "hidden_size": config.num_layers * config.hidden_size**2,
        "intermediate_size": config.num_layers * config.intermediate_size * config.hidden_size,
        "max_position_embeddings": config.max_position * config.hidden_size,
        "type_vocab_size": config.token_types * config.hidden_size,
        "num_labels": config.num_labels * config.hidden_size,
    }
    weights_of = lambda encoder: named_weights(encoder, names)
    target = weights_dtype(dtype, settings, tensors, folder)
    make = lambda: Encoder(config, dtype=target, rngs=nnx.Rngs(0))
    into = Target(target, sharding)
    model = fill(folder, tensors, make, weights_of, sizes=sizes, surplus=surplus, into=into)
    return Loaded(model, config, settings, folder, EncoderTokenizer)


def save_encoder(encoder: Encoder, folder: str | Path, *, tokenizer_from: str | Path | None = None) -> Path:
    """Writes config.json and safetensors that `load_encoder` and transformers open; returns the folder.

    Args:
      folder: a new or empty folder; it appears complete or not at all.
      tokenizer_from: as for `save`. If this is a RoBERTa folder, the saved model is RoBERTa, too. The class names of
        its config.json are kept.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: as `save`; also if it is no `Encoder`, such as a ModernBERT.
    """
    if not isinstance(encoder, Encoder):
        raise ValueError(f"only an Encoder (BERT, RoBERTa) can be saved, not {described(encoder)}")
    ours = hugging_face_encoder_config(encoder.config)
    config = config_like(tokenizer_from, ours, encoder_config, _INTERPRETED)
    weights, _ = named_weights(encoder, _names(_PREFIX[_kind(config)]))
    return write_folder(folder, config, weights, tokenizer_from=tokenizer_from)


def encoder_config(raw: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that a Hugging Face config.json describes.

    Raises:
      ValueError: the architecture or activation is unknown, entries are missing, or positions are not absolute.
    """
    kind = _kind(raw)
    if missing := [key for key in _REQUIRED if raw.get(key) is None]:
        raise ValueError(f"the config of this encoder lacks {', '.join(missing)}")
    c = {**_DEFAULTS, **said(raw)}
    if c["position_embedding_type"] != "absolute":
        raise ValueError(f"position_embedding_type is {shown(c['position_embedding_type'])}; only 'absolute' is known")
    return EncoderConfig(
        vocab_size=whole(c, "vocab_size"),
        hidden_size=whole(c, "hidden_size"),
        intermediate_size=whole(c, "intermediate_size"),
        num_layers=whole(c, "num_hidden_layers", most=MOST_LAYERS),
        num_heads=whole(c, "num_attention_heads"),
        num_labels=labels_in(c),
        max_position=whole(c, "max_position_embeddings"),
        token_types=whole(c, "type_vocab_size"),
        norm_eps=number(c, "layer_norm_eps"),
        padding_id=None if kind == "bert" else whole({"pad_token_id": 1, **c}, "pad_token_id", least=0),
        activation=text(c, "hidden_act"),
    )


def hugging_face_encoder_config(config: EncoderConfig) -> dict[str, Any]:
    """The config.json of this encoder: the inverse of `encoder_config`. BERT if there is no `padding_id`."""
    kind = "bert" if config.padding_id is None else "xlm-roberta"
    special = {"pad_token_id": 0} if kind == "bert" else {"pad_token_id": config.padding_id}
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "id2label": {str(label): f"LABEL_{label}" for label in range(config.num_labels)},
        "label2id": {f"LABEL_{label}": label for label in range(config.num_labels)},
        "max_position_embeddings": config.max_position,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "position_embedding_type": "absolute",
        **special,
    }


def _kind(raw: Mapping[str, Any]) -> str:
    given = architecture_in(raw)
    if given not in _KNOWN:
        raise ValueError(f"unknown architecture {given!r} of an encoder; known: {', '.join(_KNOWN)}")
    return _KNOWN[given]


def _names(prefix: str) -> Names:
    """Tensor names that begin with a prefix and a dot, or with nothing."""
    start = f"{prefix}." if prefix else ""
    embeddings = f"{start}embeddings"
    return Names(
        {
            "embedding": f"{embeddings}.word_embeddings.weight",
            "position_embedding": f"{embeddings}.position_embeddings.weight",
            "type_embedding": f"{embeddings}.token_type_embeddings.weight",
        },
        {
            "embedding_norm": f"{embeddings}.LayerNorm",
            "head": "classifier",
            "layers.attention.query": "attention.self.query",
            "layers.attention.key": "attention.self.key",
            "layers.attention.value": "attention.self.value",
            "layers.attention.out": "attention.output.dense",
            "layers.attention_norm": "attention.output.LayerNorm",
            "layers.up": "intermediate.dense",
            "layers.down": "output.dense",
            "layers.mlp_norm": "output.LayerNorm",
        },
        start + "encoder.layer.{layer}.",
    )
