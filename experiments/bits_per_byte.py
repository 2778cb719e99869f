"""How well the embedded model predicts documentation it has never seen, beside general-purpose compressors.

    python experiments/bits_per_byte.py

The held-out topics are joined and read in rows of the model's context, each from a fresh start, with the full cache.
xz and zstd get the same text in one piece and have no prior knowledge. The model has read other Python text before, so
the figures show what training gained, not that the model is a better compressor.
"""

from __future__ import annotations

import json
import lzma
import math
from dataclasses import dataclass

from command import OfModel, arguments, need

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation import perplexity, rows_of_text

need("zstandard", install='pip install -e ".[dev]"')
import zstandard  # noqa: E402


@dataclass(frozen=True)
class Arguments(OfModel):
    """Prints bits per byte of the model, of xz and of zstd (JSON)."""

    context: int = 2048
    """Tokens of a row."""
    rows: int | None = None
    """Read only so many; all if not given."""


QUICK = Arguments(quick=True, context=128, rows=2)


def main(args: Arguments) -> None:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    text = "\n".join(document.text for document in held_out("topics/"))
    ids = tokenizer.encode(text, add_bos=False)
    rows = rows_of_text(ids, args.context, args.rows, tokenizer.bos_id)
    # Text outside the rows, such as a last, shorter row, is not counted in bytes either.
    read = text.encode() if rows[:, 1:].size == len(ids) else tokenizer.decode(rows[:, 1:].reshape(-1)).encode()
    result = perplexity(model, rows, jc.get_policy("full"), args.context)
    bits = result.nats * result.tokens / math.log(2)
    size = len(read)
    print(
        json.dumps(
            dict(
                bytes=size,
                tokens=result.tokens,
                nats_per_token=round(result.nats, 4),
                model=round(bits / size, 3),
                xz_9=round(8 * len(lzma.compress(read, preset=9)) / size, 3),
                zstd_19=round(8 * len(zstandard.compress(read, level=19)) / size, 3),
            ),
            indent=1,
        )
    )


if __name__ == "__main__":
    main(arguments(QUICK))
