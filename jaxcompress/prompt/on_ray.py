"""A corpus shortened on several machines with Ray Data: `pip install "jaxcompress[ray]"`.

    ray.init(address="auto")
    compress_corpus_on_ray(lambda: Compressor.load(), job, workers=8)

Each actor loads the encoder once and makes parts. Source and target have to be files that all machines see. The parts
are those that `jaxcompress.prompt.corpus.compress_corpus` makes, bit for bit on CPUs of the same kind, and either goes
on where the other stopped. When an actor dies, Ray starts another, which makes the part anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcompress._extras import extra
from jaxcompress.inputs.scalars import whole
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.corpus import CorpusJob, CorpusReport, PartReport, begin, compress_part, total
from jaxcompress.prompt.corpus_files import Part

with extra("ray"):
    from ray import data, init, is_initialized  # pyright: ignore[reportMissingImports]


class _Worker:
    """An actor: it holds the encoder."""

    def __init__(self, load: Callable[[], Compressor], job: CorpusJob):
        self.compressor, self.job = load(), job

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = Part(*(int(row[name]) for name in Part._fields))
        return compress_part(self.compressor, self.job, part)._asdict()


def compress_corpus_on_ray(
    load: Callable[[], Compressor],
    job: CorpusJob,
    *,
    workers: int = 2,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    progress: Callable[[int], None] = lambda records: None,
) -> CorpusReport:
    """Makes the parts that are missing, on the Ray cluster that this process is connected to, or a local one.

    Args:
      load: makes the compressor; called here and once in each actor.
      workers: actors.
      num_cpus, num_gpus: of each actor; Ray's defaults if None.
      progress: as for `compress_corpus`.

    Raises:
      FileNotFoundError, ValueError, OSError: as `compress_corpus`; errors in an actor come as Ray's.
    """
    workers = whole(workers, "workers", least=1)
    if not is_initialized():
        init()
    parts, missing = begin(load(), job)
    progress(sum(part.records for part in parts) - sum(part.records for part in missing))
    if not missing:
        return total(len(parts), [])
    rows = data.from_items([part._asdict() for part in missing], override_num_blocks=len(missing))
    done = rows.map(
        _Worker, fn_constructor_args=(load, job), compute=data.ActorPoolStrategy(size=min(workers, len(missing))),
        num_cpus=num_cpus, num_gpus=num_gpus,
    )  # fmt: skip
    made = []
    for row in done.iter_rows():
        made.append(PartReport(*(int(row[name]) for name in PartReport._fields)))
        progress(made[-1].records)
    return total(len(parts), made)
