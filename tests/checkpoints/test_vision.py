"""Vision checkpoints: what config.json may leave out, names old and new, and what is said when something is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcompress.checkpoints import llava_config, load_llava, load_tower, save_llava, tower_config
from jaxcompress.checkpoints._vision_config import hugging_face_llava_config

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vision_models"
LLAVAS = ("llava", "llava_siglip", "llava_next")


def settings(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "config.json").read_text())


def copied(name: str, tmp_path: Path, rename: Any = None, **changes: Any) -> Path:
    """A fixture's folder with other settings, and tensors renamed, or left out where that gives None."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    (folder / "config.json").write_text(json.dumps(settings(name) | changes))
    if rename is not None:
        tensors = load_file(folder / "model.safetensors")
        save_file({new: x for old, x in tensors.items() if (new := rename(old))}, folder / "model.safetensors")
    return folder


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("name", LLAVAS)
def test_what_is_saved_is_loaded_bit_by_bit(name: str, tmp_path: Path) -> None:
    loaded = load_llava(FIXTURES / name)
    folder = save_llava(loaded.model, tmp_path / "saved", processor={"image_processor_type": "CLIPImageProcessor"})
    again = load_llava(folder)
    assert again.config == loaded.config
    same(again.model, loaded.model)
    theirs, ours = load_file(FIXTURES / name / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {key.replace("vision_model.", "") for key in ours} == set(theirs)
    assert again.processor.__class__.__name__ == "CLIPImageProcessorPil"
    with pytest.raises(FileExistsError):
        save_llava(loaded.model, folder, processor={})


@pytest.mark.parametrize("name", LLAVAS)
def test_names_of_other_versions(name: str, tmp_path: Path) -> None:
    """The hub's, with `vision_model.`; and transformers 5's own, with `model.` before the parts."""

    def fifth(old: str) -> str:
        if old.startswith("language_model.lm_head"):
            return old.removeprefix("language_model.")
        return "model." + old.replace("language_model.model.", "language_model.")

    expected = load_llava(FIXTURES / name).model
    same(load_llava(copied(name, tmp_path / "5", fifth)).model, expected)
    hub = lambda old: old.replace("vision_tower.", "vision_tower.vision_model.")
    same(load_llava(copied(name, tmp_path / "hub", hub)).model, expected)


def test_a_tower_among_other_things(tmp_path: Path) -> None:
    """A CLIP checkpoint with words, of which only the tower is read."""
    expected = load_tower(FIXTURES / "clip").model
    vision = settings("clip")
    folder = copied("clip", tmp_path, lambda old: f"vision_model.{old}")
    (folder / "config.json").write_text(json.dumps(dict(model_type="clip", vision_config=vision, dtype="float32")))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"text_model.final_layer_norm.bias": np.zeros(3, np.float32), "logit_scale": np.zeros((), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    same(load_tower(folder).model, expected)


def test_what_configs_leave_out() -> None:
    """As in llava-hf/llava-1.5-7b-hf and llava-v1.6-mistral-7b-hf."""
    config = llava_config(
        {
            "model_type": "llava", "image_token_index": 32000,
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 768},
        }
    )  # fmt: skip
    assert (config.tower.hidden_size, config.tower.num_layers, config.tower.num_patches) == (1024, 24, 576)
    assert (config.decoder.hidden_size, config.decoder.intermediate_size, config.decoder.vocab_size) == (
        4096,
        11008,
        32064,
    )
    assert config.feature_layers == 23
    config = llava_config({"model_type": "llava_next", "text_config": {"model_type": "mistral"}})
    assert (config.decoder.num_kv_heads, config.decoder.intermediate_size) == (8, 14336)
    assert len(config.pinpoints) == 5
    assert config.newline
    assert tower_config({"model_type": "vit"}).norm_eps == 1e-12
    assert tower_config({"model_type": "siglip", "vision_config": {}}).pooling == "attention"
    for name in LLAVAS:
        assert llava_config(hugging_face_llava_config(llava_config(settings(name)))) == llava_config(settings(name))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "blip"}, "unknown model type 'blip'; known: llava, llava_next"),
        ({"vision_config": {"model_type": "swin"}}, "unknown vision model type 'swin'; known: vit"),
        ({"vision_config": {"model_type": "clip_vision_model", "hidden_act": "relu"}}, "unknown hidden_act 'relu'"),
        ({"projector_hidden_act": "relu"}, "unknown projector_hidden_act 'relu'"),
        ({"vision_feature_layer": [-2, -3]}, "only features of one layer"),
        ({"vision_feature_select_strategy": "none"}, "unknown vision_feature_select_strategy 'none'"),
        ({"vision_feature_layer": 0}, "feature_layers is 0"),
        ({"text_config": {"model_type": "gpt2"}}, "unknown architecture 'gpt2'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "this tower has none"),
    ],
)
def test_configs_that_cannot_be_read(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        llava_config(settings("llava") | changes)


@pytest.mark.parametrize("where", ["outside", "text_config"])
def test_a_head_of_its_own_in_a_tied_model(where: str, tmp_path: Path) -> None:
    """Tied by either config; the files know better."""
    text = settings("llava")["text_config"] | dict(tie_word_embeddings=where == "text_config")
    folder = copied("llava", tmp_path, None, text_config=text, tie_word_embeddings=where == "outside")
    loaded, expected = load_llava(folder), load_llava(FIXTURES / "llava").model
    assert not loaded.config.decoder.tied
    same(loaded.model, expected)
    again = load_llava(save_llava(loaded.model, tmp_path / "saved", processor={}))
    same(again.model, expected)
    embedded = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.endswith("lm_head.weight")}
    save_file(embedded, folder / "model.safetensors")
    tied = load_llava(folder).model.decoder
    assert tied.config.tied
    np.testing.assert_array_equal(tied.embedding, expected.decoder.embedding)


