"""Eviction policies: one file per idea."""

from jaxcompress.policies.adaptive import adaptive
from jaxcompress.policies.chunks import by_chunks, within_chunks
from jaxcompress.policies.combine import every, mix, once, per_layer, protect, ranked, sampled, then
from jaxcompress.policies.critical import critical
from jaxcompress.policies.expected import expected_attention
from jaxcompress.policies.full import full
from jaxcompress.policies.gates import dmc, gated
from jaxcompress.policies.geometry import cur, keydiff, knorm, lagkv
from jaxcompress.policies.h2o import h2o
from jaxcompress.policies.learned import ForgetHead, dms, retention
from jaxcompress.policies.nacl import nacl
from jaxcompress.policies.observed import observed_attention
from jaxcompress.policies.policy import Candidates, Observation, Policy
from jaxcompress.policies.pooled import pooled
from jaxcompress.policies.random import random
from jaxcompress.policies.registry import learned_policy
from jaxcompress.policies.rkv import rkv
from jaxcompress.policies.scissorhands import scissorhands
from jaxcompress.policies.snapkv import snapkv
from jaxcompress.policies.tova import tova
from jaxcompress.policies.window import streaming_llm, window

__all__ = [
    "Candidates", "ForgetHead", "Observation", "Policy", "adaptive", "by_chunks", "critical", "cur", "dmc", "dms",
    "every", "expected_attention", "full", "gated", "h2o", "keydiff", "knorm", "lagkv", "learned_policy", "mix",
    "nacl", "observed_attention", "once", "per_layer", "pooled", "protect", "random", "ranked", "retention", "rkv",
    "sampled", "scissorhands", "snapkv", "streaming_llm", "then", "tova", "window", "within_chunks",
]  # fmt: skip
