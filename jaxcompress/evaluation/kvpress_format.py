"""Rows of RULER in the files that kvpress's evaluation writes (evaluation/evaluate.py of NVIDIA/kvpress).

One folder for each model, length, policy and compression ratio, with predictions.csv, metrics.json and config.yaml, so
that its scripts read them beside its own.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcompress.evaluation.results import Row

DATASET = "ruler"
COLUMNS = ("task", "question", "answer_prefix", "answer", "max_new_tokens", "predicted_answer", "compression_ratio")


def write_kvpress(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the rows that kvpress could have made; returns the folders.

    These are rows of RULER in the protocol kvpress. All seeds of a folder are its samples. A folder that exists is
    written anew, since all it holds comes from the rows.

    Raises:
      ValueError: there are no such rows.
      OSError: a file cannot be written.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.cell.experiment == DATASET and row.cell.settings.get("protocol") == "kvpress" and row.figure.details:
            groups.setdefault(_name(row), []).append(row)
    if not groups:
        raise ValueError("no row is of RULER in the protocol kvpress: measure some with jaxcompress ruler --out FILE")
    return [_written(folder / name, mine) for name, mine in groups.items()]


def _name(row: Row) -> str:
    parts = [
        DATASET, str(row.cell.context), row.cell.model.replace("/", "--"), row.cell.policy.replace("/", "--"),
        f"{_ratio(row):.2f}",
    ]  # fmt: skip
    return "__".join([*parts, "compressed_questions"] if _known(row) else parts)


def _ratio(row: Row) -> float:
    """The share of the context that is dropped."""
    return 1 - 1 / row.cell.settings["fraction"]


def _known(row: Row) -> bool:
    return row.cell.settings["question"] == "known"


def _written(folder: Path, rows: Sequence[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            for one in row.figure.details:
                asked = "" if _known(row) else one["question"]  # it is part of the context
                writer.writerow({**one, "task": row.cell.task, "question": asked, "compression_ratio": _ratio(row)})
    scores: dict[str, list[Row]] = {}
    for row in rows:
        scores.setdefault(row.cell.task, []).append(row)
    metrics = {task: {"string_match": round(_mean(mine), 2)} for task, mine in sorted(scores.items())}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=4), encoding="utf-8")
    (folder / "config.yaml").write_text(json.dumps(_config(rows), indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    return folder


def _mean(rows: Sequence[Row]) -> float:
    """Over all samples."""
    return sum(row.figure.value * row.figure.samples for row in rows) / sum(row.figure.samples for row in rows)


def _config(rows: Sequence[Row]) -> dict[str, Any]:
    cell, _, made, _ = rows[0]
    return dict(
        dataset=DATASET, data_dir=str(cell.context), model=cell.model, device=made.device, press_name=cell.policy,
        compression_ratio=_ratio(rows[0]), fraction=1.0, max_new_tokens=None, max_context_length=None,
        compress_questions=_known(rows[0]), press_init_command=cell.policy, seeds=sorted({r.cell.seed for r in rows}),
        library=f"jaxcompress {made.version} ({made.code})",
    )  # fmt: skip
