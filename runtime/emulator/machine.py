"""Runs a launch: batches of blocks, groups of threads at one place in the program.

A *batch* is as many blocks as fit a few tens of thousands of threads; registers are arrays over
all its threads, so that one NumPy call runs an instruction for all threads that stand at it.

A *group* is the threads of a batch that stand at the same instruction with the same callers. The
group that is furthest behind runs first, so that threads that parted meet again at the first
instruction that they share; groups at the same place merge. Instructions of a warp with a mask
wait for the lanes it names, wherever they are. A group that loops while it looks at memory that
others may write (a spin loop) lets others go first, each time round.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import print_instruction

from .barriers import Barriers
from .errors import Fault, Stop, callers_of
from .groups import Frame, Geometry, compact, merge
from .groups import Group as Group
from .layout import Layout
from .memory import Arena, Heap
from .operands import Get
from .order import exits
from .passed_by import check_named
from .program import Code, Program, Step, aligned
from .special import RESERVED_BYTES, special_value
from .stuck import places, stuck
from .turns import gives_way, race_behind

if TYPE_CHECKING:
    from .races import Races

Array = NDArray[Any]
Dim = tuple[int, int, int]

BATCH_THREADS = 1 << 14
"""Threads of a batch, about: their registers stay in the processor's second-level cache."""
BATCH_LOCAL_BYTES = 1 << 25
"""Local memory of a batch, about: kernels that need much have smaller batches."""
IDLE_TURNS = 30
"""How often loops may come round with nothing changing before more blocks join."""
STUCK_TURNS = 8_000
"""How often before that counts as a deadlock."""
LONG_LOOP = 1024
"""How often a loop comes round before it is looked at: whether anything changed, and the time."""
LOOK_TURNS = 500
"""How often before a loop is looked at: one that reads much memory is no deadlock."""
MOST_REVIVALS = 400
"""How often a loop that changes no memory may go on so."""


