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

from stagefuse.compiler.ptx.table import Match, OperandSpec

from ..lanes import check_masks, check_whole
from ..operands import Get, Put, elements, getter, putter, result_parts
from ..program import Control, Run, Site, Step, slot_of

if TYPE_CHECKING:
    from ..machine import Group, Machine

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
    """Gives a step what it runs."""
    load_families()
    from .wgmma import guard_registers

    meaning = site.match.form.meaning
    if meaning in CONTROL:
        step.control = _guarded_control(site, CONTROL[meaning](site))
        return
    if meaning in PURE:
        run = _pure(site, PURE[meaning](site.match))
    elif meaning in EFFECT:
        run = EFFECT[meaning](site)
    else:
        raise site.error(f"the emulator does not know what it means ({meaning})")
    run = guard_registers(site, run)
    if "converge" in site.match.form.effects:
        mask = getter(site, site.operand("m"), "b32") if site.has("m") else None
        is_matrix = site.match.form.opcode in _ON_MATRICES
        step.control = _guarded_control(site, _converging(run, mask, is_matrix))
    elif site.instruction.guard is not None:
        step.run = _guarded(site, run)
    else:
        step.run = run


def _pure(site: Site, f: Callable[..., Any]) -> Run:
    form = site.match.form
    results = [spec for spec in form.specs if spec.is_result]
    sources = [spec for spec in form.specs if not spec.is_result and site.has(spec.name)]
    gets = [_source(site, spec) for spec in sources]
    first, second = result_parts(site.operand(results[0].name))
    put = _result(site, results[0], first)
    if results[0].paired:
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


def _source(site: Site, spec: OperandSpec) -> Get:
    x = site.operand(spec.name)
    kind = site.type_of(spec.name)
    if kind == "any" or site.match.count_of(spec) or len(elements(x)) > 1:
        parts = elements(x)
        gets = [getter(site, part, _element_type(site, len(parts), kind)) for part in parts]
        return lambda g: [get(g) for get in gets]
    return getter(site, x, kind)


def _element_type(site: Site, count: int, kind: str) -> str:
    if kind != "any":
        return kind
    return f"b{int(site.word('T')[1:]) // count}"


def _result(site: Site, spec: OperandSpec, x: Any) -> Put:
    kind = site.type_of(spec.name)
    parts = elements(x)
    if len(parts) == 1 and kind != "any" and not site.match.count_of(spec):
        return putter(site, x, kind)
    puts = [putter(site, part, _element_type(site, len(parts), kind)) for part in parts]

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

    def guarded(g: Group) -> None:
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

    def guarded(machine: Machine, g: Group, step: Step) -> bool:
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
