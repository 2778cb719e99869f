"""What commands share: the compilation cache, the model, the text, progress and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxcompress.inputs.newest_files import keep_newest
from jaxcompress.inputs.position_warning import PositionWarning

if TYPE_CHECKING:
    from jaxcompress.checkpoints import Loaded
    from jaxcompress.distributed import ShardingRules
    from jaxcompress.evaluation.recall import Wording
    from jaxcompress.evaluation.results import Cell, Figure, Row
    from jaxcompress.generation.text import Tokenizer
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.policies import Policy

Line = TypeVar("Line")

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxcompress" / "compiled"

CACHE_BYTES = 256 * 2**20
"""How much of `CACHE` stays when a command begins: some 4,000 programs of 60 KB.

JAX's own bound (jax_compilation_cache_max_size) reads every entry's time for each new program: 0.45 s at 4,000 entries.
"""


def prepare() -> None:
    """Keeps compiled programs on disk, in `CACHE` and within its bound, or as JAX's own variables say."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            keep_newest(CACHE, CACHE_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def open_weights(model: str | None, dtype: str = "auto", rules: ShardingRules | None = None) -> Loaded:
    """What `jaxcompress.load` takes, or the embedded model if None; spread by rules.

    Raises:
      ValueError: the mesh does not divide the model's heads or widths; other cases as for `jaxcompress.load`.
    """
    prepare()
    from jaxcompress import embedded
    from jaxcompress.checkpoints import config_dtype, load

    where = None if rules is None else rules.weight
    loaded = load(embedded.decoder_folder() if model is None else model, dtype=dtype, sharding=where)
    if rules is not None:
        rules.check(loaded.config)
    own, taken = config_dtype(loaded.settings), loaded.model.dtype
    if model is not None and dtype == "auto" and own not in (None, taken):
        tell(f"weights in {taken}, which is faster on this device than the checkpoint's {own}; --dtype takes another")
    return loaded


def open_model(model: str | None, dtype: str = "auto", rules: ShardingRules | None = None) -> tuple[Decoder, Tokenizer]:
    """The same with its tokenizer."""
    loaded = open_weights(model, dtype, rules)
    return loaded.model, loaded.tokenizer


def folder_name(model: str | Path) -> str:
    """The last part of where a model lies, also of `.` and `..`."""
    return os.path.basename(os.path.abspath(model))


def chosen_policy(name: str, model: Decoder, folder: Path) -> Policy:
    """The policy that --policy names. `learned` is the one that was trained for this model (see `policy_of`).

    Raises:
      ValueError: an unknown name, or none was trained for it.
    """
    from jaxcompress.checkpoints import missing_policy, policy_of
    from jaxcompress.policies.names import get_policy

    if name.split("/")[0] != "learned":
        return get_policy(name)
    saved = policy_of(model, folder)
    if saved is None:
        raise ValueError(missing_policy(folder))
    return get_policy(name, learned=saved.make())


def tell_of_training(policy: str, slots: int | tuple[int, ...], folder: Path) -> None:
    """Tells if a model was trained for another policy or size than it is used with."""
    from jaxcompress.checkpoints import load_policy

    saved = load_policy(folder)
    if saved is None or "slots" not in saved.settings or policy.split("/")[0] == "learned":
        return
    as_flag = lambda sizes: " ".join(map(str, sizes if isinstance(sizes, list | tuple) else (sizes,)))
    trained, used = as_flag(saved.settings["slots"]), as_flag(slots)
    if (saved.name, trained) != (policy, used):
        tell(
            f"the model was trained with {saved.name} in {trained} slots; this is {policy} in {used}: "
            f"--policy {saved.name if ':' in saved.name else 'learned'} --slots {trained} takes its own"
        )


def peak_memory() -> int:
    """The most memory that this process has had, in bytes.

    Linux also says it in `getrusage`, but there a process that was started by another begins with the other's peak.
    """
    import resource  # absent on Windows

    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def dtypes_told(weights: str, state: str | None) -> str:
    """The type of the weights, and that of the state if it has another, for a cell."""
    return weights if state in (None, weights) else f"{weights}/{state}"


def short_hash(data: bytes) -> str:
    """Stands for what was read, in the settings of a cell."""
    return hashlib.sha256(data).hexdigest()[:12]


def line_of(kind: Callable[..., Line], row: Row, path: Path | None) -> Line:
    """The line of a table, of some class, that a row holds in its details.

    Raises:
      ValueError: they are those of another version.
    """
    try:
        return kind(**row.figure.details)
    except TypeError as error:
        raise ValueError(
            f"{path}: the row of {row.cell.policy} with {row.cell.slots} slots is of another version ({error}); give "
            "another --out"
        ) from None


