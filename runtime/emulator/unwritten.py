"""Registers that nothing wrote: who reads one, and where that matters.

Most registers are written on every way to where they are read, which the function's flow shows
once (definite assignment). The others, and what is computed from them, are followed while the
kernel runs: for each thread whether the value is *open*. An open value may be moved and computed
with, as compilers do where a guard or a select drops it later; what may not depend on one is an
address, a guard or branch, and what is stored to global memory.

What is put together of several registers is open where all of them are: structs have gaps. Memory,
shuffles and calls pass no marks on, so that a read can be missed there, and none is made up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.dsl.frozen import frozen

from .errors import Stop
from .flow import block_starts, following
from .program import Code, Decoded, Run, Scope, Site, Step, slot_of
from .repacked import PACKING

if TYPE_CHECKING:
    from .machine import Group

Array = NDArray[Any]
Pending = Sequence[tuple[Step, Scope, Decoded]]
"""All steps of a function, with their scopes and what they are."""
_COMPUTING = ("tensor.mma", "tensor.mma_quads", "tensor.mma_sparse")
"""Meanings beside pure ones whose results are open where an operand is."""


@frozen
class Uses:
    """Names of registers that an instruction reads and writes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


def uses_of(known: Decoded, x: s.Instruction) -> Uses:
    """The registers of an instruction, but for its guard."""
    reads: list[str] = []
    writes: list[str] = []
    for name, operand in zip(known.present, x.operands, strict=True):
        into = writes if _is_result(known, name) else reads
        if isinstance(operand, s.Register):
            into.append(operand.name)
            continue
        for leaf in s.leaves(operand):
            if isinstance(leaf, s.Register):
                (reads if isinstance(operand, s.Address) else into).append(leaf.name)
    return Uses(tuple(reads), tuple(writes))


def is_read(code: Code, x: s.Operand) -> bool:
    """Whether a function reads a register anywhere, by its name."""
    if code.reads is None:
        steps = code.ready or code.pending
        code.reads = frozenset(
            name for step, _, known in steps for name in uses_of(known, step.instruction).reads
        ) | {step.instruction.guard.register.name for step, _, _ in steps if step.instruction.guard}
    return isinstance(x, s.Register) and x.name in code.reads


def _is_result(known: Decoded, name: str) -> bool:
    return known.specs[name].is_result or name == "results"


@frozen
class _Block:
    """Steps without branches between: what they write for certain, what they read before, where
    they go on."""

    writes: int
    exposed: int
    following: tuple[int, ...]


class _Flow:
    """Finds registers that are read where they may not have been written."""

    def __init__(self, code: Code, pending: Pending) -> None:
        self.code, self.scopes = code, [scope for _, scope, _ in pending]
        self.uses = [uses_of(known, step.instruction) for step, _, known in pending]
        self.numbers: dict[str, int] = {}
        self.starts = block_starts(code)

    def bit(self, name: str) -> int:
        return 1 << self.numbers.setdefault(name, len(self.numbers))

    def open(self) -> set[str]:
        """Names of registers that are read where some way leads that does not write them."""
        ends = [*self.starts[1:], len(self.code.steps)]
        blocks = {a: self.block(a, b) for a, b in zip(self.starts, ends, strict=True)}
        every = (1 << len(self.numbers)) - 1
        known = dict.fromkeys(blocks, every)
        formals = (v.name for v in self.code.function.parameters if v.space == "reg")
        known[0] = sum({self.bit(name) for name in formals}) & every
        waiting = [0]
        visited: set[int] = set()
        while waiting:
            at = waiting.pop()
            visited.add(at)
            after = known[at] | blocks[at].writes
            for to in blocks[at].following:
                if to not in visited or known[to] & ~after:
                    known[to] &= after
                    waiting.append(to)
        found = 0
        for at in visited:
            found |= blocks[at].exposed & ~known[at]
        return {name for name, number in self.numbers.items() if found >> number & 1}

    def block(self, first: int, last: int) -> _Block:
        written = exposed = 0
        under: dict[tuple[str, bool], int] = {}
        """What was written under a guard, which holds for what has the same one."""
        for step, uses in zip(self.code.steps[first:last], self.uses[first:last], strict=True):
            guard = step.instruction.guard
            held = written
            if guard is not None:
                exposed |= self.bit(guard.register.name) & ~written
                held |= under.get((guard.register.name, guard.negated), 0)
            for name in uses.reads:
                exposed |= self.bit(name) & ~held
            now = 0
            for name in uses.writes:
                now |= self.bit(name)
                under.pop((name, False), None)
                under.pop((name, True), None)
            if guard is None:
                written |= now
            else:
                key = guard.register.name, guard.negated
                under[key] = under.get(key, 0) | now
        return _Block(written, exposed, tuple(following(self.code, self.scopes, last - 1)))


