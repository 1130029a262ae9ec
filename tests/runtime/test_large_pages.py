"""Weights are put into pages of 2 MB where they are: nothing of them changes."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from stagefuse.runtime.memory import LARGE_PAGE, pointer_to, use_large_pages


def pages(address: int) -> tuple[bool, int]:
    """Whether large pages are wanted for what lies at an address, and the KB in such pages."""
    inside, wanted, held = False, False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            wanted = "hg" in rest
        elif inside and first == "AnonHugePages:":
            held = int(rest[0])
    return wanted, held


def test_large_arrays_move_as_they_are(rng: np.random.Generator) -> None:
    held = rng.bytes(3 * LARGE_PAGE + 12345)
    array = np.frombuffer(held, np.uint8)[7:]
    before = hash(array.tobytes())
    use_large_pages(array)
    assert hash(array.tobytes()) == before
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text(encoding="ascii"):
        pytest.skip("this system has no large pages")
    assert pages(pointer_to(array) + LARGE_PAGE)[0]


@pytest.mark.parametrize("size", [0, 1, LARGE_PAGE - 1])
def test_small_arrays_stay(size: int, rng: np.random.Generator) -> None:
    array = rng.integers(0, 255, size, np.uint8)
    before = array.copy()
    use_large_pages(array)
    assert np.array_equal(array, before)


def test_mapped_files_stay(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * LARGE_PAGE))
    with open(tmp_path / "file", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for array in (
        np.frombuffer(memoryview(mapped)[64:], np.uint8),
        np.memmap(tmp_path / "file", np.uint8, "r"),
    ):
        use_large_pages(array)
        assert not pages(pointer_to(array) + LARGE_PAGE)[0]
