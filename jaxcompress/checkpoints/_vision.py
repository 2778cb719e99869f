"""Vision towers and LLaVA models from Hugging Face folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxcompress.checkpoints._carried import config_like
from jaxcompress.checkpoints._config import INTERPRETED, decoder_config, hugging_face_config
from jaxcompress.checkpoints._dtype import weights_dtype
from jaxcompress.checkpoints._entries import (
    MOST_LAYERS,
    architecture_in,
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
from jaxcompress.checkpoints._load import Shardings, Surplus, fill, find, opened, sizes_of, with_own_head
from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.checkpoints._processor import PROCESSOR_FILES
from jaxcompress.checkpoints._save import write_folder
from jaxcompress.checkpoints._weights import DECODER, Names, Weight, dotted, named_weights, weight_named
from jaxcompress.inputs.json import read_object, read_object_if_there
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.vit import Activation, TowerConfig, VisionTower

_ACTIVATIONS: dict[str, Activation] = {
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
_INTERPRETED = INTERPRETED | {
    "image_token_index", "image_token_id", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy",
    "projector_hidden_act", "multimodal_projector_bias", "vision_config", "text_config", "image_grid_pinpoints",
    "vision_use_head", *_TOWERS["vit"],
}  # fmt: skip
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def load_tower(
    source: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings | None = None
) -> Loaded[VisionTower, TowerConfig, Tokenizer]:
    """Reads a ViT, DeiT, CLIP or SigLIP vision tower; of a checkpoint with words too (CLIP, SigLIP) only the tower.

    Args and errors as of `load`.
    """
    folder = find(source)
    settings = read_object(folder / "config.json")
    with config_of(folder / "config.json"):
        config, kind = tower_config(settings), _type(settings)
    inside = "vision_model." if kind in _WITH_WORDS.values() else f"{kind}."
    # A tower that was saved alone may go without the prefix.
    bare = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|head)\.")
    renamed = lambda name: inside + name if bare.match(name) else name
    names = _clip_names if inside == "vision_model." else _vit_names(kind, config)
    beside = _WORDS if settings.get("model_type") in _WITH_WORDS else re.compile(r"(?!)")
    with opened(folder, renamed) as tensors:
        target = weights_dtype(dtype, settings, tensors, folder)
        model = fill(
            folder, tensors, lambda: VisionTower(config, dtype=target, rngs=nnx.Rngs(0)),
            lambda tower: named_weights(tower, names), sizes=_sizes_of_tower(config),
            surplus=Surplus(
                lambda name: name.endswith("embeddings.position_ids") or bool(beside.match(name)), _unused
            ),
            dtype=target, sharding=sharding,
        )  # fmt: skip
    return Loaded(model, config, settings, folder, Tokenizer)


_WORDS = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$")
"""What a checkpoint with words has beside the tower."""


def _sizes_of_tower(config: TowerConfig) -> dict[str, int]:
    hidden = config.hidden_size
    return {
        "hidden_size": config.num_layers * hidden**2,
        "intermediate_size": config.num_layers * config.intermediate_size * hidden,
        "image_size": (config.num_patches + config.special) * hidden,
        "patch_size": config.channels * config.patch_size**2 * hidden,
        "num_labels": config.labels * hidden,
    }


def load_llava(
    source: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings | None = None
) -> Loaded[Llava, LlavaConfig, Tokenizer]:
    """Reads a LLaVA-1.5 or LLaVA-NeXT checkpoint in transformers' layout (`llava-hf/...`).

    Args and errors as of `load`.
    """
    folder = find(source)
    settings = read_object(folder / "config.json")
    with config_of(folder / "config.json"):
        config = llava_config(settings)
    with opened(folder, _older_name) as tensors:
        target = weights_dtype(dtype, settings, tensors, folder)
        names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
        decoder, tensors = with_own_head(config.decoder, tensors, *names, target)
        config = replace(config, decoder=decoder)
        model = fill(
            folder, tensors, lambda: Llava(config, dtype=target, rngs=nnx.Rngs(0)), llava_weights,
            sizes=_sizes_of_tower(config.tower) | sizes_of(config.decoder),
            surplus=Surplus(lambda name: name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))),
            dtype=target, sharding=sharding,
        )  # fmt: skip
    return Loaded(model, config, settings, folder, Tokenizer)


def save_llava(
    model: Llava,
    folder: str | Path,
    *,
    processor: Mapping[str, Any] | None = None,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a LLaVA model as a folder that `load_llava` and transformers open; returns the folder.

    The folder appears whole or not at all, as with `save`.

    Args:
      processor: preprocessor_config.json, what `image_processor` reads; that of `tokenizer_from` if None.
      tokenizer_from: as for `save`.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: as `save`; a tower that is not CLIP's or SigLIP's; no processor.
    """
    weights, _ = llava_weights(model)
    more = _processor_files(processor, tokenizer_from)
    config = config_like(tokenizer_from, hugging_face_llava_config(model.config), llava_config, _INTERPRETED)
    return write_folder(folder, config, weights, tokenizer_from=tokenizer_from, shard_bytes=shard_bytes, more=more)


