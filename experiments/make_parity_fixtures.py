"""Tiny random models and their logits by PyTorch, for the tests of `jaxcompress.checkpoints`.

Needs an environment of its own with `torch==2.13.0 transformers==5.24.0 safetensors numpy`:

    python experiments/make_parity_fixtures.py --out tests/fixtures/parity

Each folder is a Hugging Face checkpoint with io.npz: `tokens` [B, T] and `logits` [B, T, V], computed in float32 with
"eager" attention and experts. Biases and norms, which PyTorch initialises to 0 and 1, are random too. Most weights are
stored as bfloat16, whose values float32 holds exactly, and read as float32: half the size. rope.json has the RoPE
frequencies of many configs, mxfp4.npz the numbers that MXFP4 weights of GPT-OSS stand for.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command import Command, arguments, need

need("torch", install='pip install -e ".[parity]"')
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

ROWS, LENGTH, VOCABULARY = 2, 48, 97
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.25, rms_norm_eps=1e-5,
    bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32",
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16,
    low_freq_factor=1.0, high_freq_factor=4.0,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5
)


MIXTURE: dict[str, Any] = SHAPE | dict(
    hidden_size=16, intermediate_size=12, moe_intermediate_size=8, num_experts_per_tok=2, vocab_size=29
)
SHORT = 24
"""Tokens of the rows for mixtures of experts, whose vocabulary is small too: they have many more weights."""


@dataclass(frozen=True)
class Arguments(Command):
    """Writes all folders anew."""

    out: Path = Path("tests/fixtures/parity")
    models: tuple[str, ...] = ()
    """Only these; all if not given."""


QUICK = Arguments(quick=True, out=Path("runs/quick/parity"), models=("llama2_mha", "qwen3"))


def _without(entries: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != key}


def configs() -> dict[str, PreTrainedConfig]:
    llama = lambda **changes: LlamaConfig(**SHAPE | changes)
    types = ["full_attention", "sliding_attention", "full_attention"]
    return {
        "llama2_mha": llama(num_key_value_heads=4),
        "llama3_gqa": llama(rope_parameters=dict(LLAMA3)),
        "llama_linear": llama(rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=3.0)),
        "llama_yarn": llama(rope_parameters=dict(YARN)),
        "llama_yarn_mscale": llama(rope_parameters=dict(YARN, mscale=1.5, mscale_all_dim=0.5, truncate=False)),
        "llama_biases": llama(attention_bias=True, mlp_bias=True),
        "llama_tied": llama(tie_word_embeddings=True),
        "mistral_sliding": MistralConfig(**SHAPE, sliding_window=7),
        "qwen2": Qwen2Config(**SHAPE),
        "qwen2_mixed": Qwen2Config(
            **SHAPE | dict(num_hidden_layers=3), use_sliding_window=True, sliding_window=5, layer_types=types
        ),
        "qwen3": Qwen3Config(**SHAPE, head_dim=16),
        "qwen3_biases": Qwen3Config(**SHAPE | dict(num_hidden_layers=1), head_dim=12, attention_bias=True),
        "mixtral": MixtralConfig(**_without(MIXTURE, "moe_intermediate_size"), num_local_experts=4, sliding_window=7),
        "qwen3_moe": Qwen3MoeConfig(**MIXTURE, num_experts=5, head_dim=6, norm_topk_prob=False),
        "qwen3_moe_normalised": Qwen3MoeConfig(
            **MIXTURE | dict(num_hidden_layers=1),
            num_experts=4,
            head_dim=6,
            norm_topk_prob=True,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=9,
        ),
        "gpt_oss": GptOssConfig(
            **_without(MIXTURE, "moe_intermediate_size") | dict(num_hidden_layers=3),
            num_local_experts=4,
            head_dim=6,
            sliding_window=7,
            swiglu_limit=1.5,
            rope_parameters=dict(YARN, truncate=False),
        ),
    }


def rope_cases() -> list[dict[str, Any]]:
    """Config entries. Omitted entries must be inferred as transformers infers them."""
    long = dict(max_position_embeddings=4096)
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024)
    return [
        dict(rope_parameters=dict(LLAMA3)),
        dict(rope_theta=500000.0, rope_scaling=dict(LLAMA3, original_max_position_embeddings=8192, factor=8.0), **long),
        dict(rope_theta=10000.0, rope_scaling=dict(type="linear", factor=2.5)),
        dict(rope_theta=1e6, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)),
        dict(rope_scaling={k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}, **long),
        dict(rope_parameters=dict(YARN)),
        dict(rope_parameters=dict(YARN, factor=0.5)),
        dict(rope_parameters=dict(yarn, attention_factor=0.7), **long),
        dict(rope_parameters=dict(yarn, mscale=1.0, mscale_all_dim=0.8), **long),
        dict(rope_parameters=dict(yarn, mscale=1.0), **long),
        dict(rope_parameters=dict(yarn, truncate=False), **long),
        dict(rope_parameters=dict(yarn, beta_fast=None, beta_slow=None), **long),
        dict(rope_parameters=dict(yarn, factor=None), **long),
        dict(rope_parameters=dict(yarn, beta_fast=1.0, beta_slow=1.0), **long),
        dict(rope_parameters=dict(yarn, original_max_position_embeddings=2)),
        dict(original_max_position_embeddings=512, rope_parameters=dict(yarn), **long),
    ]


def randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            parameter.data.normal_(0.0, 0.3)
        elif name.endswith(("router.weight", "mlp.gate.weight")):
            parameter.data.normal_()
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        parameter.data = parameter.data.bfloat16().float()


def write_model(name: str, config: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(sum(map(ord, name)))
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, **eager).float().eval()
    randomise(model)
    length = SHORT if hasattr(config, "num_local_experts") else LENGTH
    tokens = torch.randint(config.vocab_size, (ROWS, length))
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name != "llama2_mha":
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        tensors = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items() if k not in tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "io.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


def rope_answer(case: dict[str, Any]) -> dict[str, Any]:
    given = json.loads(json.dumps({k: v for k, v in SHAPE.items() if v is not None} | dict(head_dim=32) | case))
    config = LlamaConfig(**json.loads(json.dumps(given)))
    frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    return {
        "config": {"architectures": ["LlamaForCausalLM"], **given},
        "frequencies": frequencies.tolist(),
        "factor": factor,
    }


def write_mxfp4(file: Path) -> None:
    """Random blocks and scales of 2 experts with 3 outputs and 64 inputs, and what transformers makes of them."""
    torch.manual_seed(0)
    blocks = torch.randint(256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 131, (2, 3, 2), dtype=torch.uint8)
    plain = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    np.savez_compressed(file, blocks=blocks.numpy(), scales=scales.numpy(), plain=plain.numpy())


def main(args: Arguments) -> None:
    for name, config in configs().items():
        if not args.models or name in args.models:
            shutil.rmtree(args.out / name, ignore_errors=True)
            write_model(name, config, args.out / name)
    write_mxfp4(args.out / "mxfp4.npz")
    answers = [rope_answer(case) for case in rope_cases()]
    (args.out / "rope.json").write_text("[\n" + ",\n".join(map(json.dumps, answers)) + "\n]\n")


if __name__ == "__main__":
    main(arguments(QUICK))