def find_open(code: Code, pending: Pending) -> frozenset[str]:
    """Names of registers whose values may be open somewhere: to be followed."""
    flow = _Flow(code, pending)
    return _with_results(flow.open(), pending, flow.uses)


def _with_results(names: set[str], pending: Pending, uses: Sequence[Uses]) -> frozenset[str]:
    """Registers, and all that is computed from them."""
    if not names:
        return frozenset()
    passing = [(u.writes, u.reads) for u, (step, _, _) in zip(uses, pending, strict=True)
               if u.writes and _passes(step.match.form.meaning)]  # fmt: skip
    found, size = set(names), -1
    while size != len(found):
        size = len(found)
        for writes, reads in passing:
            if not found.isdisjoint(reads):
                found.update(writes)
    return frozenset(found)


def _passes(meaning: str) -> bool:
    from .meanings import PURE

    return meaning in PURE or meaning in _COMPUTING


def read_unwritten(
    site: Site, g: Group, results: Sequence[s.Operand], threads: Array,
    missing: Sequence[Array | None], stop: Stop,
) -> None:  # fmt: skip
    """A load read elements of shared memory that nothing wrote, or a shuffle a lane that ended:
    its results are open there.

    `missing` says for each result in which of the threads. From the first such load on, all that is
    computed from these registers is followed.
    """
    names = {x.name for x in results if isinstance(x, s.Register)}
    if not names <= site.code.loaded:
        _follow_loads(site, names)
    for x, late in zip(results, missing, strict=True):
        if late is not None and isinstance(x, s.Register):
            opened(g, slot_of(site, x))[threads[late]] = True
    stop.instruction = site.instruction
    g.batch.state.setdefault("read unwritten", stop)


def _follow_loads(site: Site, names: set[str]) -> None:
    """Makes the steps ready anew that use these registers, or what is computed from them."""
    from .meanings import compile_step

    code = site.code
    uses = [uses_of(known, step.instruction) for step, _, known in code.ready]
    found = _with_results(set(code.loaded | names), code.ready, uses)
    added, closed = found - code.loaded, found - code.open
    code.loaded, code.open = found, code.open | found
    for step, scope, known in code.ready:
        x = step.instruction
        each = Site(site.program, code, scope, x, known, known.bound(x))
        guard = [x.guard.register] if x.guard is not None else []
        registers = _registers(each, [*x.operands, *guard])
        if not added.isdisjoint(registers.values()):
            code.loaded_only.update(n for n, name in registers.items() if name in closed)
            compile_step(each, step)


def opened(g: Group, slot: int) -> Array:
    """For each thread of the batch whether a register's value is open."""
    found = g.frame.open.get(slot)
    if found is None:
        make = np.zeros if slot in g.frame.code.loaded_only else np.ones
        found = g.frame.open[slot] = make(g.batch.threads, np.bool_)
    return found


def check_guard(site: Site) -> Run | None:
    """A check that the guard of an instruction is not open, `None` where it never is."""
    guard = site.instruction.guard
    if guard is None or guard.register.name not in site.code.open:
        return None
    return _check(site, {slot_of(site, guard.register): guard.register.name}, "decides")


def _check(site: Site, slots: dict[int, str], does: str) -> Run:
    def check(g: Group) -> None:
        for slot, name in slots.items():
            if (late := g.of(opened(g, slot))).any():
                read = g.batch.state.get("read unwritten") if name in site.code.loaded else None
                if read is not None:
                    read.message += f", and {name} {does} at line {site.instruction.line}"
                    raise read
                raise Stop("uninitialised", f"nothing wrote what {name} holds, which {does} here",
                           int(g.threads()[late][0]))  # fmt: skip

    return check