def _processor_files(processor: Mapping[str, Any] | None, source: str | Path | None) -> dict[str, dict[str, Any]]:
    """What is written beside what is copied."""
    folder = None if source is None else Path(source).expanduser()
    if processor is None:
        if folder is None or not any((folder / name).is_file() for name in PROCESSOR_FILES):
            raise ValueError(
                f"no image processor: give processor=, or tokenizer_from= a folder with {PROCESSOR_FILES[0]}"
            )
        return {}
    alone, among_others = PROCESSOR_FILES
    others = {} if folder is None else read_object_if_there(folder / among_others)
    # transformers 5 may have it there, and reads it there first.
    inside = {among_others: others | {"image_processor": dict(processor)}} if "image_processor" in others else {}
    return {alone: dict(processor), **inside}


def hugging_face_llava_config(config: LlavaConfig) -> dict[str, Any]:
    """The config.json of this model: the inverse of `llava_config`.

    Raises ValueError where no Hugging Face architecture has this tower or decoder.
    """
    tower, following = config.tower, bool(config.pinpoints)
    clip = (tower.pre_norm, tower.patch_bias, tower.special, tower.pooling) == (True, False, 1, "class")
    siglip = (tower.pre_norm, tower.patch_bias, tower.special) == (False, True, 0)
    if not (clip or siglip) or tower.labels or following != config.newline:
        raise ValueError("LLaVA in Hugging Face's layout has the tower of CLIP or SigLIP, and newlines if it has tiles")
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
        "text_config": hugging_face_config(config.decoder),
        "tie_word_embeddings": config.decoder.tied,
        **({"image_grid_pinpoints": [list(point) for point in config.pinpoints]} if following else {}),
    }


_WITH_WORDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def _type(raw: Mapping[str, Any]) -> str:
    given = str(raw.get("model_type"))
    return _WITH_WORDS.get(given, given)


def tower_config(raw: Mapping[str, Any]) -> TowerConfig:
    """The tower that a Hugging Face config.json describes.

    Raises ValueError for another model type or activation, where the biases of attention were left out, and for
    entries of another type or out of range.
    """
    kind = _type(raw)
    if kind not in _TOWERS:
        known = ", ".join([*_TOWERS, *_WITH_WORDS])
        raise ValueError(f"unknown vision model type {shown(raw.get('model_type'))}; known: {known}")
    if raw.get("model_type") in _WITH_WORDS:
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

    Raises ValueError for what neither the tower, the projector nor the decoder has, and for entries of another type
    or out of range.
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
    decoder = decoder_config(_text_config(raw))
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


