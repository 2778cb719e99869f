"""Mixtures of experts in checkpoints: the layouts of their tensors, and their configs.

Logits and round trips are in `test_load` and `test_save`, with all families.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxcompress.checkpoints import decoder_config, hugging_face_config, load, save
from jaxcompress.checkpoints._experts import dequantised
from jaxcompress.models.experts_config import ClampedGate, ExpertsConfig

from .folders import PARITY, assert_same_bits, changed

Tensors = dict[str, np.ndarray]
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")


def config_of(name: str) -> dict[str, Any]:
    return json.loads((PARITY / name / "config.json").read_text())


def fused(tensors: Tensors) -> None:
    """Per-expert tensors as the modules of transformers 5 hold them."""
    mixtral = any("block_sparse_moe" in name for name in tensors)
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name in [name for name in tensors if "block_sparse_moe" in name]:
        tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        count = len([name for name in tensors if name.startswith(layer) and name.endswith(f"{down}.weight")])
        take = lambda part, layer=layer, count=count: np.stack(
            [tensors.pop(f"{layer}.experts.{expert}.{part}.weight") for expert in range(count)]
        )
        tensors[f"{layer}.experts.gate_up_proj"] = np.concatenate([take(gate), take(up)], axis=1)
        tensors[f"{layer}.experts.down_proj"] = take(down)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_separate_and_fused_experts_are_the_same(tmp_path: Path, name: str) -> None:
    folder = changed(tmp_path / "fused", name, tensors=fused)
    assert any("gate_up_proj" in tensor for tensor in load_file(folder / "model.safetensors"))
    assert_same_bits(load(folder).model, load(PARITY / name).model)


@pytest.mark.parametrize("spec", [("model",), (None, "model"), (None, None, None, "model")])
@pytest.mark.parametrize("name", MIXTURES)
def test_devices_read_their_part_of_the_experts(tmp_path: Path, name: str, spec: tuple[str | None, ...]) -> None:
    """Layers, experts, or their width shared by two devices."""
    mesh = jax.make_mesh((2,), ("model",))
    whole = lambda shape: len(shape) != 4 or any(shape[axis] % 2 for axis, used in enumerate(spec) if used)
    where = lambda _, shape: NamedSharding(mesh, PartitionSpec(*(() if whole(shape) else spec)))
    assert_same_bits(load(PARITY / name, sharding=where).model, load(PARITY / name).model)


@pytest.mark.parametrize("name", MIXTURES)
def test_tensors_are_written_as_the_hub_has_them(tmp_path: Path, name: str) -> None:
    saved = load_file(save(load(PARITY / name, dtype="bfloat16").model, tmp_path / "saved") / "model.safetensors")
    given = load_file(PARITY / name / "model.safetensors")
    assert saved.keys() == given.keys()
    for tensor, numbers in given.items():
        assert saved[tensor].tobytes() == numbers.tobytes()


def packed(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MXFP4 [X, in, out] -> blocks, scales, and what they stand for: numbers rounded down to a few values."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    turned = np.float32(numbers).swapaxes(1, 2)
    x, rows, _ = turned.shape
    groups = turned.reshape(x, rows, -1, 32)
    scales = np.full(groups.shape[:3], 125, np.uint8)
    nearest = np.abs(np.abs(groups)[..., None] * 4 - values).argmin(-1)
    codes = (nearest + 8 * (groups < 0)).astype(np.uint8)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    plain = (np.where(groups < 0, -1, 1) * values[nearest] / 4).reshape(turned.shape).swapaxes(1, 2)
    return blocks, scales, np.ascontiguousarray(plain, np.float32)


def test_mxfp4_numbers_are_those_of_transformers() -> None:
    with np.load(PARITY / "mxfp4.npz") as file:
        blocks, scales, plain = (file[key] for key in ("blocks", "scales", "plain"))
    whole = dequantised({"x_blocks": Slice(blocks), "x_scales": Slice(scales)}, load(PARITY / "gpt_oss").config)["x"]
    assert tuple(whole.get_shape()) == plain.shape
    np.testing.assert_array_equal(whole[(slice(None),) * 3], plain)
    np.testing.assert_array_equal(whole[1:2, 20:45, 1:3], plain[1:2, 20:45, 1:3])


class Slice:
    """An array with the interface of a safetensors slice."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def get_shape(self) -> list[int]:
        return list(self.array.shape)

    def get_dtype(self) -> str:
        return {"uint8": "U8", "float32": "F32"}[self.array.dtype.name]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[index]


