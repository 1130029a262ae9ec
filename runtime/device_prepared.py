"""A pipeline on a GPU made ready for sizes: grids, places of buffers in memory, order of launches.

A `DeviceBucket` is what one combination of sizes fixes. Slots of the arena are packed by their
lifetimes, so memory is reused where no two tenants live at once; `order` then finds which launches
must wait for which, from the memory they touch: the rest may overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagefuse.compiler.plan import (
    BufferPlan,
    GpuLaunchPlan,
    GpuPlan,
    LoopPlan,
    PipelinePlan,
    TensorMapPlan,
)
from stagefuse.compiler.plan_check import WRITTEN
from stagefuse.dsl.dtypes import DTYPES

from .aliases import in_place, stand_ins
from .drivers import TensorMap
from .errors import OutOfMemory, PlanError
from .prepared import Evaluator, ResultSpec, larger_than_slot, result_specs, size_of

ALIGNMENT = 256  # of buffers: a cache line's multiple, and more than TMA or vector loads need
STATUS_BYTES = 16
_MAX_GRID = (2**31 - 1, 65535, 65535)  # CUDA programming guide, technical specifications
_MAX_BYTES = 1 << 46
_MAX_LAUNCHES = 1 << 16
MAP_STEP = 16  # bytes; CUDA driver API, "Tensor Map Object Management"
_MAX_MAP_SIZE = 1 << 31  # CUDA takes twice as many, to which copies' signed coordinates don't reach
_MAX_MAP_STRIDE = 1 << 40


@dataclass(frozen=True, eq=False)
class PreparedLaunch:
    """A launch with its numbers; buffers are still those of the plan."""

    plan: GpuLaunchPlan
    grid: tuple[int, int, int]
    shared_bytes: int
    dims: tuple[int, ...]
    writes: tuple[bool, ...]  # of the plan's buffers, in its order
    after: tuple[int, ...]
    maps: tuple[TensorMap, ...] = ()


@dataclass(frozen=True, eq=False)
class DeviceBucket:
    """What a combination of sizes fixes: `places` of buffers in `size` bytes, but for weights.

    Status, inputs and results come first, in `io_bytes`.
    """

    dims: dict[str, int]
    results: tuple[ResultSpec, ...]
    launches: tuple[PreparedLaunch, ...]
    places: Mapping[int, tuple[int, int]]  # offset and size
    size: int
    io_bytes: int


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class DevicePreparer:
    """Makes buckets of one pipeline on one arch, for a device of so many multiprocessors."""

    def __init__(
        self, plan: PipelinePlan, gpu: GpuPlan, multiprocessors: int | None = None
    ) -> None:
        self.plan, self.gpu, self.multiprocessors = plan, gpu, multiprocessors
        self.where = f"{plan.name} on {gpu.arch}"
        self.inputs = _with_role(gpu.buffers, "input")
        self.results = _with_role(gpu.buffers, "result")
        self.states = _with_role(gpu.buffers, "state")

    def weights(
        self, arrays: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[dict[int, tuple[int, int]], list[tuple[int, np.ndarray[Any, Any]]], int]:
        """Where weights and constants lie, each array once: places, offsets to copy to, bytes."""
        offsets: dict[str, int] = {}
        copies: list[tuple[int, np.ndarray[Any, Any]]] = []
        places: dict[int, tuple[int, int]] = {}
        total = 0
        for number, buffer in enumerate(self.gpu.buffers):
            if buffer.array is None:
                continue
            array = arrays[buffer.array]
            if buffer.array not in offsets:
                offsets[buffer.array] = total
                copies.append((total, array))
                total += padded(array.nbytes)
            places[number] = (offsets[buffer.array], array.nbytes)
        return places, copies, total

    def prepare(self, values: dict[str, int]) -> DeviceBucket:
        """The bucket for values of the dims. Raises PlanError if the plan contradicts itself."""
        evaluate = Evaluator(values)
        places: dict[int, tuple[int, int]] = {}
        total = STATUS_BYTES
        for number in (*self.inputs, *self.results):
            size = size_of(self.gpu.buffers[number], evaluate, self.where)
            places[number] = (padded(total), size)
            total = padded(total) + size
        found = self._in_place(evaluate)
        turns = list(self._turns(found, 0, len(found), self.gpu.loops, values))
        launches = [n for n, _ in turns]
        io_bytes = total
        total = self._arena(evaluate, launches, padded(total), places)
        if total > _MAX_BYTES:
            raise OutOfMemory(f"{self.where}: buffers are larger than memory can be")
        status = self._status(launches)
        accesses = [self._accesses(n, places) for n in launches]
        after = order([a + s for a, s in zip(accesses, status, strict=True)])
        return DeviceBucket(
            values,
            result_specs(self.plan, evaluate),
            tuple(
                PreparedLaunch(
                    n, self._grid(n, evaluate), evaluate(n.shared_bytes),
                    tuple(sizes(d) for d in n.dims),
                    tuple(self._writes(n, b) for b in n.buffers), waits,
                    tuple(self._map(n, m, sizes) for m in n.maps),
                )
                for (n, sizes), waits in zip(turns, after, strict=True)
            ),
            places,
            total,
            io_bytes,
        )  # fmt: skip

    def _in_place(self, evaluate: Evaluator) -> tuple[GpuLaunchPlan, ...]:
        """The launches on the buffers that stand for others. Raises PlanError if one of them is
        smaller than what it stands for."""
        known = stand_ins(self.gpu, evaluate)
        for number, other in known.items():
            own, there = self.gpu.buffers[number], self.gpu.buffers[other]
            if size_of(own, evaluate, self.where) > size_of(there, evaluate, self.where):
                raise PlanError(f"{self.where}: {own.name} is larger than {there.name}, "
                                "which stands for it")  # fmt: skip
        return in_place(self.gpu, known)

    def _turns(
        self, launches: Sequence[GpuLaunchPlan], first: int, end: int,
        loops: Sequence[LoopPlan], values: dict[str, int],
    ) -> Iterator[tuple[GpuLaunchPlan, Evaluator]]:
        """The launches that run, loops turn by turn, each with the sizes and turns it sees."""
        evaluate = Evaluator(values)
        while first < end:
            inside = [n for n, loop in enumerate(loops) if loop.first == first and loop.end <= end]
            if not inside:
                if self._runs(launches[first], evaluate):
                    yield launches[first], evaluate
                first += 1
                continue
            loop, inner = loops[inside[0]], loops[inside[0] + 1 :]
            count = evaluate(loop.count)
            if count * (loop.end - first) > _MAX_LAUNCHES:
                raise OutOfMemory(
                    f"{self.where}: {count} steps are more launches than a graph should hold"
                )
            for turn in range(count):
                own = {**values, loop.step: turn}
                yield from self._turns(launches, first, loop.end, inner, own)
            first = loop.end

    def _runs(self, launch: GpuLaunchPlan, evaluate: Evaluator) -> bool:
        return all(evaluate(side) > 0 for side in launch.grid)

    def _grid(self, launch: GpuLaunchPlan, evaluate: Evaluator) -> tuple[int, int, int]:
        x, y, z = (evaluate(side) for side in launch.grid)
        if launch.stays and self.multiprocessors is not None:
            beside = launch.cluster[0]
            room = self.multiprocessors * max(launch.together, 1)
            x = min(x, max(room // beside, 1) * beside)
        what = f"{self.where}: the launch of {launch.kernel}"
        for side, limit, cluster in zip((x, y, z), _MAX_GRID, launch.cluster, strict=True):
            if side > limit:
                raise PlanError(f"{what} has a grid of {(x, y, z)} blocks, more than a GPU takes")
            if side % cluster:
                raise PlanError(f"{what}: {(x, y, z)} blocks don't divide into {launch.cluster}")
        if not 0 <= evaluate(launch.shared_bytes) <= 1 << 20:
            raise PlanError(f"{what} asks for an absurd amount of shared memory")
        return x, y, z

    def _map(self, launch: GpuLaunchPlan, map: TensorMapPlan, evaluate: Evaluator) -> TensorMap:
        """A tensor map with its numbers. Raises PlanError if it has elements beyond its buffer, or
        none could be made."""
        buffer = self.gpu.buffers[map.buffer]
        unit = DTYPES[buffer.dtype].itemsize
        offset, sizes = evaluate(map.offset), tuple(evaluate(n) for n in map.sizes)
        strides = tuple(evaluate(n) for n in map.strides)
        made = TensorMap(
            launch.buffers.index(map.buffer), buffer.dtype, offset * unit, sizes,
            tuple(n * unit for n in strides), map.box, map.swizzle, map.lower, map.upper, map.steps,
        )  # fmt: skip
        if made.is_empty:
            return made
        last = offset + sum((n - 1) * s for n, s in zip(sizes, (*strides, 1), strict=True))
        what = f"{self.where}: a tensor map of {launch.kernel}"
        if offset < 0 or min(strides, default=0) < 0 or min(sizes) < 0 or (
            last >= size_of(buffer, evaluate, self.where) // unit
        ):
            raise PlanError(f"{what} has elements beyond the buffer {buffer.name}")
        if max(sizes) > _MAX_MAP_SIZE or max(made.strides, default=0) >= _MAX_MAP_STRIDE:
            raise PlanError(f"{what} has sizes {sizes}, more than a map can have")
        if any(n % MAP_STEP for n in (made.offset, *made.strides)):
            raise PlanError(f"{what} has steps that are no multiples of {MAP_STEP} bytes")
        return made

    def _arena(
        self,
        evaluate: Evaluator,
        launches: Sequence[GpuLaunchPlan],
        start: int,
        places: dict[int, tuple[int, int]],
    ) -> int:
        """Puts the arena's buffers behind `start`; gives the end of memory."""
        sizes = [evaluate(text) for text in self.gpu.slots]
        lives: dict[int, list[int]] = {}
        for number, launch in enumerate(launches):
            for index in launch.buffers:
                slot = self.gpu.buffers[index].slot
                if slot is not None:
                    lives.setdefault(slot, []).append(number)
        tenants = [(padded(max(sizes[s], 0)), min(t), max(t), s) for s, t in sorted(lives.items())]
        offsets = pack([(size, first, last) for size, first, last, _ in tenants])
        found = {slot: at for (*_, slot), at in zip(tenants, offsets, strict=True)}
        for number, buffer in enumerate(self.gpu.buffers):
            if buffer.slot is None:
                continue
            size = size_of(buffer, evaluate, self.where)
            if size > sizes[buffer.slot]:
                raise larger_than_slot(buffer, evaluate, self.where)
            if buffer.slot in found:
                places[number] = (start + found[buffer.slot], size)
        ends = [at + size for (size, *_), at in zip(tenants, offsets, strict=True)]
        return start + max(ends, default=0)

    def _accesses(
        self, launch: GpuLaunchPlan, places: Mapping[int, tuple[int, int]]
    ) -> list[tuple[int, int, bool]]:
        """The bytes that a launch touches, begin and end, and whether it writes them.

        Inputs are written by no launch and may lie elsewhere, as weights do: no order follows.
        """
        found = []
        for number in launch.buffers:
            role = self.gpu.buffers[number].role
            if role == "state":  # each lies apart, and where does not matter
                begin = -_MAX_BYTES - number - 1
                found.append((begin, begin + 1, self._writes(launch, number)))
            elif role in WRITTEN:
                begin, size = places[number]
                found.append((begin, begin + size, self._writes(launch, number)))
        return found

    def _status(self, launches: Sequence[GpuLaunchPlan]) -> list[list[tuple[int, int, bool]]]:
        """The status as accesses after which those that are guarded come after those that report,
        and no others are ordered: each guarded launch has a byte that all that report touch."""
        found: list[list[tuple[int, int, bool]]] = []
        guarded = 0
        for launch in launches:
            mine: list[tuple[int, int, bool]] = []
            if launch.guarded:
                mine.append((-2 - guarded, -1 - guarded, True))
                guarded += 1
            found.append(mine)
        for launch, mine in zip(launches, found, strict=True):
            if launch.reports and guarded:
                mine.append((-1 - guarded, -1, False))
        return found

    def _writes(self, launch: GpuLaunchPlan, number: int) -> bool:
        """Whether a launch may write a buffer."""
        if self.gpu.buffers[number].role not in WRITTEN:
            return False
        return not launch.writes or number in launch.writes


