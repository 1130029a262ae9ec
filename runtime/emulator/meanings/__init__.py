"""What instructions do: functions by the names that the instruction table gives.

- `pure(name)`: a factory that takes the match and gives a function from operands to the result.
- `effect(name)`: a factory that takes the site and gives a function that runs for a group.
- `control(name)`: as `effect`, but the function may move, split or stop the group.

A module of this folder is found by itself, so that a family is one file here and one in the
table. Forms with the effect `converge` wait for the lanes of their mask by themselves.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.table import Match, OperandSpec
from stagefuse.dsl.frozen import frozen
from stagefuse.runtime.emulator.lanes import check_masks, check_whole
from stagefuse.runtime.emulator.operands import Get, Put, elements, getter, putter, result_parts
from stagefuse.runtime.emulator.program import Control, Run, Site, Step, slot_of
from stagefuse.runtime.emulator.unwritten import check_guard, follow, settle

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group, Machine

PURE: dict[str, Callable[[Match], Callable[..., Any]]] = {}
EFFECT: dict[str, Callable[[Site], Run]] = {}
CONTROL: dict[str, Callable[[Site], Control]] = {}

Pure = Callable[[Match], Callable[..., Any]]


def pure(*names: str) -> Callable[[Pure], Pure]:
    """Registers the meaning of instructions whose result depends on operands alone."""

    def register(factory: Pure) -> Pure:
        PURE.update(dict.fromkeys(names, factory))
        return factory

    return register


def effect(*names: str) -> Callable[[Callable[[Site], Run]], Callable[[Site], Run]]:
    """Registers the meaning of instructions with effects that go on to the next one."""

    def register(factory: Callable[[Site], Run]) -> Callable[[Site], Run]:
        EFFECT.update(dict.fromkeys(names, factory))
        return factory

    return register


def control(*names: str) -> Callable[[Callable[[Site], Control]], Callable[[Site], Control]]:
    """Registers the meaning of instructions that move or stop threads."""

    def register(factory: Callable[[Site], Control]) -> Callable[[Site], Control]:
        CONTROL.update(dict.fromkeys(names, factory))
        return factory

    return register


@cache
def load_families() -> None:
    """Imports every module of this folder, so that all meanings are registered."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


def compile_step(site: Site, step: Step) -> None:
    """Gives a step what it runs. The families are loaded."""
    from .wgmma import guard_registers

    meaning = site.match.form.meaning
    if meaning in CONTROL:
        step.control = _guarded_control(site, _settled(site, CONTROL[meaning](site)))
        return
    if meaning in PURE:
        run = _pure(site)
    elif meaning in EFFECT:
        run = EFFECT[meaning](site)
    else:
        raise site.error(f"the emulator does not know what it means ({meaning})")
    run = follow(site, guard_registers(site, run))
    if "converge" in site.match.form.effects:
        mask = getter(site, site.operand("m"), "b32") if site.has("m") else None
        is_matrix = site.match.form.opcode in _ON_MATRICES
        step.control = _guarded_control(site, _converging(run, mask, is_matrix))
    elif site.instruction.guard is not None:
        step.run = _guarded(site, run)
    else:
        step.run = run


@frozen
class _Values:
    """What a pure instruction computes, and how its operands are read: for each source its name,
    its type, and whether it is a list of values; the same for the result."""

    function: Callable[..., Any]
    sources: tuple[tuple[str, str, bool], ...]
    result: tuple[str, str, bool]
    is_paired: bool


def _values(site: Site) -> _Values:
    """What this instruction has in common with others of its kind, found once."""
    known = site.known.values
    if known is None:
        match, specs = site.match, site.specs.values()

        def part(spec: OperandSpec) -> tuple[str, str, bool]:
            kind = site.type_of(spec.name)
            count = len(elements(_single(site, spec)))
            is_list = bool(kind == "any" or match.count_of(spec) or count > 1)
            return (
                spec.name,
                f"b{int(site.word('T')[1:]) // count}" if kind == "any" else kind,
                is_list,
            )

        first = next(spec for spec in specs if spec.is_result)
        known = site.known.values = _Values(
            PURE[match.form.meaning](match),
            tuple(part(spec) for spec in specs if not spec.is_result and site.has(spec.name)),
            part(first), first.paired,
        )  # fmt: skip
    found: _Values = known
    return found