def wide(tensors: Tensors) -> None:
    """Every width of a gpt_oss that has blocks of 32 becomes 32: zeros are added."""
    for name, numbers in tensors.items():
        shape = list(numbers.shape)
        if name.endswith("gate_up_proj"):
            shape[1:] = [32, 64]
        elif name.endswith("down_proj"):
            shape[1:] = [32, 32]
        elif name.endswith("gate_up_proj_bias"):
            shape[1] = 64
        else:
            shape = [32 if n == 16 else n for n in shape]
        tensors[name] = np.pad(numbers, [(0, n - m) for n, m in zip(shape, numbers.shape, strict=True)])


def test_a_quantised_gpt_oss(tmp_path: Path) -> None:
    """The model with MXFP4 experts is the model with the numbers that they stand for; it is saved as plain numbers."""
    sizes = dict(hidden_size=32, intermediate_size=32)

    def quantise(tensors: Tensors, plain: bool) -> None:
        wide(tensors)
        for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
            blocks, scales, numbers = packed(tensors.pop(name))
            tensors |= {name: numbers} if plain else {f"{name}_blocks": blocks, f"{name}_scales": scales}

    method = {"quant_method": "mxfp4"}
    given = changed(
        tmp_path / "mxfp4", "gpt_oss", config=sizes | dict(quantization_config=method),
        tensors=lambda x: quantise(x, False),
    )  # fmt: skip
    same = changed(tmp_path / "plain", "gpt_oss", config=sizes, tensors=lambda x: quantise(x, True))
    model = load(given).model
    assert_same_bits(model, load(same).model)
    (given / "tokenizer.json").write_text("{}")
    saved = save(model, tmp_path / "saved", tokenizer_from=given)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    assert_same_bits(load(saved).model, model)


def test_configs_of_the_hub() -> None:
    """As published: Mixtral 8x7B, Qwen3 30B-A3B and GPT-OSS 20B, in the words of transformers 4."""
    mixtral = decoder_config(
        {
            "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "num_local_experts": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
            "vocab_size": 32000,
        }
    )  # fmt: skip
    assert mixtral.experts == ExpertsConfig(8, 2)
    assert (mixtral.sliding, mixtral.head_dim, mixtral.sinks) == ((), 128, False)
    qwen = decoder_config(
        {
            "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "rope_theta": 1e6, "sliding_window": None, "use_sliding_window": False,
            "vocab_size": 151936, "max_window_layers": 48,
        }
    )  # fmt: skip
    assert qwen.experts == ExpertsConfig(128, 8)
    assert (qwen.intermediate_size, qwen.qk_norm, qwen.qkv_bias, qwen.sliding) == (768, True, False, ())
    oss = decoder_config(
        {
            "architectures": ["GptOssForCausalLM"], "attention_bias": True, "head_dim": 64, "hidden_size": 2880,
            "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
            "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
            "num_local_experts": 32, "rope_theta": 150000, "sliding_window": 128, "vocab_size": 201088,
            "swiglu_limit": 7.0, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
        }
    )  # fmt: skip
    assert oss.experts == ExpertsConfig(32, 4, bias=True, clamped=ClampedGate(1.702, 7.0))
    assert (oss.sinks, oss.qkv_bias, oss.out_bias, oss.sliding) == (True, True, True, (128, None) * 12)
    assert (oss.rope.kind, oss.rope.theta, oss.rope.truncate, oss.rope.factor) == ("yarn", 150000.0, False, 32.0)
    for config in (mixtral, qwen, oss):
        assert decoder_config(hugging_face_config(config)) == config


