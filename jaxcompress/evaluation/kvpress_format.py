"""Rows of RULER in the files that kvpress's evaluation writes (evaluation/evaluate.py of NVIDIA/kvpress).

One folder for each model, length, policy and compression ratio, with predictions.csv, metrics.json and config.yaml, so
that its scripts read them beside its own. Folders that would bear one name, such as those of two forms of prompts, bear
what they differ in too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcompress.evaluation.results import Row
from jaxcompress.inputs.whole_file import whole_file

DATASET = "ruler"
COLUMNS = ("task", "question", "answer_prefix", "answer", "max_new_tokens", "predicted_answer", "compression_ratio")


def write_kvpress(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the rows that kvpress could have made; returns the folders.

    These are rows of RULER in the protocol kvpress; of a cell that was measured twice, the newer one. All seeds of a
    folder are its samples. A folder that exists is written anew, since all it holds comes from the rows.

    Raises:
      ValueError: there are no such rows.
      OSError: a file cannot be written.
    """
    groups: dict[str, list[Row]] = {}
    for row in {row.cell.key: row for row in sorted(rows, key=lambda row: row.at)}.values():
        if row.cell.experiment == DATASET and row.cell.settings.get("protocol") == "kvpress" and row.figure.details:
            groups.setdefault(json.dumps(_setting(row), sort_keys=True), []).append(row)
    if not groups:
        raise ValueError("no row is of RULER in the protocol kvpress: measure some with jaxcompress ruler --out FILE")
    return [_written(folder / name, mine) for name, mine in zip(_names(groups), groups.values(), strict=True)]


def _setting(row: Row) -> dict[str, Any]:
    """What the rows of a folder share."""
    cell = row.cell
    shared = dict(cell.settings, model=cell.model_hash, dtype=cell.dtype, slots=cell.slots)
    return shared | dict(context=cell.context, policy=cell.policy)


def _names(groups: dict[str, list[Row]]) -> list[str]:
    """The name of each folder: as kvpress names it, and what it differs in from others of that name."""
    names = [_name(rows[0]) for rows in groups.values()]
    settings = [json.loads(key) for key in groups]
    found = []
    for name, mine in zip(names, settings, strict=True):
        like = [other for other, one in zip(settings, names, strict=True) if one == name]
        differs = sorted(key for key in mine if any(other.get(key) != mine[key] for other in like))
        said = [f"{key}-{mine[key]}".replace("/", "--") for key in differs]
        found.append("__".join([name, *said]))
    return found


def _name(row: Row) -> str:
    parts = [
        DATASET, str(row.cell.context), row.cell.model.replace("/", "--"), row.cell.policy.replace("/", "--"),
        f"{_ratio(row):.2f}",
    ]  # fmt: skip
    return "__".join([*parts, "compressed_questions"] if _known(row) else parts)


def _ratio(row: Row) -> float:
    """The share of the context that is to be dropped of the longest one; most contexts are shorter, and lose less."""
    return 1 - 1 / row.cell.settings["fraction"]


def _ratio_of(row: Row, one: dict[str, Any]) -> float:
    """The share that was dropped of this context; the nominal one with a question in it, whose length no row has."""
    slots = row.cell.slots
    if _known(row) or not isinstance(slots, int) or "context_tokens" not in one:
        return _ratio(row)
    return max(0.0, 1 - slots / one["context_tokens"])


def _known(row: Row) -> bool:
    return row.cell.settings["question"] == "known"


def _written(folder: Path, rows: Sequence[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "predictions.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            for one in row.figure.details:
                asked = "" if _known(row) else one["question"]  # it is part of the context
                ratio = _ratio_of(row, one)
                writer.writerow({**one, "task": row.cell.task, "question": asked, "compression_ratio": ratio})
    scores: dict[str, list[Row]] = {}
    for row in rows:
        scores.setdefault(row.cell.task, []).append(row)
    metrics = {task: {"string_match": round(_mean(mine), 2)} for task, mine in sorted(scores.items())}
    with whole_file(folder / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=4), encoding="utf-8")
    with whole_file(folder / "config.yaml") as part:
        part.write_text(json.dumps(_config(rows), indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    return folder


def _mean(rows: Sequence[Row]) -> float:
    """Over all samples."""
    return sum(row.figure.value * row.figure.samples for row in rows) / sum(row.figure.samples for row in rows)


def _config(rows: Sequence[Row]) -> dict[str, Any]:
    cell, _, made, _ = rows[0]
    return dict(
        dataset=DATASET, data_dir=str(cell.context), model=cell.model, device=made.device, press_name=cell.policy,
        compression_ratio=_ratio(rows[0]), compression_ratio_of="the longest context", fraction=1.0,
        max_new_tokens=None, max_context_length=None,
        compress_questions=_known(rows[0]), press_init_command=cell.policy, seeds=sorted({r.cell.seed for r in rows}),
        library=f"jaxcompress {made.version} ({made.code})",
    )  # fmt: skip