def test_what_a_folder_says_beside_goes_back(tmp_path: Path) -> None:
    """Configs of the model, its tower and its decoder, the processor, and what ends a text."""
    mine = settings("llava")
    text, vision = mine["text_config"] | {"eos_token_id": 7, "my_own": 1}, mine["vision_config"] | {"projection_dim": 3}
    source = copied("llava", tmp_path / "source", text_config=text, vision_config=vision, my_own=[2])
    beside = {
        "tokenizer.json": "{}", "generation_config.json": '{"eos_token_id": [7, 8]}', "chat_template.json": "{}",
        "preprocessor_config.json": '{"a": 1}', "processor_config.json": '{"image_processor": {"a": 1}, "b": 2}',
    }  # fmt: skip
    for name, content in beside.items():
        (source / name).write_text(content)
    model = load_llava(source).model
    folder = save_llava(model, tmp_path / "same", tokenizer_from=source)
    assert {name: (folder / name).read_text() for name in beside} == beside
    written = json.loads((folder / "config.json").read_text())
    theirs = json.loads((source / "config.json").read_text())
    assert {k: v for k, v in written.items() if k != "dtype"} == {k: v for k, v in theirs.items() if k != "dtype"}
    other = save_llava(model, tmp_path / "other", processor={"a": 3}, tokenizer_from=source)
    read = lambda name: json.loads((other / name).read_text())
    assert read("preprocessor_config.json") == read("processor_config.json")["image_processor"] == {"a": 3}
    assert read("processor_config.json")["b"] == 2
    theirs["text_config"]["max_position_embeddings"] += 1
    (source / "config.json").write_text(json.dumps(theirs))
    changed = save_llava(model, tmp_path / "changed", tokenizer_from=source)
    written = json.loads((changed / "config.json").read_text())
    assert llava_config(written) == model.config
    assert (written["my_own"], written["vision_config"]["projection_dim"]) == ([2], 3)
    assert (written["text_config"]["eos_token_id"], written["text_config"]["my_own"]) == (7, 1)
    with pytest.raises(ValueError, match="no image processor: give processor="):
        save_llava(model, tmp_path / "none")


def test_tensors_of_no_use_are_named(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "vit" / "model.safetensors")
    folder = copied("vit", tmp_path)
    tensors["vit.pooler.dense.bias"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="no use for: vit.pooler.dense.bias"):
        load_tower(folder)
    tensors["decoder.0.bias"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="left over: decoder.0.bias"):
        load_tower(folder)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    less = lambda name: None if name.endswith("linear_2.weight") else name
    with pytest.raises(ValueError, match=r"missing: multi_modal_projector.linear_2.weight"):
        load_llava(copied("llava", tmp_path / "less", less))
    more = lambda name: name.replace("image_newline", "image_oldline")
    with pytest.raises(ValueError, match=r"(?s)missing: image_newline.*left over: image_oldline"):
        load_llava(copied("llava_next", tmp_path / "more", more))
    with pytest.raises(ValueError, match="of another shape: vit.embeddings.position_embeddings"):
        load_tower(copied("vit", tmp_path, image_size=35))
    with pytest.raises(ValueError, match="unknown vision model type 'llama'"):
        load_tower(copied("clip", tmp_path, model_type="llama"))
    with pytest.raises(ValueError, match="qkv_bias"):
        tower_config({"model_type": "vit", "qkv_bias": False})
    with pytest.raises(FileNotFoundError):
        load_llava(tmp_path / "absent")


def test_a_decoder_that_no_llava_has() -> None:
    config = llava_config(settings("llava"))
    decoder = replace(config.decoder, norms_at="after", qk_norm=True, qk_norm_over="projection")
    with pytest.raises(ValueError, match="LLaVA with a decoder Olmo2ForCausalLM is not known; known: Llama"):
        hugging_face_llava_config(replace(config, decoder=decoder))
