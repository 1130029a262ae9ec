"""Loads, stores and addresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.table import Match
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime.emulator import access
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.memory import (
    ALLOCATION_BITS,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    RANK_BITS,
    SHARED_WINDOW,
    WINDOW_BITS,
)
from stagefuse.runtime.emulator.operands import (
    address,
    elements,
    getter,
    is_generic_variable,
    putter,
)
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.repacked import is_passed, only_repacked
from stagefuse.runtime.emulator.unwritten import is_read, read_unwritten
from stagefuse.runtime.emulator.values import DTYPES

from . import effect, pure

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

ORDERS = ("relaxed", "acquire", "release", "acq_rel", "volatile")
"""Words of accesses that other threads may do at the same time (PTX ISA, "strong operations")."""


def space_of(site: Site, operand: str = "a") -> str:
    """The space that an instruction names, else that of the variable it names, else generic."""
    named = site.word("space") or ("global" if "global" in site.match.slots else "")
    named = named or site.specs[operand].space
    if named:
        return "param" if named == "param::func" else named
    return {"entry": "param", "call": "param", "dynamic": "shared"}.get(
        found := is_generic_variable(site, operand), found or "generic"
    )


def order_of(site: Site) -> str:
    """The order of an access: a word of `ORDERS`, or "" for a weak one."""
    words = site.match.slots.values()
    return next((word for word in words if word in ORDERS), "")


@effect("memory.ld")
def ld(site: Site) -> Run:
    kind = site.word("T")
    space, order, narrow = space_of(site), order_of(site), site.word("scope") == "cta"
    at = address(site, "a")
    results = elements(site.operand("d"))
    if kind == "b128":
        return _ld128(site, space, order, narrow, at)
    puts = [putter(site, x, kind) for x in results]
    dtype, count = DTYPES[kind], len(results)
    if space in ("param", "param::entry") and is_generic_variable(site, "a") == "entry":
        return _ld_entry(site, puts, dtype)

    read_only = "nc" in site.match
    guess = not order and site.code.swaps_at(site.operand("a"))
    if guess:  # the first read of a compare-and-swap loop, which programs leave weak
        order = "relaxed"

    @cache
    def is_repacked(x: s.Operand) -> bool:
        # without optimisations, code also passes words on, and loads what it then drops
        is_plain = space == "generic" or not is_passed(site.code, x)
        is_used = space == "generic" or count > 1 or is_read(site.code, x)
        return is_plain and is_used and only_repacked(site.code, [x])

    def missing(part: access.Part) -> list[Any]:
        return [part.arena.untouched(part.index + j * dtype.itemsize, dtype.itemsize)
                for j in range(count)]  # fmt: skip

    def repacks(part: access.Part) -> bool:
        found = zip(results, missing(part), strict=True)
        return all(late is None or is_repacked(x) for x, late in found)

    def unread(g: Group, part: access.Part, stop: Stop) -> None:
        read_unwritten(site, g, results, part.threads, missing(part), stop)

    def run(g: Group) -> None:
        addresses = at(g)
        if order and not guess:
            g.look(addresses)
        values = access.load(
            g, space, addresses, dtype, count, order=order, narrow=narrow,
            repacks=repacks, read_only=read_only, unread=None if order else partial(unread, g),
        )  # fmt: skip
        for put, value in zip(puts, values, strict=True):
            put(g, value)

    return run


def _ld_entry(site: Site, puts: list[Any], dtype: np.dtype[Any]) -> Run:
    """A kernel's parameter, which is the same for all threads."""
    x = site.operand("a")
    assert isinstance(x, s.Address) and isinstance(x.base, s.Symbol)
    place = site.scope.place(x.base.name)
    assert place is not None
    offset = place.offset + x.base.offset + x.offset
    if offset % (dtype.itemsize * len(puts)):
        raise site.error("a parameter that is not aligned")

    def run(g: Group) -> None:
        view = g.batch.machine.params.view(dtype)
        for i, put in enumerate(puts):
            put(g, view[offset // dtype.itemsize + i])

    return run


def _ld128(site: Site, space: str, order: str, narrow: bool, at: Any) -> Run:
    put = putter(site, site.operand("d"), "b128")
    both = DTYPES["b128"]

    def run(g: Group) -> None:
        addresses = at(g)
        if order:
            g.look(addresses)
        low, high = access.load(g, space, addresses, DTYPES["b64"], 2, order=order, narrow=narrow)
        values = np.empty(g.n, both)
        values["low"], values["high"] = low, high
        put(g, values)

    return run


@effect("memory.st")
def st(site: Site) -> Run:
    kind = site.word("T")
    space, order, narrow = space_of(site), order_of(site), site.word("scope") == "cta"
    at = address(site, "a")
    if kind == "b128":
        wide = getter(site, site.operand("b"), "b128")
        return lambda g: access.store(
            g, space, at(g), [np.ascontiguousarray(wide(g)[n]) for n in ("low", "high")],
            order=order, narrow=narrow,
        )  # fmt: skip
    gets = [getter(site, x, kind) for x in elements(site.operand("b"))]
    raw = DTYPES[f"b{TYPES[kind].bits}"]

    def run(g: Group) -> None:
        access.store(
            g, space, at(g), [get(g).view(raw) for get in gets], order=order, narrow=narrow
        )

    return run


@effect("memory.prefetch")
def prefetch(site: Site) -> Run:
    """Nothing that a program could see."""
    return lambda g: None


@effect("memory.discard")
def discard(site: Site) -> Run:
    """The bytes count as unwritten (PTX ISA, "discard": reading them is undefined)."""
    at = address(site, "a")
    size = site.operand("size")
    assert isinstance(size, s.Immediate)
    count = size.value

    def run(g: Group) -> None:
        for part in access.places(g, space_of(site), at(g), count, g.threads()):
            arena = part.arena
            if arena.valid is None:  # a buffer that was written whole
                arena.valid = np.ones(arena.bytes.size, np.uint8)
            arena.forget(part.index, count)

    return run


@effect("memory.createpolicy")
def createpolicy(site: Site) -> Run:
    put = putter(site, site.operand("d"), "b64")
    return lambda g: put(g, np.zeros(g.n, np.uint64))


_WINDOWS = {
    "shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "shared::cluster": SHARED_WINDOW,
    "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "param::entry": PARAM_WINDOW,
}  # fmt: skip


def _window_word(match: Match) -> str:
    return match.get("S") or "shared::cluster"


@pure("memory.cvta")
def cvta(match: Match) -> Callable[..., Any]:
    """To and from generic addresses: a window is added or taken off."""
    dtype = DTYPES[match.get("T")]
    window = dtype.type(_WINDOWS.get(_window_word(match), 0) & ((1 << dtype.itemsize * 8) - 1))
    if "to" in match.slots:
        return lambda a: a - window
    return lambda a: a + window


@effect("memory.isspacep")
def isspacep(site: Site) -> Run:
    get, put = getter(site, site.operand("a"), "u64"), putter(site, site.operand("p"), "pred")
    word = _window_word(site.match)

    def run(g: Group) -> None:
        a = np.broadcast_to(get(g), (g.n,))
        window = (a >> np.uint64(WINDOW_BITS)).astype(np.int64)
        if word in ("global", "const"):
            constants = [i + 1 for i, arena in enumerate(g.batch.machine.heap.arenas)
                         if arena.constant]  # fmt: skip
            number = (a >> np.uint64(ALLOCATION_BITS)).astype(np.int64)
            found = (window == 0) & (np.isin(number, constants) == (word == "const"))
        else:
            found = window == _WINDOWS[word] >> WINDOW_BITS
            if word in ("shared", "shared::cta"):  # ISA: "if no sub-qualifier is specified, ::cta"
                rank = (a & np.uint64(0xFFFFFFFF)) >> np.uint64(RANK_BITS)
                own = g.special("%cluster_ctarank").astype(np.uint64) + np.uint64(1)
                found = found & ((rank == 0) | (rank == own))
        put(g, found)

    return run
