"""Asynchronous products of warpgroups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.dsl.frozen import frozen
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.matrix_descriptor import K_BYTES, operand_addresses, operand_words
from stagefuse.runtime.emulator.operands import Get, elements, getter
from stagefuse.runtime.emulator.order import acquire, async_read, product_agent
from stagefuse.runtime.emulator.program import Code, Control, Run, Site, Step, slot_of
from stagefuse.runtime.emulator.region import Region, count
from stagefuse.runtime.emulator.sparse import indices_of_rows, spread
from stagefuse.runtime.emulator.warpgroup_product import accumulate, decode, operand_from_registers
from stagefuse.runtime.emulator.warpgroups import THREADS, Warpgroups

from . import control

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group, Machine

Array = NDArray[Any]
Work = Callable[["Group", Warpgroups, Array, Array], None]
"""What is done for a group, its warpgroups, their numbers and their threads, `[n][128]`."""


def _together(work: Work) -> Control:
    """Waits until all threads of a warpgroup have come, then works for whole warpgroups."""

    def run(machine: Machine, g: Group, step: Step) -> bool:
        if not g.batch.converge_warpgroups(g, step):
            return False
        if machine.races is not None:
            machine.races.together(g.batch, g)
        groups = Warpgroups.of_batch(g.batch)
        threads = g.threads()
        if len(threads) % THREADS:
            raise Stop("barrier", "a warpgroup is four whole warps, and some threads are missing")
        threads = threads.reshape(-1, THREADS)
        work(g, groups, groups.of[threads[:, 0]], threads)
        g.pc += 1
        return True

    return run


@control("wgmma.fence")
def _fence(site: Site) -> Control:
    def work(g: Group, groups: Warpgroups, numbers: Array, threads: Array) -> None:
        groups.fence(numbers)

    return _together(work)


@control("wgmma.commit_group")
def _commit(site: Site) -> Control:
    return _together(lambda g, groups, numbers, threads: groups.commit(numbers))


@control("wgmma.wait_group")
def _wait(site: Site) -> Control:
    pending = site.operand("n")
    assert isinstance(pending, s.Immediate)
    count = pending.value

    def work(g: Group, groups: Warpgroups, numbers: Array, threads: Array) -> None:
        groups.wait(numbers, count)
        for number, mine in zip(numbers, threads, strict=True):
            acquire(g.batch, mine, product_agent(g.batch, number, int(groups.done[number])).clock)

    return _together(work)


def _constant(site: Site, name: str, default: int) -> int:
    if not site.has(name):
        return default
    x = site.operand(name)
    if not isinstance(x, s.Immediate):
        raise site.error(f"{name} is a constant")
    return x.value


def _slots(site: Site, name: str) -> list[int]:
    found = []
    for x in elements(site.operand(name)):
        if not isinstance(x, s.Register):
            raise site.error(f"{name} is registers")
        found.append(slot_of(site, x))
    return found


@frozen
class _Product:
    """A `wgmma.mma_async`: its form, its operands, the registers it reads and writes."""

    n: int
    types: tuple[str, str]
    """Of the elements of A and B."""
    dtype: str
    """Of the accumulators."""
    sign: int
    flips: tuple[int, int]
    saturate: bool
    results: list[int]
    a_slots: list[int]
    """The registers of A, none where A is in shared memory."""
    a_bits: Get | None
    b_bits: Get
    scale: Get
    metadata: Get | None
    selector: int
    in_order: bool
    """Whether the assembler lets nothing run beside products: of code for a debugger."""

    @property
    def deep(self) -> int:
        """Bytes of K of an operand whose elements are all there."""
        return K_BYTES if self.metadata is None else 2 * K_BYTES

    def run(self, g: Group, groups: Warpgroups, numbers: Array, threads: Array) -> None:
        """Multiplies for whole warpgroups; the results are marked as on their way."""
        self._check(g, groups, numbers, threads)
        adds = _uniform(g, self.scale(g), threads, "scale-d")
        if adds.any() and any(g.regs[slot] is None for slot in self.results):
            raise Stop("uninitialised", "adds to accumulators that nothing wrote",
                       int(threads[adds][0, 0]))  # fmt: skip
        before = _registers(g, self.results, threads)
        after = np.empty_like(before)
        for i, (a, b) in enumerate(self._operands(g, groups, numbers, threads)):
            after[i] = accumulate(
                before[i] if adds[i] else None, a if self.sign == 1 else -a, b, self.dtype,
                self.saturate,
            )  # fmt: skip
        flat = threads.reshape(-1)
        columns = after.reshape(-1, len(self.results))
        for j, slot in enumerate(self.results):
            register = g.regs[slot]
            assert register is not None
            register.view(np.uint32)[flat] = columns[:, j]
        groups.used[numbers] = True
        if not self.in_order:
            groups.mark(g, flat, self.results, self.a_slots)

    def _check(self, g: Group, groups: Warpgroups, numbers: Array, threads: Array) -> None:
        if not groups.fenced[numbers].all():
            late = int(threads[~groups.fenced[numbers]][0, 0])
            raise Stop("race", "no `wgmma.fence` orders what this warpgroup wrote to registers "
                       "before this wgmma", late)  # fmt: skip
        if any(groups.is_marked(g, slot) for slot in self.a_slots):
            raise Stop("race", "an operand in registers is what an outstanding wgmma writes",
                       int(threads[0, 0]))  # fmt: skip

    def _operands(
        self, g: Group, groups: Warpgroups, numbers: Array, threads: Array
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """A and B of each warpgroup, with the zeros of a sparse A."""
        (a_type, b_type), (flip_a, flip_b) = self.types, self.flips
        b_of = _uniform(g, self.b_bits(g), threads, "descriptor b")
        a_of = words = a_values = None
        if self.a_bits is not None:
            a_of = _uniform(g, self.a_bits(g), threads, "descriptor a")
        else:
            a_values = _registers(g, self.a_slots, threads)
        if self.metadata is not None:
            every = np.broadcast_to(self.metadata(g), (g.n,))
            words = np.ascontiguousarray(every).reshape(-1, THREADS)
        for i, mine in enumerate(threads):
            reader = _Reader(g, groups, int(numbers[i]), mine)
            b = reader.operand(int(b_of[i]), self.n, b_type, flip_b, self.deep)
            if a_of is not None:
                a = reader.operand(int(a_of[i]), 64, a_type, flip_a, is_a=True)
            else:
                assert a_values is not None
                a = operand_from_registers(a_values[i], a_type)
            if words is not None:
                at = indices_of_rows(words[i].reshape(4, 32), a_type, b.shape[1], self.selector)
                a = spread(a, at.reshape(64, -1), a_type)
            yield a, b


@control("wgmma.mma_async")
def _mma_async(site: Site) -> Control:
    in_registers = isinstance(site.operand("a"), s.Vector)
    sparse = site.has("e")
    product = _Product(
        n=int(site.word("S").split("n")[1].split("k")[0]),
        types=(site.word("A"), site.word("B") or site.word("A")),
        dtype=next(w for w in site.instruction.modifiers[3:] if w in ("f32", "f16", "s32")),
        sign=_constant(site, "scale_a", 1) * _constant(site, "scale_b", 1),
        flips=(_constant(site, "trans_a", 0), _constant(site, "trans_b", 0)),
        saturate="satfinite" in site.instruction.modifiers,
        results=_slots(site, "d"),
        a_slots=_slots(site, "a") if in_registers else [],
        a_bits=None if in_registers else getter(site, site.operand("a"), "b64"),
        b_bits=getter(site, site.operand("b"), "b64"),
        scale=getter(site, site.operand("scale_d"), "pred"),
        metadata=getter(site, site.operand("e"), "b32") if sparse else None,
        selector=_selector(site, site.word("A")) if sparse else 0,
        in_order="debug" in site.program.module.target,
    )
    return _together(product.run)


def _selector(site: Site, kind: str) -> int:
    """Which lanes' metadata counts: the first or second pair of four, or all of them."""
    x = site.operand("selector")
    most = 2 if kind in ("f16", "bf16", "tf32") else 1
    if not isinstance(x, s.Immediate) or not 0 <= x.value < most:
        raise site.error(f"the selector is a constant below {most}")
    return x.value


