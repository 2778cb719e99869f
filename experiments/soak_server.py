"""Mixed requests of all kinds, and faults, against a server in a process of its own.

    python experiments/soak_server.py

It sends whole and streamed requests, hang-ups, malformed bodies, requests over the limits and some prompts of many
tokens, several at a time, and checks three things: each answer is that of `generate` for the same request alone, so no
row saw the tokens of another; the server answers after each fault; and its memory stays flat. Then the server is killed
while it works, half of its prefix files are damaged, and another server takes the folder over: it tells of those that
it is asked for. A third finds the port in use and ends with exit code 2, and the second ends in order on SIGTERM. What
does not hold is told in the end, with exit code 2.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import Command, arguments, need, stop

import jaxcompress as jc
from jaxcompress.generation import GenerationConfig, generate

SLOTS, SEGMENT, PATH = 32, 64, "/v1/completions"
GROWTH = 1.2
"""How many times the memory of the first half of the requests the second half may take."""
MALFORMED = (
    b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "a", "n": 1000}',
    b'{"prompt": "a", "temperature": "x"}', b"\xff\xfe", b'{"prompt": [99999999]}', b'{"prompt": "a", "model": "no"}',
)  # fmt: skip


@dataclass(frozen=True)
class Arguments(Command):
    """Prints what was sent and found as JSON lines."""

    requests: int = 2000
    at_a_time: int = 24
    rows: int = 8
    long: int = 4
    """Prompts of `long_tokens` tokens."""
    long_tokens: int = 100_000
    checked: int = 60
    """Different requests whose answers are compared."""
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(quick=True, requests=60, at_a_time=6, rows=3, long=1, long_tokens=1000, checked=6)


class Process:
    """A server in a process of its own."""

    def __init__(self, args: Arguments, folder: Path) -> None:
        command = [
            sys.executable, "-m", "jaxcompress.cli", "serve", "--port", "0", "--slots", str(SLOTS), "--rows",
            str(args.rows), "--segment", str(SEGMENT), "--placement", "slot", "--prefixes", str(folder),
            "--prefix-mb", "8", "--prefix-disk-mb", "16", "--max-waiting", str(4 * args.at_a_time),
        ]  # fmt: skip
        self._log = folder.with_name(f"{folder.name}.log")
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(command, stderr=log)
        try:
            found = self._wait(lambda: re.search(r'"url": "http://127.0.0.1:(\d+)"', self.log()))
            self.port = int(found[1])
            self._wait(lambda: ask(self.port, "/ready")[0] == 200)
        except BaseException:
            self.kill()
            raise

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def memory(self) -> float:
        """MiB that it has in memory now."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def end(self, how: signal.Signals) -> int:
        self._process.send_signal(how)
        return self._process.wait(120)

    def kill(self) -> None:
        """Ends it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(120)

    def _wait(self, holds: Any) -> Any:
        until = time.monotonic() + 600
        while not (found := holds()):
            if self._process.poll() is not None or time.monotonic() > until:
                stop(f"the server did not start: {self.log()[-2000:]}")
            time.sleep(0.1)
        return found


def ask(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request("GET" if body is None else "POST", path, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if answer.getheader("content-type") == "application/json" else text
    finally:
        connection.close()


def requests_to_check(args: Arguments, text: str) -> list[dict[str, Any]]:
    """Prompts of many lengths, greedy and seeded."""
    draw = random.Random(0)
    found = []
    for n in range(args.checked):
        start, length = draw.randrange(len(text) - 4000), draw.choice((5, 40, 300, 1500))
        body: dict[str, Any] = dict(prompt=text[start : start + length], max_tokens=draw.choice((1, 8, 24)))
        body |= dict(temperature=0) if n % 2 else dict(temperature=0.8, top_p=0.9, seed=n)
        found.append(body)
    return found


def alone(loaded: Any, body: dict[str, Any]) -> str:
    """The text that `generate` gives."""
    config = GenerationConfig(
        temperature=body["temperature"], top_p=body.get("top_p"), stop_token_ids=tuple(loaded.tokenizer.eos_ids)
    )
    prompt = loaded.tokenizer.encode(body["prompt"])
    (tokens,) = generate(
        loaded.model, [prompt], jc.get_policy("tova"), SLOTS, max_new_tokens=body["max_tokens"], config=config,
        seeds=[body.get("seed", 0)], segment=SEGMENT, placement="slot",
    )  # fmt: skip
    until = jc.generation.TextUntil(loaded.tokenizer, (), loaded.tokenizer.eos_ids, prompt)
    return "".join(map(until.push, tokens[0][tokens[0] >= 0])) + until.finish()


def hang_up(port: int, body: dict[str, Any], seconds: float) -> None:
    """Sends a request, reads a little of the answer, and goes."""
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        connection.settimeout(seconds)
        with suppress(TimeoutError):
            connection.recv(1)


def one_request(port: int, n: int, kind: str, checked: list[Any], long: str) -> str:
    """Sends a request of a kind; returns what came of it."""
    body, expected = checked[n % len(checked)]
    if kind == "whole":
        status, answer = ask(port, PATH, body)
        return "right" if status == 200 and answer["choices"][0]["text"] == expected else f"WRONG {status}"
    if kind == "streamed":
        status, content = ask(port, PATH, dict(body, stream=True))
        lines = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: {")]
        text = "".join(line["choices"][0]["text"] for line in lines)
        return "right" if status == 200 and text == expected else f"WRONG {status}"
    if kind == "malformed":
        status, _ = ask(port, PATH, MALFORMED[n % len(MALFORMED)])
        return "refused" if 400 <= status < 500 else f"WRONG {status}"
    if kind == "too large":
        status, _ = ask(port, PATH, b'"' + b"x" * 5_000_000)
        return "refused" if status == 413 else f"WRONG {status}"
    if kind == "long":
        status, answer = ask(port, PATH, dict(prompt=f"{n} {long}", max_tokens=4, temperature=0))
        return f"answered after {answer['usage']['prompt_tokens']} tokens" if status == 200 else f"WRONG {status}"
    hang_up(port, dict(body, max_tokens=1000, stream=bool(n % 2)), 0.2 if n % 3 else 0.01)
    return "left"


def soak(args: Arguments, server: Process, checked: list[Any], long: str) -> dict[str, Any]:
    draw = random.Random(1)
    weights = {"whole": 45, "streamed": 25, "malformed": 14, "hang-up": 14, "too large": 2}
    kinds = draw.choices(list(weights), list(weights.values()), k=args.requests - args.long)
    for n in range(args.long):
        kinds.insert((n + 1) * len(kinds) // (args.long + 1), "long")
    begun, found, memory = time.monotonic(), Counter[str](), []
    part = max(len(kinds) // 10, 1)
    with ThreadPoolExecutor(args.at_a_time) as pool:
        for start in range(0, len(kinds), part):
            now = kinds[start : start + part]
            results = pool.map(
                lambda n, kind: one_request(server.port, n, kind, checked, long), range(start, len(kinds)), now
            )
            found.update(f"{kind}: {result}" for kind, result in zip(now, results, strict=True))
            memory.append(round(server.memory(), 1))
            print(json.dumps(dict(sent=start + len(now), mib=memory[-1])), flush=True)
    return dict(part="soak", seconds=round(time.monotonic() - begun, 1), found=dict(found), mib=memory)


def faults(args: Arguments, server: Process, checked: list[Any], folder: Path) -> list[dict[str, Any]]:
    """A server that is killed while it works, a damaged file, and a port in use."""
    rows = []
    with ThreadPoolExecutor(4) as pool:
        for n in range(4):
            pool.submit(hang_up, server.port, dict(checked[n % len(checked)][0], max_tokens=1000), 1.0)
        time.sleep(0.2)
        server.end(signal.SIGKILL)
    files = sorted(folder.glob("*.state"))
    for file in files[: len(files) // 2]:
        file.write_bytes(file.read_bytes()[:1000])
    with running(Process(args, folder)) as again:
        rows += taken_over(again, checked, len(files))
    return rows


def taken_over(again: Process, checked: list[Any], files: int) -> list[dict[str, Any]]:
    """A server in the folder of one that was killed, where half of the files are cut."""
    rows = []
    right = [one_request(again.port, n, "whole", checked, "") for n in range(len(checked))]
    told = again.log().count("a prefix file is left out and deleted")
    rows.append(
        dict(
            part="killed, half of the files cut",
            files=files,
            cut=files // 2,
            found=dict(Counter(right)),
            told=told,
        )
    )
    taken = subprocess.run(
        [sys.executable, "-m", "jaxcompress.cli", "serve", "--port", str(again.port)], capture_output=True, text=True
    )
    rows.append(dict(part="port in use", code=taken.returncode, told=taken.stderr.strip().splitlines()[-1]))
    rows.append(dict(part="ended by SIGTERM", code=again.end(signal.SIGTERM), stopped='"stopped"' in again.log()))
    return rows


@contextmanager
def running(server: Process) -> Iterator[Process]:
    """A server that ends in any case."""
    try:
        yield server
    finally:
        server.kill()


def faults_of(rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold of what is checked."""
    sent, damaged, port, ended = rows
    mib = sent["mib"]
    early, late = max(mib[: len(mib) // 2], default=0), max(mib[len(mib) // 2 :])
    held = {
        f"its memory grows: {early} MiB, then {late}": len(mib) < 2 or late <= GROWTH * early,
        f"{damaged['told']} of {damaged['cut']} damaged files were told": bool(damaged["cut"]) == bool(damaged["told"]),
        f"a port in use gives exit code {port['code']}": port["code"] == 2,
        # uvicorn ends in order, and then by the signal itself
        f"SIGTERM gives exit code {ended['code']}": ended["stopped"] and ended["code"] in (0, -signal.SIGTERM),
    }
    wrong = [f"not right: {what}" for what in (*sent["found"], *damaged["found"]) if "WRONG" in what]
    return wrong + [what for what, holds in held.items() if not holds]


def main(args: Arguments) -> None:
    need("starlette", "uvicorn", "prometheus_client", install='pip install "jaxcompress[serve]"')
    from jaxcompress.embedded.corpus import held_out

    text = "\n".join(document.text for document in held_out())
    loaded = jc.load_embedded()
    checked = [(body, alone(loaded, body)) for body in requests_to_check(args, text)]
    per_token = len(text) / len(loaded.tokenizer.encode(text))
    long = (text * (1 + int(args.long_tokens * per_token) // len(text)))[: int(args.long_tokens * per_token)]
    with tempfile.TemporaryDirectory() as folder:
        prefixes = Path(folder, "prefixes")
        with running(Process(args, prefixes)) as server:
            rows = [soak(args, server, checked, long)]
            rows += faults(args, server, checked, prefixes)
    for row in rows:
        print(json.dumps(row))
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1))
    if wrong := faults_of(rows):
        stop("; ".join(wrong))


if __name__ == "__main__":
    main(arguments(QUICK))
