"""Encoders that classify tokens, in and out: BERT and XLM-RoBERTa as `...ForTokenClassification`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from jaxcompress.checkpoints._load import Shardings, find, read_json, read_module
from jaxcompress.checkpoints._save import write_folder
from jaxcompress.checkpoints._weights import Names, named_weights
from jaxcompress.models.encoder import Encoder, EncoderConfig

_PREFIX = {"bert": "bert", "xlm-roberta": "roberta", "roberta": "roberta"}
_ARCHITECTURES = {"bert": "BertForTokenClassification", "xlm-roberta": "XLMRobertaForTokenClassification"}
_KNOWN = {**{name: kind for kind, name in _ARCHITECTURES.items()}, "RobertaForTokenClassification": "roberta"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers assumes where a config.json is silent.
_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "num_labels": 2,
}


class LoadedEncoder(NamedTuple):
    """What a checkpoint of an encoder holds.

    Attributes:
      model: the encoder; its shape is `model.config`.
      settings: config.json as it was read.
      folder: where the files are, the tokenizer's among them.
    """

    model: Encoder
    settings: dict[str, Any]
    folder: Path


def load_encoder(source: str | Path, *, dtype: Any = None, sharding: Shardings | None = None) -> LoadedEncoder:
    """Reads a BERT or XLM-RoBERTa checkpoint that classifies tokens, such as those of LLMLingua-2.

    Args:
      source, dtype, sharding: as for `load`.

    Raises:
      FileNotFoundError, ValueError: as `load`.

    Example:
      >>> name = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
      >>> encoder = load_encoder(name).model  # doctest: +SKIP
    """
    folder = find(source)
    settings = read_json(folder / "config.json")
    config, kind = encoder_config(settings), _kind(settings)
    build = lambda dtype: Encoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    unused = lambda name: ".pooler." in name or name.endswith("embeddings.position_ids")
    model = read_module(folder, settings, build, _names(_PREFIX[kind]), unused, dtype, sharding)
    return LoadedEncoder(model, settings, folder)


def save_encoder(encoder: Encoder, folder: str | Path, *, tokenizer_from: str | Path | None = None) -> Path:
    """Writes config.json and safetensors that `load_encoder` and transformers open; returns the folder.

    Args:
      folder: new or empty; appears whole or not at all.
      tokenizer_from: a folder whose tokenizer files are copied.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: as `save`.
    """
    config = hugging_face_encoder_config(encoder.config)
    weights, _ = named_weights(encoder, _names(_PREFIX[config["model_type"]]))
    return write_folder(Path(folder).expanduser().absolute(), config, weights, tokenizer_from, 5 * 10**9)


def encoder_config(raw: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that a Hugging Face config.json describes.

    Raises:
      ValueError: another architecture, missing entries, positions that are not absolute, an unknown activation.
    """
    kind = _kind(raw)
    if missing := [key for key in _REQUIRED if raw.get(key) is None]:
        raise ValueError(f"the config of this encoder lacks {', '.join(missing)}")
    c = {**_DEFAULTS, **{key: value for key, value in raw.items() if value is not None}}
    if c["position_embedding_type"] != "absolute":
        raise ValueError(f"position_embedding_type is {c['position_embedding_type']!r}; only 'absolute' is known")
    return EncoderConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_labels=len(c["id2label"]) if c.get("id2label") else c["num_labels"],
        max_position=c["max_position_embeddings"],
        token_types=c["type_vocab_size"],
        norm_eps=c["layer_norm_eps"],
        padding_id=None if kind == "bert" else c.get("pad_token_id", 1),
        activation=c["hidden_act"],
    )


def hugging_face_encoder_config(config: EncoderConfig) -> dict[str, Any]:
    """The config.json of this encoder: the inverse of `encoder_config`, BERT if it has no `padding_id`."""
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
    given = (raw.get("architectures") or [None])[0]
    if given not in _KNOWN:
        raise ValueError(f"unknown architecture {given!r} of an encoder; known: {', '.join(_KNOWN)}")
    return _KNOWN[given]


def _names(prefix: str) -> Names:
    embeddings = f"{prefix}.embeddings"
    return Names(
        {
            "embedding": f"{embeddings}.word_embeddings.weight",
            "position_embedding": f"{embeddings}.position_embeddings.weight",
            "type_embedding": f"{embeddings}.token_type_embeddings.weight",
            "embedding_norm.scale": f"{embeddings}.LayerNorm.weight",
            "embedding_norm.bias": f"{embeddings}.LayerNorm.bias",
            "head.kernel": "classifier.weight",
            "head.bias": "classifier.bias",
        },
        {
            "layers.attention.query": "attention.self.query",
            "layers.attention.key": "attention.self.key",
            "layers.attention.value": "attention.self.value",
            "layers.attention.out": "attention.output.dense",
            "layers.attention_norm": "attention.output.LayerNorm",
            "layers.up": "intermediate.dense",
            "layers.down": "output.dense",
            "layers.mlp_norm": "output.LayerNorm",
        },
        prefix + ".encoder.layer.{layer}.",
    )
