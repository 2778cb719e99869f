"""A corpus shortened record by record: JSON Lines or Parquet in, a folder of parts in the same format out.

    job = CorpusJob(Path("documents.jsonl"), Path("shorter"), rate=0.5, protect=("numbers",))
    compress_corpus(compressor, job)  # may be stopped at any moment and started again

Each record stays as it is and gets the shorter text beside its own. A part is done when its file is there, so neither
`kill -9` nor a lost machine costs more than the parts that were being made. Parts are the same wherever they are made:
`jaxcompress.prompt.on_ray` makes them on several machines.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.inputs.json import read_object
from jaxcompress.inputs.scalars import share, whole
from jaxcompress.inputs.text import clean
from jaxcompress.inputs.whole_file import unfinished, whole_file
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.corpus_files import Part, Record, format_of, part_file, parts_of, read_part, write_part
from jaxcompress.prompt.keeping import checked_force, keep_with_forced
from jaxcompress.prompt.kinds import Kind, checked_kinds

SETTINGS = "corpus.json"
"""What the parts of a folder were made with."""

LEFT_SECONDS = 3600
"""An unfinished part that is older was left by a killed process. Another machine may be at work on a younger one."""

_ADDED = {"compressed": "string", "tokens_before": "int64", "tokens_after": "int64"}
_LABELS = {"words": "spans", "labels": "flags"}


_PROBE = """Unbelievably, 4,200 tokenizers disagree: don't they? naïve – “façade”, 3.14e-7 %, U.S.A.
    def count(self, text: str) -> int:\n\t\treturn len(text.encode("utf-8"))  # https://example.org/a_b?c=1
Die Straßenbahnhaltestelle; où ça; ¿qué?; Привет, мир; 会议将于三点开始。会議は三時に。
회의는 3시에; नमस्ते; שלום; 🙂👩‍👧"""
"""What a reader's tokens are counted in, from its beginning to every place, to know it again."""


@dataclass(frozen=True)
class CorpusJob:
    """What is shortened, and how.

    Attributes:
      source: a file of JSON Lines or Parquet.
      target: a folder; created if missing.
      field: the field of a record that holds its text.
      rate: the share of the tokens of each record that stays, as for `keep`.
      force, protect: as for `keep`. A record in which they need more than its rate keeps what they need.
      labels: also write `words`, the places of the words in the text, and `labels`, 1 for those that stay: with a field
        `text`, JSON Lines are then examples that `jaxcompress.prompt.dataset.read_examples` reads.
      rows: records of a part. They are scored together.

    Raises:
      ValueError, TypeError: as `keep`; a number of rows below 1.
    """

    source: Path
    target: Path
    field: str = "text"
    rate: float = 0.5
    force: tuple[str, ...] = ()
    protect: tuple[Kind, ...] = ()
    labels: bool = False
    rows: int = 256

    def __post_init__(self) -> None:
        share(self.rate)
        whole(self.rows, "rows of a part", least=1)
        checked_force("document", self.force)
        checked_kinds(self.protect)

    @property
    def added(self) -> dict[str, str]:
        """The fields that records get, and their types."""
        return _ADDED | (_LABELS if self.labels else {})


class PartReport(NamedTuple):
    """What was made of a part.

    Attributes:
      records: how many.
      over: how many of them have more tokens than their rate, for what is forced and protected.
    """

    records: int
    over: int
    tokens_before: int
    tokens_after: int


class CorpusReport(NamedTuple):
    """What a call did.

    Attributes:
      parts: how many the corpus has.
      made: how many of them this call made; the others were there.
      records, over, tokens_before, tokens_after: sums over the parts that this call made, as in `PartReport`.
    """

    parts: int
    made: int
    records: int
    over: int
    tokens_before: int
    tokens_after: int


def compress_corpus(
    compressor: Compressor, job: CorpusJob, *, progress: Callable[[int], None] = lambda records: None
) -> CorpusReport:
    """Makes the parts that are missing, one after the other.

    Args:
      progress: called with the number of records of each part that is done, those that were there first.

    Raises:
      FileNotFoundError: there is no source.
      ValueError: the source has another format; a record has no text, or a field that would be overwritten; the target
        holds parts of other settings, or of a source with other content.
      OSError: a part cannot be written.
    """
    parts, missing = begin(compressor, job)
    progress(sum(part.records for part in parts) - sum(part.records for part in missing))
    made = []
    for part in missing:
        made.append(compress_part(compressor, job, part))
        progress(part.records)
    return total(len(parts), made)


