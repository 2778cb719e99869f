"""Vision towers and LLaVA models from Hugging Face folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxcompress.checkpoints._config import decoder_config, hugging_face_config
from jaxcompress.checkpoints._load import Shardings, fill, find, read_json
from jaxcompress.checkpoints._save import write_folder
from jaxcompress.checkpoints._weights import DECODER, Names, Weight, dotted, named_weights, weight_named
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
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class LoadedTower(NamedTuple):
    """A tower as a checkpoint holds it; attributes as in `Loaded`. `settings["id2label"]` names the classes."""

    model: VisionTower
    config: TowerConfig
    settings: dict[str, Any]
    folder: Path

    def processor(self) -> Any:
        """The `transformers` image processor of this checkpoint."""
        return image_processor(self.folder)


class LoadedLlava(NamedTuple):
    """A LLaVA model as a checkpoint holds it; attributes as in `Loaded`."""

    model: Llava
    config: LlavaConfig
    settings: dict[str, Any]
    folder: Path

    def processor(self) -> Any:
        """The `transformers` image processor of this checkpoint."""
        return image_processor(self.folder)

    def tokenizer(self) -> Any:
        """The `transformers` tokenizer of this checkpoint."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


def load_tower(source: str | Path, *, dtype: Any = None, sharding: Shardings | None = None) -> LoadedTower:
    """Reads a ViT, DeiT, CLIP or SigLIP vision tower; of a checkpoint with words too (CLIP, SigLIP) only the tower.

    Args and errors as of `load`.
    """
    folder = find(source)
    settings = read_json(folder / "config.json")
    config = tower_config(settings)
    kind = _type(settings)
    inside = "vision_model." if kind in _WITH_WORDS.values() else f"{kind}."
    # A tower that was saved alone may go without the prefix.
    bare = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|head)\.")
    renamed = lambda name: inside + name if bare.match(name) else name
    ignored = lambda name: not name.startswith(inside) and "classifier" not in name or _unused(name)
    make = lambda dtype: VisionTower(config, dtype=dtype, rngs=nnx.Rngs(0))
    names = _clip_names if inside == "vision_model." else _vit_names(kind, config)

    weights_of = lambda tower: named_weights(tower, names)
    model = fill(folder, settings, make, weights_of, ignored=ignored, renamed=renamed, dtype=dtype, sharding=sharding)
    return LoadedTower(model, config, settings, folder)


def load_llava(source: str | Path, *, dtype: Any = None, sharding: Shardings | None = None) -> LoadedLlava:
    """Reads a LLaVA-1.5 or LLaVA-NeXT checkpoint in transformers' layout (`llava-hf/...`).

    Args and errors as of `load`.
    """
    folder = find(source)
    settings = read_json(folder / "config.json")
    config = llava_config(settings)
    ignored = lambda name: name.endswith("rotary_emb.inv_freq") or (
        config.decoder.tied and name == "language_model.lm_head.weight"
    ) or _unused(name)  # fmt: skip
    make = lambda dtype: Llava(config, dtype=dtype, rngs=nnx.Rngs(0))
    model = fill(
        folder, settings, make, llava_weights, ignored=ignored, renamed=_older_name, dtype=dtype, sharding=sharding
    )
    return LoadedLlava(model, config, settings, folder)


