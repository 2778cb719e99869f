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
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

ROWS, LENGTH, VOCABULARY = 2, 48, 97
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.25, rms_norm_eps=1e-5,
    bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32",
)  # fmt: skip
SMALL = SHAPE | dict(vocab_size=31)
"""Of the families that came later: smaller files. Their rows have `SMALL_LENGTH` tokens."""
SMALL_LENGTH = 24
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16,
    low_freq_factor=1.0, high_freq_factor=4.0,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5
)
MIXTURE = SHAPE | dict(vocab_size=29, hidden_size=16, intermediate_size=12, num_experts_per_tok=2)
"""Of mixtures of experts, which have many more weights; the rows are as short."""


@dataclass(frozen=True)
class Arguments(Command):
    """Writes all folders anew."""

    out: Path = Path("tests/fixtures/parity")
    models: tuple[str, ...] = ()
    """Only these; all if not given."""


QUICK = Arguments(quick=True, out=Path("runs/quick/parity"), models=("llama2_mha", "qwen3"))


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
        **later_configs(),
        **mixture_configs(),
    }


def later_configs() -> dict[str, PreTrainedConfig]:
    """The windows are shorter, and the soft caps lower, than in use, so that they matter in a row of 24 tokens."""
    neox = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    gemma = SMALL | dict(head_dim=8, query_pre_attn_scalar=5)
    long = dict(
        rope_type="longrope", rope_theta=100.0, partial_rotary_factor=0.75,
        short_factor=[1.0, 1.25, 1.5], long_factor=[1.5, 2.5, 4.0],
    )  # fmt: skip
    phi3 = lambda original, **changes: Phi3Config(
        **SMALL | changes, original_max_position_embeddings=original,
        rope_parameters=dict(long, original_max_position_embeddings=original),
    )  # fmt: skip
    return {
        "neox": GPTNeoXConfig(**neox, rotary_pct=0.5),
        "neox_serial": GPTNeoXConfig(
            **neox, rotary_pct=0.25, use_parallel_residual=False, hidden_act="gelu_fast", attention_bias=False
        ),
        "gemma2": Gemma2Config(**gemma, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        "gemma3": Gemma3TextConfig(
            **gemma | dict(num_hidden_layers=3), sliding_window=5, sliding_window_pattern=3, rope_theta=1000.0,
            rope_local_base_freq=10.0, rope_scaling=dict(rope_type="linear", factor=2.0),
        ),
        "phi3_long": phi3(16, sliding_window=9),
        "phi3_short": phi3(32, max_position_embeddings=32),
        "olmo2": Olmo2Config(**SMALL),
        "smollm3": SmolLM3Config(
            **SMALL, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7, rope_theta=1000.0
        ),
        "llama_dynamic": LlamaConfig(
            **SMALL | dict(num_hidden_layers=1),
            rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=3.0),
        ),
    }  # fmt: skip


def mixture_configs() -> dict[str, PreTrainedConfig]:
    qwen3 = MIXTURE | dict(moe_intermediate_size=8, head_dim=6)
    return {
        "mixtral": MixtralConfig(**MIXTURE, num_local_experts=4, sliding_window=7),
        "qwen3_moe": Qwen3MoeConfig(**qwen3, num_experts=5, norm_topk_prob=False),
        "qwen3_moe_normalised": Qwen3MoeConfig(
            **qwen3 | dict(num_hidden_layers=1), num_experts=4, norm_topk_prob=True, attention_bias=True,
            use_sliding_window=True, sliding_window=9,
        ),
        "gpt_oss": GptOssConfig(
            **MIXTURE | dict(num_hidden_layers=3), num_local_experts=4, head_dim=6, sliding_window=7,
            swiglu_limit=1.5, rope_parameters=dict(YARN, truncate=False),
        ),
    }  # fmt: skip


def rope_cases() -> list[dict[str, Any]]:
    """Config entries. Omitted entries must be inferred as transformers infers them."""
    long = dict(max_position_embeddings=4096)
    searched = dict(
        rope_type="longrope", original_max_position_embeddings=1024,
        short_factor=[1.0 + i / 16 for i in range(16)], long_factor=[1.0 + i for i in range(16)],
    )  # fmt: skip
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
        dict(rope_parameters=dict(rope_type="dynamic", factor=4.0), **long),
        dict(rope_parameters=dict(rope_type="dynamic", factor=4.0), length=9000, **long),
        dict(rope_parameters=dict(searched), length=1024, **long),
        dict(rope_parameters=dict(searched), length=1025, **long),
        dict(rope_parameters=dict(searched, factor=2.0, attention_factor=1.25), length=4096, **long),
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
    length = LENGTH if config.vocab_size == VOCABULARY else SMALL_LENGTH
    tokens = torch.randint(config.vocab_size, (ROWS, length))
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name != "llama2_mha":
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "io.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


def rope_answer(case: dict[str, Any]) -> dict[str, Any]:
    """`length` is that of the text that is read, where frequencies depend on it."""
    length = {key: case[key] for key in ("length",) if key in case}
    case = {key: value for key, value in case.items() if key != "length"}
    given = json.loads(json.dumps({k: v for k, v in SHAPE.items() if v is not None} | dict(head_dim=32) | case))
    config = LlamaConfig(**json.loads(json.dumps(given)))
    initialise = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    frequencies, factor = initialise(config, "cpu", seq_len=length.get("length"))
    return {
        **length,
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
