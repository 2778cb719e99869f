"""Eviction policies: one file per idea."""

from jaxcompress.policies.adaptive import adaptive
from jaxcompress.policies.cache_view import CacheView, Observation
from jaxcompress.policies.chunks import by_chunks, within_chunks
from jaxcompress.policies.critical import critical
from jaxcompress.policies.expected import ExpectedAttention
from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.policies.full import Full
from jaxcompress.policies.gates import dmc, gated
from jaxcompress.policies.geometry import CUR, KeyDiff, KNorm, LagKV
from jaxcompress.policies.h2o import H2O
from jaxcompress.policies.learned import DMS, Retention
from jaxcompress.policies.mix import mix, ranked, then
from jaxcompress.policies.nacl import NACL
from jaxcompress.policies.names import get_policy
from jaxcompress.policies.observed import ObservedAttention
from jaxcompress.policies.per_layer import per_layer
from jaxcompress.policies.policy import Policy, leaf, policy
from jaxcompress.policies.pooled import pooled
from jaxcompress.policies.protect import protect
from jaxcompress.policies.random import Random
from jaxcompress.policies.reductions import with_reduce
from jaxcompress.policies.registry import learned_policy
from jaxcompress.policies.rkv import RKV
from jaxcompress.policies.sampled import sampled
from jaxcompress.policies.schedule import Schedule
from jaxcompress.policies.scissorhands import Scissorhands
from jaxcompress.policies.snapkv import SnapKV
from jaxcompress.policies.tova import TOVA
from jaxcompress.policies.waiting import every, once
from jaxcompress.policies.window import StreamingLLM, Window

__all__ = [
    "CUR", "CacheView", "DMS", "ExpectedAttention", "ForgetHead", "Full", "H2O", "KNorm", "KeyDiff", "LagKV", "NACL",
    "Observation", "ObservedAttention", "Policy", "RKV", "Random", "Retention", "Schedule", "Scissorhands", "SnapKV",
    "StreamingLLM", "TOVA", "Window", "adaptive", "by_chunks", "critical", "dmc", "every", "gated", "get_policy",
    "leaf", "learned_policy", "mix", "once", "per_layer", "policy", "pooled", "protect", "ranked", "sampled", "then",
    "with_reduce", "within_chunks",
]  # fmt: skip
