"""Operands as Python functions: read a value for a group of threads, write a result, an address."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s

from .floats import F16, F32, F64
from .program import Place, Site, slot_of
from .values import DTYPES, immediate, stored_dtype

if TYPE_CHECKING:
    from .machine import Group

Array = NDArray[Any]
Get = Callable[["Group"], Any]
Put = Callable[["Group", Any], None]

I64, U64 = np.dtype(np.int64), np.dtype(np.uint64)


def getter(site: Site, x: s.Operand, type: str) -> Get:
    """A function that reads an operand as a type, for the threads of a group.

    It gives an array with an element for each thread, or one NumPy scalar for all.
    """
    match x:
        case s.Register():
            return _register(slot_of(site, x), x.type, type)
        case s.Negated(register):
            inner = _register(slot_of(site, register), "pred", "pred")
            return lambda g: ~inner(g)
        case s.Immediate(value):
            constant = immediate(value, type)
            return lambda g: constant
        case s.FloatImmediate():
            return _float(x, type)
        case s.Special(name):
            dtype = DTYPES[type]
            return lambda g: _typed(g.special(name), dtype)
        case s.Symbol(name, offset):
            return _symbol(site, name, offset, DTYPES[type])
        case _:
            raise site.error("an operand that cannot be read here")


def _typed(values: Any, dtype: np.dtype[Any]) -> Any:
    if values.dtype.itemsize == dtype.itemsize:
        return values.view(dtype)
    return values.astype(dtype)


def _float(x: s.FloatImmediate, type: str) -> Get:
    if type in ("f32", "f64"):
        constant = np.array(x.bits, f"u{x.width // 8}").view(f"f{x.width // 8}")
        value = constant.astype(DTYPES[type])[()]
    else:
        value = immediate(x.bits, type)
    return lambda g: value


def _register(slot: int, declared: str, type: str) -> Get:
    dtype, stored = DTYPES[type], stored_dtype(declared)
    if stored.itemsize == dtype.itemsize:

        def get(g: Group) -> Any:
            a = g.regs[slot]
            if a is None:
                a = g.fresh(slot)
            if a.dtype is not dtype:
                a = a.view(dtype)
            sel = g.sel
            return a if sel is None else a[sel]

        return get

    narrow = np.dtype(f"u{dtype.itemsize}")

    def cut(g: Group) -> Any:
        a = g.regs[slot]
        if a is None:
            a = g.fresh(slot)
        a = a.view(stored)
        sel = g.sel
        return (a if sel is None else a[sel]).astype(narrow).view(dtype)

    return cut


def _symbol(site: Site, name: str, offset: int, dtype: np.dtype[Any]) -> Get:
    place = site.scope.place(name)
    if place is None:
        if name in site.program.codes or name in site.program.externals:
            return lambda g: dtype.type(g.batch.machine.function_address(name))
        raise site.error(f"`{name}` is not declared")
    at = place
    return lambda g: dtype.type(address_of(g, at) + offset)


def address_of(g: Group, place: Place) -> int:
    """The address of a variable in its own space."""
    match place.space:
        case "entry":
            return place.offset
        case "shared":
            return g.batch.machine.layout.shared[place.key]
        case "dynamic":
            return g.batch.machine.layout.dynamic_offset
        case "local":
            return g.frame.local_base + place.offset
        case "call":
            return g.frame.param_address(place.offset)
        case _:
            return g.batch.machine.variables[place.variable.name]


def putter(site: Site, x: s.Operand, type: str) -> Put:
    """A function that writes a result of a type to a register.

    A result narrower than its register is extended: by its sign if it is signed, else by zeros.
    """
    if isinstance(x, s.Sink):
        return lambda g, values: None
    if not isinstance(x, s.Register):
        raise site.error("a result that cannot be written")
    slot, dtype, stored = slot_of(site, x), DTYPES[type], stored_dtype(x.type)
    if stored.itemsize == dtype.itemsize:
        return lambda g, values: write(g, slot, values)
    wide = np.dtype(f"i{stored.itemsize}") if dtype.kind == "i" else stored
    raw = np.dtype(f"u{dtype.itemsize}")

    def put(g: Group, values: Any) -> None:
        if dtype in (F16, F32, F64):
            values = values.view(raw)
        write(g, slot, values.astype(wide))

    return put


def write(g: Group, slot: int, values: Any) -> None:
    """Writes a register of the threads of a group; the array may become the register itself."""
    sel = g.sel
    if sel is None:
        if values.__class__ is not np.ndarray or values.shape != (g.n,):
            values = np.full(g.n, values)
        g.regs[slot] = values
        return
    a = g.regs[slot]
    if a is None:
        a = g.fresh(slot)
    if not a.flags.writeable:  # one value for all threads
        a = g.regs[slot] = a.copy()
    if a.dtype is not values.dtype:
        a = a.view(values.dtype)
    a[sel] = values


def elements(x: s.Operand) -> tuple[s.Operand, ...]:
    """The elements of a vector, or the one value."""
    return x.elements if isinstance(x, s.Vector) else (x,)


def result_parts(x: s.Operand) -> tuple[s.Operand, s.Operand]:
    """A result and its second part, which is a sink where there is none."""
    return (x.first, x.second) if isinstance(x, s.Pair) else (x, s.Sink())


def address(site: Site, name: str) -> Get:
    """A function that gives the addresses of an operand, as an i64 array of each thread."""
    x = site.operand(name)
    if not isinstance(x, s.Address):
        raise site.error(f"{name} is no address")
    offset = x.offset
    if isinstance(x.base, s.Register):
        slot, stored = slot_of(site, x.base), stored_dtype(x.base.type)
        if stored.itemsize == 8:

            def wide(g: Group) -> Any:
                a = g.regs[slot]
                if a is None:
                    a = g.fresh(slot)
                sel = g.sel
                a = a.view(I64) if sel is None else a[sel].view(I64)
                return a + offset if offset else a

            return wide

        def narrow(g: Group) -> Any:
            a = g.regs[slot]
            if a is None:
                a = g.fresh(slot)
            sel = g.sel
            return (a.view(stored) if sel is None else a[sel].view(stored)).astype(I64) + offset

        return narrow
    if isinstance(x.base, s.Immediate):
        at = x.base.value + offset
        return lambda g: np.full(g.n, at, I64)
    base = _symbol(site, x.base.name, x.base.offset + offset, U64)
    return lambda g: np.full(g.n, int(base(g)), I64)


def is_generic_variable(site: Site, name: str) -> str:
    """The space of the variable that an address names, "" for a register."""
    x = site.operand(name)
    if isinstance(x, s.Address) and isinstance(x.base, s.Symbol):
        place = site.scope.place(x.base.name)
        return place.space if place else ""
    return ""
