"""wmma: matrices whose fragments have no layout that a program may know.

Here lane i holds every 32nd element of the matrix, row by row, from the ith on; where a fragment
has room for twice as many, as A and B of f16 have, the second half repeats the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime.emulator import access
from stagefuse.runtime.emulator import floats as fl
from stagefuse.runtime.emulator.arrays import warps_of
from stagefuse.runtime.emulator.operands import address, elements, getter, putter
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.values import DTYPES

from . import effect
from .tensor import unpacked, warp_rows

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Array = NDArray[Any]


def _shape(site: Site) -> tuple[int, int, int]:
    name = next(w for w in site.match.slots.values() if w[0] == "m" and w[1:2].isdigit())
    m, rest = name[1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


def _element(site: Site) -> str:
    """The type of elements in memory: the last word."""
    return next(w for w in reversed(list(site.match.slots.values())) if w in TYPES)


def _layout(site: Site) -> tuple[int, int, bool]:
    """Rows and columns of the matrix that is loaded or stored, and whether rows come first."""
    m, n, k = _shape(site)
    rows, columns = {"a": (m, k), "b": (k, n)}.get(
        next(w for w in site.match.slots if w in "abcd"), (m, n)
    )
    return rows, columns, site.word("layout") == "row"


def _places(rows: int, columns: int, by_rows: bool, held: int) -> list[tuple[Array, Array]]:
    """For each element that a lane holds, its line in memory and its place in that."""
    lane = np.arange(32)
    found = []
    for i in range(held):
        at = (lane + 32 * i) % (rows * columns)
        row, column = at // columns, at % columns
        found.append((row, column) if by_rows else (column, row))
    return found


def _stride(site: Site, rows: int, columns: int, by_rows: bool) -> Any:
    if site.has("stride"):
        return getter(site, site.operand("stride"), "u32")
    tight = np.uint32(columns if by_rows else rows)
    return lambda g: tight


@effect("wmma.load")
def load(site: Site) -> Run:
    rows, columns, by_rows = _layout(site)
    kind = _element(site)
    item = TYPES[kind].size_bytes
    results = elements(site.operand("d"))
    word = _word(kind)
    puts = [putter(site, x, word) for x in results]
    at, stride = address(site, "p"), _stride(site, rows, columns, by_rows)
    each = DTYPES[word].itemsize // item
    space = site.word("space") or "generic"
    dtype = np.dtype(f"u{item}")

    def run(g: Group) -> None:
        base, step = at(g), np.broadcast_to(stride(g), (g.n,)).astype(np.int64)
        lane = g.threads() & 31
        parts = [
            access.load(g, space, base + (line[lane] * step + within[lane]) * item, dtype, 1)[0]
            for line, within in _places(rows, columns, by_rows, len(puts) * each)
        ]
        for r, put in enumerate(puts):
            words = np.stack(parts[r * each : (r + 1) * each], axis=1)
            put(g, np.ascontiguousarray(words).view(DTYPES[word]).reshape(-1))

    return run


@effect("wmma.load_small")
def load_small(site: Site) -> Run:
    """Four lanes hold a row of A, or a column of B, of elements smaller than a byte."""
    _, _, k = _shape(site)
    bits = TYPES[_element(site)].bits
    put = putter(site, elements(site.operand("d"))[0], "b32")
    at, stride = address(site, "p"), _stride(site, k, k, True)
    space = site.word("space") or "generic"

    def run(g: Group) -> None:
        step = np.broadcast_to(stride(g), (g.n,)).astype(np.int64) * bits // 8
        lane = g.threads() & 31
        where = at(g) + lane // 4 * step + lane % 4 * 4
        put(g, access.load(g, space, where, np.dtype(np.uint32), 1)[0])

    return run


@effect("wmma.store")
def store(site: Site) -> Run:
    rows, columns, by_rows = _layout(site)
    kind = _element(site)
    item = TYPES[kind].size_bytes
    word = _word(kind)
    gets = [getter(site, x, word) for x in elements(site.operand("c"))]
    at, stride = address(site, "p"), _stride(site, rows, columns, by_rows)
    each = DTYPES[word].itemsize // item
    space = site.word("space") or "generic"
    dtype = np.dtype(f"u{item}")

    def run(g: Group) -> None:
        base, step = at(g), np.broadcast_to(stride(g), (g.n,)).astype(np.int64)
        lane = g.threads() & 31
        places = _places(rows, columns, by_rows, len(gets) * each)
        for r, get in enumerate(gets):
            words = np.ascontiguousarray(np.broadcast_to(get(g), (g.n,)))
            halves = words.view(dtype).reshape(g.n, each)
            for e in range(each):
                line, within = places[r * each + e]
                addresses = base + (line[lane] * step + within[lane]) * item
                access.store(g, space, addresses, [np.ascontiguousarray(halves[:, e])])

    return run


def _matrix(g: Group, gets: list[Any], kind: str, warps: Array, size: tuple[int, int]) -> Array:
    """A matrix for each warp, as f64, from its fragment."""
    columns = [warp_rows(g, np.broadcast_to(get(g), (g.n,)), warps) for get in gets]
    words = np.ascontiguousarray(np.stack(columns, axis=2))
    values = unpacked(words, kind)  # warp, lane, element
    if TYPES[kind].bits < 8:  # rows of A, columns of B
        lines = values.reshape(len(warps), 8, -1)
        return lines if size[0] == 8 < size[1] else lines.transpose(0, 2, 1)
    count = size[0] * size[1] // 32
    return values[:, :, :count].transpose(0, 2, 1).reshape(len(warps), *size)


@effect("wmma.mma")
def mma(site: Site) -> Run:
    m, n, k = _shape(site)
    kind, d_kind = site.word("A") or "f16", site.word("D")
    c_kind = site.word("C") or d_kind
    word = _word(kind)
    gets = {x: [getter(site, e, word) for e in elements(site.operand(x))] for x in "abc"}
    puts = [putter(site, x, word) for x in elements(site.operand("d"))]
    clamps, joined = "satfinite" in site.match.slots, site.word("joined")

    def run(g: Group) -> None:
        warps = warps_of(g.threads())
        a = _matrix(g, gets["a"], kind, warps, (m, k))
        b = _matrix(g, gets["b"], kind, warps, (k, n))
        product = np.matmul(a, b)
        if joined == "xor":
            product = a.sum(axis=2)[:, :, None] + b.sum(axis=1)[:, None, :] - 2 * product
        total = product + _matrix(g, gets["c"], c_kind, warps, (m, n))
        held = total.reshape(len(warps), -1, 32).transpose(0, 2, 1)  # warp, lane, element
        words = _words(np.ascontiguousarray(held), d_kind, clamps)
        whole = np.zeros((g.batch.warps, *words.shape[1:]), words.dtype)
        whole[warps] = words
        flat = whole.reshape(-1, words.shape[2])[g.threads()]
        for r, put in enumerate(puts):
            put(g, np.ascontiguousarray(flat[:, r]))

    return run


def _word(kind: str) -> str:
    """The type of a fragment's registers."""
    return "b64" if kind == "f64" else "b32"


def _words(values: Array, kind: str, clamps: bool) -> Array:
    if kind == "f64":
        return values.view(np.uint64)
    if kind == "f32":
        return fl.canonical(values.astype(fl.F32)).view(np.uint32)
    if kind == "f16":
        return np.ascontiguousarray(fl.to_f16(values)).view(np.uint32)
    if clamps:
        values = np.clip(values, -(2.0**31), 2.0**31 - 1)
    return (values.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
