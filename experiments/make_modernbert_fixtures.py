"""Writes tiny ModernBERT checkpoints of random weights, and what PyTorch computes with them.

    pip install torch==2.13.0 transformers
    python experiments/make_modernbert_fixtures.py [--to tests/fixtures/modernbert]

Three kinds, as they are published: a token classifier of transformers; OpenProvence, whose pruning head reads the last
layer's output before the last norm (hidden_states[-1] of transformers 4); Kompress, with a convolution over spans.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command import Command, arguments, need
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

need("torch", install='pip install -e ".[parity]"')
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)

from jaxcompress.embedded.corpus import held_out  # noqa: E402

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Arguments(Command):
    """Writes a folder for each kind, and outputs.npz."""

    to: Path = Path(__file__).parents[1] / "tests" / "fixtures" / "modernbert"


QUICK = Arguments(quick=True, to=Path("runs/quick/modernbert"))


def config(**more: Any) -> ModernBertConfig:
    """4 layers, of which the first and the last attend to all tokens; the others to those at most 4 away."""
    ids = {f"{name}_token_id": SPECIAL.index(f"[{name.upper()}]") for name in ("pad", "cls", "sep")}
    return ModernBertConfig(
        vocab_size=400, hidden_size=24, intermediate_size=20, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=256, local_attention=8, initializer_range=0.5, bos_token_id=2, eos_token_id=3,
        attn_implementation="eager", **ids, **more,
    )  # fmt: skip


def tokenizer() -> Tokenizer:
    """A byte-level BPE, as that of ModernBERT."""
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([held_out()[0].text[:20_000]], trainer)
    return made


class Provence(nn.Module):
    def __init__(self, base: ModernBertConfig):
        super().__init__()
        self.ranking_model = ModernBertForSequenceClassification(base)
        self.pruning_head = nn.ModuleDict({"classifier": nn.Linear(base.hidden_size, 2)})

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        before = []
        norm = self.ranking_model.model.final_norm
        hook = norm.register_forward_pre_hook(lambda module, given: before.append(given[0]))
        ranking = self.ranking_model(input_ids=ids, attention_mask=mask).logits
        hook.remove()
        keep = self.pruning_head["classifier"](before[0]).softmax(-1)[..., 1]
        return dict(keep=keep, relevance=ranking[:, 0].sigmoid())


class Kompress(nn.Module):
    def __init__(self, base: ModernBertConfig):
        super().__init__()
        self.encoder = ModernBertForTokenClassification(base).model
        self.token_head = nn.Linear(base.hidden_size, 2)
        self.span_conv = nn.Sequential(
            nn.Conv1d(base.hidden_size, 256, 5, padding=2), nn.GELU(), nn.Conv1d(256, 1, 3, padding=1), nn.Sigmoid()
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        p = self.token_head(hidden).softmax(-1)[..., 1]
        return dict(keep=p * (0.5 + 0.5 * self.span_conv(hidden.transpose(1, 2))[:, 0]))


class Classifier(nn.Module):
    def __init__(self, base: ModernBertConfig):
        super().__init__()
        self.inside = ModernBertForTokenClassification(base)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.inside(input_ids=ids, attention_mask=mask).logits
        return dict(logits=logits, keep=logits.softmax(-1)[..., 1])


def settings_of(base: ModernBertConfig, architecture: str) -> dict[str, Any]:
    """config.json without what is neither of the model nor told by its name."""
    kept = base.to_diff_dict() | dict(architectures=[architecture])
    return {name: value for name, value in kept.items() if not name.startswith(("_", "transformers"))}


def main(args: Arguments) -> None:
    torch.manual_seed(0)
    base, mean = config(num_labels=2), config(num_labels=1, classifier_pooling="mean")
    provence = dict(
        model_type="open_provence", architectures=["OpenProvenceModel"], max_length=96, num_labels=1,
        num_pruning_labels=2, base_model_config=settings_of(mean, "ModernBertForSequenceClassification"),
        pruning_config=dict(hidden_size=mean.hidden_size, num_labels=2),
    )  # fmt: skip
    kinds = {
        "classifier": (Classifier(base), settings_of(base, "ModernBertForTokenClassification")),
        "provence": (Provence(mean), provence),
        "kompress": (Kompress(base), settings_of(base, "ModernBertForMaskedLM")),
    }
    # One row by itself: in a batch, the convolution of Kompress also reads what padding came out as.
    row = np.concatenate([[2], np.random.default_rng(0).integers(5, 400, 70), [3]])
    outputs: dict[str, np.ndarray] = {"tokens": row.astype(np.int32)}
    marks = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    for name, (module, settings) in kinds.items():
        for one in module.parameters():
            one.data += 0.1 * torch.randn_like(one)  # norms and biases are not those of the beginning
        folder = args.to / name
        folder.mkdir(parents=True, exist_ok=True)
        inside = module.inside if isinstance(module, Classifier) else module
        save_file({key: x.contiguous() for key, x in inside.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
        tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(marks) + "\n")
        ids = torch.tensor(row)[None]
        with torch.no_grad():
            found = module.eval()(ids, torch.ones_like(ids))
        outputs |= {f"{name}/{key}": value[0].numpy() for key, value in found.items()}
    np.savez_compressed(args.to / "outputs.npz", **outputs)  # pyright: ignore[reportArgumentType]
    print(f"{sum(file.stat().st_size for file in args.to.rglob('*') if file.is_file()):,} bytes in {args.to}")


if __name__ == "__main__":
    main(arguments(QUICK))
