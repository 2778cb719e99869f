"""The flags of `train`, and which of them do not go together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from jaxcompress.cli.flags import ModeFlags, ModelFlag, PlacementFlag, PolicyFlags, SeedFlag, at_least
from jaxcompress.cli.mesh import ProfileFlag
from jaxcompress.cli.paths import FOLDER, TRAINED
from jaxcompress.cli.train.presets import NETWORK_RATE, PRESETS


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """Where settings come from that no flag gives."""

    resume: bool = False
    """Continue from the last checkpoint in --out; with --data, begin if there is no run yet. Settings that no flag
    gives are those of the run. Only --steps, --save-every, --keep, --tensorboard and --mesh may change."""
    preset: Literal["retention", "joint", "dms"] | None = None
    """Set of flags for one purpose; other flags and --config win over it. retention: a head that foresees attention,
    beside a model that stays as it is. joint: model and head together, with the model's own full cache as teacher.
    dms: delayed eviction, beside a model that stays as it is."""
    config: Path | None = None
    """TOML file with settings, named as the flags: `learning_rate = 1e-4`."""


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """What a step reads."""

    length: int = 1024
    """Tokens predicted per row."""
    rows: int = 4
    """Rows per step."""
    accumulate: int = 1
    """Take the rows of a step in so many equal parts, one after the other; more parts take less memory. dms, dmc: each
    part is penalised for the share that it keeps itself."""
    held_out: int = 16
    """Rows that are never trained on, at most a tenth of all. Their loss is told before and after training."""


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """How weights are changed."""

    steps: int = 200
    """Steps in all. With --resume it may differ from before: the run then continues as one that was begun with so many
    steps."""
    learning_rate: float | None = None
    """The highest learning rate; 3e-3 where a policy's network is trained and the model stays as it is, else 1e-4, if
    not given. A network that is trained together with a model learns ten times as fast."""
    schedule: Literal["cosine", "stable", "constant"] = "cosine"
    """Learning rate after the warmup. cosine: half a cosine down to a tenth. stable: a plateau, then a linear decay.
    constant: the same to the end."""
    warmup: int = 20
    """Steps in which the learning rate rises from 0; at most all steps but the last."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the model's weights. Adapters and the networks of policies have AdamW."""
    weight_decay: float = 0.01
    """Weight decay of the optimizer."""
    clip: float = 1.0
    """Highest norm of the gradient; a larger gradient is scaled down to it."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Type in which models compute; bfloat16 on accelerators and float32 on CPUs if not given. Master weights, losses
    and sums of gradients are float32."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags(
    SourceFlags, SeedFlag, OptimizerFlags, RowFlags, ProfileFlag, PlacementFlag, ModeFlags, PolicyFlags, ModelFlag,
):  # fmt: skip
    """What `train` is told."""

    policy: Annotated[str, TRAINED] = "tova"
    """Eviction policy to train a model for: a name from `jaxcompress info`, full for plain attention, FILE.py:NAME for
    your own, or learned for the one that the model has, which stays as it is. Or one to learn: retention,
    retention-layer, retention-pool, dms, dms-pool, dmc."""
    data: str
    """Text file, JSONL file, folder of both, or dataset of the Hugging Face hub (`name` or `name:configuration`)."""
    out: Annotated[Path, FOLDER]
    """Write the run into this folder."""
    tokenizer: str | None = None
    """Folder with another tokenizer; that of the model if not given."""
    field: str = "text"
    """Name of the text in JSON lines and datasets. Lines may have token ids under "tokens" instead."""
    split: str = "train"
    """Split of a dataset."""
    distill: bool = False
    """Also learn to predict what the model, as it was before training, predicts with its full cache. A retention head
    then learns together with the model."""
    from_learned: bool = False
    """Begin with the network of the policy that the model has already (`learned`), not with a new one; --policy and its
    flags are those that it was trained with."""
    lora: int | None = None
    """Train adapters of this rank beside the attention projections (LoRA) and leave the model as it is. They are added
    to the model when it is saved."""
    segment: int = 256
    """Tokens read at once: a multiple of --chunk in mode chunked. More is faster and takes more memory; the result is
    the same."""
    bptt_segments: int | None = 2
    """Number of segments that the gradient goes back over; None: the whole row."""
    ratio: float = 8.0
    """dms, dmc: one of so many tokens is kept in the end."""
    window: int = 64
    """dms: a token can be evicted once more than so many tokens have come after it."""
    recent: int = 0
    """retention: so many newest tokens are never evicted, and no part of what is learned."""
    horizon: float | None = 128.0
    """retention: attention to come counts less the further away it is, by e in so many tokens; None: all alike."""
    save_every: int = 50
    """Steps between two checkpoints."""
    keep: int = 2
    """Number of checkpoints that are kept."""
    tensorboard: bool = False
    """Also write to --out/tensorboard."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out.expanduser())  # no shell has, in TOML and in --out=~/runs

    @property
    def chunk_length(self) -> int:
        """Tokens between two selections."""
        return self.chunk_tokens() if self.mode == "chunked" else 1

    @property
    def network_alone(self) -> bool:
        """Whether a policy's network is trained beside a model that stays as it is."""
        return self.policy.split("-")[0] in ("retention", "dms") and not self.distill

    @property
    def network_and_model(self) -> bool:
        """Whether a policy's network is trained together with the model, or with adapters of it."""
        return self.policy.split("-")[0] in ("retention", "dmc") and not self.network_alone

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return NETWORK_RATE if self.network_alone else 1e-4

    def check(self) -> None:
        """What can be known before anything is loaded.

        Raises:
          ValueError: a number that makes no sense, settings that exclude each other or do nothing, or a folder that
            holds a run already.
        """
        self._check_numbers()
        if self.policy.startswith("learned/"):
            raise ValueError(
                f"--policy {self.policy}: a model is trained through its own policy as that is; give --policy learned, "
                f"and {self.policy} when you read with the trained model"
            )
        if self.mode == "oneshot":
            raise ValueError("--mode oneshot selects once per prompt, and training rows have none; use chunked")
        if self.rows % self.accumulate:
            raise ValueError(f"--rows {self.rows} cannot be taken in --accumulate {self.accumulate} equal parts")
        if self.policy != "full" and self.segment < self.length and self.segment % (chunk := self.chunk_length):
            raise ValueError(
                f"--segment {self.segment} is no multiple of --chunk {chunk}, and tokens would be selected at the end "
                f"of each segment too; give --segment {-(-self.segment // chunk) * chunk}"
            )
        if self.distill and (self.policy == "full" or self.policy.startswith(("dms", "dmc"))):
            raise ValueError(
                f"--distill is for states that evict by a policy or a retention head, not for {self.policy}"
            )
        if self.lora is not None and (self.network_alone or self.policy == "dmc"):
            more = "; with --distill it trains both" if self.policy.startswith("retention") else ""
            raise ValueError(f"--lora trains adapters of a model; {self.policy} trains a network of its own{more}")
        defaults, preset = {field.name: field.default for field in fields(self)}, PRESETS.get(self.preset or "", {})
        for name, why in self._idle().items():
            if getattr(self, name) not in (defaults[name], preset.get(name, defaults[name])):
                raise ValueError(f"--{name.replace('_', '-')} does nothing {why}; leave it out")
        if not self.resume and any(any(self.out.glob(name)) for name in ("run.json", "checkpoints/*", "model")):
            raise ValueError(f"{self.out} holds a run already; give --resume to continue it, or another --out")

    def _check_numbers(self) -> None:
        """Raises ValueError for a number that makes no sense, whatever the others are."""
        for name in ("length", "rows", "accumulate", "steps", "segment", "bptt_segments", "save_every", "keep"):
            at_least(1, **{name: getattr(self, name)})
        at_least(0, warmup=self.warmup, recent=self.recent, held_out=self.held_out)
        for name, value in (("learning-rate", self.rate), ("clip", self.clip)):
            if not value > 0:
                raise ValueError(f"--{name} must be above 0, not {value:g}")
        if not self.weight_decay >= 0:
            raise ValueError(f"--weight-decay must be at least 0, not {self.weight_decay:g}")
        self.chunk_tokens()

    def _idle(self) -> dict[str, str]:
        """Settings that nothing reads, given the others, and why."""
        kind, idle = self.policy.split("-")[0], {}
        if self.policy == "full":
            why = "with --policy full, which evicts nothing"
            idle |= dict.fromkeys(("slots", "segment", "bptt_segments", "mode", "chunk", "placement"), why)
        if kind != "dms":
            idle["window"] = f"with --policy {self.policy}; it is for dms"
        if kind != "retention":
            idle |= dict.fromkeys(("horizon", "recent"), f"with --policy {self.policy}; it is for retention")
        if kind not in ("retention", "dms", "dmc"):
            what = "whose network stays as it is" if self.policy == "learned" else "which has no network"
            idle["from_learned"] = f"with --policy {self.policy}, {what}"
        if kind not in ("dms", "dmc"):
            idle["ratio"] = f"with --policy {self.policy}; it is for dms and dmc"
        if kind in ("dms", "dmc", "retention") and not self.distill:
            idle["bptt_segments"] = f"with --policy {self.policy}, which learns from plain attention"
        if kind in ("dms", "retention") and not self.distill:
            idle["optimizer"] = f"with --policy {self.policy}, whose network AdamW trains"
        if self.lora is not None:
            idle["optimizer"] = "with --lora, whose adapters AdamW trains"
        if Path(self.data).expanduser().exists():
            idle["split"] = f"with files; {self.data} is no dataset of the hub"
        return idle
