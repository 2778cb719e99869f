"""States of prefixes: in memory, on disk, and where files are not what they should be."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import CONFIGS, SEGMENT, alone, prompt, spec
from tiny import tiny_decoder

from jaxcompress.inputs import whole_file
from jaxcompress.models.fingerprint import fingerprint
from jaxcompress.policies import TOVA, policy
from jaxcompress.policies.names import get_policy
from jaxcompress.serving import Engine, PrefixLimits, Request
from jaxcompress.serving.prefix_files import PrefixFiles
from jaxcompress.serving.prefixes import marks

SPEC = spec(rows=2)


@policy
class Typed(TOVA):
    """A policy whose code is that of this file."""


Open = Callable[..., Engine]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens engines, and closes them."""
    engines: list[Engine] = []

    def start(folder: Path | None = None, one: Any = SPEC, **limits: Any) -> Engine:
        engines.append(Engine({"one": one}, prefixes=PrefixLimits(folder=folder, **limits)))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(seconds=0.0)


def known(engine: Engine, tokens: np.ndarray, config: int = 0) -> int:
    """The tokens that were not read again; the answer is that of the request alone."""
    request = Request(tokens, 5, CONFIGS[config], seed=config)
    answer = engine.submit(request).answer()
    assert answer.tokens.tolist() == alone(request, engine.pools["one"])
    return answer.known_tokens


def test_marks_are_those_of_all_prompts_that_begin_alike() -> None:
    one, other = prompt(30), np.concatenate([prompt(30)[:17], prompt(20)])
    ends = [mark.tokens for mark in marks(b"", one, 8)]
    assert ends == [8, 16, 24]
    assert [a == b for a, b in zip(marks(b"", one, 8), marks(b"", other, 8), strict=False)] == [True, True, False]
    assert not set(marks(b"", one, 8)) & set(marks(b"x", one, 8))


@pytest.mark.parametrize("changes", [{}, dict(mode="chunked", chunk=4)], ids=["streaming", "chunked"])
def test_a_prefix_is_not_read_again(opened: Open, changes: dict[str, Any]) -> None:
    engine, text = opened(one=spec(rows=2, **changes)), prompt(3 * SEGMENT + 5)
    assert known(engine, text) == 0
    assert known(engine, text, config=1) == 3 * SEGMENT
    assert known(engine, text[: 3 * SEGMENT], config=1) == 3 * SEGMENT  # all of it: nothing is left to read
    assert known(engine, np.concatenate([text, prompt(30, seed=1)])) == 3 * SEGMENT
    assert known(engine, np.concatenate([text, prompt(30, seed=1)])) == 3 * SEGMENT + 32
    assert known(engine, text[1:]) == 0


def test_what_prompts_share_is_kept_from_the_second_one_on(opened: Open) -> None:
    engine, system = opened(), prompt(2 * SEGMENT)
    found = [known(engine, np.concatenate([system, prompt(20, seed=seed)]), config=seed % 4) for seed in range(4)]
    assert found == [0, 0, 2 * SEGMENT, 2 * SEGMENT]


def test_those_used_longest_ago_go_first(opened: Open) -> None:
    engine = opened()
    known(engine, prompt(SEGMENT))
    assert engine.prefixes is not None
    size = engine.prefixes.nbytes
    assert size > 0
    engine = opened(memory_bytes=2 * size)
    texts = [prompt(SEGMENT, seed=seed) for seed in range(3)]
    assert [known(engine, text) for text in (texts[0], texts[1], texts[0], texts[2])] == [0, 0, SEGMENT, 0]
    assert [known(engine, text) for text in (texts[0], texts[1])] == [SEGMENT, 0]
    assert engine.prefixes is not None
    assert engine.prefixes.nbytes == 2 * size
    assert len(engine.prefixes) == 2
    engine = opened(memory_bytes=size - 1)
    assert [known(engine, texts[0]), known(engine, texts[0])] == [0, 0]


def test_files_outlive_the_engine_and_stay_within_their_limit(opened: Open, tmp_path: Path) -> None:
    texts = [prompt(SEGMENT, seed=seed) for seed in range(3)]
    engine = opened(tmp_path)
    known(engine, texts[0])
    engine.close()
    (first,) = tmp_path.iterdir()
    os.utime(first, (1, 1))
    killed, others = (tmp_path / f".{name}.state.77.partial" for name in ("killed", "others"))
    for part in (killed, others):
        part.write_bytes(b"half")
    os.utime(killed, (1, 1))
    engine = opened(tmp_path, disk_bytes=int(2.5 * first.stat().st_size))
    assert [known(engine, text) for text in (texts[1], texts[0], texts[2])] == [0, SEGMENT, 0]
    engine.close()
    assert not killed.exists()
    others.unlink()  # it may be what another server was writing
    assert len(list(tmp_path.iterdir())) == 2
    engine = opened(tmp_path, memory_bytes=0)
    assert [known(engine, text) for text in (texts[0], texts[2], texts[1])] == [SEGMENT, SEGMENT, 0]


