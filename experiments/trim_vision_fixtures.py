"""Extracts the numbers that tests of `jaxcompress.vision` need from a folder in the format of `vision_parity.py`.

    python experiments/trim_vision_fixtures.py FOLDER --out tests/fixtures/vision

Small cases of the functions on arrays, and small whole decoders; hidden inputs and outputs only where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from command import Command, arguments

KEEP = (
    "tome/match_0[0-4]", "tome/match_1*", "tome/kth_*", "tome/parse_r", "mustdrop/stage1_pool_[0-356]",
    "mustdrop/stage2_filter_[0-2]", "fastv/select_*", "fitprune/select_[13]", "sparsevlm/cluster_[1-4]",
    "sparsevlm/rank_[0-4]", "cdpruner/case_[0-2]", "fastervlm/case_[23]", "visionzip/case_[34]", "prumerge/adv_fixed_0",
    "prumerge/plus_fixed_0", "fastv/llm_dense", "fastv/llm_weights", "fastv/llm_K2_r12_*", "mustdrop/llm_0",
    "mustdrop/llm_weights",
)  # fmt: skip
UNUSED = ("attn_full", "_f64run", "cl0_in", "cl1_in", "cl2_in", "cl3_in")


@dataclass(frozen=True)
class Arguments(Command):
    """Writes the trimmed files and says how large they are."""

    folder: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("tests/fixtures/vision")


QUICK = Arguments(
    quick=True,
    folder=Path(__file__).parents[1] / "tests" / "fixtures" / "vision",
    out=Path("runs/quick/vision_fixtures"),
)


def main(options: Arguments) -> None:
    total = 0
    for pattern in KEEP:
        for path in sorted(options.folder.glob(f"{pattern}.npz")):
            with np.load(path) as data:
                kept = {key: data[key] for key in data.files if not any(key.endswith(end) for end in UNUSED)}
            out = options.out / path.parent.name / path.name
            out.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(out, **kept)
            total += out.stat().st_size
    print(f"{total / 1e6:.2f} MB in {options.out}")


if __name__ == "__main__":
    main(arguments(QUICK))
