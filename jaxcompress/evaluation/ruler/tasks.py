"""The tasks of RULER by name (Hsieh et al. 2024, arXiv 2404.06654; scripts/synthetic.yaml)."""

from __future__ import annotations

from jaxcompress.evaluation.ruler.asking import two_hops
from jaxcompress.evaluation.ruler.counting import FEW_COMMON, common_words, frequent_words
from jaxcompress.evaluation.ruler.needles import needles
from jaxcompress.evaluation.ruler.sample import Task
from jaxcompress.evaluation.ruler.tracking import variable_tracking

_NEEDLES = {
    "niah_single_1": needles("repeat"),
    "niah_single_2": needles("essay"),
    "niah_single_3": needles("essay", value="uuids"),
    "niah_multikey_1": needles("essay", keys=4),
    "niah_multikey_2": needles("needle"),
    "niah_multikey_3": needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": needles("essay", values=4),
    "niah_multiquery": needles("essay", queries=4),
}

TASKS: dict[str, Task] = {
    **{name: Task(make, 128) for name, make in _NEEDLES.items()},
    "vt": Task(variable_tracking, 30, least=2),
    "cwe": Task(common_words, 120, least=FEW_COMMON),
    "fwe": Task(frequent_words, 50, least=30),
    "qa_2": Task(two_hops, 32, least=0, match_any=True),
}
"""By RULER's names. `qa_2` is RULER's HotpotQA task, with questions that are made up unless a file is given."""


def get_task(name: str) -> Task:
    """Raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
