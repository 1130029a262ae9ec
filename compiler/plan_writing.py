"""A plan file that is written while the plan is made: most of its bytes are weights, which are
known when the graph is, long before the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from . import plan_file
from .plan import Plan

if TYPE_CHECKING:
    import numpy as np


class _GivenUp(Exception):
    """There will be no plan."""


class Writing:
    """Writes a plan to a file, its arrays as soon as they are known. The file is there when all of
    it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays: Mapping[str, np.ndarray[Any, Any]] = {}
        self.thread: Thread | None = None
        self.failed: Exception | None = None
        self.plans: SimpleQueue[Plan | None] = SimpleQueue()

    def start(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Begins with the arrays that the plan is expected to have."""
        self.arrays = dict(arrays)
        self.thread = Thread(target=self._write, daemon=True)
        self.thread.start()

    def finish(self, plan: Plan) -> None:
        """Writes the rest; everything, if the plan has other arrays or nothing was begun. Raises
        PlanError, OSError."""
        if self.thread is None or plan.arrays.keys() != self.arrays.keys():
            self.stop()
            plan_file.write(plan, self.path)
            return
        self._give(plan)
        if self.failed is not None:
            raise self.failed

    def stop(self) -> None:
        """Leaves nothing of what is not finished."""
        if self.thread is not None:
            self._give(None)

    def _give(self, plan: Plan | None) -> None:
        assert self.thread is not None
        self.plans.put(plan)
        self.thread.join()
        self.thread = None

    def _write(self) -> None:
        try:
            plan_file.write_made(self.path, self.arrays, self._plan)
        except Exception as error:  # for the thread that finishes
            self.failed = error

    def _plan(self) -> Plan:
        plan = self.plans.get()
        if plan is None:
            raise _GivenUp
        return plan
