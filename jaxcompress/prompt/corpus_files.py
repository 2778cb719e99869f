"""Records of a JSON Lines or Parquet file, in parts, and the files of these parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from jaxcompress._extras import extra
from jaxcompress.inputs.text import decode, parse_json
from jaxcompress.inputs.whole_file import whole_file

Format = Literal["jsonl", "parquet"]
Record = dict[str, Any]
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class Part(NamedTuple):
    """Some records of a file that follow each other.

    Attributes:
      number: from 0; names its file.
      records: how many.
      first: the first record's number, from 0.
      start: where it begins: a byte of a JSON Lines file; the same as `first` for Parquet.
    """

    number: int
    records: int
    first: int
    start: int


def format_of(source: Path) -> Format:
    """The format of a file, by its suffix.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has another suffix.
    """
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    if source.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{source}: a corpus is a file of {', '.join(_SUFFIXES)}, not {source.suffix or 'no suffix'}")
    return _SUFFIXES[source.suffix.lower()]


def parts_of(source: Path, rows: int) -> list[Part]:
    """The parts of a file, each of `rows` records but the last. Lines of white space are no records."""
    if format_of(source) == "parquet":
        with extra("parquet"):
            import pyarrow.parquet as pq
        total = pq.ParquetFile(source).metadata.num_rows
        starts = range(0, total, rows)
        return [Part(number, min(rows, total - start), start, start) for number, start in enumerate(starts)]
    parts: list[Part] = []
    at = found = 0
    with open(source, "rb") as file:
        for line in file:
            if _is_record(line):
                if found % rows == 0:
                    parts.append(Part(len(parts), 0, found, at))
                parts[-1] = parts[-1]._replace(records=parts[-1].records + 1)
                found += 1
            at += len(line)
    return parts


def _is_record(line: bytes) -> bool:
    """Whether a line has more than white space, of any kind, after a byte order mark."""
    return line.startswith(b"{") or bool(line.decode("utf-8", "replace").removeprefix("\ufeff").strip())


def read_part(source: Path, part: Part) -> list[Record]:
    """The records of a part.

    Raises:
      ValueError: a line is no JSON object; names it.
    """
    if format_of(source) == "parquet":
        return _read_parquet(source, part)
    records: list[Record] = []
    with open(source, "rb") as file:
        file.seek(part.start)
        while len(records) < part.records and (line := file.readline()):
            where = f"{source}, record {part.first + len(records) + 1}"
            if _is_record(line):
                value = parse_json(decode(line, where), where)
                if not isinstance(value, dict):
                    raise ValueError(f"{where} is no JSON object, but {type(value).__name__}")
                records.append(value)
    return records


def _read_parquet(source: Path, part: Part) -> list[Record]:
    """Reads the row groups that hold these rows, and no others."""
    with extra("parquet"):
        import pyarrow.parquet as pq
    metadata = pq.ParquetFile(source).metadata
    changed = source.stat().st_mtime_ns
    found: list[Record] = []
    before, end = 0, part.start + part.records
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        first = max(part.start - before, 0)
        if (count := min(end - before, rows) - first) > 0:
            found += _row_group(source, changed, group).slice(first, count).to_pylist()
        before += rows
    return found


@lru_cache(maxsize=1)
def _row_group(source: Path, changed: int, group: int) -> Any:
    """A row group as a table; the last one is kept, for the parts that follow in it. `changed`: when the file was."""
    with extra("parquet"):
        import pyarrow.parquet as pq
    return pq.ParquetFile(source).read_row_group(group)


def part_file(target: Path, number: int, format: Format) -> Path:
    return target / f"part-{number:06d}.{format}"


def write_part(
    target: Path, number: int, records: Sequence[Record], source: Path, added: dict[str, str], format: Format
) -> Path:
    """Writes the file of a part; it is on disk when this returns. Whoever writes it last wins.

    Args:
      source: whose columns the records have, in Parquet.
      added: the types of the other columns, by Arrow's names.
    """
    file = part_file(target, number, format)
    with whole_file(file, writer=uuid4().hex[:8]) as partial:
        if format == "jsonl":
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            partial.write_text("".join(lines), encoding="utf-8")
        else:
            _write_parquet(partial, records, source, added)
    return file


def _write_parquet(path: Path, records: Sequence[Record], source: Path, added: dict[str, str]) -> None:
    with extra("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    types = {"string": pa.string(), "int64": pa.int64(), "spans": pa.list_(pa.list_(pa.int64())),
             "flags": pa.list_(pa.int8())}  # fmt: skip
    columns = [pa.field(name, types[kind]) for name, kind in added.items()]
    schema = pa.schema([*(field for field in pq.read_schema(source) if field.name not in added), *columns])
    pq.write_table(pa.Table.from_pylist(list(records), schema=schema), path)
