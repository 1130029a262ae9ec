"""A pipeline made ready for sizes: which addresses and counts its steps get.

A loop is a record after those of its steps, see `compiler.cpu.pool`: the number of the turn is
among the argument slots, and so are the addresses of the slots that hold it for kernels.

A `Bucket` is what one combination of sizes fixes: a template of the kernels' argument slots and
of the step records. A `Workspace` is what one call at a time owns: the arena, scratch memory and
the status word. `Workspace.bind` puts the two together; calls only fill in the addresses of
inputs and results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagefuse.compiler.plan import (
    CUT_ROWS,
    BufferPlan,
    LoopPlan,
    PiecesPlan,
    PipelinePlan,
    StepPlan,
)
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.frozen import frozen

from .errors import OutOfMemory, PlanError
from .memory import ALIGNMENT, POOLED_BYTES, allocate, pointer_to, use_large_pages
from .pieces import Cutter, Pieces

_MAX = 1 << 62
_RANGES = 64
"""Ranges of a step for each thread, at most: neighbours that run on two threads disturb each
other's prefetching, and fewer leave a thread waiting for the others at the end."""
# A step record: function, argument slots, count, grain, scratch, stride of scratch, status.
_RECORD = 7
_FUNCTION, _ARGS, _COUNT, _GRAIN, _SCRATCH, _STRIDE, _STATUS = range(_RECORD)


@frozen
class ResultSpec:
    """A result's shape, dtype and size for one combination of sizes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int


@frozen
class Loop:
    """Records from `first` to before `end`, `count` times; `slots` hold the turn's number."""

    first: int
    end: int
    count: int
    slots: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Bucket:
    """What a combination of sizes fixes. Slots of the arena are offsets until bound."""

    dims: dict[str, int]
    results: tuple[ResultSpec, ...]
    args: np.ndarray[Any, Any]
    records: np.ndarray[Any, Any]
    labels: tuple[StepPlan | None, ...]  # None: the end of a loop
    arena_slots: np.ndarray[Any, Any]
    inner_slots: np.ndarray[Any, Any]  # those that hold offsets into `args` itself
    small: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]  # of results, if all are small
    slots: tuple[tuple[int, int], ...]  # place among inputs, results and states, and slot of each
    arena_bytes: int
    scratch_bytes: int
    loops: tuple[Loop, ...] = ()


class Evaluator:
    """Values of the plan's expressions for one combination of sizes, each computed once."""

    def __init__(self, values: dict[str, int]) -> None:
        self.values = values
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        value = self._known.get(text)
        if value is None:
            value = self._known[text] = parse(text).evaluate(self.values)
        return value

    def shape(self, texts: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self(text) for text in texts)


def size_of(buffer: BufferPlan, evaluate: Evaluator, where: str) -> int:
    """The bytes of a buffer for the evaluator's sizes. Raises PlanError, OutOfMemory."""
    size = most = DTYPES[buffer.dtype].itemsize
    for extent in evaluate.shape(buffer.shape):
        if extent < 0:
            raise PlanError(f"{where}: {buffer.name} has a negative size")
        size *= extent
        most *= max(extent, 1)
    if most > _MAX:  # of an array without elements too, since strides count its other extents
        sizes = _sizes_text(evaluate.values)
        raise OutOfMemory(f"{where}: {buffer.name} is larger than memory can be for {sizes}")
    return size


def larger_than_slot(buffer: BufferPlan, evaluate: Evaluator, where: str) -> PlanError:
    """The error of a buffer that does not fit its part of the arena."""
    sizes = _sizes_text(evaluate.values)
    return PlanError(f"{where}: {buffer.name} is larger than its slot for {sizes}")


