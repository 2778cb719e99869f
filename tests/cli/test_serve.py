"""What `jaxcompress serve` refuses before it serves."""

from __future__ import annotations

import gc
import socket
import warnings
import weakref
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from jaxcompress.cli import command_of, main
from jaxcompress.cli.runtime import folder_name, told_warnings
from jaxcompress.inputs.position_warning import PositionWarning


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--rows 0", "--rows must be at least 1, not 0"),
        ("--max-prompt-tokens 0", "--max-prompt-tokens must be at least 1, not 0"),
        ("--port 70000", "--port must be from 0 (any free one) to 65535, not 70000"),
        ("--seconds 0", "--seconds must be above 0, not 0"),
        ("--port 0 --more-pools h2o", "--more-pools takes POLICY:SLOTS such as h2o:256, not 'h2o'"),
        ("--port 0 --more-pools no:5", "unknown policy 'no'"),
        ("--port 0 --mode oneshot", "a pool reads prompts in pieces between the tokens of other rows"),
        ("--port 0 --policy tova/once4", "cannot be a row of a pool"),
        ("--port 0 --more-pools h2o:8 h2o:08", "there are two pools h2o:8; name each once"),
        ("--port 0 --more-pools tova:512", "there are two pools tova:512; name each once"),
        ("--port 0 --prefixes kept --prefix-mb 0", "--prefix-mb 0 keeps no states of prompts, and --prefixes keeps"),
        ("--port 0 --prefix-disk-mb 5", "--prefix-disk-mb is for --prefixes"),
        ("--port 0 --policy full --more-pools full:9 --placement slot", "--placement does nothing for full"),
        ("--port 0 --policy full --more-pools no:9 --placement slot", "unknown policy 'no'"),
        ("--port 0 --api-key=", "the API key is empty, and would guard nothing"),
        ("--port 0 --api-key schlüssel", "the API key has letters that a header of HTTP cannot carry"),
        ("--port 0 --allowed-hosts a*.example", "'a*.example' is no name of a host: give one without port"),
        ("--port 0 --allowed-hosts a.example localhost:8000", "'localhost:8000' is no name of a host"),
        ("--host 192.0.2.1", "the server cannot listen at 192.0.2.1, port 8000"),
    ],
)
def test_what_cannot_be_served(flags: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.count("\n") == 1


def test_a_key_of_white_space_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JAXCOMPRESS_API_KEY", " \n")
    assert main(["serve", "--port", "0"]) == 2
    assert "the API key is empty" in capsys.readouterr().err
    monkeypatch.setenv("JAXCOMPRESS_API_KEY", "sesame\n")
    assert command_of(["serve"])._settings().api_key == "sesame"
    assert command_of(["serve", "--api-key", "other"])._settings().api_key == "other"


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is in use; give another with --port" in capsys.readouterr().err


def test_a_warning_is_told_once_and_none_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """A server would keep one of each long request, for ever."""
    seen = []
    with told_warnings():
        for n in range(3):
            warning = PositionWarning(f"positions reach {n}")
            seen.append(weakref.ref(warning))
            warnings.warn(warning, stacklevel=1)
            del warning
        gc.collect()
        assert [one() for one in seen] == [None] * 3
    assert capsys.readouterr().err == "jaxcompress: positions reach 0\n"


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ("", ("localhost", "127.0.0.1", "127.0.0.1", "[::1]")),
        ("--host 0.0.0.0", ("*",)),
        ("--host 0.0.0.0 --allowed-hosts a.example *.b.example", ("a.example", "*.b.example")),
        ("--host ::1", ("localhost", "::1", "127.0.0.1", "[::1]")),
    ],
)
def test_names_by_which_the_server_may_be_called(flags: str, hosts: tuple[str, ...]) -> None:
    assert command_of(["serve", *flags.split()])._settings().hosts == hosts


def test_a_model_of_this_folder_has_the_name_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the `model` of requests, and was empty."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert [folder_name(one) for one in (".", "./", Path(), "../mine", "lab/mine")] == ["mine"] * 5
