"""What of a text is still there."""

from __future__ import annotations

import pytest

from jaxcompress.prompt.recovery import recovery

TEXT = "The council votes on the budget of 3.5 million in 2021, and the council is late: 2021 was last."


def test_nothing_lost() -> None:
    found = recovery(TEXT, TEXT)
    assert (found.kinds, found.mentions, found.numbers, found.missing, found.missing_numbers) == (1, 1, 1, (), ())


def test_everything_lost() -> None:
    found = recovery(TEXT, "")
    assert (found.kinds, found.mentions, found.numbers) == (0, 0, 0)
    assert found.missing[0] == "council"
    assert found.missing_numbers[0] == "2021"


def test_shares() -> None:
    found = recovery(TEXT, "council vote budget 3.5 2021")
    # council twice, vote, budget, million, late, last
    assert found.kinds == pytest.approx(3 / 6)
    assert found.mentions == pytest.approx(3 / 7)
    assert found.numbers == pytest.approx(2 / 3)
    assert set(found.missing) == {"million", "late", "last"}
    assert found.missing_numbers == ("2021",)


def test_a_number_must_be_whole() -> None:
    assert recovery("It costs 1,250 dollars.", "costs 1 dollars").numbers == 0
    assert recovery("It costs 1,250 dollars.", "costs 1,250").numbers == 1


def test_what_is_told() -> None:
    told = str(recovery(TEXT, "council vote budget 3.5 2021"))
    assert told.startswith("50% of the content words, 43% of their mentions, 67% of the numbers; lost: ")
    assert told.endswith(", 2021")
    assert "lost" not in str(recovery(TEXT, TEXT))


def test_a_text_without_content() -> None:
    found = recovery("and of the", "")
    assert (found.kinds, found.mentions, found.numbers) == (1, 1, 1)
    assert recovery("", "") == found
