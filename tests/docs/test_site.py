"""The site: its navigation, its reference of public names, its drawings."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, PAGES, ROOT, text

import drawings  # isort: skip  in docs/making, which `pages` adds to the path
import by_policy  # isort: skip
import public  # isort: skip

SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"")


def in_navigation(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from in_navigation(part)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    entries = {entry for entry in in_navigation(SETTINGS["nav"]) if not entry.endswith("/")}
    there = {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)}
    assert entries | {"api/index.md", *(f"api/{name}.md" for name in public.PAGES)} == there


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    for target in (first or second for first, second in LINK.findall((ROOT / page).read_text(encoding="utf-8"))):
        assert "://" in target or (ROOT / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_public_name_is_in_the_reference_once_and_explained() -> None:
    texts = [text(page) for page in PAGES if page.is_relative_to(DOCS)]
    made = [by_policy.page(one) for one in by_policy.pages()]
    assert not public.problems([*texts, *made])


def test_a_name_that_the_reference_lacks_is_told() -> None:
    assert "the reference lacks training.fit" in public.problems([])
    assert "the reference has models.read 2 times" in public.problems(["::: jaxcompress.models.read\n"] * 2)
    page = "```python\nfrom jaxcompress.prompt.baselines import tf_idf\n```\n"
    assert "pages import prompt.baselines.tf_idf, which the reference lacks" in public.problems([page])
    assert "models.nothing has no docstring" in public.problems(["::: jaxcompress.models.nothing\n"])


@pytest.mark.parametrize("path", drawings.for_readme(), ids=lambda path: path.stem)
def test_the_drawing_of_the_readme_is_what_its_script_makes(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == drawings.for_readme()[path]


def test_pages_name_drawings_that_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"<!-- drawing: ([a-z-]+) -->", text(page))}
    assert named == set(drawings.DRAWINGS)
    for draw in drawings.DRAWINGS.values():
        assert "\n" not in draw(drawings.PAGE)


def test_reading_modes_differ_as_the_drawing_says() -> None:
    for mode, most in (("streaming", 5), ("chunked", 8), ("oneshot", 12)):
        assert max(map(len, drawings.visible(mode))) == most
        assert all(query in seen for query, seen in enumerate(drawings.visible(mode)))


def test_what_policies_keep_fits_into_the_slots() -> None:
    data = drawings.data()
    total, slots = len(data["tokens"]), data["slots"]
    shown = {row["of"] for row in data["policies"]}
    assert shown == {one.title for one in by_policy.pages()}
    for row in data["policies"]:
        deaths = row["deaths"]
        if deaths is None:
            assert row["of"] in ("DMS", "dmc"), "only policies that no model ships weights for are not drawn"
            continue
        assert all(at < death <= total for quantile in deaths for at, death in enumerate(quantile)), row["policy"]
        held = sum(death == total for death in deaths[0])
        assert held == total if row["of"] == "Full" else held <= slots + 1, row["policy"]
    window = next(row for row in data["policies"] if row["policy"] == "window")
    assert all(row == [min(at + slots + 1, total) for at in range(total)] for row in window["deaths"])


def test_the_page_of_a_policy_shows_its_text_and_its_cost() -> None:
    page = by_policy.page(next(one for one in by_policy.pages() if one.title == "TOVA"))
    plain = re.sub(r"<[^>]+>", "", page)
    assert "::: jaxcompress.policies.TOVA" in page
    assert "".join(drawings.data()["tokens"])[-40:].split()[-1] in html.unescape(plain)
    assert "step / attention" in page
