"""The reference page is current, and the emulator knows every row of the table."""

from __future__ import annotations

from pathlib import Path

from stagefuse.compiler.ptx.reference import reference
from stagefuse.compiler.ptx.table import forms
from stagefuse.runtime.emulator import meanings

PAGE = Path(__file__).resolve().parents[3] / "docs" / "ptx.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run `python -m stagefuse.compiler.ptx.reference --write`"
    )


def test_every_row_has_a_meaning() -> None:
    meanings.load_families()
    known = {*meanings.PURE, *meanings.EFFECT, *meanings.CONTROL}
    missing = {form.meaning for rows in forms().values() for form in rows} - known
    assert not missing
