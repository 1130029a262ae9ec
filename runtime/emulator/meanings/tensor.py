"""mma.sync, ldmatrix, stmatrix, movmatrix.

Layouts (PTX ISA, "Matrix Fragments for mma"): with `g = lane / 4`, `t = lane % 4`, and E elements
of A and B in a register, for all shapes:

- A, register r, element e: row `g + 8 * (r % 2)` and column `4E * (r / 2) + E * t + e` where there
  are 16 rows; row g and column `4E * r + E * t + e` where there are 8,
- B, register r, element e: row `4E * r + E * t + e`, column g,
- C and D: row `g + 8 * (r / 2)`, column `2 * t + r % 2`; with two f16 in a register, its element
  takes the place of `r % 2`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime.emulator import access
from stagefuse.runtime.emulator import floats as fl
from stagefuse.runtime.emulator.arrays import warps_of
from stagefuse.runtime.emulator.operands import Get, address, elements, getter, putter
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.sparse import indices_of_rows, spread

from . import effect

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Array = NDArray[Any]


def _bits(x: Array) -> Array:
    raw = np.ascontiguousarray(x).view(np.uint8)
    return np.unpackbits(raw, axis=-1, bitorder="little").astype(np.float64)


def _nibbles(x: Array, signed: bool) -> Array:
    bits = (x[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & np.uint32(15)
    values = bits.astype(np.float64).reshape(*x.shape[:-1], -1)
    return np.where(values > 7, values - 16, values) if signed else values


def unpacked(words: Array, kind: str) -> Array:
    """The elements of words of 32 bits (f64: 64), along the last axis, as f64."""
    if kind == "bf16":
        return fl.from_bf16(words.view(np.uint16)).astype(fl.F64)
    if kind in ("u4", "s4"):
        return _nibbles(words, kind == "s4")
    if kind == "b1":
        return _bits(words)
    if kind == "tf32":  # the lower 13 bits are ignored
        words = words & np.uint32(0xFFFFE000)
    dtype: Any = {
        "f16": np.float16, "tf32": np.float32, "f32": np.float32, "f64": np.float64,
        "u8": np.uint8, "s8": np.int8, "s32": np.int32,
        "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
    }[kind]  # fmt: skip
    found: Array = words.view(dtype).astype(fl.F64)
    return found


def warp_rows(g: Group, values: Any, warps: Array) -> Array:
    """A register's values as a row of 32 lanes for each of some warps."""
    if g.n == 32 * len(warps):
        return np.ascontiguousarray(values).reshape(-1, 32)
    whole = np.zeros(g.batch.threads, values.dtype)
    whole[g.threads()] = values
    found: Array = whole.reshape(-1, 32)[warps]
    return found


def registers(g: Group, gets: list[Get], warps: Array) -> Array:
    """Operands in several registers: warp, lane, register."""
    return np.stack(_columns(g, gets, warps), axis=2)


