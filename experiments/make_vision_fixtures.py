"""Tiny random vision towers and LLaVA models and their outputs by PyTorch, for the tests of `jaxcompress.models`.

Needs an environment of its own with `torch==2.13.0 transformers==5.24.0 safetensors numpy`:

    python experiments/make_vision_fixtures.py --out tests/fixtures/vision_models

Each folder is a Hugging Face checkpoint with io.npz, computed in float32 with "eager" attention. Of towers: pixels, the
hidden states and attention of every layer, and what they are pooled to or classified as. Of LLaVA: for two prompts with
a picture each, logits, visual tokens and 8 greedy tokens, and the logits of both as a batch padded left and right.
Weights are stored as bfloat16, whose values float32 holds exactly.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command import Command, arguments, need

need("torch", install='pip install -e ".[parity]"')
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

IMAGE = 63
TOWER: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
)
TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=256, initializer_range=0.25, bos_token_id=None,
    eos_token_id=None, pad_token_id=None, rms_norm_eps=1e-5,
)  # fmt: skip
SIZES = ((40, 55), (50, 20))
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


@dataclass(frozen=True)
class Arguments(Command):
    """Writes all folders anew."""

    out: Path = Path("tests/fixtures/vision_models")
    models: tuple[str, ...] = ()
    """Only these; all if not given."""


QUICK = Arguments(quick=True, out=Path("runs/quick/vision_models"), models=("clip", "llava"))


def models() -> dict[str, PreTrainedModel]:
    clip = CLIPVisionConfig(**TOWER, projection_dim=16)
    siglip = SiglipVisionConfig(**TOWER, vision_use_head=False)
    common: dict[str, Any] = dict(image_token_index=IMAGE, image_seq_length=16)
    return {
        "clip": CLIPVisionModel(clip),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**TOWER)),
        "vit": ViTForImageClassification(ViTConfig(**TOWER, num_labels=5)),
        "deit_distilled": DeiTForImageClassificationWithTeacher(DeiTConfig(**TOWER, num_labels=5)),
        "llava": LlavaForConditionalGeneration(
            LlavaConfig(vision_config=clip, text_config=LlamaConfig(**TEXT), **common)
        ),
        "llava_siglip": LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=siglip, text_config=Qwen2Config(**TEXT), vision_feature_select_strategy="full",
                vision_feature_layer=-1, multimodal_projector_bias=False, **common,
            )
        ),
        "llava_next": LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=clip, text_config=MistralConfig(**TEXT, sliding_window=None),
                image_grid_pinpoints=PINPOINTS, **common,
            )
        ),
    }  # fmt: skip


def randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.2)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "language_model" not in name and "lm_head" not in name:
            parameter.data.normal_(0.0, 0.25)
        elif "lm_head" in name:
            parameter.data[IMAGE] = 0.0  # never written
        parameter.data = parameter.data.bfloat16().float()


def tower_outputs(model: Any) -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 3, 28, 28).half().float()
    done = model(pixels, output_hidden_states=True, output_attentions=True)
    pooled = done.logits if hasattr(done, "logits") else done.pooler_output
    return dict(pixels=pixels.half(), hidden=torch.stack(done.hidden_states), attention=torch.stack(done.attentions),
                out=pooled)  # fmt: skip


def llava_outputs(model: Any) -> dict[str, Any]:
    following = isinstance(model, LlavaNextForConditionalGeneration)
    crops = [1 + (h // 28) * (w // 28) for h, w in ((56, 56), (56, 28))] if following else [1, 1]
    pixels = torch.randn(2, max(crops), 3, 28, 28).half().float()
    for row, n in enumerate(crops):
        pixels[row, n:] = 0
    out: dict[str, Any] = dict(pixels=pixels.half(), crops=np.array(crops), sizes=np.array(SIZES))
    prompts = []
    for row, (before, after) in enumerate(((3, 8), (5, 9))):
        given = dict(pixel_values=pixels[row : row + 1] if following else pixels[row])
        if following:
            given["image_sizes"] = torch.tensor(SIZES[row : row + 1])
        features = model.get_image_features(**given, return_dict=True).pooler_output
        visual = torch.cat(list(features)).reshape(-1, TEXT["hidden_size"])
        ids = [torch.randint(1, 62, (before,)), torch.full((len(visual),), IMAGE), torch.randint(1, 62, (after,))]
        prompts.append(torch.cat(ids)[None])
        out[f"tokens_{row}"], out[f"visual_{row}"] = prompts[-1], visual
        out[f"logits_{row}"] = model(input_ids=prompts[-1], **given).logits
        ids = prompts[-1]
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids, **given).logits[:, -1:].argmax(-1)], dim=1)
        out[f"written_{row}"] = ids[:, -8:]
    width = max(p.shape[1] for p in prompts)
    given = dict(pixel_values=pixels if following else pixels[:, 0])
    if following:
        given["image_sizes"] = torch.tensor(SIZES)
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            n = prompt.shape[1]
            where = slice(width - n, width) if side == "left" else slice(0, n)
            ids[row, where], mask[row, where] = prompt[0], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **given).logits
        out |= {f"{side}_tokens": ids, f"{side}_mask": mask, f"{side}_logits": logits * mask[..., None]}
    return out


@torch.no_grad()
def main(args: Arguments) -> None:
    for name, model in models().items():
        if args.models and name not in args.models:
            continue
        torch.manual_seed(sum(map(ord, name)))
        model = model.float().eval()
        model.set_attn_implementation("eager")
        randomise(model)
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key).bfloat16() for key in file.keys()}  # noqa: SIM118
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        outputs = llava_outputs(model) if name.startswith("llava") else tower_outputs(model)
        arrays = {key: np.asarray(value) for key, value in outputs.items()}
        small = {key: v.astype(np.int32) if v.dtype == np.int64 else v for key, v in arrays.items()}
        np.savez_compressed(folder / "io.npz", **small)


if __name__ == "__main__":
    main(arguments(QUICK))
