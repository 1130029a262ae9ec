"""Loops, folds, guards, checks, tiles and sorts of the CPU back end, run against NumPy."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.cpu.build import build
from stagefuse.compiler.cpu.emit import module_text
from stagefuse.compiler.cpu.tile import register_tile, tallest
from stagefuse.compiler.cpu.tile_sums import STRETCH
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Buffer,
    Checked,
    Const,
    Fold,
    For,
    If,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Op,
    SortRow,
    Store,
    TileProduct,
)
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, mod, sym
from stagefuse.dsl.dtypes import BF16, BOOL, F16, F32, F64, I8, I32, I64, U8, DType

from .cpu_run import LEVELS, Compiled

N, M, K, D = sym("N"), sym("M"), sym("K"), sym("D")
i, j, d = sym("i"), sym("j"), sym("d")
SIZES = [0, 1, 2, 7, 16, 31, 64, 97, 1009]


def at(*exprs: Any) -> tuple[Index, ...]:
    return tuple(Index(e) for e in exprs)


def op(fn: str, *args: Any, dtype: DType = F32) -> Op:
    return Op(fn, args, dtype)


def fold_kernel(kind: str, dtype: DType) -> Kernel:
    result = I64 if kind.startswith("arg") else dtype.compute
    return Kernel(
        f"{kind}.{dtype}",
        (Buffer("x", dtype, (M, N), "in"), Buffer("y", result, (M,), "out")),
        ("M", "N"), (("i", M),),
        (
            Fold("r", kind, (("j", N),), Load("x", at(i, j), dtype), result),
            Store("y", at(i), Local("r", result)),
        ),
    )  # fmt: skip


def softmax_kernel() -> Kernel:
    value = Load("x", at(i, d), F32)
    shifted = op("exp", op("sub", value, Local("m", F32)))
    scaled = op("div", Load("t", at(d), F32), Local("s", F32))
    return Kernel(
        "softmax", (Buffer("x", F32, (N, D), "in"), Buffer("y", F32, (N, D), "out")),
        ("N", "D"), (("i", N),),
        (
            Fold("m", "max", (("d", D),), value, F32),
            Alloc("t", F32, (D,)),
            For("d", const(0), D, (Store("t", at(d), shifted),), True),
            Fold("s", "sum", (("d", D),), Load("t", at(d), F32), F32),
            For("d", const(0), D, (Store("y", at(i, d), scaled),), True),
        ),
    )  # fmt: skip


def pad_kernel() -> Kernel:
    """A row of x with two elements of 9 before it and three after."""
    inside = (
        op("ge", Index(j - 2), Const(0, I64), dtype=BOOL),
        op("lt", Index(j - 2), Index(N), dtype=BOOL),
    )
    return Kernel(
        "pad", (Buffer("x", F32, (M, N), "in"), Buffer("y", F32, (M, N + 5), "out")),
        ("M", "N"), (("i", M), ("j", N + 5)),
        (Store("y", at(i, j), Load("x", at(i, j - 2), F32, inside, 9)),),
    )  # fmt: skip


def gather_kernel() -> Kernel:
    row = Checked(Load("ids", at(i), I64), M, 6)
    return Kernel(
        "gather",
        (Buffer("w", F32, (M, D), "in"), Buffer("ids", I64, (N,), "in"),
         Buffer("y", F32, (N, D), "out")),
        ("N", "M", "D"), (("i", N),),
        (For("d", const(0), D, (Store("y", at(i, d), Load("w", (row, Index(d)), F32)),), True),),
    )  # fmt: skip


def divided_kernel() -> Kernel:
    """Index arithmetic with floor, remainder, least and greatest."""
    expr = floordiv(i - 7, D) * 1000 + mod(i - 7, D) + minimum(i, D) - floordiv(i - 9, 5)
    return Kernel(
        "divided", (Buffer("y", I64, (N,), "out"),), ("N", "D"), (("i", N),),
        (Store("y", at(i), Index(expr)),),
    )  # fmt: skip


def scan_kernel() -> Kernel:
    value = op("cast", Load("x", at(i, j), I8), dtype=I32)
    total = op("add", Load("t", (), I32), value, dtype=I32)
    return Kernel(
        "scan", (Buffer("x", I8, (M, N), "in"), Buffer("y", I32, (M, N), "out")),
        ("M", "N"), (("i", M),),
        (
            Alloc("t", I32, ()),
            Store("t", (), Const(0, I32)),
            For("j", const(0), N, (
                Let("v", total),
                Store("t", (), Local("v", I32)),
                Store("y", at(i, j), Load("t", (), I32)),
            )),
        ),
    )  # fmt: skip


def window_kernel() -> Kernel:
    """max over a 3 by 3 window, a fold of two loops; only where i is even."""
    value = Load("x", at(i + sym("a"), j + sym("b")), F16)
    return Kernel(
        "window", (Buffer("x", F16, (M + 2, N + 2), "in"), Buffer("y", F16, (M, N), "inout")),
        ("M", "N"), (("i", M), ("j", N)),
        (
            If(op("eq", Index(mod(i, 2)), Const(0, I64), dtype=BOOL), (
                Fold("r", "max", (("a", const(3)), ("b", const(3))), value, F32),
                Store("y", at(i, j), Local("r", F32)),
            )),
        ),
    )  # fmt: skip


def whole_kernel() -> Kernel:
    """No parallel loop at all: position of the greatest of a matrix."""
    return Kernel(
        "whole", (Buffer("x", F32, (M, N), "in"), Buffer("y", I64, (), "out")), ("M", "N"), (),
        (
            Fold("r", "argmax", (("i", M), ("j", N)), Load("x", at(i, j), F32), I64),
            Store("y", (), Local("r", I64)),
        ),
    )  # fmt: skip


def tile_kernel(dtype: DType, accumulate: bool) -> Kernel:
    t = sym("t")
    return Kernel(
        f"tile.{dtype}.{accumulate}",
        (Buffer("a", dtype, (M, K), "in"), Buffer("p", dtype, (K, const(48)), "in"),
         Buffer("y", dtype, (M, const(48)), "inout")),
        ("M", "K"), (("t", floordiv(M + 35, 36)),),
        (TileProduct("y", t * 36 * 48, const(48), "a", t * 36 * K, K, const(1), "p", const(0),
                     minimum(M - t * 36, 36), K, 36, 48, accumulate),),
    )  # fmt: skip


def place_kernel(dtype: DType, rows: str) -> Kernel:
    """The first N columns of a product with a panel whose rows lie in steps of K + 3, or where
    those of a window do: every other one 50 further on."""
    where: dict[str, Expr] = {"panel_row": K + 3, "panel_col": const(1)}
    if rows == "places":
        k = sym("k")
        where = {"panel_place": floordiv(k, 2) + mod(k, const(2)) * 50}
    return Kernel(
        f"place.{dtype}.{rows}",
        (Buffer("a", dtype, (M, K), "in"), Buffer("p", dtype, (K * (K + 3) + 150,), "in"),
         Buffer("y", dtype, (M, const(48)), "inout")),
        ("K", "M", "N"), (),
        (TileProduct("y", const(0), const(48), "a", const(0), K, const(1), "p", const(1),
                     M, K, 1000, 48, width=N, **where),),
    )  # fmt: skip


def sort_kernel(dtype: DType, descending: bool) -> Kernel:
    kind = dtype.compute
    return Kernel(
        f"sort.{dtype}.{descending}",
        (Buffer("x", dtype, (N,), "in"), Buffer("y", dtype, (N,), "out"),
         Buffer("o", I64, (N,), "out")),
        ("N",), (),
        (
            Alloc("k", kind, (N,)),
            Alloc("order", I64, (N,)),
            For("j", const(0), N, (Store("k", at(j), Load("x", at(j), dtype)),), True),
            SortRow("k", "order", N, descending),
            For("j", const(0), N, (
                Store("y", at(j), Load("k", at(j), kind)),
                Store("o", at(j), Load("order", at(j), I64)),
            ), True),
        ),
    )  # fmt: skip


FOLDS = [
    (kind, dtype)
    for kind in ("sum", "prod", "max", "min", "argmax", "argmin")
    for dtype in (F64, F32, BF16, I64, I8, U8)
] + [("any", BOOL), ("all", BOOL), ("max", BOOL), ("argmax", BOOL), ("argmin", BOOL)]
SORTS = [(t, down) for t in (F64, F32, BF16, I64, U8, BOOL) for down in (False, True)]
KERNELS = [
    *(fold_kernel(*case) for case in FOLDS),
    *(sort_kernel(*case) for case in SORTS),
    *(tile_kernel(t, add) for t in (F32, F64) for add in (False, True)),
    *(place_kernel(t, rows) for t in (F32, F64) for rows in ("steps", "places")),
    softmax_kernel(), pad_kernel(), gather_kernel(), divided_kernel(), scan_kernel(),
    window_kernel(), whole_kernel(),
]  # fmt: skip


@pytest.fixture(scope="module", params=LEVELS)
def compiled(request: Any) -> Any:
    return Compiled(KERNELS, request.param)


def numbers(dtype: DType, shape: tuple[int, ...], seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    if dtype.is_float:
        return rng.standard_normal(shape).astype(dtype.numpy)
    return rng.integers(0 if dtype.kind != "int" else -5, 2 if dtype.is_bool else 6, shape).astype(
        dtype.numpy
    )


@pytest.mark.parametrize("kind, dtype", FOLDS, ids=[f"{k}.{t}" for k, t in FOLDS])
def test_folds(compiled: Compiled, kind: str, dtype: DType) -> None:
    for n in SIZES:
        if n == 0 and kind in ("max", "min", "argmax", "argmin"):
            continue
        x = numbers(dtype, (3, n))
        y = np.zeros(3, (I64 if kind.startswith("arg") else dtype.compute).numpy)
        compiled(f"{kind}.{dtype}", [x, y], {"M": 3, "N": n})
        wide = x.astype(np.float64) if dtype.is_float else x
        if kind in ("sum", "prod") and not dtype.is_float:
            want = getattr(np, kind)(wide, 1, dtype=dtype.numpy)
        else:
            want = getattr(np, kind)(wide, 1)
        if dtype.is_float and kind in ("sum", "prod"):
            assert np.allclose(y, want, rtol=1e-4, atol=1e-4 if kind == "sum" else 1e-30)
        else:
            assert np.array_equal(y, want)


def test_extremes_keep_nan_and_nothing_gives_the_identity(compiled: Compiled) -> None:
    x, y, p = numbers(F32, (2, 40)), np.zeros(2, np.float32), np.zeros(2, np.int64)
    x[1, 17] = x[1, 30] = np.nan
    compiled("max.f32", [x, y], {"M": 2, "N": 40})
    assert y[0] == x[0].max() and np.isnan(y[1])
    compiled("argmin.f32", [x, p], {"M": 2, "N": 40})
    assert list(p) == [x[0].argmin(), 17]
    for kind, want in (("max", -np.inf), ("min", np.inf), ("sum", 0), ("prod", 1)):
        compiled(f"{kind}.f32", [np.zeros((2, 0), np.float32), y], {"M": 2, "N": 0})
        assert list(y) == [want, want]


@pytest.mark.parametrize("kind", ["argmax", "argmin"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, I8, U8], ids=str)
def test_places_in_long_rows(
    compiled: Compiled, kind: str, dtype: DType, rng: np.random.Generator
) -> None:
    """The first of equal ones and of NaN, wherever parts of a row end."""
    for n in (255, 256, 257, 511, 512, 513, 1009):
        x = numbers(dtype, (40, n), seed=int(rng.integers(1 << 30)))
        last = {"argmax": (1, np.inf), "argmin": (-1, -np.inf)}[kind]
        for row in x[:30] if dtype.is_float else x[:0]:
            at = rng.integers(0, n, 3)
            row[at] = rng.choice([*last, np.nan, -last[1]], 3)
        if dtype.is_float:
            x[30] = -last[1]  # what the extreme of nothing is
        places = np.zeros(len(x), np.int64)
        compiled(f"{kind}.{dtype}", [x, places], {"M": len(x), "N": n})
        wide = x.astype(np.float64) if dtype.is_float else x
        assert np.array_equal(places, getattr(np, kind)(wide, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_softmax_over_tails(compiled: Compiled, threads: int) -> None:
    for n in SIZES:
        x, y = numbers(F32, (13, n)), np.zeros((13, n), np.float32)
        compiled("softmax", [x, y], {"N": 13, "D": n}, threads, grain=2)
        if n:
            e = np.exp(x.astype(float) - x.max(1, keepdims=True))
            assert np.allclose(y, e / e.sum(1, keepdims=True), rtol=1e-5)


def test_pad_reads_only_inside(compiled: Compiled) -> None:
    for m, n in ((0, 3), (3, 0), (4, 1), (5, 33)):
        x, y = numbers(F32, (m, n)), np.zeros((m, n + 5), np.float32)
        compiled("pad", [x, y], {"M": m, "N": n}, 2, grain=7)
        assert np.array_equal(y, np.pad(x, ((0, 0), (2, 3)), constant_values=9))


def test_gather_checks_positions(compiled: Compiled) -> None:
    w, ids = numbers(F32, (50, 33)), np.random.default_rng(0).integers(-50, 50, 77)
    y = np.zeros((77, 33), np.float32)
    assert compiled("gather", [w, ids, y], {"N": 77, "M": 50, "D": 33}) == [0, 0, 0, 0]
    assert np.array_equal(y, w[ids])
    for wrong in (50, -51, 1 << 62, -(1 << 63)):
        bad = ids.copy()
        bad[5] = wrong
        assert compiled("gather", [w, bad, y], {"N": 77, "M": 50, "D": 33})[:2] == [7, wrong]
        assert np.array_equal(y[5], w[0])
    none = np.zeros((0, 33), np.float32)
    empty = np.zeros((0,), np.int64)
    assert compiled("gather", [w, empty, none], {"N": 0, "M": 50, "D": 33}) == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [0, 1, 3, 8, 1000])
def test_index_arithmetic_is_pythons(compiled: Compiled, size: int) -> None:
    y = np.zeros(40, np.int64)
    compiled("divided", [y], {"N": 40, "D": size})
    expr = divided_kernel().body[0].indices  # type: ignore[union-attr]
    assert len(expr) == 1
    for k in range(40):
        quotient, rest = ((k - 7) // size, (k - 7) % size) if size else (0, 0)
        assert y[k] == quotient * 1000 + rest + min(k, size) - (k - 9) // 5


def test_scan_sees_its_own_writes(compiled: Compiled) -> None:
    x, y = numbers(I8, (3, 100)), np.zeros((3, 100), np.int32)
    compiled("scan", [x, y], {"M": 3, "N": 100})
    assert np.array_equal(y, np.cumsum(x, 1, dtype=np.int32))


def test_window_and_branch(compiled: Compiled) -> None:
    x, y = numbers(F16, (9, 12)), np.full((7, 10), 5, np.float16)
    compiled("window", [x, y], {"M": 7, "N": 10}, 2, grain=3)
    want = np.lib.stride_tricks.sliding_window_view(x, (3, 3)).max((2, 3))
    want[1::2] = 5
    assert np.array_equal(y, want)


def test_position_in_a_matrix(compiled: Compiled) -> None:
    x, y = numbers(F32, (11, 13)), np.zeros((), np.int64)
    compiled("whole", [x, y], {"M": 11, "N": 13})
    assert y == x.argmax()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_tile_product(compiled: Compiled, dtype: DType, accumulate: bool) -> None:
    for m in (1, 2, 3, 5, 8, 9, 10, 35, 36, 37, 100):
        for k in (0, 1, 7, 64):
            a, p = numbers(dtype, (m, k)), numbers(dtype, (k, 48))
            y = np.full((m, 48), 7, dtype.numpy)
            compiled(f"tile.{dtype}.{accumulate}", [a, p, y], {"M": m, "K": k}, 2, 1)
            assert np.allclose(y, a.astype(float) @ p + 7 * accumulate, atol=1e-4)


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_error_of_deep_sums(
    compiled: Compiled, rng: np.random.Generator, accumulate: bool
) -> None:
    """They are done in stretches: in one accumulator the error of 8192 is about 2.8 times that."""
    errors = np.zeros(2)
    for m, k in ((1, 8192), (2, 8195), (6, STRETCH + 1), (6, 2 * STRETCH), (9, 8191)):
        a = rng.standard_normal((m, k), np.float32)
        p = rng.standard_normal((k, 48), np.float32)
        y = np.full((m, 48), 7, np.float32)
        compiled(f"tile.f32.{accumulate}", [a, p, y], {"M": m, "K": k})
        wanted = a.astype(float) @ p + 7 * accumulate
        assert np.allclose(y, wanted, atol=1e-2)
        if k > 8000:
            one = np.cumsum(a[..., None] * p, 1, np.float32)[:, -1] + 7 * accumulate
            errors += [((found - wanted) ** 2).sum() for found in (y, one)]
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("rows", ["steps", "places"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_product_of_rows_elsewhere(compiled: Compiled, dtype: DType, rows: str) -> None:
    for m, k in [*itertools.product((1, 2, 9, 10, 19), (0, 1, 2, 30)), (7, 2 * STRETCH - 900)]:
        for n in (1, 7, 8, 15, 16, 17, 31, 33, 47, 48):
            a, p = numbers(dtype, (m, k)), numbers(dtype, (k * (k + 3) + 150,))
            steps = np.arange(k)
            begin = 1 + (steps * (k + 3) if rows == "steps" else steps // 2 + steps % 2 * 50)
            y = np.zeros((m, 48), dtype.numpy)
            compiled(f"place.{dtype}.{rows}", [a, p, y], {"K": k, "M": m, "N": n})
            want = a.astype(float) @ p.astype(float)[begin[:, None] + np.arange(n)]
            assert np.allclose(y[:, :n], want, atol=1e-4)


def test_a_panel_at_the_end_of_memory_is_not_read_beyond(compiled: Compiled) -> None:
    """The last row of a panel in steps may end where its pages do."""
    k, n = 3, 13
    size = k * (k + 3) + 150
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory:
        libc = ctypes.CDLL(None, use_errno=True)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(begin + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
        place = begin + mmap.PAGESIZE - 4 * (1 + (k - 1) * (k + 3) + n)
        p = np.ctypeslib.as_array((ctypes.c_float * size).from_address(place))
        wanted = p[: 1 + (k - 1) * (k + 3) + n]
        wanted[:] = numbers(F32, wanted.shape)
        a, y = numbers(F32, (5, k)), np.zeros((5, 48), np.float32)
        compiled("place.f32.steps", [a, p, y], {"K": k, "M": 5, "N": n})
        want = a.astype(float) @ np.stack([wanted[1 + r * (k + 3) :][:n] for r in range(k)])
        assert np.allclose(y[:, :n], want, atol=1e-4)
        assert libc.mprotect(ctypes.c_void_p(begin + mmap.PAGESIZE), mmap.PAGESIZE, 3) == 0


@pytest.mark.parametrize("dtype, descending", SORTS)
def test_sort_is_stable(compiled: Compiled, dtype: DType, descending: bool) -> None:
    for n in (*SIZES, 5000):
        x = numbers(dtype, (n,))
        if dtype.is_float and n > 2:
            x = np.round(x.astype(float) * 3).astype(dtype.numpy)
            x[1] = x[n // 2] = np.nan
            x[n // 3 :: 7] *= -0.0 if n % 2 else 1e30  # zeros of both signs; infinities in f32
        elif dtype.is_int and n % 2:
            x = x * np.asarray(np.iinfo(dtype.numpy).max // 7).astype(dtype.numpy)
        y, order = np.empty_like(x), np.empty(n, np.int64)
        compiled(f"sort.{dtype}.{descending}", [x, y, order], {"N": n})
        wide = x.astype(np.float64 if dtype.is_float else np.int64)
        if descending:
            falling = np.where(np.isnan(wide), -np.inf, -wide) if dtype.is_float else -wide
            want = np.argsort(falling, kind="stable")
        else:
            want = np.argsort(wide, kind="stable")
        assert np.array_equal(order, want)
        assert np.array_equal(y.astype(wide.dtype), wide[want], equal_nan=True)


def test_long_chains_are_written_without_recursion() -> None:
    """Two equal chains built apart, each value used twice, are computed once."""

    def chain() -> Any:
        value: Any = Load("x", at(i), I64)
        for k in range(3000):
            value = op("bitxor", op("add", value, value, dtype=I64), Const(k, I64), dtype=I64)
        return value

    kernel = Kernel(
        "chain", (Buffer("x", I64, (N,), "in"), Buffer("y", I64, (N,), "out")), ("N",),
        (("i", N),), (Store("y", at(i), op("sub", chain(), chain(), dtype=I64)),),
    )  # fmt: skip
    text = module_text([kernel], "v3")
    assert text.count(" = xor i64") in (3000, 3001)


def test_the_same_kernels_give_the_same_bytes() -> None:
    kernels = [softmax_kernel(), gather_kernel(), tile_kernel(F32, False)]
    assert build(kernels, "v3") == build(kernels, "v3")
    assert module_text(kernels, "v4") == module_text(kernels, "v4")


def test_register_tiles_fit() -> None:
    assert (tallest("float", 48, "v4"), tallest("float", 48, "v3")) == (8, 6)
    assert (tallest("float", 64, "v4"), tallest("float", 16, "v4")) == (6, 12)
    assert register_tile("float", 48, "v4", 8) == (3, 16)
    assert register_tile("float", 48, "v3", 6) == (2, 8)
    assert register_tile("float", 48, "v3", 1) == (6, 8)  # a row takes the panel in one pass
    for element, columns, level in itertools.product(
        ("float", "double"), (16, 32, 48, 64), ("v3", "v4")
    ):
        registers = {"v3": 16, "v4": 32}[level]
        for rows in range(1, tallest(element, columns, level) + 1):
            wide, lanes = register_tile(element, columns, level, rows)
            assert columns % (wide * lanes) == 0
            assert rows * wide + 2 <= registers
