"""jaxcompress compress-corpus"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxcompress.cli.compress_prompt import Protect, check_kinds, kinds_named, reader_counter
from jaxcompress.cli.flags import JsonFlag, WeightFlags, at_least
from jaxcompress.cli.paths import FOLDER, READ
from jaxcompress.cli.runtime import prepare, progress, tell, write_json
from jaxcompress.inputs.text import unescaped

if TYPE_CHECKING:
    from jaxcompress.prompt import Compressor


@dataclass(frozen=True, kw_only=True)
class CompressCorpus(JsonFlag, WeightFlags):
    """Shortens every record of a JSON Lines or Parquet file, as compress-prompt does with a text.

    Writes a folder of files in the same format, of --rows records each. A record keeps its fields and gets
    `compressed`, `tokens_before` and `tokens_after`. Run the same command again to go on after an interruption. What is
    protected stays even where it is more than the rate; how many records that were is told at the end.

    Example: jaxcompress compress-corpus documents.jsonl shorter --rate 0.33 --labels
    """

    source: Annotated[Path, tyro.conf.Positional, READ]
    """A file of JSON Lines (.jsonl, .ndjson) or Parquet (.parquet)."""
    target: Annotated[Path, tyro.conf.Positional, FOLDER]
    """A folder for the result; created if missing."""
    field: str = "text"
    """The field of a record that holds its text."""
    rate: float = 0.5
    """Share of the reader's tokens that stay of each record, in (0, 1]."""
    reader: str | None = None
    """Folder of the model that will read the texts, as for compress-prompt."""
    force: tuple[str, ...] = ()
    """Words, signs or white space that stay, as for compress-prompt."""
    protect: tuple[Protect, ...] = ()
    """Kinds of things that stay whole, as for compress-prompt."""
    labels: bool = False
    """Also write the places of the words, and 1 for those that stay: training data for a classifier."""
    rows: int = 256
    """Records of a file of the result; they are scored together."""
    workers: int = 0
    """Make files on so many workers of Ray (pip install "jaxcompress[ray]"): on the cluster that RAY_ADDRESS names, or
    on this machine."""

    def run(self) -> None:
        at_least(1, rows=self.rows)
        at_least(0, workers=self.workers)
        if not 0 < self.rate <= 1:
            raise ValueError(f"--rate must be in (0, 1], the share of tokens that stays, not {self.rate}")
        check_kinds(self.protect)
        prepare()
        from jaxcompress.prompt.corpus import CorpusJob, compress_corpus

        job = CorpusJob(
            self.source, self.target, self.field, self.rate, tuple(unescaped(string) for string in self.force),
            tuple(kinds_named(self.protect)), self.labels, self.rows,
        )  # fmt: skip
        load = partial(_load, self.model, self.dtype, self.reader)
        with progress(None, "compressing", "record") as advance:
            if self.workers:
                from jaxcompress.prompt.on_ray import compress_corpus_on_ray

                report = compress_corpus_on_ray(load, job, workers=self.workers, progress=advance)
            else:
                report = compress_corpus(load(), job, progress=advance)
        if self.json:
            write_json(report._asdict())
        tell(
            f"{report.made} of {report.parts} parts made, {report.records:,} records, {report.tokens_before:,} tokens "
            f"to {report.tokens_after:,}"
        )
        if report.over:
            tell(f"{report.over:,} records have more tokens than their rate, for what is forced and protected")


def _load(model: Any, dtype: Any, reader: str | None) -> Compressor:
    from jaxcompress.prompt import Compressor

    return Compressor.load(model, dtype=dtype, count=reader_counter(reader))