def _single(site: Site, spec: OperandSpec) -> s.Operand:
    """An operand, of a pair the first."""
    return result_parts(site.operand(spec.name))[0]


def _settled(site: Site, inner: Control) -> Control:
    """A control function behind the checks of registers that nothing wrote."""
    if not site.code.open:
        return inner
    first = settle(site)

    def settled(machine: Machine, g: Group, step: Step) -> bool:
        first(g)
        return inner(machine, g, step)

    return settled


def _pure(site: Site) -> Run:
    values = _values(site)
    f, gets = values.function, [_source(site, *part) for part in values.sources]
    name, kind, is_list = values.result
    first, second = result_parts(site.operand(name))
    put = _result(site, first, kind, is_list)
    if values.is_paired:
        return _two_results(f, gets, put, putter(site, second, "pred"))
    if len(gets) == 1:
        (a,) = gets
        return lambda g: put(g, f(a(g)))
    if len(gets) == 2:
        a, b = gets
        return lambda g: put(g, f(a(g), b(g)))
    if len(gets) == 3:
        a, b, c = gets
        return lambda g: put(g, f(a(g), b(g), c(g)))
    return lambda g: put(g, f(*[get(g) for get in gets]))


def _source(site: Site, name: str, kind: str, is_list: bool) -> Get:
    x = site.operand(name)
    if not is_list:
        return getter(site, x, kind)
    gets = [getter(site, part, kind) for part in elements(x)]
    return lambda g: [get(g) for get in gets]


def _result(site: Site, x: s.Operand, kind: str, is_list: bool) -> Put:
    if not is_list:
        return putter(site, x, kind)
    puts = [putter(site, part, kind) for part in elements(x)]

    def put(g: Group, values: Any) -> None:
        for one, value in zip(puts, values, strict=True):
            one(g, value)

    return put


def _two_results(f: Callable[..., Any], gets: list[Get], put: Put, also: Put) -> Run:
    def run(g: Group) -> None:
        values, second = f(*[get(g) for get in gets])
        put(g, values)
        also(g, second)

    return run


def _guarded(site: Site, run: Run) -> Run:
    """Runs for the threads whose guard holds."""
    guard = site.instruction.guard
    assert guard is not None
    slot, negated = slot_of(site, guard.register), guard.negated
    check = check_guard(site)

    def guarded(g: Group) -> None:
        if check is not None:
            check(g)
        p = g.regs[slot]
        if p is None:
            p = g.fresh(slot)
        sel = g.sel
        held = p if sel is None else p[sel]
        if negated:
            held = ~held
        count = int(np.count_nonzero(held))
        if count == g.n:
            run(g)
        elif count:
            n = g.n
            g.narrow(held, count)
            try:
                run(g)
            finally:
                g.sel, g.n = sel, n

    return guarded


def _guarded_control(site: Site, inner: Control) -> Control:
    """Splits a group by the guard: those where it does not hold go on behind the instruction."""
    guard = site.instruction.guard
    if guard is None:
        return inner
    slot, negated = slot_of(site, guard.register), guard.negated
    check = check_guard(site)

    def guarded(machine: Machine, g: Group, step: Step) -> bool:
        if check is not None:
            check(g)
        p = g.regs[slot]
        if p is None:
            p = g.fresh(slot)
        held = p if g.sel is None else p[g.sel]
        if negated:
            held = ~held
        count = int(np.count_nonzero(held))
        if count == g.n:
            return inner(machine, g, step)
        if count == 0:
            g.pc += 1
            return True
        rest = g.split(~held, g.n - count)
        rest.pc += 1
        g.batch.push(rest)
        g.narrow(held, count)
        if inner(machine, g, step):
            g.batch.push(g)
        return False

    return guarded


_ON_MATRICES = frozenset(("mma", "wmma", "ldmatrix", "stmatrix", "movmatrix"))
"""Opcodes of what a whole warp does with matrices."""


def _converging(run: Run, mask: Get | None, is_matrix: bool) -> Control:
    def converge(machine: Machine, g: Group, step: Step) -> bool:
        if mask is not None:
            check_masks(g, mask(g))
        if not g.batch.converge(g, step, mask):
            return False
        if is_matrix:
            check_whole(g)
        if machine.races is not None:
            machine.races.together(g.batch, g)
        run(g)
        g.pc += 1
        return True

    return converge
