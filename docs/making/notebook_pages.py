"""Notebooks as pages: what they say, their code, and what it showed when they were run."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "notebooks"


class Page(NamedTuple):
    """A notebook as Markdown.

    Attributes:
      path: of the page, from the folder of the documentation.
      text: its Markdown.
      pictures: the PNG files that it shows, by their paths.
    """

    path: str
    text: str
    pictures: dict[str, bytes]


def page(notebook: Path) -> Page:
    """The page of a notebook; the notebook itself can be downloaded from it."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                name = f"{notebook.stem}_{len(pictures) + 1}.png"
                pictures[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the code above draws]({name})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                parts.append("```text\n" + "".join(output.get("text", data.get("text/plain", ""))).rstrip() + "\n```")
    parts.append(f"[This page as a notebook]({notebook.name}){{ download }}")
    return Page(f"notebooks/{notebook.stem}.md", "\n\n".join(parts) + "\n", pictures)


def pages() -> list[Page]:
    order = ("bounding_a_checkpoint", "a_policy_of_your_own", "training_through_the_state")
    return [page(FOLDER / f"{name}.ipynb") for name in order]