def begin(compressor: Compressor, job: CorpusJob) -> tuple[list[Part], list[Part]]:
    """All parts of a job, and those that are missing. Writes down the settings if the target is new.

    Raises:
      FileNotFoundError, ValueError: as `compress_corpus`.
    """
    compressor.check_force(job.force)
    kind, parts = format_of(job.source), parts_of(job.source, job.rows)
    job.target.mkdir(parents=True, exist_ok=True)
    settings = _settings(compressor, job)
    begun = {*unfinished(job.target, "part-*"), *unfinished(job.target, f"{SETTINGS}*")}
    for left in begun:
        if time.time() - left.stat().st_mtime > LEFT_SECONDS:
            left.unlink(missing_ok=True)
    file = job.target / SETTINGS
    if file.exists():
        theirs = read_object(file)
        if different := [key for key in settings if theirs.get(key) != settings[key]]:
            raise ValueError(
                f"{job.target} holds parts made with another {different[0]} ({theirs.get(different[0])}, not "
                f"{settings[different[0]]}); choose another folder, or the same settings to go on"
            )
    elif set(job.target.iterdir()) - begun:
        raise ValueError(f"{job.target} holds other files, and no {SETTINGS}; choose a new folder")
    else:
        with whole_file(file) as part:
            part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return parts, [part for part in parts if not part_file(job.target, part.number, kind).exists()]


def compress_part(compressor: Compressor, job: CorpusJob, part: Part) -> PartReport:
    """Makes a part, whether it is there or not.

    Raises:
      ValueError: a record has no text, or has a field that is to be added; names it. Words are forced where the
        compressor keeps sentences.
      OSError: the part cannot be written.
    """
    compressor.check_force(job.force)
    records = read_part(job.source, part)
    texts = [_text(record, job, part.first + n) for n, record in enumerate(records)]
    counter, over, before, after = compressor.counter, 0, 0, 0
    options: dict[str, Any] = dict(rate=job.rate, force=job.force, protect=job.protect)
    for record, scored in zip(records, compressor.score(texts), strict=True):
        result = keep_with_forced(scored, counter, **options)
        (kept,) = result.documents
        over += result.asked < result.tokens_after
        before, after = before + result.tokens_before, after + result.tokens_after
        record |= dict(compressed=result.text, tokens_before=result.tokens_before, tokens_after=result.tokens_after)
        if job.labels:
            record |= dict(words=kept.scored.spans.tolist(), labels=kept.labels.astype(int).tolist())
    write_part(job.target, part.number, records, job.source, job.added, format_of(job.source))
    return PartReport(len(records), over, before, after)


def total(parts: int, made: list[PartReport]) -> CorpusReport:
    """The report of a call.

    Args:
      parts: how many the corpus has.
    """
    sums = [int(sum(column)) for column in zip(*made, strict=True)] or [0] * len(PartReport._fields)
    return CorpusReport(parts, len(made), *sums)


def _text(record: Record, job: CorpusJob, at: int) -> str:
    if taken := sorted(record.keys() & job.added.keys()):
        raise ValueError(
            f"{job.source}, record {at + 1}: {taken[0]!r} is there already and would be overwritten; rename that field"
        )
    if not isinstance(text := record.get(job.field), str):
        has = f"has {', '.join(map(repr, list(record)[:8]))}" if job.field not in record else "holds no string there"
        raise ValueError(f"{job.source}, record {at + 1}: the text should be in {job.field!r}; it {has} (--field)")
    return clean(text)


def _settings(compressor: Compressor, job: CorpusJob) -> dict[str, Any]:
    """What decides the content of parts. Compressors with the same weights, tokenizer and counts are the same."""
    with open(job.source, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    weights = 0
    for leaf in jax.tree.leaves(compressor.encoder):
        weights = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).tobytes(), weights)
    own = {key: value for key, value in asdict(job).items() if key not in ("source", "target")}
    return json.loads(
        json.dumps(
            own
            | dict(
                source=job.source.name, content=content, weights=f"{weights:08x}",
                word=compressor.word, unit=compressor.unit, window=compressor.window, question=compressor.question,
                tokenizer=_hash((compressor.tokenizer.folder / "tokenizer.json").read_bytes()),
                reader=_hash(repr([compressor.tokens(_PROBE[: n + 1]) for n in range(len(_PROBE))]).encode()),
            )
        )
    )  # fmt: skip


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
