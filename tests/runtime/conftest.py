"""A fake GPU for the tests that ask for one."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from .cuda_run import installed
from .fake_cuda import FakeCuda


@pytest.fixture()
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = installed(monkeypatch)
    yield fake
    gc.collect()
    assert fake.faults == []
    assert fake.leaks() == {}
