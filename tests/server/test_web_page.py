"""The page: a conversation, and beside it what the state holds. In a browser, and its script alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from browser import CHROMIUM, browser
from serving_here import serving, tiny_served

from jaxcompress.server import Settings

SEND = "(at('message').value = {!r}, at('form').requestSubmit())"
IDLE = "!at('send').disabled && at('stop').disabled"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_conversation_on_the_page(tmp_path: Path) -> None:
    settings = Settings(stop_seconds=5.0, max_tokens=20_000, api_key="sesame")
    with serving(tiny_served(tmp_path / "model"), settings) as here, browser(tmp_path / "profile") as tab:
        tab.call("Page.enable")
        tab.call("Page.navigate", url=here.url)
        tab.wait("document.readyState === 'complete' && !at('keyed').hidden")
        tab.run("(at('key').value = 'sesame', at('key').dispatchEvent(new Event('change')))")
        tab.wait("at('model').options.length === 3")
        tab.run("at('most').value = 12")
        tab.run(SEND.format("<b>Hello</b>"))
        tab.wait(f"spans.length > 20 && {IDLE}")
        assert tab.run("said.length") == 2
        assert tab.run("at('said').querySelector('.user').textContent") == "<b>Hello</b>"  # text, not markup
        assert tab.run("at('facts').textContent").startswith("16 of ")
        held = tab.run("spans.filter(one => one.className !== 'gone').length")
        assert 16 <= held < tab.run("spans.length")
        before = tab.run("spans.length")
        tab.run(SEND.format("And now?"))
        tab.wait(f"spans.length > {before} && {IDLE}")
        assert tab.run("at('facts').textContent").startswith("16 of ")
        tab.run("at('most').value = 20000")
        tab.run(SEND.format("Go on."))
        tab.wait("said.length === 5 && !at('stop').disabled && at('said').lastChild.textContent.length > 9")
        tab.run("at('stop').click()")
        tab.wait(IDLE)
        assert here.idle()  # the row is free
        tab.run("at('new').click()")  # the answer that was stopped may have been long
        tab.run("at('most').value = 30000")
        tab.run(SEND.format("Too much."))
        tab.wait("at('said').querySelector('.wrong') !== null")
        assert "from 1 to 20000" in tab.run("at('said').querySelector('.wrong').textContent")
        for width, dark in ((390, False), (1280, True)):
            tab.show(width, 800, dark)
            assert tab.run("document.documentElement.scrollWidth") <= width
        tab.run("at('new').click()")
        assert tab.run("at('held').childElementCount") == 0


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node here")
def test_answers_that_are_left_or_fail_leave_the_conversation_sound(tmp_path: Path) -> None:
    page = files("jaxcompress.server").joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    around = Path(__file__).with_name("page_alone.js").read_text(encoding="utf-8")
    (tmp_path / "page.js").write_text(f"{around}\n{{{script}\nconversations({{said: () => said}});}}", encoding="utf-8")
    ran = subprocess.run(["node", str(tmp_path / "page.js")], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "sound\n"), ran.stderr
