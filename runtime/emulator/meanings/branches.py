"""Branches, calls, the end of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stagefuse.compiler.ptx import syntax as s
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.externals import EXTERNALS
from stagefuse.runtime.emulator.layout import MOST_CALLS
from stagefuse.runtime.emulator.operands import getter, putter, write
from stagefuse.runtime.emulator.passed_by import called
from stagefuse.runtime.emulator.program import Control, Place, Run, Site, Step

from . import control, effect
from .stack import leave

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group, Machine


def _label(site: Site, name: str) -> int:
    found = site.scope.label(name)
    if found is None:
        raise site.error(f"there is no label `{name}`")
    return found


@control("control.bra")
def bra(site: Site) -> Control:
    target = site.operand("target")
    assert isinstance(target, s.Symbol)
    pc = _label(site, target.name)
    return lambda machine, g, step: g.batch.jump(g, pc)


@control("control.brx")
def brx(site: Site) -> Control:
    get = getter(site, site.operand("a"), "u32")
    table = site.operand("targets")
    assert isinstance(table, s.Symbol)
    if table.name not in site.code.tables:
        raise site.error(f"there is no list `{table.name}`")
    labels = [_label(site, name) for name in site.code.tables[table.name].labels]

    def run(machine: Machine, g: Group, step: Step) -> bool:
        index = np.broadcast_to(get(g), (g.n,))
        if int(index.max()) >= len(labels):
            at = int(index.argmax())
            raise Stop("out-of-bounds", f"label {int(index[at])} of {len(labels)}",
                       int(g.threads()[at]))  # fmt: skip
        chosen = np.unique(index)
        if len(chosen) == 1:
            return g.batch.jump(g, labels[int(chosen[0])])
        for number in chosen:
            held = index == number
            part = g.split(held, int(np.count_nonzero(held)))
            if part.batch.jump(part, labels[int(number)]):
                part.batch.push(part)
        return False

    return run


@control("control.exit")
def exit_(site: Site) -> Control:
    def run(machine: Machine, g: Group, step: Step) -> bool:
        g.batch.exit(g)
        return False

    return run


@control("control.ret")
def ret(site: Site) -> Control:
    results = site.code.formals[: len(site.code.function.results)]

    def run(machine: Machine, g: Group, step: Step) -> bool:
        if not g.stack:
            g.batch.exit(g)
            return False
        frame, pc, takes = g.stack[-1]
        leave(g)
        callee = g.frame
        g.stack = g.stack[:-1]
        g.frame, g.regs, g.pc = frame, frame.regs, pc + 1
        for formal, take in zip(results, takes, strict=True):
            take(g, callee, formal)
        return True

    return run


@control("control.trap")
def trap(site: Site) -> Control:
    def run(machine: Machine, g: Group, step: Step) -> bool:
        raise Stop("trap", "the kernel stopped itself")

    return run


@effect("misc.nothing")
def nothing(site: Site) -> Run:
    return lambda g: None


@effect("misc.nanosleep")
def nanosleep(site: Site) -> Run:
    def run(g: Group) -> None:
        g.looks = True

    return run


# calls


def _param_rows(g: Group, frame: Any, place: Place) -> Any:
    arena = frame.params[place.offset]
    return arena.bytes.reshape(g.batch.threads, -1), arena


def _copy_param(g: Group, source: Any, a: Place, target: Any, b: Place) -> None:
    """Copies a parameter variable between frames, for the threads of a group."""
    rows, _ = _param_rows(g, source, a)
    to, _ = _param_rows(g, target, b)
    threads = g.threads()
    size = min(rows.shape[1], to.shape[1])
    to[threads, :size] = rows[threads, :size]


@control("control.call")
def call(site: Site) -> Control:
    function = site.operand("function")
    arguments = _list(site, "arguments")
    results = _list(site, "results")
    if isinstance(function, s.Symbol):
        name = function.name
        if name not in site.program.codes:
            return _external(site, name, arguments, results)
        chosen = None
    else:
        name, chosen = "", getter(site, function, "u64")
    passes = [_pass(site, x) for x in arguments]
    takes = tuple(_take(site, x) for x in results)

    def enter(machine: Machine, g: Group, target: str) -> None:
        code = machine.program.codes[target]
        frame, batch = g.frame, g.batch
        if len(g.stack) >= MOST_CALLS:
            raise Stop("trap", f"calls are nested more than {MOST_CALLS} deep")
        base = frame.local_base + -(-frame.code.local_bytes // 16) * 16
        inner = batch.frame(code, len(g.stack) + 1, base)
        formals = code.formals[len(code.function.results) :]
        for formal, give in zip(formals, passes, strict=True):
            give(g, inner, formal)
        g.stack = (*g.stack, (frame, g.pc, takes))
        g.frame, g.regs, g.pc = inner, inner.regs, 0
        called(g)

    def run(machine: Machine, g: Group, step: Step) -> bool:
        if chosen is None:
            enter(machine, g, name)
            return True
        targets = np.broadcast_to(chosen(g), (g.n,))
        for address in np.unique(targets):
            held = targets == address
            part = g.split(held, int(np.count_nonzero(held)))
            enter(machine, part, machine.function_at(int(address)))
            g.batch.push(part)
        return False

    return run


def _list(site: Site, name: str) -> tuple[s.Operand, ...]:
    if not site.has(name):
        return ()
    x = site.operand(name)
    assert isinstance(x, s.Arguments)
    return x.elements


def _pass(site: Site, x: s.Operand) -> Any:
    """A function that hands an argument to a formal parameter of a frame."""
    place = site.scope.place(x.name) if isinstance(x, s.Symbol) else None

    def give(g: Group, inner: Any, formal: Place | int) -> None:
        if isinstance(formal, Place):
            if place is None:
                raise Stop("trap", "a register where a parameter variable belongs")
            _copy_param(g, g.frame, place, inner, formal)
            return
        value = getter(site, x, inner.code.registers[formal])(g)
        saved = g.frame, g.regs
        g.frame, g.regs = inner, inner.regs
        write(g, formal, np.array(np.broadcast_to(value, (g.n,))))
        g.frame, g.regs = saved

    return give


def _take(site: Site, x: s.Operand) -> Any:
    """A function that takes a result from a frame that ended."""
    place = site.scope.place(x.name) if isinstance(x, s.Symbol) else None

    def take(g: Group, callee: Any, formal: Place | int) -> None:
        if isinstance(formal, Place):
            if place is None:
                raise Stop("trap", "a register where a parameter variable belongs")
            _copy_param(g, callee, formal, g.frame, place)
            return
        assert isinstance(x, s.Register)
        values = callee.regs[formal]
        putter(site, x, callee.code.registers[formal])(g, g.of(values).copy())

    return take


def _external(
    site: Site, name: str, arguments: tuple[s.Operand, ...], results: tuple[s.Operand, ...]
) -> Control:
    known = EXTERNALS.get(name)

    def read(g: Group, x: s.Operand) -> Any:
        place = site.scope.place(x.name) if isinstance(x, s.Symbol) else None
        if place is None:
            return np.broadcast_to(getter(site, x, "b64")(g), (g.n,))
        rows, arena = _param_rows(g, g.frame, place)
        return rows[g.threads()].view(f"u{arena.stride}").reshape(-1)

    def run(machine: Machine, g: Group, step: Step) -> bool:
        if known is None:
            raise Stop("trap", f"nothing defines the function `{name}`")
        value = known(g, [read(g, x) for x in arguments])
        for x in results:
            place = site.scope.place(x.name) if isinstance(x, s.Symbol) else None
            if place is not None and value is not None:
                rows, arena = _param_rows(g, g.frame, place)
                raw = np.asarray(value, np.uint64).view(np.uint8).reshape(-1, 8)[:, : arena.stride]
                rows[g.threads()] = raw
                if arena.valid is not None:
                    arena.valid[:] = 1
        g.pc += 1
        return True

    return run