def result_specs(plan: PipelinePlan, evaluate: Evaluator) -> tuple[ResultSpec, ...]:
    """Shape, dtype and size of each result."""
    return tuple(
        ResultSpec(evaluate.shape(b.shape), DTYPES[b.dtype].numpy, size_of(b, evaluate, plan.name))
        for b in (plan.buffers[r.buffer] for r in plan.results)
    )


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Preparer:
    """Makes buckets of one pipeline: knows its weights' addresses and its kernels' ones."""

    def __init__(
        self,
        plan: PipelinePlan,
        functions: dict[str, int],
        arrays: Mapping[str, np.ndarray[Any, Any]],
        threads: int,
        cutter: Cutter | None = None,
    ) -> None:
        self.plan, self.functions, self.threads = plan, functions, threads
        needed = {b.array for b in plan.buffers if b.array is not None}
        # Kept as long as kernels may read them: what is mapped or dense already is not copied.
        self._arrays = {name: np.require(arrays[name], None, ["C", "A"]) for name in needed}
        for array in self._arrays.values():
            use_large_pages(array)
        self._pieces = Pieces(plan, self._arrays, cutter) if cutter else None
        self._fixed = {
            i: pointer_to(self._arrays[b.array])
            for i, b in enumerate(plan.buffers)
            if b.array is not None
        }

    def prepare(self, values: dict[str, int]) -> Bucket:
        """The bucket for values of the dims. Raises PlanError if the plan contradicts itself."""
        evaluate = Evaluator(values)
        offsets, arena_bytes = self._arena(evaluate)
        table = _Table(self, evaluate, offsets)
        table.add(0, len(self.plan.steps), self.plan.loops)
        if self._pieces is not None:
            self._pieces.cut(self.threads)
        arena = [slot for buffer in offsets for slot in table.used.get(buffer, ())]
        results = result_specs(self.plan, evaluate)
        is_small = all(r.size < POOLED_BYTES for r in results)
        plan = self.plan
        given = [x.buffer for xs in (plan.inputs, plan.results, plan.states) for x in xs]
        return Bucket(
            values,
            results,
            np.array(table.args or [0], np.uint64),
            np.array(table.records, np.uint64).reshape(-1, _RECORD),
            tuple(table.labels),
            np.array(arena, np.intp),
            np.array(table.inner, np.intp),
            tuple((r.shape, r.dtype) for r in results if is_small),
            tuple((n, s) for n, x in enumerate(given) for s in table.used.get(x, ())),
            arena_bytes,
            _padded(table.scratch_bytes),
            tuple(table.loops),
        )

    def pieces(self, step: StepPlan, cut: PiecesPlan, evaluate: Evaluator) -> int:
        """The address of the pieces of a step's panels, or 0."""
        buffer = self.plan.buffers[step.buffers[cut.buffer]]
        if self._pieces is None or buffer.array is None or evaluate(cut.rows) < CUT_ROWS:
            return 0
        return self._pieces.of(buffer.array)

    def _arena(self, evaluate: Evaluator) -> tuple[dict[int, int], int]:
        """Where in the arena each of its buffers begins, and the arena's size."""
        sizes = [evaluate(text) for text in self.plan.slots]
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += _padded(max(size, 0))
        offsets = {}
        for i, buffer in enumerate(self.plan.buffers):
            if buffer.slot is not None:
                if size_of(buffer, evaluate, self.plan.name) > sizes[buffer.slot]:
                    raise larger_than_slot(buffer, evaluate, self.plan.name)
                offsets[i] = starts[buffer.slot]
        return offsets, total