def _uniform(g: Group, values: Any, threads: Array, what: str) -> Array:
    """One value for each warpgroup, the same in all of its threads.

    Raises: Stop where they differ.
    """
    if not isinstance(values, np.ndarray) or values.ndim == 0:
        return np.full(len(threads), values)
    table: Array = values.reshape(threads.shape)
    if (table != table[:, :1]).any():
        raise Stop("barrier", f"{what} differs between threads of a warpgroup", int(threads[0, 0]))
    first: Array = table[:, 0]
    return first


def _registers(g: Group, slots: list[int], threads: Array) -> Array:
    """Registers of whole warpgroups: `[n][128][registers]` of 32 bits."""
    flat = threads.reshape(-1)
    columns = []
    for slot in slots:
        register = g.regs[slot]
        if register is None:
            register = g.fresh(slot)
        columns.append(register.view(np.uint32)[flat])
    return np.stack(columns, axis=1).reshape(*threads.shape, len(slots))


@frozen
class _Reader:
    """A warpgroup, by its number and its threads, that reads operands from shared memory."""

    g: Group
    groups: Warpgroups
    number: int
    threads: Array

    def operand(
        self, bits: int, rows: int, type_: str, flip: int, deep: int = K_BYTES, is_a: bool = False
    ) -> NDArray[np.float64]:
        """A matrix `[rows][K]` that a descriptor finds in the block's shared memory."""
        batch, thread = self.g.batch, int(self.threads[0])
        unit = 2 if flip else 8
        at = operand_addresses(bits, rows, bool(flip), deep)
        arena = batch.shared
        if int(at.max()) + unit > arena.limit:
            raise Stop("out-of-bounds", f"an operand ends at byte {int(at.max()) + unit} of shared "
                       f"memory with {arena.limit}", thread)  # fmt: skip
        base = int(batch.block_of[thread]) * arena.stride
        region = Region(arena, at + base, unit)
        words = Region(arena, operand_words(bits, rows, bool(flip), deep) + base, 8)
        agent = product_agent(batch, self.number, int(self.groups.open[self.number]))
        leaders = self.threads[::32].tolist()
        try:
            async_read(batch, leaders, words, agent, every=True)
        except Stop:
            if not is_a:
                raise
            # a warp reads its own 16 rows of A, and need not come behind who wrote the others
            for leader, part in zip(leaders, np.split(region.index, len(leaders)), strict=True):
                async_read(batch, (leader,), Region(arena, part, unit), agent)
        words.check_written(thread)
        count(batch.machine, "shared", "read", region.size)
        return decode(region.read().view(np.uint8), type_)