class Batch:
    """Blocks that run together.

    `block_of` is the block of each thread, counted within the batch, `within` its index there.
    """

    def __init__(self, machine: Machine, first: int, count: int) -> None:
        self.machine, self.first, self.blocks = machine, first, count
        bx, by, bz = machine.block
        self.block_threads = bx * by * bz
        self.stride = -(-self.block_threads // 32) * 32
        """Threads from one block to the next: whole warps."""
        self.threads = count * self.stride
        self.warps = self.threads // 32
        shape = machine.geometry(count, self.stride)
        self.all_threads, self.within, self.block_of = shape.threads, shape.within, shape.block_of
        self.exists: Array = self.within < self.block_threads
        self.alive: Array = self.exists.copy()
        self.alive_count = count * self.block_threads
        self._special: dict[str, Array] = {}
        self._frames: dict[tuple[int, int], Frame] = {}
        self.shared = Arena(
            "shared", count * machine.shared_stride, valid=not machine.looks_for_unwritten,
            limit=machine.shared_bytes, stride=machine.shared_stride,
        )  # fmt: skip
        self.shared.variable_at = machine.layout.shared_variable
        self.shared_base: Array = self.block_of * machine.shared_stride
        if machine.layout.uses_reserved:  # it starts with zeros
            at = np.arange(machine.reserved_offset, machine.shared_bytes, 8)
            for start in range(0, count * machine.shared_stride, machine.shared_stride):
                self.shared.store(at + start, np.zeros(len(at), np.uint64))
        local = machine.local_bytes
        each = aligned(local, 16)
        # unoptimised code copies objects whole, with what nothing wrote in them
        known = "debug" in machine.program.module.target or not machine.looks_for_unwritten
        self.local = Arena("local", self.threads * each, valid=known, limit=local, stride=each)
        self.local_base: Array = self.all_threads * each
        self.barriers = Barriers(self)
        self.ready: dict[tuple[Any, ...], Group] = {}
        self.waiting: dict[tuple[Any, ...], tuple[Group, Step, Get | None]] = {}
        """Groups at an instruction of a warp, until the lanes it names have come."""
        self.running: Group | None = None
        self.at: Step = machine.entry.steps[0]
        self._exits = self._seen_exits = 0
        self.state: dict[str, Any] = {}
        """What families of instructions keep for these blocks, by a name of theirs."""
        frame = self.frame(machine.entry, 0, 0)
        whole = self.stride == self.block_threads
        sel = None if whole else compact(np.flatnonzero(self.exists))
        self.push(Group(self, frame, 0, (), sel, count * self.block_threads))

    def frame(self, code: Code, depth: int, local_base: int) -> Frame:
        """The frame of a function at a depth of calls, which threads share by their index."""
        key = (code.number, depth)
        if key not in self._frames:
            self._frames[key] = Frame(self, code, depth, local_base)
        return self._frames[key]

    def special(self, name: str) -> Array:
        """A special register of all threads."""
        found = self._special.get(name)
        if found is None:
            found = special_value(self, name)
            if name not in ("%clock", "%clock64", "%globaltimer", "%clock_hi"):
                self._special[name] = found
        return found

    def position(self, thread: int) -> tuple[Dim, Dim]:
        """The block and the thread that an index within the batch stands for."""
        bx, by, _ = self.machine.block
        gx, gy, _ = self.machine.grid
        block, within = self.first + thread // self.stride, thread % self.stride
        return (
            (block % gx, block // gx % gy, block // (gx * gy)),
            (within % bx, within // bx % by, within // (bx * by)),
        )

    def push(self, g: Group) -> None:
        """Makes a group ready, together with one that stands at the same place."""
        other = self.ready.get(g.key)
        if other is None:
            self.ready[g.key] = g
        else:
            merge(other, g)

    @property
    def is_done(self) -> bool:
        return not (self.ready or self.waiting or self.barriers.is_waiting)

    def step(self) -> bool:
        """Runs the group that is furthest behind until it stops; whether there was one."""
        if not self.ready:
            return False
        key = min(self.ready, key=self._order) if len(self.ready) > 1 else next(iter(self.ready))
        self._run(self.ready.pop(key))
        return True

    def _order(self, key: tuple[Any, ...]) -> tuple[int, int, int]:
        g = self.ready[key]
        return (g.turn, -len(g.stack), g.pc)

    def _run(self, g: Group) -> None:
        machine, steps, pc, ready = self.machine, g.frame.code.steps, g.pc, self.ready
        self.running = g
        step = steps[pc]
        if step.is_release and ready and gives_way(g):
            self.push(g)
            return
        g.gave_way = ()
        try:
            while True:
                step.lanes += g.n
                self.at, run = step, step.run
                if run is not None:
                    run(g)
                    pc += 1
                else:
                    g.pc = pc
                    assert step.control is not None
                    if not step.control(machine, g, step):
                        return
                    pc, steps = g.pc, g.frame.code.steps
                step = steps[pc]
                if ready and step.is_leader:
                    g.pc = pc
                    self.push(g)
                    return
        except Stop as stop:
            raise race_behind(self, stop) or machine.fault(stop, step, self, g) from None

    def jump(self, g: Group, pc: int) -> bool:
        """Moves a group to an instruction; whether it goes on at once."""
        back, g.pc = pc <= g.pc, pc
        if not back:
            return True
        g.rounds += 1
        if g.rounds % LONG_LOOP == 0:
            self.machine.check_time(self, g)
            if not g.looks and not self._is_idle_loop(g):
                return True
        elif not g.looks:
            return True
        g.turn += 1
        g.looks = False
        self.machine.turned(g)
        self.push(g)
        return False

    def _is_idle_loop(self, g: Group) -> bool:
        """Whether a loop waits for others, since nothing changed since a long while."""
        now, before = (self.machine.progress, g.checksum()), g.seen
        g.seen = now
        g.rounds -= before == now  # from then on each time
        return before == now

    def exit(self, g: Group) -> None:
        """Ends the threads of a group."""
        exits(self, g.threads())
        self.alive[g.threads()] = False
        self.alive_count -= g.n
        self._exits += 1
        self.machine.progress += 1
        self.wake()

    def park(self, g: Group, step: Step) -> None:
        """Lets a group wait at its instruction until it is unparked, or threads end."""
        waiting = self.waiting.get(g.key)
        if waiting is not None:
            merge(g, waiting[0])
        self.waiting[g.key] = (g, step, None)

    def unpark(self, *meanings: str) -> None:
        """Lets the groups look again that wait at such instructions."""
        for key, (g, step, _) in list(self.waiting.items()):
            if step.match.form.meaning in meanings:
                del self.waiting[key]
                self.push(g)

    def converge_warpgroups(self, g: Group, step: Step) -> bool:
        """As `converge`, for all threads of warpgroups: four warps, from the block's first on."""
        parked = self.waiting.pop(g.key, None)
        if parked is not None:
            merge(g, parked[0])
        per_block = -(-self.stride // 128)
        group = self.block_of * per_block + self.all_threads % self.stride // 128
        threads = g.threads()
        came = np.bincount(group[threads], minlength=self.blocks * per_block)
        complete: Array = came[group[threads]] == 128
        count = int(np.count_nonzero(complete))
        if count == g.n:
            return True
        rest = g.split(~complete, g.n - count)
        self.waiting[rest.key] = (rest, step, None)
        if count:
            g.narrow(complete, count)
        return bool(count)

    def converge(self, g: Group, step: Step, mask: Get | None) -> bool:
        """Whether all lanes that the masks name are in the group; else what is not waits.

        Where some warps are complete, `g` keeps those, and the rest waits.
        """
        if mask is not None and self.alive_count < self.blocks * self.block_threads:
            check_named(self, g, mask(g))
        if g.n == self.alive_count:
            return True
        parked = self.waiting.pop(g.key, None)
        if parked is not None:
            merge(g, parked[0])
        threads = g.threads()
        active = self._lane_bits(threads)
        alive = self._lane_bits(self.all_threads[self.alive])
        warp = threads // 32
        need = alive[warp] if mask is None else alive[warp] & mask(g).astype(np.uint32)
        complete = (active[warp] & need) == need
        count = int(np.count_nonzero(complete))
        if count == g.n:
            return True
        rest = g.split(~complete, g.n - count)
        self.waiting[rest.key] = (rest, step, mask)
        if count:
            g.narrow(complete, count)
        return bool(count)

    def _lane_bits(self, threads: Array) -> Array:
        """For each warp the bits of its lanes that are among `threads`."""
        flags = np.zeros(self.threads, np.bool_)
        flags[threads] = True
        packed = np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)
        flat: Array = packed.reshape(-1)
        return flat

    def lane_bits(self, g: Group) -> Array:
        """For each thread of a group the lanes of its warp that are in the group."""
        found: Array = self._lane_bits(g.threads())[g.threads() // 32]
        return found

    def wake(self) -> bool:
        """After threads ended, lets waiting groups look again; whether any does."""
        if self._exits == self._seen_exits or not (self.waiting or self.barriers.is_waiting):
            return False
        self._seen_exits = self._exits
        if self.barriers.is_waiting:
            self.barriers.open_without_ended()
        parked, self.waiting = self.waiting, {}
        for g, _, _ in parked.values():
            self.push(g)
        return bool(parked or self.ready)


class Machine:
    """One launch."""

    def __init__(
        self, program: Program, entry: Code, layout: Layout, grid: Dim, block: Dim, cluster: Dim,
        params: Arena, variables: dict[str, int], heap: Heap, shared_bytes: int,
        races: Races | None,
    ) -> None:  # fmt: skip
        self.program, self.entry = program, entry
        self.grid, self.block, self.cluster = grid, block, cluster
        self.params, self.variables, self.heap, self.races = params, variables, heap, races
        self.layout = layout
        self.shared_bytes = layout.dynamic_offset + shared_bytes
        self.dynamic_bytes = shared_bytes
        self.looks_for_unwritten = True
        self.reserved_offset = aligned(self.shared_bytes, 128)
        """Where shared memory lies that the system keeps, for kernels that ask for it."""
        if layout.uses_reserved:
            self.shared_bytes = self.reserved_offset + RESERVED_BYTES
        self.shared_stride = -(-self.shared_bytes // 1024) * 1024
        self.local_bytes = layout.local_bytes
        self.progress = 0
        self.deadline: float | None = None
        """When the launch has run for too long, by `time.monotonic`."""
        self._idle, self._last, self._revived = 0, 0, 0
        self._seen: dict[tuple[int, int], Any] = {}
        """What groups that loop looked at, else their registers, by batch and instruction."""
        self.traffic: dict[tuple[str, str], int] = {}
        """Bytes by memory space and by what was done to them."""
        self.conflicts = 0
        self.printed: list[str] = []
        self.clock = 0
        self._workspace: int | None = None
        self._geometry: dict[int, Geometry] = {}
        self.specials: dict[tuple[int, str], Array] = {}
        """Special registers that do not depend on the block, by the number of blocks."""

    def geometry(self, blocks: int, stride: int) -> Geometry:
        """The shape of a batch, which most batches of a launch share."""
        if blocks not in self._geometry:
            threads, count = np.arange(blocks * stride), np.arange(blocks)
            within = np.tile(np.arange(stride), blocks)
            self._geometry[blocks] = Geometry(threads, within, np.repeat(count, stride))
        return self._geometry[blocks]

    def run(self) -> None:
        """Runs all blocks. Blocks start in order, and later ones only when earlier ones ended
        or wait for something that only later ones can do."""
        total = self.grid[0] * self.grid[1] * self.grid[2]
        per = self.cluster[0]
        if self.cluster[1] > 1:  # blocks of a cluster must be in one batch
            per = self.grid[0] * self.cluster[1]
        if self.cluster[2] > 1:
            per = self.grid[0] * self.grid[1] * self.cluster[2]
        stride = -(-self.block[0] * self.block[1] * self.block[2] // 32) * 32
        threads = min(BATCH_THREADS, BATCH_LOCAL_BYTES // max(self.local_bytes, 1))
        size = max(threads // stride // per, 1) * per
        first, live = 0, list[Batch]()
        while first < total or live:
            if not live or self._idle > IDLE_TURNS and first < total:
                live.append(Batch(self, first, min(size, total - first)))
                first += size
                self._idle = 0
            live = [batch for batch in live if not self._advance(batch, bool(live[1:]))]

    def _advance(self, batch: Batch, others: bool) -> bool:
        """Runs a batch until it ends, or, with others beside it, for a while."""
        while not batch.is_done:
            self.check_time(batch)
            idle = self._idle
            if not batch.step() and not batch.wake():
                if not others:
                    raise stuck(batch)
                self._idle += 1
                if self._idle > STUCK_TURNS:
                    raise stuck(batch)
                return False
            if self._idle > idle:
                if self._idle > STUCK_TURNS:
                    raise self._spinning(batch)
                if others or self._idle > IDLE_TURNS:
                    return False
        return True

    def grid_workspace(self) -> int:
        """The address of a few bytes of zeros, which all blocks share."""
        if self._workspace is None:
            arena = Arena("the grid's workspace", 16, data=np.zeros(16, np.uint8))
            self._workspace = self.heap.add(arena)
        return self._workspace

    def check_time(self, batch: Batch, g: Group | None = None) -> None:
        """Raises: TimeoutError, which says where threads stand, after the deadline."""
        if self.deadline is None or monotonic() < self.deadline:
            return
        if g is not None:
            batch.push(g)
        raise TimeoutError(f"{self.entry.name} has not ended: {places(batch)}")

    def turned(self, g: Group) -> None:
        """Counts a loop that came round while nothing changed: no memory, nor where it looks."""
        if self.progress != self._last:
            self._last, self._idle = self.progress, 0
            return
        self._idle += 1
        if self._idle % LOOK_TURNS == 0 and self._revived < MOST_REVIVALS:
            key = (id(g.batch), g.pc)
            seen = frozenset(g.places) or g.checksum()
            if key in self._seen and self._seen[key] != seen:
                self._idle = 0
                self._revived += 1
            self._seen[key] = seen
            g.places.clear()

    def _spinning(self, batch: Batch) -> Fault:
        if not batch.ready:
            return stuck(batch)
        g = next(iter(batch.ready.values()))
        step = g.frame.code.steps[g.pc]
        stop = Stop("deadlock", "loops for something that never happens", int(g.threads()[0]))
        return self.fault(stop, step, batch, g)

    def function_address(self, name: str) -> int:
        """The address of a function, for calls through pointers."""
        names = [*self.program.codes, *sorted(self.program.externals)]
        return (7 << 48) + 16 * names.index(name)

    def function_at(self, address: int) -> str:
        """The name of the function at an address.

        Raises: Stop where there is none.
        """
        names = [*self.program.codes, *sorted(self.program.externals)]
        number, rest = divmod(address - (7 << 48), 16)
        if rest or not 0 <= number < len(names):
            raise Stop("out-of-bounds", f"no function at {address:#x}")
        return names[number]

    def fault(self, stop: Stop, step: Step, batch: Batch, g: Group) -> Fault:
        """A stop with the place where it happened."""
        x = stop.instruction or step.instruction
        thread = int(g.threads()[0]) if stop.thread is None else stop.thread
        block, within = batch.position(thread)
        where = stop.kind == "deadlock" and places(batch, stop.message)
        return Fault(
            stop.kind, stop.message + (f"; threads stand so: {where};" if where else ""),
            kernel=self.entry.name, instruction=print_instruction(x), line=x.line,
            file=self.program.module.file(x.loc.file) if x.loc else "",
            source_line=x.loc.line if x.loc else 0, block=block, thread=within,
            callers=tuple(callers_of(g.frame.code, x, g.stack, self.program.module)),
            other=stop.other.instruction if stop.other else None,
        )  # fmt: skip
