"""Runs the notebooks of docs/notebooks, each in a fresh process and an empty folder; a cell that fails ends it.

python .ci/notebooks.py            # a check: nothing is written
python .ci/notebooks.py --write    # keeps what the cells showed; of some notebooks only, if they are named
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"


def executed(notebook: Any) -> Any:
    """The notebook after all its cells were run."""
    with tempfile.TemporaryDirectory() as place:
        return NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": place}},
        ).execute()


def clean(notebook: Any) -> Any:
    """Without what differs from run to run: counts, times, names of cells, messages of libraries."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for index, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{index}", {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    return notebook


def main(given: list[str]) -> None:
    write, named = "--write" in given, [Path(one) for one in given if one != "--write"]
    # The notebooks import this tree, on one device; matplotlib draws into the notebook.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["JAX_PLATFORMS"] = "cpu"
    for path in named or sorted(FOLDER.glob("*.ipynb")):
        begun = time.perf_counter()
        notebook = executed(nbformat.read(path, as_version=4))
        if write:
            nbformat.write(clean(notebook), path)
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