def test_a_folder_that_is_shared_has_one_limit(tmp_path: Path) -> None:
    """Each process reads what the other wrote, and the one that was used longest ago goes, whoever wrote it."""
    state, model = SPEC.fresh(), SPEC.model
    one = PrefixFiles(tmp_path, 2**30)
    one.write("a", state, model)
    one.close()
    size = one.nbytes
    os.utime(tmp_path / "a.state", (1, 1))
    one, other = PrefixFiles(tmp_path, 2 * size), PrefixFiles(tmp_path, 2 * size)
    one.write("b", state, model)
    one.close()
    assert other.read("b", model, SPEC.policy) is not None
    other.write("c", state, model)
    other.close()
    assert {path.name for path in tmp_path.iterdir()} == {"b.state", "c.state"}
    assert one.read("a", model, SPEC.policy) is None
    assert one.read("c", model, SPEC.policy) is not None
    assert one.nbytes == other.nbytes == 2 * size


def test_files_of_another_pool_are_not_taken(opened: Open, tmp_path: Path) -> None:
    engine = opened(tmp_path)
    known(engine, prompt(SEGMENT))
    engine.close()
    assert known(opened(tmp_path, one=spec("window", rows=2)), prompt(SEGMENT)) == 0


@pytest.mark.parametrize("content", [b"", b"no state", None], ids=["empty", "garbage", "cut"])
def test_a_damaged_file_is_left_out_and_deleted(
    opened: Open, tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(tmp_path)
    known(engine, prompt(SEGMENT))
    engine.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    engine = opened(tmp_path)
    with caplog.at_level(logging.WARNING, "jaxcompress.serving"):
        assert known(engine, prompt(SEGMENT)) == 0
    assert "a prefix file is left out and deleted" in caplog.text
    engine.close()
    assert known(opened(tmp_path), prompt(SEGMENT)) == SEGMENT  # it was written anew


def test_another_model_of_equal_weights_has_other_prefixes() -> None:
    other = replace(SPEC, model=tiny_decoder(max_position=2**20, norm_eps=1e-3))
    assert fingerprint(other.model) == fingerprint(SPEC.model)
    assert other.digest() != SPEC.digest()
    assert SPEC.digest() == replace(SPEC, rows=3).digest()
    narrow = replace(SPEC, model=jax.tree.map(lambda x: x.astype(jnp.bfloat16), SPEC.model), dtype="float32")
    assert fingerprint(narrow.model) == fingerprint(SPEC.model)
    assert narrow.digest() != SPEC.digest()


def test_policies_of_one_name_and_other_code_have_other_prefixes(tmp_path: Path) -> None:
    source = "from jaxcompress.policies import TOVA, policy\n\n\n@policy\nclass Far(TOVA):\n    needs = {}\n"

    def digest(name: str, needs: int, around: str = "") -> bytes:
        (tmp_path / name).write_text(source.format(needs))
        return replace(SPEC, policy=get_policy(f"{tmp_path / name}:Far{around}")).digest()

    found = [digest("a.py", 2), digest("b.py", 3), digest("a.py", 4), digest("a.py", 4, "/every2")]
    assert len(set(found)) == 4
    assert digest("a.py", 2) == found[0]
    assert digest("a.py", 4, "/every2") == found[3]


def test_code_that_cannot_be_read_shares_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = replace(SPEC, policy=Typed())
    assert typed.digest() == typed.digest()
    monkeypatch.setattr(Typed, "__module__", "nowhere")
    assert typed.digest() != typed.digest()


def test_a_folder_that_cannot_be_looked_into_fails_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as one of a disk that has gone: there, and for a name that is too long, `Path.exists` raises."""
    files = PrefixFiles(tmp_path, 2**30)
    files.folder = tmp_path / ("x" * 300)
    files.write("one", SPEC.fresh(), SPEC.model)
    files.close()
    assert "a prefix file was not written" in caplog.text


def test_a_full_disk_ends_the_writing_only(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(tmp_path)
    known(engine, prompt(SEGMENT))
    assert engine.prefixes is not None
    files = engine.prefixes.files
    assert files is not None
    until = time.monotonic() + 20
    while not files.nbytes and time.monotonic() < until:
        time.sleep(0.01)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_file.os, "fsync", full)
    with caplog.at_level(logging.WARNING, "jaxcompress.serving"):
        assert [known(engine, prompt(SEGMENT, seed)) for seed in (1, 1, 2)] == [0, SEGMENT, 0]
        engine.close()
    assert caplog.text.count("prefix files are no longer written: [Errno 28] No space left") == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert not files.writes
    assert files.read(next(tmp_path.iterdir()).stem, SPEC.model, SPEC.policy) is not None


def test_another_error_of_writing_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names: list[str] = []

    def broken(*_: Any) -> None:
        names.extend(path.name for path in tmp_path.iterdir())
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(whole_file.os, "fsync", broken)
    files = PrefixFiles(tmp_path, 2**30)
    files.write("one", SPEC.fresh(), SPEC.model)
    files.close()
    assert names == [f".one.state.{os.getpid()}.partial"]  # another server may write the same file now
    assert "a prefix file was not written: [Errno 5]" in caplog.text
    assert files.writes


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        PrefixFiles(tmp_path / "file", 1)