class _Table:
    """The records of steps and their argument slots, filled in order."""

    def __init__(self, owner: Preparer, evaluate: Evaluator, offsets: dict[int, int]) -> None:
        self.owner, self.evaluate, self.offsets = owner, evaluate, offsets
        self.args: list[int] = []
        self.records: list[list[int]] = []
        self.labels: list[StepPlan | None] = []
        self.used: dict[int, list[int]] = {}
        self.turns: dict[str, list[int]] = {}
        self.inner: list[int] = []
        self.loops: list[Loop] = []
        self.scratch_bytes = 0

    def add(self, first: int, end: int, loops: Sequence[LoopPlan]) -> None:
        """The plan's steps from `first` to before `end`, in loops that are among these."""
        while first < end:
            inside = [n for n, loop in enumerate(loops) if loop.first == first and loop.end <= end]
            if inside:
                self.loop(loops[inside[0]], loops[inside[0] + 1 :])
                first = loops[inside[0]].end
            else:
                self.step(self.owner.plan.steps[first])
                first += 1

    def loop(self, plan: LoopPlan, inner: Sequence[LoopPlan]) -> None:
        count, first = self.evaluate(plan.count), len(self.records)
        if count > _MAX:
            raise PlanError(f"{self.owner.plan.name}: the loop {plan.step} has an absurd size")
        if count <= 0:
            return
        self.turns[plan.step] = []
        self.add(plan.first, plan.end, inner)
        end = len(self.records)
        if end == first:
            return
        copies = self.turns.pop(plan.step)
        at = len(self.args)
        self.records.append([0, 8 * at, count, end - first, 0, len(copies), 0])
        self.labels.append(None)
        self.inner.extend(range(at + 1, at + 1 + len(copies)))
        self.args.extend([0, *(8 * slot for slot in copies)])
        self.loops.append(Loop(first, end, count, tuple(copies)))

    def step(self, step: StepPlan) -> None:
        owner, evaluate = self.owner, self.evaluate
        count = evaluate(step.count)
        if count <= 0:
            return
        stride = _padded(evaluate(step.scratch_bytes))
        if count > _MAX or not 0 <= stride < _MAX:
            raise PlanError(f"{owner.plan.name}: step {step.symbol} has an absurd size")
        self.scratch_bytes = max(self.scratch_bytes, stride * owner.threads)
        grain = max(evaluate(step.grain), -(-count // (_RANGES * owner.threads)))
        grain = min(grain, count)
        function = owner.functions[step.symbol]
        self.records.append([function, 8 * len(self.args), count, grain, 0, stride, 0])
        self.labels.append(step)
        for buffer in step.buffers:
            self.used.setdefault(buffer, []).append(len(self.args))
            self.args.append(owner._fixed.get(buffer, self.offsets.get(buffer, 0)))
        for dim in step.dims:
            if dim in self.turns:
                self.turns[dim].append(len(self.args))
            self.args.append(0 if dim in self.turns else evaluate(dim) & 0xFFFFFFFFFFFFFFFF)
        self.args.extend(owner.pieces(step, cut, evaluate) for cut in step.pieces)


def _sizes_text(values: dict[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "these sizes"


@dataclass(frozen=True, eq=False)
class Bound:
    """A bucket in a workspace: `args` is writable, the records hold addresses into both. `given`:
    the records' address and count, as ctypes passes them on without a look."""

    args: memoryview
    table: np.ndarray[Any, Any]
    records: np.ndarray[Any, Any]
    address: int
    count: int
    given: tuple[Any, Any]


class Workspace:
    """Memory that one call at a time owns."""

    _MAX_BOUND = 256

    def __init__(self, size: int = 0) -> None:
        """`size`: bytes of intermediates and scratch at first."""
        self._status = np.zeros(8, np.int64)
        self.status = self._status.data
        self.status_address = pointer_to(self._status)
        self._memory = allocate(size, "intermediates")
        self._bound: dict[Bucket, Bound] = {}

    @property
    def size(self) -> int:
        """Bytes of intermediates and scratch memory that there are now."""
        return self._memory.nbytes

    def forget(self) -> None:
        """Drop what is bound: the next call binds again."""
        self._bound.clear()

    def touch(self, bucket: Bucket) -> None:
        """Writes to all memory of a bucket: the first to do so would wait for its pages."""
        self.bind(bucket)
        self._memory.fill(0)

    def bind(self, bucket: Bucket) -> Bound:
        """The bucket with this workspace's addresses. Raises OutOfMemory."""
        bound = self._bound.get(bucket)
        if bound is not None:
            return bound
        needed = bucket.arena_bytes + bucket.scratch_bytes
        if self._memory.nbytes < needed:
            self._bound.clear()
            self._memory = allocate(0, "intermediates")  # let go of the old one first
            self._memory = allocate(needed, "intermediates")
        if len(self._bound) >= self._MAX_BOUND:
            self._bound.clear()
        start = np.uint64(pointer_to(self._memory)) if needed else np.uint64(0)
        table = bucket.args.copy()
        table[bucket.arena_slots] += start
        table[bucket.inner_slots] += np.uint64(pointer_to(table))
        records = bucket.records.copy()
        records[:, _ARGS] += np.uint64(pointer_to(table))
        records[:, _SCRATCH] = start + np.uint64(bucket.arena_bytes)
        records[:, _STATUS] = self.status_address
        address = pointer_to(records) if len(records) else 0
        given = ctypes.c_void_p.from_param(address), ctypes.c_void_p.from_param(len(records))
        bound = Bound(table.data, table, records, address, len(records), given)
        self._bound[bucket] = bound
        return bound