def _text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own config. It is tied if either of the two configs says so, as to transformers."""
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


def llava_weights(model: Llava) -> tuple[list[Weight], Any]:
    """The arrays of a LLaVA model, real or abstract, as `weights_of` has those of a decoder."""
    config = model.config

    def named(name: str, array: Any) -> Weight:
        part, rest = name.split(".", 1) if "." in name else (name, "")
        if part == "decoder":
            weight = weight_named(rest, array, config.decoder.num_layers, DECODER)
            return weight._replace(name=name, tensors=tuple(f"language_model.{tensor}" for tensor in weight.tensors))
        if part == "tower":
            weight = weight_named(rest, array, config.tower.num_layers, _clip_names)
            return weight._replace(name=name, tensors=tuple(f"vision_tower.{tensor}" for tensor in weight.tensors))
        return weight_named(name, array, 0, _PROJECTOR)

    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    return [named(dotted(path), leaf) for path, leaf in leaves], tree


_PROJECTOR = Names(
    {"newline": "image_newline"},
    {"projector.up": "multi_modal_projector.linear_1", "projector.down": "multi_modal_projector.linear_2"},
    "",
)
_clip_names = Names(
    {
        "patch": "vision_model.embeddings.patch_embedding.weight",
        "patch_bias": "vision_model.embeddings.patch_embedding.bias",
        "position": "vision_model.embeddings.position_embedding.weight",
        "class_token": "vision_model.embeddings.class_embedding",
        "pool.probe": "vision_model.head.probe",
        "pool.kernel": "vision_model.head.attention.in_proj_weight",
        "pool.bias": "vision_model.head.attention.in_proj_bias",
    },
    {
        "layers.attention_norm": "layer_norm1",
        "layers.mlp_norm": "layer_norm2",
        "layers.attention.query": "self_attn.q_proj",
        "layers.attention.key": "self_attn.k_proj",
        "layers.attention.value": "self_attn.v_proj",
        "layers.attention.out": "self_attn.out_proj",
        "layers.mlp.up": "mlp.fc1",
        "layers.mlp.down": "mlp.fc2",
        "pre_norm": "vision_model.pre_layrnorm",
        "norm": "vision_model.post_layernorm",
        "pool.out": "vision_model.head.attention.out_proj",
        "pool.norm": "vision_model.head.layernorm",
        "pool.mlp.up": "vision_model.head.mlp.fc1",
        "pool.mlp.down": "vision_model.head.mlp.fc2",
    },
    "vision_model.encoder.layers.{layer}.",
    leading={"pool.probe": 2},
)


def _vit_names(kind: str, config: TowerConfig) -> Names:
    embeddings = f"{kind}.embeddings"
    return Names(
        {
            "patch": f"{embeddings}.patch_embeddings.projection.weight",
            "patch_bias": f"{embeddings}.patch_embeddings.projection.bias",
            "position": f"{embeddings}.position_embeddings",
            "class_token": f"{embeddings}.cls_token",
            "distillation_token": f"{embeddings}.distillation_token",
        },
        {
            "layers.attention_norm": "layernorm_before",
            "layers.mlp_norm": "layernorm_after",
            "layers.attention.query": "attention.attention.query",
            "layers.attention.key": "attention.attention.key",
            "layers.attention.value": "attention.attention.value",
            "layers.attention.out": "attention.output.dense",
            "layers.mlp.up": "intermediate.dense",
            "layers.mlp.down": "output.dense",
            "norm": f"{kind}.layernorm",
            "classifier": "cls_classifier" if config.special > 1 else "classifier",
            "distillation_classifier": "distillation_classifier",
        },
        kind + ".encoder.layer.{layer}.",
        leading={"position": 1, "class_token": 2, "distillation_token": 2},
    )


def _unused(name: str) -> bool:
    """ViT's pooler, which classifiers lack, and a mask for pre-training."""
    return name.endswith("embeddings.mask_token") or ".pooler." in name


def _older_name(name: str) -> str:
    """As the hub's folders have it. transformers 5 may put `model.` before the parts, the head beside them, and leave
    `vision_model.` out."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)