def _with_role(buffers: Sequence[BufferPlan], role: str) -> tuple[int, ...]:
    return tuple(i for i, b in enumerate(buffers) if b.role == role)


def pack(tenants: Sequence[tuple[int, int, int]]) -> list[int]:
    """Offsets for (size, first, last), where those that live at once do not overlap.

    The largest first, each at the lowest place that is free during its life: within a few percent
    of the best in practice. Source: Pisarchyk and Lee, "Efficient memory management for deep
    neural net inference" (2020), greedy by size.
    """
    offsets = [0] * len(tenants)
    placed: list[int] = []
    for number in sorted(range(len(tenants)), key=lambda i: (-tenants[i][0], i)):
        size, first, last = tenants[number]
        at = 0
        for other in sorted(placed, key=lambda i: offsets[i]):
            theirs, begin, end = tenants[other]
            if begin <= last and first <= end and offsets[other] < at + size:
                at = max(at, offsets[other] + theirs)
        offsets[number] = at
        placed.append(number)
    return offsets


def order(accesses: Sequence[Sequence[tuple[int, int, bool]]]) -> list[tuple[int, ...]]:
    """For each launch the earlier ones that it must wait for, but for those implied by others.

    Two launches are ordered where they touch a byte that one of them writes.
    """
    waits: list[tuple[int, ...]] = []
    before: list[int] = []  # bit i: launch i comes before it
    for number, mine in enumerate(accesses):
        direct, known = [], 0
        for other in range(number - 1, -1, -1):
            if known == (1 << number) - 1:
                break
            if not known >> other & 1 and _conflict(mine, accesses[other]):
                direct.append(other)
                known |= before[other] | 1 << other
        waits.append(tuple(reversed(direct)))
        before.append(known)
    return waits


def _conflict(
    one: Sequence[tuple[int, int, bool]], other: Sequence[tuple[int, int, bool]]
) -> bool:
    return any(
        (writes or theirs) and begin < their_end and their_begin < end
        for begin, end, writes in one
        for their_begin, their_end, theirs in other
    )
