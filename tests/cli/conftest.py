"""A shell, a program that is right, and one that is wrong."""

from pathlib import Path

import pytest

from .shell import GOOD, WRONG, Shell


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pipe"
    path.write_text(GOOD)
    return path


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.pipe"
    path.write_text(WRONG)
    return path
