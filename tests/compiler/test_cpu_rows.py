"""Passes over a row: which of them are one loop, what a maximum may lose, and the results."""

from __future__ import annotations

import re

import numpy as np
import pytest

from stagefuse.compiler.cpu.build import improved
from stagefuse.compiler.cpu.emit import module_text
from stagefuse.compiler.cpu.lost_nans import lost_nans
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.compiler.kernel_text import parse_kernel
from stagefuse.compiler.plan import UNITS

from .cpu_run import LEVELS, Compiled

SIZES = [0, 1, 2, 7, 15, 16, 17, 33, 63, 64, 65, 100, 128, 131, 300, 1009]
HEAD = """stagefuse kernel 1
kernel {name} for test
buffer x : in f32[M, N]
buffer y : {mode} f32[M, N]
buffer z : out f32[M, N]
dims M N
parallel m in M
"""
SOFTMAX = """alloc row : f32[N]
fold most = max over (f in N) : f32 of x.f32[m, f]
for s in 0..N vector
  store row[s] = exp.f32(sub.f32(x.f32[m, s], $most.f32))
fold total = sum over (f in N) : f32 of row.f32[f]
for n in 0..N vector
  store z[m, n] = mul.f32(row.f32[n], reciprocal.f32($total.f32))
"""
EDITS = {
    "softmax": ("", ""),
    "scores too": ("reciprocal.f32($total.f32))\n",
                   "reciprocal.f32($total.f32))\n  store y[m, n] = $most.f32\n"),
    "not divided": ("mul.f32(row.f32[n], reciprocal.f32($total.f32))", "row.f32[n]"),
    "of others": ("sub.f32(x.f32[m, s]", "sub.f32(y.f32[m, s]"),
    "some": ("of row.f32[f]", "of select.f32(gt.bool(row.f32[f], f32(0)), row.f32[f], f32(0))"),
    "mirrored": ("of row.f32[f]", "of row.f32[N - 1 - f]"),
    "capped": ("exp.f32(sub.f32(x.f32[m, s], $most.f32))",
               "minimum.f32(exp.f32(sub.f32(x.f32[m, s], $most.f32)), f32(1))"),
}  # fmt: skip


def kernel(name: str) -> Kernel:
    old, new = EDITS[name]
    mode = "out" if "store y" in new else "in"
    head = HEAD.format(name=name.replace(" ", "_"), mode=mode)
    return parse_kernel(head + SOFTMAX.replace(old, new, 1) if old else head + SOFTMAX)


@pytest.mark.parametrize("name", EDITS)
def test_a_maximum_may_lose_a_nan_where_all_results_are_nan_anyway(name: str) -> None:
    assert lost_nans(kernel(name)) == ({"most"} if name == "softmax" else set())


@pytest.mark.parametrize("level", LEVELS)
def test_the_loop_of_such_a_maximum_takes_no_care_of_nans(level: str) -> None:
    text = str(improved(module_text([kernel("softmax")], level), level))
    found = [line for line in text.splitlines() if "call" in line and "@llvm.maximum." in line]
    assert found and all(" nnan " in line for line in found)


@pytest.mark.parametrize("name", EDITS)
def test_a_loop_and_the_sum_of_what_it_stores_are_one(name: str) -> None:
    def loops(k: Kernel) -> int:
        return module_text([k], "v3").count("!llvm.loop ")

    # `y` may be streamed, and then its loop is written twice
    apart = loops(kernel("mirrored"))
    assert loops(kernel(name)) == apart - (name not in ("mirrored",))


def test_what_whole_vectors_leave_is_not_added_to_their_sum_in_turn() -> None:
    accumulators = re.findall(r"phi float \[ (\S+), %enter", module_text([kernel("softmax")], "v4"))
    least, zero = "0xFFF0000000000000", "0x0000000000000000"
    assert accumulators == [least, least, zero, zero]  # each loop begins anew


@pytest.mark.parametrize("level", LEVELS)
def test_softmax_of_rows_with_special_numbers(level: str, rng: np.random.Generator) -> None:
    compiled = Compiled([kernel("softmax")], level)
    for n in SIZES:
        x = rng.normal(0, 3, (40, n)).astype(np.float32)
        for row, value in enumerate((np.nan, -np.nan, np.inf, -np.inf, 1e38, -1e38)):
            if n:
                x[row, rng.integers(n)] = value
                x[row + 6, :] = value
        y, z = np.zeros_like(x), np.full_like(x, 7)
        assert compiled("softmax", [x, y, z], {"M": len(x), "N": n})[0] == 0
        with np.errstate(all="ignore"):
            wide = x.astype(np.float64)
            e = np.exp(wide - wide.max(-1, keepdims=True, initial=-np.inf))
            expected = e / e.sum(-1, keepdims=True)
        # half a unit of a difference below 32, one of exp, and those of 22 additions
        np.testing.assert_allclose(z, expected, rtol=1e-6 + 24 * 2**-23, atol=1e-37)


MASKED = """stagefuse kernel 1
kernel {name} for test
buffer x : in f32[M, N]
buffer keep : in bool[M, N]
buffer z : out f32[M, N]
dims M N
parallel m in M
fold extreme = {kind} over (f in N) : f32 of select.f32({bit}, {choices})
alloc row : f32[N]
for s in 0..N vector
  store row[s] = exp.f32(sub.f32(select.f32({bit_s}, x.f32[m, s], f32(-inf)), $extreme.f32))
for n in 0..N vector
  store z[m, n] = mul.f32(row.f32[n], f32(2))
"""
BITS = {"given": "keep.bool[m, {i}]", "causal": "ge.bool(index(m - {i}), i64(0))"}


