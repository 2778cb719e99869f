"""How well a bounded state remembers: perplexity, recall, tables and pictures."""

from jaxcompress.evaluation.perplexity import Perplexity, perplexity
from jaxcompress.evaluation.recall import Answers, Recall, answers, exam, weave, wording
from jaxcompress.evaluation.sweep import Row, rows_of_text, sweep

__all__ = [
    "Answers", "Perplexity", "Recall", "Row", "answers", "exam", "perplexity", "rows_of_text", "sweep", "weave",
    "wording",
]  # fmt: skip
