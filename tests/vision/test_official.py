"""Numbers of the authors' code, by the checks of `experiments/vision_parity.py`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "fixtures" / "vision"
QUICK = {
    "tome/match_03", "tome/match_11", "tome/parse_r", "mustdrop/stage1_pool_2", "mustdrop/stage2_filter_0",
    "fastv/select_hf_ratio_1", "fitprune/select_3", "sparsevlm/cluster_1", "sparsevlm/rank_2", "visionzip/case_4",
    "fastervlm/case_2", "cdpruner/case_1", "prumerge/plus_fixed_0",
}  # fmt: skip
FILES = [path for path in sorted(FOLDER.glob("*/*.npz")) if "weights" not in path.stem]
NAMES = [f"{path.parent.name}/{path.stem}" for path in FILES]


@pytest.fixture(scope="module")
def parity():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        yield importlib.import_module("vision_parity")
    finally:
        sys.path.remove(str(ROOT / "experiments"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=n, marks=[] if n in QUICK else pytest.mark.slow) for p, n in zip(FILES, NAMES, strict=True)],
)
def test_equal_to_the_authors(parity, path: Path) -> None:
    found = parity.check(path)
    assert found
    assert not [(what, why) for what, equal, why in found if not equal]


def test_all_quick_cases_are_there() -> None:
    assert set(NAMES) >= QUICK
