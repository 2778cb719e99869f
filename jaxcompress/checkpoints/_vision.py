"""Loads vision towers and LLaVA models from Hugging Face folders, and saves LLaVA models."""

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
from jaxcompress.checkpoints._dtype import weights_dtype
from jaxcompress.checkpoints._entries import config_of
from jaxcompress.checkpoints._load import Shardings, Surplus, Target, fill, find, sizes_of, tensors_of, with_own_head
from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.checkpoints._processor import PROCESSOR_FILES
from jaxcompress.checkpoints._save import write_folder
from jaxcompress.checkpoints._vision_config import (
    LLAVA_INTERPRETED,
    WITH_TEXT,
    hugging_face_llava_config,
    llava_config,
    tower_config,
    tower_type,
)
from jaxcompress.checkpoints._weights import DECODER, Names, Weight, dotted, named_weights, weight_named
from jaxcompress.inputs.json import read_object, read_object_if_there
from jaxcompress.inputs.paths import path_of
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.models.vit import VisionTower


def load_tower(
    source: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings | None = None
) -> Loaded[VisionTower, TowerConfig, Tokenizer]:
    """Reads a ViT, DeiT, CLIP or SigLIP vision tower. Of CLIP and SigLIP checkpoints, only the tower is read.

    Arguments and errors are those of `load`.
    """
    folder = find(source)
    settings = read_object(folder / "config.json")
    with config_of(folder / "config.json"):
        config, kind = tower_config(settings), tower_type(settings)
    inside = "vision_model." if kind in WITH_TEXT.values() else f"{kind}."
    # The tensor names of a tower that was saved alone may lack the prefix.
    bare = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|head)\.")
    renamed = lambda name: inside + name if bare.match(name) else name
    names = _clip_names if inside == "vision_model." else _vit_names(kind, config)
    beside = _TEXT_PARTS if settings.get("model_type") in WITH_TEXT else re.compile(r"(?!)")
    tensors = tensors_of(folder, renamed)
    target = weights_dtype(dtype, settings, tensors, folder)
    model = fill(
        folder, tensors, lambda: VisionTower(config, dtype=target, rngs=nnx.Rngs(0)),
        lambda tower: named_weights(tower, names), sizes=_sizes_of_tower(config),
        surplus=Surplus(
            lambda name: name.endswith("embeddings.position_ids") or bool(beside.match(name)), _unused
        ),
        into=Target(target, sharding),
    )  # fmt: skip
    return Loaded(model, config, settings, folder, Tokenizer)


_TEXT_PARTS = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$")
"""The tensors beside the tower in a CLIP or SigLIP checkpoint: text encoder, projections, logit scale and bias."""


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

    Arguments and errors are those of `load`.
    """
    folder = find(source)
    settings = read_object(folder / "config.json")
    with config_of(folder / "config.json"):
        config = llava_config(settings)
    tensors = tensors_of(folder, _older_name)
    target = weights_dtype(dtype, settings, tensors, folder)
    names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    decoder, tensors = with_own_head(config.decoder, tensors, *names, target)
    config = replace(config, decoder=decoder)
    model = fill(
        folder, tensors, lambda: Llava(config, dtype=target, rngs=nnx.Rngs(0)), llava_weights,
        sizes=_sizes_of_tower(config.tower) | sizes_of(config.decoder),
        surplus=Surplus(lambda name: name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))),
        into=Target(target, sharding),
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

    The folder appears complete or not at all, as with `save`.

    Args:
      processor: the content of preprocessor_config.json, which `image_processor` reads. If None, the one of
        `tokenizer_from` is copied.
      tokenizer_from: as for `save`.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: as `save`; also if the tower is not that of CLIP or SigLIP, or if
        there is no processor.
    """
    weights, _ = llava_weights(model)
    more = _processor_files(processor, tokenizer_from)
    config = config_like(tokenizer_from, hugging_face_llava_config(model.config), llava_config, LLAVA_INTERPRETED)
    return write_folder(folder, config, weights, tokenizer_from=tokenizer_from, shard_bytes=shard_bytes, more=more)


def _processor_files(processor: Mapping[str, Any] | None, source: str | Path | None) -> dict[str, dict[str, Any]]:
    """The processor files to write in addition to the copied files."""
    folder = None if source is None else path_of(source, "tokenizer_from")
    if processor is None:
        if folder is None or not any((folder / name).is_file() for name in PROCESSOR_FILES):
            raise ValueError(
                f"no image processor: give processor=, or tokenizer_from= a folder with {PROCESSOR_FILES[0]}"
            )
        return {}
    alone, among_others = PROCESSOR_FILES
    others = {} if folder is None else read_object_if_there(folder / among_others)
    # transformers 5 may store the image processor in this file, and reads it there first.
    inside = {among_others: others | {"image_processor": dict(processor)}} if "image_processor" in others else {}
    return {alone: dict(processor), **inside}


def llava_weights(model: Llava) -> tuple[list[Weight], Any]:
    """The arrays of a LLaVA model (real or abstract), in the form that `named_weights` returns."""
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
    """Whether a tensor is ViT's pooler, which classifiers lack, or the mask token of pre-training."""
    return name.endswith("embeddings.mask_token") or ".pooler." in name


def _older_name(name: str) -> str:
    """The name of a tensor as in the hub's folders.

    transformers 5 may prefix the parts with `model.`, put the head beside them, and omit `vision_model.`.
    """
    name = re.sub(r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)
