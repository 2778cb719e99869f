"""Training decoders that live in a bounded state.

Names are imported on first use: the trainer imports data loading and checkpointing, the losses alone do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcompress.training.checkpointing import Checkpoints
    from jaxcompress.training.data import Batch, PackedRows, batches, pack, read_documents
    from jaxcompress.training.delayed_eviction import dms_loss, init_dms, share_schedule, temperature_schedule
    from jaxcompress.training.distillation import distilled_value_and_grad, divergence
    from jaxcompress.training.foresight import foresight_loss
    from jaxcompress.training.lora import add_lora, init_lora
    from jaxcompress.training.loss import token_losses
    from jaxcompress.training.merging import init_gates, merging_loss
    from jaxcompress.training.metrics import MetricsFile
    from jaxcompress.training.objectives import adapted, adapted_jointly, bounded, causal, distilled, joint_retention
    from jaxcompress.training.optimizer import (
        adamw_for_decoder,
        muon_for_decoder,
        warmup_cosine,
        warmup_stable_decay,
    )
    from jaxcompress.training.policy_objectives import PolicyObjective, policy_objective
    from jaxcompress.training.recurrent import bounded_value_and_grad, exact_gradient, rematerialised, through_time
    from jaxcompress.training.retention_heads import init_retention, retention_loss
    from jaxcompress.training.trainer import fit, init_train_state, make_step

__all__ = [
    "Batch", "Checkpoints", "MetricsFile", "PackedRows", "PolicyObjective", "adamw_for_decoder", "adapted",
    "adapted_jointly", "add_lora", "batches", "bounded", "bounded_value_and_grad", "causal", "distilled",
    "distilled_value_and_grad", "divergence", "dms_loss", "exact_gradient", "fit", "foresight_loss", "init_dms",
    "init_gates", "init_lora", "init_retention", "init_train_state", "joint_retention", "make_step", "merging_loss",
    "muon_for_decoder", "pack", "policy_objective", "read_documents", "rematerialised", "retention_loss",
    "share_schedule", "temperature_schedule", "through_time", "token_losses", "warmup_cosine", "warmup_stable_decay",
]  # fmt: skip

_HOME = {
    "Checkpoints": "checkpointing",
    **dict.fromkeys(("Batch", "PackedRows", "batches", "pack", "read_documents"), "data"),
    **dict.fromkeys(("distilled_value_and_grad", "divergence"), "distillation"),
    "foresight_loss": "foresight",
    **dict.fromkeys(("dms_loss", "init_dms", "share_schedule", "temperature_schedule"), "delayed_eviction"),
    **dict.fromkeys(("init_retention", "retention_loss"), "retention_heads"),
    **dict.fromkeys(("PolicyObjective", "policy_objective"), "policy_objectives"),
    **dict.fromkeys(("init_gates", "merging_loss"), "merging"),
    **dict.fromkeys(("add_lora", "init_lora"), "lora"),
    "token_losses": "loss",
    "MetricsFile": "metrics",
    **dict.fromkeys(("adapted", "adapted_jointly", "joint_retention", "bounded", "causal", "distilled"), "objectives"),
    **dict.fromkeys(("adamw_for_decoder", "muon_for_decoder", "warmup_cosine", "warmup_stable_decay"), "optimizer"),
    **dict.fromkeys(("bounded_value_and_grad", "exact_gradient", "rematerialised", "through_time"), "recurrent"),
    **dict.fromkeys(("fit", "init_train_state", "make_step"), "trainer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxcompress.training' has no attribute {name!r}")
    return getattr(import_module(f"jaxcompress.training.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
