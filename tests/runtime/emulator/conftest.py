"""Launches that run on the GPU too, where an option asks for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from stagefuse.runtime import emulator

from .hardware import Hardware


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hardware", action="store_true", help="run launches on GPU 0 too")
    parser.addoption("--hardware-report", type=Path, help="a file to add a line to for each")


@cache
def _hardware(report: Path | None) -> Hardware:
    return Hardware(report)


@pytest.fixture(autouse=True)
def on_hardware(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on the GPU too where the option asks for it."""
    if request.config.getoption("--hardware", default=False):
        hardware = _hardware(request.config.getoption("--hardware-report"))
        left_open = request.node.get_closest_marker("left_open") is not None
        launch = hardware.wrap(emulator.Module.launch, request.node.nodeid, left_open)
        monkeypatch.setattr(emulator.Module, "launch", launch)


@pytest.fixture
def is_emulated(request: pytest.FixtureRequest) -> bool:
    """Whether results are the emulator's, which is exact where hardware only approximates."""
    return not request.config.getoption("--hardware", default=False)
