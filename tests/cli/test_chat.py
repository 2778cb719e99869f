"""jaxcompress chat: through a pipe and through a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_cli import run  # noqa: F401  fixture
from tiny_chat import TEMPLATE, chat_folder

import jaxcompress as jc
from jaxcompress.checkpoints import Loaded, load
from jaxcompress.cli.chat import _talk
from jaxcompress.cli.conversation import COMMANDS, Conversation, retention_page
from jaxcompress.generation import Chat
from jaxcompress.policies import TOVA, policy
from jaxcompress.policies.forget_head import init_forget_head
from jaxcompress.policies.learned import DMS

# ruff: noqa: F811  pytest's fixtures


@policy
class Mine(TOVA):
    """A policy that no name gives back."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


@pytest.fixture
def say(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the program with these lines on standard input."""

    def say(*lines: str, model: Path | None = folder, flags: tuple[str, ...] = ("--slots", "8")) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        return run("chat", "--policy", "tova", "--max-new-tokens", 6, *flags, model=model)

    return say


def test_a_line_is_a_message(say: Any, loaded: Loaded) -> None:
    ran = say("Who are you?", "", "Grüße 😀", " /etc is a folder", "/quit", "never")
    chat = Chat(loaded, TOVA(), 8, max_new_tokens=6)
    answers = [chat.send(message) for message in ("Who are you?", "Grüße 😀", " /etc is a folder")]
    assert (ran.code, str(ran)) == (0, "".join(f"{answer}\n\n" for answer in answers))
    assert ran.err == "jaxcompress: an empty line is no message; write one, or /help\n"


@pytest.mark.slow
def test_flags_reach_the_chat(say: Any, loaded: Loaded, tmp_path: Path) -> None:
    flags = ("--slots", "6", "7", "--state-dtype", "int8", "--placement", "slot", "--mode", "chunked", "--chunk", "4",
             "--system", "S", "--template-args", '{"x": 1}', "--temperature", "0.7", "--seed", "3")  # fmt: skip
    ran = say("Who are you?", f"/save {tmp_path / 'file'}", flags=flags)
    assert (ran.code, "saved in" in ran.err) == (0, True)
    chat = Chat.load(tmp_path / "file", loaded)
    assert (chat.slots, chat.arguments, chat.messages[0]["content"]) == ([6, 7], {"x": 1}, "S")
    assert chat.options == dict(mode="chunked", chunk=4, dtype="int8", placement="slot")
    assert (chat.config.temperature, f"{chat.messages[-1]['content']}\n\n") == (0.7, str(ran))


def test_a_conversation_is_saved_loaded_and_forgotten(say: Any, loaded: Loaded, tmp_path: Path) -> None:
    file, chat = tmp_path / "file", Chat(loaded, TOVA(), 8, max_new_tokens=6)
    who, and_i = chat.send("Who are you?"), chat.send("And I?")
    assert say("Who are you?", f"/save {file}", "And I?", "/forget", "Who are you?") == f"{who}\n\n{and_i}\n\n{who}\n\n"
    later = say(f"/load {file}", "And I?", flags=("--slots", "9"))
    assert later == f"{and_i}\n\n"
    assert "tiny, tova, 8 slots" in later.err


def test_another_policy_reads_again_or_forgets(say: Any, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    window, chat = jc.get_policy("window+2"), Chat(loaded, TOVA(), 8, max_new_tokens=6)
    who, tokens = chat.send("Who are you?"), len(chat.tokens)
    ran = say("Who are you?", "/policy window+2 7", "And I?")
    assert ran == f"{who}\n\n{chat.reread(window, 7).send('And I?')}\n\n"
    assert "tiny, window+2, 7 slots" in ran.err
    assert f"read {tokens} tokens again" in ran.err
    monkeypatch.setattr("jaxcompress.cli.conversation.REREAD", 10)
    ran = say("Who are you?", "/policy window+2 7", "Who are you?")
    assert ran == f"{who}\n\n{chat.fresh(window, 7).send('Who are you?')}\n\n"
    assert f"forgot {tokens} tokens: up to 10 are read again" in ran.err


def test_the_page_shows_what_the_state_holds(say: Any, loaded: Loaded, tmp_path: Path) -> None:
    chat = Chat(loaded, TOVA(), 8, max_new_tokens=6)
    chat.send("Who are you?"), chat.send("And I?")
    death, _ = retention_page(chat)
    seen = death[:, 0] == death.shape[-1]  # by the last token, after which one more was evicted
    for layer, positions in zip(seen, np.asarray(chat.state.kv[0].positions)[:, 0, 0], strict=True):
        held = {int(position) for position in positions if position >= 0}
        assert len(held) == 8
        assert held < set(np.flatnonzero(layer).tolist())
        assert layer.sum() == 9
    page = tmp_path / "page.html"
    ran = say("Who are you?", "And I?", f"/retention {page}")
    assert f"of {len(chat.tokens)} tokens, {seen.mean():.0%} are held" in ran.err
    assert "a conversation of 4 messages" in page.read_text()


def test_help_lists_the_commands(say: Any) -> None:
    assert [line.split()[0] for line in say("/help").splitlines()] == [f"/{name}" for name in COMMANDS]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nothing", "there is no command /nothing"),
        ("/", "there is no command /;"),
        ("/save", "write /save FILE"),
        ("/save a b", "write /save FILE"),
        ("/save nowhere/file", "there is no folder nowhere"),
        ("/load nowhere", "there is no file nowhere"),
        ("/load {model}/model.safetensors", "is no state that was saved: it has other arrays in it"),
        ("/policy tofa", "unknown policy 'tofa', did you mean tova?"),
        ("/policy tova many", "the number of slots must be a whole number, not 'many'"),
        ("/policy tova 0", "at least 1 slot"),
        ("/retention", "nothing was said yet"),
        ("/quit now", "write /quit"),
    ],
)
def test_a_wrong_command_is_one_line(say: Any, folder: Path, line: str, says: str) -> None:
    ran = say(line.format(model=folder))
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert says in ran.err


def test_models_that_cannot_chat(say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = say("a", model=chat_folder(tmp_path, template=None))
    assert (bare.code, bare.err.count("\n"), "has no chat template" in bare.err) == (2, 1, True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    none = say("a", model=None)
    assert (none.code, none.err.count("\n"), "real_model.py --fetch" in none.err) == (2, 1, True)


def test_a_file_of_another_model(say: Any, tmp_path: Path) -> None:
    other = load(chat_folder(tmp_path, TEMPLATE))
    doubled = jax.tree.map(lambda x: x * 2, other.model)
    changed = Loaded(doubled, other.config, other.settings, other.folder, other.tokenizer_type)
    Chat(changed, TOVA(), 8).save(tmp_path / "file")
    ran = say(f"/load {tmp_path / 'file'}")
    assert (ran.code, "a model of the same shape with other weights" in ran.err) == (2, True)


def test_a_file_of_the_same_policy_with_other_weights(loaded: Loaded, tmp_path: Path) -> None:
    """They are in the file."""
    of = lambda seed: init_forget_head(
        jax.random.key(seed), layers=2, kv_heads=2, head_dim=8, hidden=4, start=(0.0, 1.0)
    )
    mine, other = (Chat(loaded, DMS(of(seed), window=2), 8) for seed in range(2))
    other.save(tmp_path / "file")
    conversation = Conversation(mine)
    conversation.take(f"/load {tmp_path / 'file'}")
    assert conversation.chat.policy == other.policy != mine.policy


def test_a_file_of_a_policy_of_ones_own_says_what_to_do(loaded: Loaded, tmp_path: Path) -> None:
    Chat(loaded, Mine(), 8).save(tmp_path / "file")
    conversation = Conversation(Chat(loaded, TOVA(), 8))
    with pytest.raises(ValueError, match=r"a policy of your own, .* go over to it first: /policy FILE.py:Mine"):
        conversation.take(f"/load {tmp_path / 'file'}")
    conversation.chat = Chat(loaded, Mine(), 8)
    conversation.take(f"/load {tmp_path / 'file'}")


def test_a_policy_that_fails_does_not_end_the_conversation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal what goes wrong is told, also in code of one's own."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from jaxcompress.policies import Policy, policy\n@policy\nclass Mine(Policy):\n"
        "    def score(self, stats, held):\n        return held.nothing\n"
    )
    lines = iter([f"/policy {mine}:Mine 8", "Hello?", "/help", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    _talk(Conversation(Chat(load(folder), TOVA(), 8)))
    told = capsys.readouterr()
    assert "mine.py, line 5: AttributeError" in told.err
    assert "score of your policy failed" in told.err
    assert "/retention" in told.out


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        ours, theirs = pty.openpty()
        become = (  # a run of tests in the background leaves it deaf to Ctrl-C
            "import fcntl, signal, sys, termios; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0); from jaxcompress.cli import main; "
        )
        self.program = subprocess.Popen(
            [sys.executable, "-c", f"{become}sys.exit(main(sys.argv[1:]))", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.file, self.seen = ours, ""

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Waits for a text; returns what was printed up to it, since the last one."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.file], [], [], 0.2)[0]:
                self.seen += os.read(self.file, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt(self, text: str) -> None:
        """Presses Ctrl-C until a text comes: between a prompt and the reading from the terminal it goes unnoticed."""
        for _ in range(24):
            self.type("\x03")
            with suppress(AssertionError):
                self.wait_for(text, seconds=5)
                return
        raise AssertionError(f"no {text!r} after Ctrl-C; {self.seen!r}")


def test_a_terminal(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    terminal = Terminal(
        "chat", "--model", str(folder), "--policy", "tova", "--slots", "8", "--max-new-tokens", "1000000"
    )
    try:
        assert "/help lists the commands" in terminal.wait_for("[0/8 slots, ")
        terminal.wait_for(" > ")
        terminal.interrupt(" > ")  # at the prompt it does nothing
        for message in ("Who are you?", "And I?"):
            terminal.type(f"{message}\n")
            terminal.wait_for(message)
            time.sleep(0.5)
            terminal.interrupt("the answer counts as far as it was written")
            terminal.wait_for("[8/8 slots, ")
            terminal.wait_for(" > ")
        terminal.type("/nothing\n")
        terminal.wait_for("there is no command /nothing")
        terminal.type(f"/save {tmp_path / 'file'}\n")
        terminal.wait_for("saved in")
        terminal.wait_for(" > ")
        terminal.type("\x04")
        assert terminal.program.wait(timeout=60) == 0
    finally:
        if terminal.program.poll() is None:
            os.kill(terminal.program.pid, signal.SIGKILL)
        terminal.program.wait()
        os.close(terminal.file)
    chat = Chat.load(tmp_path / "file", loaded)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    text = loaded.tokenizer.decode(chat.tokens, skip_special=False)
    assert text.count("<|im_end|>\n<|im_start|>user\nAnd I?<|im_end|>\n<|im_start|>assistant\n") == 1
    assert next(chat.stream("Still there?"))
