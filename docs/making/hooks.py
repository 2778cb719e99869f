"""What MkDocs calls while it builds the site: pages that are made, drawings, links from names to the reference."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import by_policy  # noqa: E402
import drawings  # noqa: E402  beside this file
import notebook_pages  # noqa: E402
import public  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

log = logging.getLogger("mkdocs.hooks.jaxcompress")  # a warning fails the build
DRAWING = re.compile(r"^<!-- drawing: ([a-z-]+) -->$", re.MULTILINE)
APART = re.compile(r"(<(h[1-6]|a|pre|svg)\b.*?</\2>)", re.DOTALL)
CODE = re.compile(r"(?<!<b>)<code>(?=jc\.|jaxcompress\.|\w*[A-Z_])(?:jc\.|jaxcompress\.)?((?:\w+\.)*\w+)(\(\))?</code>")


def on_config(config: Any) -> Any:
    for entry in config.nav:
        if entry.get("Policies"):
            entry["Policies"] = ["policies/index.md", *({one.title: one.page} for one in by_policy.pages())]
        if entry.get("API"):
            entry["API"] = ["api/index.md", *({title: f"api/{name}.md"} for name, title in public.PAGES.items())]
        if entry.get("Notebooks"):
            entry["Notebooks"] = [one.path for one in notebook_pages.pages()]
    return config


def on_files(files: Files, config: Any) -> Files:
    made: dict[str, str | bytes] = {one.page: by_policy.page(one) for one in by_policy.pages()}
    made["policies/index.md"] = by_policy.index()
    for one in notebook_pages.pages():
        made |= {one.path: one.text, **one.pictures}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    texts = [file.content_string for file in files.documentation_pages()]
    for problem in public.problems(texts):
        log.warning(problem)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return DRAWING.sub(lambda found: by_policy.drawing(drawings.DRAWINGS[found[1]](drawings.PAGE)), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A name in code is a link to its place in the reference, where it has one."""

    def link(found: re.Match[str]) -> str:
        path = public.place(found[1])
        return f'<autoref optional identifier="{path}">{found[0]}</autoref>' if path else found[0]

    parts = APART.split(html)  # text, element, its tag, text, ...
    return "".join(CODE.sub(link, part) if at % 3 == 0 else part for at, part in enumerate(parts) if at % 3 != 2)
