"""Made-up sentences and their compressions, which `--quick` uses in place of people's."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = {
    "who": ("ministers", "farmers", "engineers", "two schools", "the old museum", "a small team"),
    "did": ("opened", "sold", "painted", "moved", "closed", "found"),
    "what": ("the bridge", "a garden", "several boats", "the archive", "new rooms", "a map"),
    "aside": ("after a long and rather cold winter", "as was said in the town hall", "to nobody's surprise"),
}


def write_sentences(path: Path, n: int = 24) -> Path:
    """JSON lines with "sentence" and "compression", which leaves the aside out; the same at every run."""
    draw, lines = random.Random(0), []
    for _ in range(n):
        who, did, what, aside = (draw.choice(words) for words in WORDS.values())
        lines.append(json.dumps(dict(sentence=f"{who} {did} {what}, {aside}.", compression=f"{who} {did} {what}.")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
