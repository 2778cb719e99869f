"""How well a bounded state remembers: perplexity, recall, tables and pictures."""

from jaxcompress.evaluation.lifetimes import (
    Ages,
    KindSurvival,
    Overlap,
    Survival,
    ages,
    held,
    occupancy,
    overlap,
    survival,
    survival_by_kind,
    token_kinds,
    token_texts,
)
from jaxcompress.evaluation.perplexity import Perplexity, perplexity
from jaxcompress.evaluation.recall import Answers, Recall, answers, exam, weave, wording
from jaxcompress.evaluation.sweep import Row, rows_of_text, sweep
from jaxcompress.evaluation.tracing import Trace, trace

__all__ = [
    "Ages", "Answers", "KindSurvival", "Overlap", "Perplexity", "Recall", "Row", "Survival", "Trace", "ages",
    "answers", "exam", "held", "occupancy", "overlap", "perplexity", "rows_of_text", "survival", "survival_by_kind",
    "sweep", "token_kinds", "token_texts", "trace", "weave", "wording",
]  # fmt: skip