def follow(site: Site, run: Run) -> Run:
    """Adds to an instruction what becomes of open registers, and the check that it may use them."""
    found = site.code.open
    if not found:
        return run
    uses = uses_of(site.known, site.instruction)
    if found.isdisjoint(uses.reads) and found.isdisjoint(uses.writes):
        return run
    checks = [_check(site, slots, does) for slots, does in _sinks(site) if slots]
    results = _slots(site, (x for n, x in site.bound.items() if _is_result(site.known, n)))
    becomes = _becomes(site)

    def followed(g: Group) -> None:
        for check in checks:
            check(g)
        after = becomes(g) if results else False
        for slot in results:
            values = opened(g, slot)
            values[slice(None) if g.sel is None else g.sel] = after
        run(g)  # a load may find that nothing wrote what it reads

    return followed


def settle(site: Site) -> Run:
    """What instructions that move or stop threads do first: check addresses, close results."""
    return follow(site, lambda g: None)


def _registers(site: Site, operands: Any) -> dict[int, str]:
    """The registers in operands, by number."""
    leaves = (leaf for x in operands for leaf in s.leaves(x))
    return {slot_of(site, x): x.name for x in leaves if isinstance(x, s.Register)}


def _slots(site: Site, operands: Any) -> dict[int, str]:
    """The followed registers in operands, by number."""
    return {n: x for n, x in _registers(site, operands).items() if x in site.code.open}


def _sinks(site: Site) -> Iterator[tuple[dict[int, str], str]]:
    """Followed registers that something depends on, and in words what they do."""
    meaning = site.match.form.meaning
    addresses = [x for x in site.bound.values() if isinstance(x, s.Address)]
    yield _slots(site, addresses), "is part of an address"
    values = [x for n, x in site.bound.items()
              if not isinstance(x, s.Address) and not _is_result(site.known, n)]  # fmt: skip
    if meaning == "control.brx":
        yield _slots(site, values), "decides"
    if (meaning == "memory.st" or meaning.startswith("atomic.")) and (
        site.word("space") == "global"
    ):
        yield _slots(site, values), "is stored"
    elif not _passes(meaning):  # of what was loaded nothing is missed
        found = _slots(site, values)
        yield {n: x for n, x in found.items() if x in site.code.loaded}, "is used"


def _becomes(site: Site) -> Any:
    """A function that says whether results are open: for each thread, or for all."""
    meaning = site.match.form.meaning
    values = [x for n, x in site.bound.items() if x is not None and not site.specs[n].is_result]
    if not _passes(meaning):
        return lambda g: False
    if meaning == "compare.selp":
        return _selected(site)
    if site.match.form.opcode in ("and", "or") and site.word("T") == "pred":
        return _joined(site)
    slots = list(_slots(site, values))
    leaves = [leaf for x in values for leaf in s.leaves(x) if isinstance(leaf, s.Register)]
    gathers = site.match.form.opcode in PACKING or "bool" in site.match
    if not slots or gathers and any(leaf.name not in site.code.open for leaf in leaves):
        return lambda g: False
    combine = np.logical_and if gathers else np.logical_or
    return lambda g: combine.reduce([g.of(opened(g, slot)) for slot in slots])


def _selected(site: Site) -> Any:
    """Of `selp` the operand that the predicate chooses."""
    from .operands import getter

    sources = [list(_slots(site, [site.bound[n]])) for n in ("a", "b")]
    chosen, own = getter(site, site.operand("p"), "pred"), list(_slots(site, [site.bound["p"]]))

    def becomes(g: Group) -> Any:
        first, second = (g.of(opened(g, x[0])) if x else np.False_ for x in sources)
        found = np.where(chosen(g), first, second)
        for slot in own:
            found = found | g.of(opened(g, slot))
        return found

    return becomes


def _joined(site: Site) -> Any:
    """Of `and` and `or` of predicates: not open where one that is not open decides."""
    from .operands import getter

    deciding = site.match.form.opcode == "or"
    sides = [(getter(site, site.operand(n), "pred"), list(_slots(site, [site.bound[n]])))
             for n in ("a", "b")]  # fmt: skip

    def becomes(g: Group) -> Any:
        found: Any = np.False_
        decided: Any = np.False_
        for get, slots in sides:
            late = g.of(opened(g, slots[0])) if slots else np.False_
            found = found | late
            decided = decided | ~late & (get(g) == deciding)
        return found & ~decided

    return becomes
