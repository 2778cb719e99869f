"""Converts config.json to the config of a vision tower or LLaVA model, and a LLaVA config back to config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcompress.checkpoints._config import INTERPRETED, architecture_of, decoder_config, hugging_face_config
from jaxcompress.checkpoints._entries import (
    MOST_LAYERS,
    architecture_in,
    flag,
    labels_in,
    number,
    object_in,
    said,
    shown,
    text,
    whole,
)
from jaxcompress.models.activations import TowerActivation
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.llava import LlavaConfig
from jaxcompress.models.tower_config import TowerConfig

_ACTIVATIONS: dict[str, TowerActivation] = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip
_BASE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 16, "num_channels": 3,
}  # fmt: skip
_TOWERS: dict[str, dict[str, Any]] = {
    "vit": {**_BASE, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "clip_vision_model": {**_BASE, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {**_BASE, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_TOWERS["deit"] = _TOWERS["vit"]
_LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
_TEXTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336},
    "qwen2": {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016},
    "qwen3": {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016},
}
_LLAVA_TOWER = {
    "model_type": "clip_vision_model", "intermediate_size": 4096, "hidden_size": 1024, "patch_size": 14,
    "image_size": 336, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
_LARGEST_SIDE = 2**16
_DECODERS = tuple(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3"))
LLAVA_INTERPRETED = INTERPRETED | {
    "image_token_index", "image_token_id", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy",
    "projector_hidden_act", "multimodal_projector_bias", "vision_config", "text_config", "image_grid_pinpoints",
    "vision_use_head", *_TOWERS["vit"],
}  # fmt: skip
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def hugging_face_llava_config(config: LlavaConfig) -> dict[str, Any]:
    """The config.json of this model: the inverse of `llava_config`.

    Raises:
      ValueError: no Hugging Face architecture has this tower or decoder.
    """
    tower, following = config.tower, bool(config.pinpoints)
    clip = (tower.pre_norm, tower.patch_bias, tower.special, tower.pooling) == (True, False, 1, "class")
    siglip = (tower.pre_norm, tower.patch_bias, tower.special) == (False, True, 0)
    if not (clip or siglip) or tower.labels or following != config.newline:
        raise ValueError("LLaVA in Hugging Face's layout has the tower of CLIP or SigLIP, and newlines if it has tiles")
    text_config = hugging_face_config(config.decoder)
    _check_decoder(text_config)
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == tower.activation)
    vision = {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": tower.hidden_size, "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_layers, "num_attention_heads": tower.num_heads,
        "image_size": tower.image_size, "patch_size": tower.patch_size, "num_channels": tower.channels,
        "hidden_act": activation, "layer_norm_eps": tower.norm_eps,
        **({} if clip else {"vision_use_head": tower.pooling == "attention"}),
    }  # fmt: skip
    return {
        "architectures": ["LlavaNextForConditionalGeneration" if following else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if following else "llava",
        "image_token_index": config.image_token,
        "image_seq_length": config.tokens_per_crop,
        "vision_feature_layer": config.feature_layers - tower.num_layers - 1,
        "vision_feature_select_strategy": "full" if config.keep_special or not tower.special else "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "vision_config": vision,
        "text_config": text_config,
        "tie_word_embeddings": config.decoder.tied,
        **({"image_grid_pinpoints": [list(point) for point in config.pinpoints]} if following else {}),
    }


WITH_TEXT = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def tower_type(raw: Mapping[str, Any]) -> str:
    given = str(raw.get("model_type"))
    return WITH_TEXT.get(given, given)


def tower_config(raw: Mapping[str, Any]) -> TowerConfig:
    """The tower that a Hugging Face config.json describes.

    Raises:
      ValueError: the model type or activation is unknown; attention has no biases; an entry is of another type or out
        of range.
    """
    kind = tower_type(raw)
    if kind not in _TOWERS:
        known = ", ".join([*_TOWERS, *WITH_TEXT])
        raise ValueError(f"unknown vision model type {shown(raw.get('model_type'))}; known: {known}")
    if raw.get("model_type") in WITH_TEXT:
        raw = object_in(raw, "vision_config")
    c = {"qkv_bias": True, "vision_use_head": True, "num_labels": 2, **_TOWERS[kind], **said(raw)}
    if text(c, "hidden_act") not in _ACTIVATIONS:
        raise ValueError(f"unknown hidden_act {c['hidden_act']!r}; known: {', '.join(_ACTIVATIONS)}")
    if not flag(c, "qkv_bias"):
        raise ValueError("qkv_bias is false; only towers with biases on query, key and value are known")
    classifies = "ForImageClassification" in (architecture_in(raw) or "")
    siglip = kind == "siglip_vision_model"
    return TowerConfig(
        hidden_size=whole(c, "hidden_size"),
        intermediate_size=whole(c, "intermediate_size"),
        num_layers=whole(c, "num_hidden_layers", most=MOST_LAYERS),
        num_heads=whole(c, "num_attention_heads"),
        image_size=whole(c, "image_size"),
        patch_size=whole(c, "patch_size"),
        channels=whole(c, "num_channels"),
        norm_eps=number(c, "layer_norm_eps"),
        activation=_ACTIVATIONS[c["hidden_act"]],
        special=0 if siglip else 2 if kind == "deit" else 1,
        patch_bias=kind != "clip_vision_model",
        pre_norm=kind == "clip_vision_model",
        pooling=("attention" if flag(c, "vision_use_head") else "mean") if siglip else "class",
        labels=labels_in(c) if classifies else 0,
    )


def llava_config(raw: Mapping[str, Any]) -> LlavaConfig:
    """The LLaVA model that a Hugging Face config.json describes.

    Raises:
      ValueError: the tower, the projector or the decoder does not support a feature; an entry is of another type or out
        of range.
    """
    kind = raw.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ValueError(f"unknown model type {shown(kind)}; known: llava, llava_next")
    following = kind == "llava_next"
    raw = said(raw)
    c = {
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "image_token_index": raw.get("image_token_id", 32000), "multimodal_projector_bias": True, **raw,
    }  # fmt: skip
    decoder = _decoder(_text_config(raw))
    tower = tower_config({**_LLAVA_TOWER, **said(object_in(raw, "vision_config"))})
    if c["projector_hidden_act"] != "gelu":
        raise ValueError(f"unknown projector_hidden_act {shown(c['projector_hidden_act'])}; known: 'gelu'")
    layers = tower.num_layers + 1
    if isinstance(c["vision_feature_layer"], list):
        raise ValueError(
            f"vision_feature_layer is {shown(c['vision_feature_layer'])}; only features of one layer are known"
        )
    layer = whole(c, "vision_feature_layer", least=-layers, most=layers - 1)
    strategy = c["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise ValueError(f"unknown vision_feature_select_strategy {shown(strategy)}; known: 'default', 'full'")
    if strategy == "default" and not tower.special:
        raise ValueError("vision_feature_select_strategy 'default' leaves out a class token, this tower has none")
    return LlavaConfig(
        tower=tower,
        decoder=decoder,
        image_token=whole(c, "image_token_index", least=0),
        feature_layers=layer % layers,
        keep_special=strategy == "full",
        projector_bias=flag(c, "multimodal_projector_bias"),
        pinpoints=_pinpoints(raw) if following else (),
        newline=following,
    )


def _decoder(raw: Mapping[str, Any]) -> DecoderConfig:
    _check_decoder(raw)
    return decoder_config(raw)


def _check_decoder(raw: Mapping[str, Any]) -> None:
    """Raises ValueError if a config.json describes a decoder that LLaVA has not in Hugging Face's layout."""
    if (kind := architecture_of(raw)) not in _DECODERS:
        raise ValueError(f"LLaVA with a decoder {kind} is not known; known: {', '.join(_DECODERS)}")


def _text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the decoder. It is tied if either of the two configs says so, as in transformers."""
    given = said(object_in(raw, "text_config"), "num_key_value_heads", "sliding_window")
    kind = text({"model_type": "llama", **given}, "model_type")
    tied = flag(raw, "tie_word_embeddings") or flag(given, "tie_word_embeddings")
    return {**_TEXTS.get(kind, {}), "model_type": kind, **given, "tie_word_embeddings": tied}


def _pinpoints(raw: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    given = raw.get("image_grid_pinpoints", _PINPOINTS)
    pairs = isinstance(given, list) and all(isinstance(point, list) and len(point) == 2 for point in given)
    if not pairs or not given:
        raise ValueError(f"image_grid_pinpoints must be a list of pairs (height, width), not {shown(given)}")
    side = lambda value: whole({"image_grid_pinpoints": value}, "image_grid_pinpoints", most=_LARGEST_SIDE)
    return tuple((side(h), side(w)) for h, w in given)