def masked(bit: str, kind: str) -> Kernel:
    """exp(x - extreme) * 2 where the bit is, 0 elsewhere: the extreme is of those alone."""
    identity = "f32(-inf)" if kind == "max" else "f32(inf)"
    choices = f"x.f32[m, f], {identity}"
    of, at = (BITS[bit].format(i=i) for i in "fs")
    name = f"{bit}_{kind}"
    return parse_kernel(MASKED.format(name=name, kind=kind, bit=of, bit_s=at, choices=choices))


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("bit", BITS)
def test_extremes_under_a_mask_are_made_in_vectors(bit: str, kind: str) -> None:
    for level in LEVELS:
        text = str(improved(module_text([masked(bit, kind)], level), level))
        assert f"@llvm.vector.reduce.f{kind}imum.v" in text


@pytest.mark.parametrize("level", LEVELS)
def test_extremes_under_a_mask(level: str, rng: np.random.Generator) -> None:
    kernels = [masked(bit, kind) for bit in BITS for kind in ("max", "min")]
    compiled = Compiled(kernels, level)
    for n in SIZES:
        x = rng.normal(0, 3, (40, n)).astype(np.float32)
        keep = rng.random((40, n)) < rng.random((40, 1))
        for row, value in enumerate((np.nan, np.inf, -np.inf, 1e38)):
            if n:
                x[row, rng.integers(n)] = value
        for kernel in kernels:
            bit, kind = kernel.name.split("_")
            z = np.full_like(x, 7)
            assert compiled(kernel.name, [x, keep, z], {"M": len(x), "N": n})[0] == 0
            bits = keep if bit == "given" else np.tri(40, n, dtype=bool)
            with np.errstate(all="ignore"):
                wide, none = x.astype(np.float64), -np.inf if kind == "max" else np.inf
                reduce = np.max if kind == "max" else np.min
                extreme = reduce(np.where(bits, wide, none), -1, keepdims=True, initial=none)
                shifted = (np.where(bits, wide, -np.inf) - extreme).astype(np.float32)
                expected = 2 * np.exp(shifted.astype(np.float64))
            # the difference is rounded as ours is, and exp is within four units
            np.testing.assert_allclose(z, expected, rtol=2**-20, atol=1e-37)


SHORT = """stagefuse kernel 1
kernel {name} for test
buffer k : inout f32[3, {m}]
buffer x : in f32[3, {n}]
dims
parallel d0 in 3
for d1 in 0..{n} vector
  store k[d0, d1 + 1] = add.f32(mul.f32(k.f32[d0, d1 + 1], f32(2.0)), x.f32[d0, d1])
"""


@pytest.mark.parametrize("level", LEVELS)
def test_a_short_row_that_is_updated_from_itself_is_updated_once(
    level: str, rng: np.random.Generator
) -> None:
    """No element of its last vector is computed twice, as it may be where rows are only written."""
    sizes = (3, 5, 7, 9, 13, 14, 28, 61)
    compiled = Compiled(
        [parse_kernel(SHORT.format(name=f"of{n}", n=n, m=n + 2)) for n in sizes], level
    )
    for n in sizes:
        k, x = (rng.integers(-9, 9, (3, w)).astype(np.float32) for w in (n + 2, n))  # exact
        wanted = k.copy()
        wanted[:, 1:-1] = wanted[:, 1:-1] * 2 + x
        assert compiled(f"of{n}", [k, x])[0] == 0
        assert np.array_equal(k, wanted)


QUOTIENTS = """stagefuse kernel 1
kernel quotients for test
buffer x : in f32[M, N]
buffer d : in f32[M]
buffer z : out f32[M, N]
buffer y : out f32[M]
dims M N
parallel m in M
fold most = max over (f in N) : f32 of div.f32(x.f32[m, f], d.f32[m])
store y[m] = $most.f32
for n in 0..N vector
  store z[m, n] = div.f32(x.f32[m, n], d.f32[m])
"""


@pytest.mark.parametrize("units", [0, UNITS["quotients"]])
@pytest.mark.parametrize("level", LEVELS)
def test_rows_over_one_number(units: int, level: str, rng: np.random.Generator) -> None:
    """By division or by a reciprocal, the same bits; but one of a tie of subnormal results."""
    compiled = Compiled([parse_kernel(QUOTIENTS)], level)
    compiled.native.use_units(units)
    d = np.concatenate([[0, -0.0, np.inf, np.nan, 3, 1e-40, -3e38], rng.standard_normal(57)])
    d = d.astype(np.float32)
    for n in (1, 16, 31, 200):
        bits = rng.integers(0, 1 << 32, (len(d), n), np.uint64).astype(np.uint32)
        x = np.where(rng.random((len(d), n)) < 0.1, np.float32(0), bits.view(np.float32))
        z, y = np.empty_like(x), np.empty_like(d)
        assert compiled("quotients", [x, d, z, y], {"M": len(d), "N": n})[0] == 0
        with np.errstate(all="ignore"):
            want = x / d[:, None]
            off = np.where(np.abs(want) < 2.0**-126, 2.0**-149, 0)
            assert np.array_equal(np.isnan(z), np.isnan(want))
            same = (z == want) | (np.abs(z.astype("f8") - want) <= off) | np.isnan(want)
        assert same.all() and np.array_equal(np.signbit(z)[z == z], np.signbit(want)[z == z])
        np.testing.assert_array_equal(y, z.max(1))
