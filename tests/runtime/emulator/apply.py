"""Runs one instruction on arrays of operands, and random operands with their hard cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import ModuleBuilder, Reg, print_module
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime import emulator

Array = NDArray[Any]
LOADED = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32", "u16x2": "b32",
          "s16x2": "b32", "tf32": "b32", "e4m3x2": "b16", "e5m2x2": "b16"}  # fmt: skip


def loadable(kind: str) -> str:
    return LOADED.get(kind, kind)


def apply(
    name: str, operands: Sequence[tuple[str, Any]], result: str, *, target: str = "sm_90a",
    pair: bool = False,
) -> Any:  # fmt: skip
    """The results of an instruction for each element of its operands.

    An operand is a type and an array, or a type and a number for a constant. The result is of
    type `result`; with `pair`, both results.
    """
    arrays = [x for _, x in operands if isinstance(x, np.ndarray)]
    n = len(arrays[0]) if arrays else 1
    b = ModuleBuilder(target, (8, 6))
    params = [(f"x{i}", "u64") for i in range(len(arrays))]
    k = b.entry("apply", [*params, ("d", "u64"), ("p", "u64"), ("n", "u32")])
    i = k.op("mad.lo.u32", k.special("ctaid.x"), 64, k.special("tid.x"))
    with k.when(k.r("setp.lt.u32", i, k.param("n"))):
        sources: list[Any] = []
        for kind, x in operands:
            sources.append(x if not isinstance(x, np.ndarray) else _load(
                k, f"x{sum(isinstance(s, Reg) for s in sources)}", i, kind))  # fmt: skip
        made = k.op(name, *sources, pair=pair)
        value, second = made if pair else (made, None)
        _store(k, "d", i, value, result)
        if second is not None:
            _store(k, "p", i, second, "pred")
    out = np.zeros(n, dtype_of(result))
    also = np.zeros(n, np.bool_)
    module = emulator.load(print_module(b.module()))
    module.launch("apply", grid=-(-n // 64), block=64, args=[*arrays, out, also, np.uint32(n)])
    return (out, also) if pair else out


def dtype_of(kind: str) -> Any:
    """The dtype of arrays of a type: small floats as bits."""
    if kind == "pred":
        return np.dtype(np.bool_)
    kind = loadable(kind)
    return np.dtype({"f": "f", "s": "i"}.get(kind[0], "u") + str(TYPES[kind].bits // 8))


def _at(k: Any, name: str, i: Reg, size: int) -> Reg:
    made: Reg = k.op("add.u64", k.param(name), k.op("mul.wide.u32", i, size))
    return made


def _load(k: Any, name: str, i: Reg, kind: str) -> Reg:
    if kind == "pred":
        word = k.op("ld.global.u8", _at(k, name, i, 1))
        made: Reg = k.op("setp.ne.u16", word, 0)
        return made
    kind = loadable(kind)
    made = k.op(f"ld.global.{kind}", _at(k, name, i, TYPES[kind].size_bytes))
    return made


def _store(k: Any, name: str, i: Reg, value: Reg, kind: str) -> None:
    if kind == "pred":
        word = k.op("selp.u16", 1, 0, value)
        k.op("st.global.u8", _at(k, name, i, 1), word)
        return
    kind = loadable(kind)
    k.op(f"st.global.{kind}", _at(k, name, i, TYPES[kind].size_bytes), value)


_SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, np.inf, -np.inf, np.nan,
            2.0**-126, 2.0**-127, -(2.0**-140), 2.0**-149, 65504.0, 65520.0, 3.4028234e38,
            -3.4028234e38, 2.0**31, -(2.0**31), 2.0**32, 2.0**63, 448.0, 464.0, 57344.0, 1e-5,
            2.0**-24, 2.0**-25, 255.5, -128.5]  # fmt: skip


def numbers(rng: np.random.Generator, kind: str, n: int = 500) -> Array:
    """Random values of a type, with the ones on which implementations go wrong."""
    dtype = dtype_of(kind)
    if kind == "pred":
        return rng.integers(0, 2, n).astype(np.bool_)
    bits = rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8).view(f"u{dtype.itemsize}")
    if dtype.kind == "f":
        values = np.where(rng.random(n) < 0.5, bits.view(dtype), rng.normal(0, 4, n)).astype(dtype)
        pick = rng.choice(_SPECIAL, n).astype(dtype)
        return np.where(rng.random(n) < 0.3, pick, values).astype(dtype)
    edges = np.array([0, 1, 2, -1, -2], "i8").astype(dtype)
    limit = np.iinfo(dtype)
    edges = np.r_[edges, dtype.type(limit.max), dtype.type(limit.min), dtype.type(limit.max // 2)]
    small = rng.integers(0, 70, n).astype(dtype)
    raw = bits.view(dtype)
    chosen = rng.integers(0, 3, n)
    found: Array = np.where(chosen == 0, raw, np.where(chosen == 1, small, rng.choice(edges, n)))
    return found.astype(dtype)


def same(a: Array, b: Array) -> bool:
    """Whether two arrays are equal, bit by bit but for NaN."""
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    nan = np.isnan(a) & np.isnan(b)
    raw = f"u{a.dtype.itemsize}"
    return bool(((a.view(raw) == b.view(raw)) | nan).all())


def check(got: Array, want: Array, *operands: Any) -> None:
    """Asserts that results are the same, and shows the first that differs."""
    if same(got, want):
        return
    nan = (got != got) & (want != want)
    raw = f"u{got.dtype.itemsize}"
    bad = np.flatnonzero((got.view(raw) != want.view(raw)) & ~nan)
    at = int(bad[0])
    given = [x[at] if isinstance(x, np.ndarray) else x for x in operands]
    raise AssertionError(f"{len(bad)} differ, first for {given}: {got[at]!r}, not {want[at]!r}")