def test_what_a_silent_config_means() -> None:
    """The defaults of transformers 5."""
    sizes = dict(vocab_size=9, hidden_size=32, intermediate_size=8, num_hidden_layers=3, num_attention_heads=8)
    silent = lambda architecture, **more: decoder_config({"architectures": [architecture], **sizes, **more})
    oss = silent("GptOssForCausalLM")
    assert (oss.sliding, oss.num_kv_heads, oss.head_dim) == ((128, None, 128), 8, 64)
    assert (oss.rope.kind, oss.rope.theta, oss.rope.original_context) == ("yarn", 150000.0, 4096)
    assert silent("MixtralForCausalLM").rope.theta == 1e6
    qwen = silent("Qwen3MoeForCausalLM")
    assert (qwen.experts, qwen.intermediate_size) == (ExpertsConfig(128, 8, normalised=False), 768)
    assert silent("Qwen3MoeForCausalLM", use_sliding_window=True, sliding_window=7).sliding == (7, 7, 7)
    assert silent("Qwen3MoeForCausalLM", num_local_experts=16) == silent("Qwen3MoeForCausalLM", num_experts=16)


@pytest.mark.parametrize(
    ("name", "entries", "says"),
    [
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step is 2.*some layers have a plain MLP"),
        ("qwen3_moe", dict(mlp_only_layers=[1]), r"mlp_only_layers \[1\], so some layers have a plain MLP"),
        ("mixtral", dict(num_experts_per_tok=9), "num_experts_per_tok must be a whole number from 1 to 4, not 9"),
        ("mixtral", dict(num_local_experts=0), "num_local_experts must be a whole number from 1"),
        ("mixtral", dict(quantization_config=dict(quant_method="mxfp4")), "only plain float weights are read"),
        (
            "gpt_oss",
            dict(quantization_config=dict(quant_method="gptq")),
            "'gptq'.* or those of mxfp4",
        ),
        ("gpt_oss", dict(layer_types=["full_attention"]), "layer_types has 1 entries for 3 layers"),
    ],
)
def test_what_is_refused(name: str, entries: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decoder_config(config_of(name) | entries)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gpt_oss", lambda c: replace(c, sinks=False), "GptOssForCausalLM, lacks sinks=False"),
        (
            "gpt_oss",
            lambda c: replace(c, mlp="gated", experts=None),
            "lacks mlp='gated', experts=null",
        ),
        ("gpt_oss", lambda c: replace(c, out_bias=False), "has no biases on query, key and value without one"),
        (
            "mixtral",
            lambda c: replace(c, qkv_bias=True, out_bias=True),
            "no biases on query, key, value and output",
        ),
        ("mixtral", lambda c: replace(c, sliding=(7, None)), r"MixtralForCausalLM, lacks sliding=\(7, None\)"),
        (
            "mixtral",
            lambda c: replace(c, experts=replace(c.experts, normalised=False)),
            r"lacks experts=ExpertsConfig\(count=4, chosen=2, normalised=False",
        ),
    ],
)
def test_what_no_architecture_has(name: str, change: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        hugging_face_config(change(decoder_config(config_of(name))))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def lose(tensors: Tensors) -> None:
        del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]

    def odd(tensors: Tensors) -> None:
        del tensors["model.layers.0.mlp.experts.gate_up_proj"]

    with pytest.raises(ValueError, match=r"missing: model.layers.1.block_sparse_moe.experts.3.w2.weight"):
        load(changed(tmp_path / "one", "mixtral", tensors=lose))
    with pytest.raises(ValueError, match=r"missing: model.layers.0.mlp.experts.gate_up_proj$"):
        load(changed(tmp_path / "both", "gpt_oss", tensors=odd))
    with pytest.raises(ValueError, match=r"intermediate_size \([\d,]+\)"):
        load(changed(tmp_path / "many", "mixtral", config=dict(num_local_experts=2**31 - 1)))