class Incomplete(Exception):
    """Some cells of a sweep could not be measured."""


def swept(
    cells: Iterable[Cell],
    measure: Callable[[Cell], Iterable[Figure]],
    path: Path | None,
    shown: Callable[[Sequence[Row]], None],
) -> None:
    """Measures the cells that a file of rows lacks, and adds theirs.

    Raises:
      Incomplete: some failed, each of which was told; the others are done.
      ValueError: the file has a line that is no row.
    """
    from jaxcompress.evaluation.provenance import provenance
    from jaxcompress.evaluation.results import run_cells

    made, others = provenance(), set()

    def show(rows: Sequence[Row]) -> None:
        others.update(row.made.code for row in rows)
        shown(rows)

    where = lambda cell: f"{cell.task}, {cell.policy}, {cell.slots} slots, seed {cell.seed}"
    failed = lambda cell, error: tell(f"{where(cell)}: {str(error) or type(error).__name__}")
    done = run_cells(cells, measure, made, path, shown=show, failed=failed)
    if done.found:
        tell(f"{done.found} cells were in {path} already, {done.measured} were measured")
    if older := sorted(others - {made.code}):
        tell(f"rows of other versions of the code are among them: {', '.join(older)}; this one is {made.code}")
    if done.failed:
        total = done.measured + done.found + len(done.failed)
        raise Incomplete(f"{len(done.failed)} of {total} cells failed; the same command tries them again")


def tell(line: str) -> None:
    """One line on standard error."""
    print(f"jaxcompress: {line}", file=sys.stderr)


def too_small(policies: Sequence[Policy], slots: Sequence[int]) -> None:
    """Tells which policies need more than some of the slots, and are left out there.

    Raises:
      ValueError: so all of them are everywhere.
    """
    evicting = [policy for policy in policies if policy.forgets]
    small = ", ".join(f"{policy.name} needs {policy.needs}" for policy in evicting if min(slots) < policy.needs)
    if evicting and len(evicting) == len(policies) and all(max(slots) < policy.needs for policy in evicting):
        raise ValueError(f"{max(slots)} slots are too few: {small}")
    if small:
        tell(f"left out where slots are too few: {small}")


def check_writable(*paths: Path | None) -> None:
    """That files can be written where they are to go, before hours of work; raises OSError."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the name of a file")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(f"{path} cannot be written: permission denied")


def check_figure(path: Path | None) -> None:
    """That a picture can be drawn into a file, before hours of work.

    Raises:
      OSError: it cannot be written.
      ValueError: its suffix names no format of pictures.
      ImportError: matplotlib is not installed; the message says how to install it.
    """
    if path is None:
        return
    check_writable(path)
    from jaxcompress._extras import extra

    with extra("plots"):
        from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ValueError(f"a picture cannot be drawn into {path.name}: give a name with one of .{', .'.join(known)}")


@contextmanager
def told_warnings() -> Iterator[None]:
    """Tells the first `PositionWarning` in one line; the others of a command say the same of other texts."""
    told, shown = False, warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any) -> None:
        nonlocal told
        if not issubclass(category, PositionWarning):
            return shown(message, category, *where)
        if not told:
            tell(str(message))
        told = True
        return None

    with warnings.catch_warnings():
        warnings.simplefilter("always", PositionWarning)
        warnings.showwarning = show
        yield


def held_out_text() -> tuple[str, str]:
    """Name and content of the documents that the embedded model was not trained on."""
    from jaxcompress.embedded.corpus import held_out

    return "held-out documents", "\n".join(document.text for document in held_out())


def words_of(tokenizer: Tokenizer) -> Wording:
    """What recall tasks are made of, in a tokenizer's words."""
    from jaxcompress.evaluation.recall import wording

    return wording(tokenizer.vocabulary(), lambda text: tokenizer.encode(text, add_bos=False).tolist())


@contextmanager
def progress(total: int | None, what: str, unit: str = "tok") -> Iterator[Callable[[int], None]]:
    """A bar on standard error, only where that is a terminal; yields a function to call with what has been done."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(n: int) -> None:
            bar.update(n)

        yield advance


def write_json(value: Any, path: Path | None = None) -> None:
    """To a file, whole or not at all, or to standard output."""
    text = json.dumps(value, indent=2) + "\n"
    if path is None:
        print(text, end="")
        return
    from jaxcompress.inputs.whole_file import whole_file

    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
