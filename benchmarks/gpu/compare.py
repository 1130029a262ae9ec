"""The GPU against the emulator, bit by bit, on small shapes of every workload.

Both run the same PTX on the same data. Where the emulator says something else than the GPU, one of
them is wrong, or the instruction is one whose result the PTX ISA leaves open: `ex2.approx` and its
kind within a bound, and the order of a tensor core's sums. The table says by how many units in the
last place results differ at most, which is much where a sum is near 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagefuse.runtime.devices import open_plan

from ..workload import Family
from .plans import plan_of


@dataclass(frozen=True)
class Comparison:
    """How results of one workload differ. `error` is the GPU's against float64, see Workload."""

    workload: str
    elements: int = 0
    different: int = 0
    ulps: int = 0
    error: float = float("nan")
    tolerance: float = float("nan")
    failure: str = ""

    @property
    def good(self) -> bool:
        return not self.failure and self.error <= self.tolerance


def compared(families: Sequence[Family], seed: int, device: str, arch: str) -> Iterator[Comparison]:
    """Each family at its tiny shape."""
    for family in families:
        workload = family.workload(seed, family.tiny)
        try:
            plan = plan_of(workload, arch)
            with open_plan(plan, None, device) as pipe:
                found = _listed(pipe(**workload.inputs))
            with open_plan(plan, None, f"emulator:{arch}") as pipe:
                emulated = _listed(pipe(**workload.inputs))
            pairs = list(zip(found, emulated, strict=True))
            yield Comparison(
                family.name,
                sum(a.size for a in found),
                sum(int(np.count_nonzero(bits(a) != bits(b))) for a, b in pairs),
                max((ulps(a, b) for a, b in pairs), default=0),
                workload.error(found, workload.reference()),
                family.tolerance,
            )
        except Exception as error:
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            yield Comparison(family.name, failure=text)


def bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Elements as unsigned integers of their size."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def ulps(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    """The greatest distance of two arrays' elements, in floats that lie between."""
    if one.size == 0:
        return 0
    steps = [_ordered(a) for a in (one, other)]
    return int(np.max(np.where(steps[0] > steps[1], steps[0] - steps[1], steps[1] - steps[0])))


def _ordered(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers in the order of the floats, neighbours one apart."""
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    signed = np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}").astype(np.int64)
    lowest = np.int64(-1) << np.int64(8 * array.dtype.itemsize - 1)
    return np.where(signed < 0, lowest - signed, signed)


def _listed(results: Any) -> list[np.ndarray[Any, Any]]:
    return list(results) if isinstance(results, tuple) else [results]