def _a_matrices(columns: list[Array], rows: int, kind: str) -> Array:
    """Matrices `[warp][row][k]` from the registers of A, each `[warp][lane]`."""
    n, down = len(columns[0]), rows // 8
    words = np.empty((n, down, 8, len(columns) // down, 4), columns[0].dtype)
    for r, column in enumerate(columns):
        words[:, r % down, :, r // down] = column.reshape(n, 8, 4)
    return unpacked(words, kind).reshape(n, rows, -1)


def _b_matrices(columns: list[Array], kind: str) -> Array:
    """Matrices `[warp][k][column]` from the registers of B."""
    n = len(columns[0])
    words = np.empty((n, 8, len(columns), 4), columns[0].dtype)
    for r, column in enumerate(columns):
        words[:, :, r] = column.reshape(n, 8, 4)
    return unpacked(words, kind).reshape(n, 8, -1).transpose(0, 2, 1)


def _c_matrices(columns: list[Array], rows: int, kind: str) -> Array:
    """Matrices `[warp][row][column]` from the registers of C."""
    n, each = len(columns[0]), 8 * len(columns) // rows
    words = np.empty((n, rows // 8, 8, 4, each), columns[0].dtype)
    for r, column in enumerate(columns):
        words[:, r // each, :, :, r % each] = column.reshape(n, 8, 4)
    return unpacked(words, kind).reshape(n, rows, 8)


def _give_c(g: Group, puts: list[Any], matrices: Array, warps: Array) -> None:
    """Writes registers of D from words of matrices `[warp][row][words of a row]`."""
    n, rows, width = matrices.shape
    words = matrices.reshape(n, rows // 8, 8, 4, width // 4)
    values = words.transpose(0, 2, 3, 1, 4).reshape(n, 32, -1)
    give(g, puts, values, warps)


def _columns(g: Group, gets: list[Get], warps: Array) -> list[Array]:
    """Operands in several registers, each `[warp][lane]`."""
    return [warp_rows(g, np.broadcast_to(get(g), (g.n,)), warps) for get in gets]


def give(g: Group, puts: list[Any], values: Array, warps: Array) -> None:
    """Writes results: values by warp, lane, register."""
    if g.n == 32 * len(warps):
        flat = values.reshape(-1, values.shape[2])
    else:
        whole = np.zeros((g.batch.warps, *values.shape[1:]), values.dtype)
        whole[warps] = values
        flat = whole.reshape(-1, values.shape[2])[g.threads()]
    for i, put in enumerate(puts):
        put(g, np.ascontiguousarray(flat[:, i]))


@effect("tensor.mma")
def mma(site: Site) -> Run:
    shape = next(w for w in site.match.slots if w[0] == "m" and w[1].isdigit())
    rows = int(shape[1 : shape.index("n")])
    a_kind = site.word("A") or "f16"
    b_kind = site.word("B") or a_kind
    d_kind = site.word("D") or ("s32" if a_kind == "b1" else "f16")
    wide = "f64" if a_kind == "f64" else "b32"
    gets = {n: [getter(site, x, wide) for x in elements(site.operand(n))] for n in "abc"}
    puts = [putter(site, x, wide) for x in elements(site.operand("d"))]
    clamps = "satfinite" in site.match.slots
    c_kind, ones_differ = d_kind, "xor" in site.match

    def run(g: Group) -> None:
        warps = warps_of(g.threads())
        a = _a_matrices(_columns(g, gets["a"], warps), rows, a_kind)
        b = _b_matrices(_columns(g, gets["b"], warps), b_kind)
        product = np.matmul(a, b)
        if ones_differ:  # the number of bits that differ: a + b - 2ab for each
            product = a.sum(2)[:, :, None] + b.sum(1)[:, None, :] - 2 * product
        total = product + _c_matrices(_columns(g, gets["c"], warps), rows, c_kind)
        _give_c(g, puts, narrowed(total, d_kind, clamps), warps)

    return run


@effect("tensor.mma_sparse")
def mma_sparse(site: Site) -> Run:
    kinds = {"a": site.word("A"), "b": site.word("B") or site.word("A"), "c": site.word("D")}
    shape = next(w for w in site.match.slots if w[0] == "m" and w[1].isdigit())
    depth = int(shape.split("k")[1])
    gets = {n: [getter(site, x, "b32") for x in elements(site.operand(n))] for n in "abc"}
    puts = [putter(site, x, "b32") for x in elements(site.operand("d"))]
    each = 32 // TYPES[kinds["a"]].bits
    metadata, selector = getter(site, site.operand("e"), "b32"), site.operand("selector")
    lanes = depth * TYPES[kinds["a"]].bits // (256 if each < 4 else 128)
    if not isinstance(selector, s.Immediate) or not 0 <= selector.value < 4 // lanes:
        raise site.error(f"the selector is a constant below {4 // lanes}")
    chosen = selector.value
    clamps = "satfinite" in site.match.slots

    def run(g: Group) -> None:
        warps = warps_of(g.threads())
        a = _a_matrices(_columns(g, gets["a"], warps), 16, kinds["a"])
        b = _b_matrices(_columns(g, gets["b"], warps), kinds["b"])
        c = _c_matrices(_columns(g, gets["c"], warps), 16, kinds["c"])
        (words,) = _columns(g, [metadata], warps)
        whole = spread(a, indices_of_rows(words, kinds["a"], depth, chosen), kinds["a"])
        _give_c(g, puts, narrowed(np.matmul(whole, b) + c, kinds["c"], clamps), warps)

    return run


def narrowed(x: Array, kind: str, clamps: bool) -> Array:
    """Accumulators as registers hold them."""
    if kind == "f64":
        return x
    if kind == "f32":
        return fl.canonical(x.astype(fl.F32)).view(np.uint32)
    if kind == "f16":
        return np.ascontiguousarray(fl.to_f16(x)).view(np.uint32)
    if clamps:
        x = np.clip(x, -(2.0**31), 2.0**31 - 1)
    return (x.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def _count(site: Site) -> int:
    return int(site.word("N")[1:])


def _row_places(
    g: Group, at: Callable[[Any], Array], warps: Array, count: int, space: str
) -> tuple[Array, Array, Any]:
    """The rows of 16 bytes that the first lanes name: addresses and threads, by warp."""
    addresses = warp_rows(g, at(g), warps)[:, : 8 * count].reshape(-1)
    threads = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
    parts = access.places(g, space, addresses, 16, threads)
    (part,) = parts
    part.arena.check_free(part.index, 16, threads)
    return part.index, threads, part


def _space(site: Site) -> str:
    return site.word("S") or "generic"


@effect("tensor.ldmatrix")
def ldmatrix(site: Site) -> Run:
    at, count, space = address(site, "a"), _count(site), _space(site)
    puts = [putter(site, x, "b32") for x in elements(site.operand("d"))]
    transposed = "trans" in site.match.slots

    def run(g: Group) -> None:
        warps = warps_of(g.threads())
        index, threads, part = _row_places(g, at, warps, count, space)
        machine = g.batch.machine
        access.count(g, part.space, "read", index, 16, threads)
        if machine.races is not None:
            machine.races.read(g.batch, part.arena, index, 16, threads, True)
        access.check_written(part.arena, index, 16, threads)
        view = part.arena.view(np.dtype(np.uint16))
        rows = view[(index // 2)[:, None] + np.arange(8)].reshape(len(warps), count, 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(len(warps), count, 32)
        give(g, puts, np.ascontiguousarray(pairs.transpose(0, 2, 1)), warps)

    return run


@effect("tensor.stmatrix")
def stmatrix(site: Site) -> Run:
    at, count, space = address(site, "a"), _count(site), _space(site)
    gets = [getter(site, x, "b32") for x in elements(site.operand("b"))]
    transposed = "trans" in site.match.slots

    def run(g: Group) -> None:
        warps = warps_of(g.threads())
        index, threads, part = _row_places(g, at, warps, count, space)
        words = registers(g, gets, warps).transpose(0, 2, 1)
        rows = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        flat = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, 4)
        machine = g.batch.machine
        machine.progress += 1
        access.count(g, part.space, "written", index, 16, threads)
        if machine.races is not None:
            columns = [np.ascontiguousarray(flat[:, j]) for j in range(4)]
            machine.races.write(g.batch, part.arena, index, 16, threads, True, columns)
        for j in range(4):
            part.arena.store(index + 4 * j, np.ascontiguousarray(flat[:, j]))

    return run


@effect("tensor.movmatrix")
def movmatrix(site: Site) -> Run:
    get, put = getter(site, site.operand("a"), "b32"), putter(site, site.operand("d"), "b32")

    def run(g: Group) -> None:
        warps = warps_of(g.threads())
        words = registers(g, [get], warps).reshape(len(warps), 32)
        rows = words.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
        moved = np.ascontiguousarray(rows).view(np.uint32).reshape(len(warps), 32, 1)
        give(g, [put], moved, warps)

    return run