def save_llava(
    model: Llava,
    folder: str | Path,
    *,
    processor: Mapping[str, Any],
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a LLaVA model as a folder that `load_llava` and transformers open; returns the folder.

    The folder appears whole or not at all, as with `save`.

    Args:
      processor: preprocessor_config.json, what `image_processor` reads.
      tokenizer_from: a folder whose tokenizer files are copied.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: as `save`; a tower that is not CLIP's or SigLIP's.
    """
    weights, _ = llava_weights(model)
    more = {"preprocessor_config.json": dict(processor)}
    config = hugging_face_llava_config(model.config)
    return write_folder(folder, config, weights, tokenizer_from=tokenizer_from, shard_bytes=shard_bytes, more=more)


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


def image_processor(folder: Path) -> Any:
    """The `transformers` image processor of a folder, through Pillow.

    Raises ValueError where its settings describe none.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception as error:  # of any type: settings are taken as they are
        raise ValueError(
            f"{folder} has no image processor that transformers can make; see its preprocessor_config.json: {error}"
        ) from error


_WITH_WORDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def _type(raw: Mapping[str, Any]) -> str:
    given = str(raw.get("model_type"))
    return _WITH_WORDS.get(given, given)


def tower_config(raw: Mapping[str, Any]) -> TowerConfig:
    """The tower that a Hugging Face config.json describes.

    Raises ValueError for another model type or activation, and where the biases of attention were left out.
    """
    kind = _type(raw)
    if kind not in _TOWERS:
        known = ", ".join([*_TOWERS, *_WITH_WORDS])
        raise ValueError(f"unknown vision model type {raw.get('model_type')!r}; known: {known}")
    if raw.get("model_type") in _WITH_WORDS:
        raw = raw.get("vision_config") or {}
    c = {**_TOWERS[kind], **raw}
    if c["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"unknown hidden_act {c['hidden_act']!r}; known: {', '.join(_ACTIVATIONS)}")
    if not c.get("qkv_bias", True):
        raise ValueError("qkv_bias is false; only towers with biases on query, key and value are known")
    architecture = (raw.get("architectures") or [""])[0]
    labels = 0
    if "ForImageClassification" in architecture:
        labels = len(c["id2label"]) if c.get("id2label") else c.get("num_labels", 2)
    siglip = kind == "siglip_vision_model"
    return TowerConfig(
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        channels=c["num_channels"],
        norm_eps=c["layer_norm_eps"],
        activation=_ACTIVATIONS[c["hidden_act"]],
        special=0 if siglip else 2 if kind == "deit" else 1,
        patch_bias=kind != "clip_vision_model",
        pre_norm=kind == "clip_vision_model",
        pooling=("attention" if c.get("vision_use_head", True) else "mean") if siglip else "class",
        labels=labels,
    )


def llava_config(raw: Mapping[str, Any]) -> LlavaConfig:
    """The LLaVA model that a Hugging Face config.json describes.

    Raises ValueError for what neither the tower, the projector nor the decoder has.
    """
    kind = raw.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ValueError(f"unknown model type {kind!r}; known: llava, llava_next")
    text = dict(raw.get("text_config") or {"model_type": "llama"})
    text = {**_TEXTS.get(text.get("model_type", "llama"), {}), "model_type": "llama", **text}
    tower = tower_config({**_LLAVA_TOWER, **(raw.get("vision_config") or {})})
    if raw.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"unknown projector_hidden_act {raw['projector_hidden_act']!r}; known: 'gelu'")
    layer = raw.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer is {layer}; only features of one layer are known")
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ValueError(f"unknown vision_feature_select_strategy {strategy!r}; known: 'default', 'full'")
    if strategy == "default" and not tower.special:
        raise ValueError("vision_feature_select_strategy 'default' leaves out a class token, this tower has none")
    following = kind == "llava_next"
    token = raw.get("image_token_index", raw.get("image_token_id"))
    return LlavaConfig(
        tower=tower,
        decoder=decoder_config(text),
        image_token=32000 if token is None else token,
        feature_layers=layer % (tower.num_layers + 1),
        keep_special=strategy == "full",
        projector_bias=raw.get("multimodal_projector_bias", True),
        pinpoints=tuple((h, w) for h, w in raw.get("image_grid_pinpoints", _PINPOINTS)) if following else (),
        newline=following,
    )


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
    """Buffers of older checkpoints, ViT's pooler, which classifiers lack, and a mask for pre-training."""
    return name.endswith(("embeddings.position_ids", "embeddings.mask_token")) or ".pooler." in name


def _older_name(name: str) -> str:
    """As the hub's folders have it. transformers 5 may put `model.` before the parts, the head beside them, and leave
    `vision_model.` out."""
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)
