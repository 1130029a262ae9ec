"""Weights in pieces for AMX, made when a call is first to use them; see `compiler.cpu.cutting`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from stagefuse.compiler.plan import PipelinePlan, cut_bytes

from . import forks
from .memory import allocate, pointer_to


class Cutter(Protocol):
    """Native code that cuts panels."""

    def cutter(self, columns: int) -> int:
        """The kernel for panels of so many columns: its address. Raises PlanError."""

    def run(self, steps: int, count: int, threads: int, /) -> Any:
        """Runs step records."""


class Pieces:
    """Panels of constants in pieces.

    They take 1.5 times the constants' memory, and cutting what is not among them takes as long as
    a product of 30 rows: so there are LARGEST bytes of them at most, those of the first steps.
    Which ones they are is the plan's alone, as the bits of results are.
    """

    LARGEST = 1 << 29

    def __init__(
        self, plan: PipelinePlan, arrays: Mapping[str, np.ndarray[Any, Any]], code: Cutter
    ) -> None:
        self._arrays, self._code = arrays, code
        self._places: dict[str, int] = {}
        self._size = 0
        for step in plan.steps:
            for pieces in step.pieces:
                name = plan.buffers[step.buffers[pieces.buffer]].array
                if name is not None and name not in self._places:
                    size = _size(arrays[name].shape)
                    if size and self._size + size <= self.LARGEST:
                        self._places[name] = self._size
                        self._size += size
        self._memory: np.ndarray[Any, Any] | None = None
        self._lock = forks.lock()
        self.wanted: set[str] = set()
        self.made: set[str] = set()

    def of(self, name: str) -> int:
        """Where the pieces of an array of panels will be after `cut`, or 0."""
        if name not in self._places:
            return 0
        with self._lock:
            if self._memory is None:  # all of it at once: so that it lies in huge pages
                self._memory = allocate(self._size, "weights in pieces")
            self.wanted.add(name)
            return pointer_to(self._memory) + self._places[name]

    def cut(self, threads: int) -> None:
        """Makes the pieces of what was asked for and has none."""
        with self._lock:
            names = sorted(self.wanted - self.made)
            if not names:
                return
            assert self._memory is not None
            status = np.zeros(2, np.int64)
            arguments, records = [], []
            for name in names:
                panels = self._arrays[name]
                *lead, depth, columns = panels.shape
                place = pointer_to(self._memory) + self._places[name]
                arguments.append(np.array([pointer_to(panels), depth, place], np.int64))
                record = (
                    self._code.cutter(columns), pointer_to(arguments[-1]), math.prod(lead), 1,
                    0, 0, pointer_to(status),
                )  # fmt: skip
                records.append(record)
            table = np.array(records, np.int64)
            self._code.run(pointer_to(table), len(records), threads)
            self.made.update(names)


def _size(shape: Sequence[int]) -> int:
    *lead, depth, columns = shape
    return math.prod(lead) * cut_bytes(depth, columns) if depth else 0