def watched(code: Code) -> frozenset[str]:
    """The names of a function's registers that belong to products, and copies by `mov`."""
    if code.watched is None:
        code.watched = frozenset(_find_watched(code))
    return code.watched


def _find_watched(code: Code) -> set[str]:
    products = [x for x in code.steps if x.match.form.meaning == "wgmma.mma_async"]
    if not products:
        return set()
    names: set[str] = set()
    for step in products:
        for x in step.instruction.operands[:2]:
            names |= {e.name for e in elements(x) if isinstance(e, s.Register)}
    moves = [x.instruction.operands for x in code.steps if _is_move(x.instruction)]
    before = 0
    while before != len(names):
        before = len(names)
        for target, source in moves:
            if isinstance(target, s.Register) and isinstance(source, s.Register):
                if source.name in names:
                    names.add(target.name)
    return names


def _is_move(x: s.Instruction) -> bool:
    return x.opcode == "mov" and len(x.operands) == 2


def _used(site: Site) -> tuple[dict[int, str], dict[int, str]]:
    """The registers that an instruction reads, and those that it writes, by their numbers."""
    reads: dict[int, str] = {}
    writes: dict[int, str] = {}
    for name, x in site.bound.items():
        if x is None:
            continue
        into = writes if site.specs[name].is_result else reads
        parts = (x.first, x.second) if isinstance(x, s.Pair) else elements(x)
        if isinstance(x, s.Address):
            parts = (x.base,)
        for part in parts:
            register = part.register if isinstance(part, s.Negated) else part
            if isinstance(register, s.Register):
                into[slot_of(site, register)] = register.name
    return reads, writes


def guard_registers(site: Site, run: Run) -> Run:
    """Adds to an instruction the check that it uses no register of an outstanding product.

    A `mov` from a register to another passes the mark on instead.
    """
    found = watched(site.code)
    leaves = (leaf for x in site.instruction.operands for leaf in s.leaves(x)) if found else ()
    if not any(isinstance(leaf, s.Register) and leaf.name in found for leaf in leaves):
        return run
    all_reads, all_writes = _used(site)
    reads = [slot for slot, name in all_reads.items() if name in found]
    writes = [slot for slot, name in all_writes.items() if name in found]
    if not reads and not writes:
        return run
    names = all_reads | all_writes
    if _is_move(site.instruction) and len(reads) == len(writes) == 1:
        return _moving(run, reads[0], writes[0])

    def checked(g: Group) -> None:
        groups = g.batch.state.get("warpgroups")
        if groups is not None and not groups.is_idle:
            groups.check(g, reads, writes, names)
        run(g)
        if groups is not None:
            groups.forget(g, writes)

    return checked


def _moving(run: Run, source: int, target: int) -> Run:
    def moving(g: Group) -> None:
        run(g)
        groups = g.batch.state.get("warpgroups")
        if groups is not None:
            groups.copy(g, source, target)

    return moving
