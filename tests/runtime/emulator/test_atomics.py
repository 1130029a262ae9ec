"""Atomics: what memory holds afterwards, and that old values are those of some order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from .kernels import kernel, run, words

U, S, L = np.uint32, np.int32, np.uint64


def inc(old: int, b: int) -> int:
    return 0 if old >= b else old + 1


def dec(old: int, b: int) -> int:
    return b if old == 0 or old > b else old - 1


OPERATIONS: dict[str, tuple[Any, Any]] = {
    "add.u32": (U, lambda a, b: a + b), "add.s32": (S, lambda a, b: a + b),
    "add.u64": (L, lambda a, b: a + b), "min.u32": (U, min), "max.u32": (U, max),
    "min.s32": (S, min), "max.s32": (S, max), "min.u64": (L, min), "max.s64": (np.int64, max),
    "and.b32": (U, lambda a, b: a & b), "or.b32": (U, lambda a, b: a | b),
    "xor.b64": (L, lambda a, b: a ^ b), "exch.b32": (U, lambda a, b: b), "inc.u32": (U, inc),
    "dec.u32": (U, dec),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize("cells", [1, 3, 64])
def test_operations(rng: np.random.Generator, name: str, space: str, cells: int) -> None:
    dtype, f = OPERATIONS[name]
    size = np.dtype(dtype).itemsize
    kind = name.split(".")[1]
    bank = "%d" if size == 8 else "%r"
    where = "" if space == "generic" else f".{space}"
    to_shared = space == "shared"
    text = kernel(
        f"""
        rem.u32 %r4, %r3, {cells};
        mul.wide.u32 %d4, %r4, {size};
        {"cvt.u32.u64 %r6, %d4;" if to_shared else ""}
        add.u64 %d5, %d0, %d4;
        mul.wide.u32 %d6, %r3, {size};
        add.u64 %d7, %d1, %d6;
        add.u64 %d8, %d2, %d6;
        ld.global.{kind} {bank}10, [%d7];
        {
            f"ld.global.{kind} {bank}12, [%d5]; st.shared.{kind} [%r6], {bank}12; bar.sync 0;"
            if to_shared
            else ""
        }
        atom{where}.{name} {bank}11, [{"%r6" if to_shared else "%d5"}], {bank}10;
        {
            f"bar.sync 0; ld.shared.{kind} {bank}12, [%r6]; st.global.{kind} [%d5], {bank}12;"
            if to_shared
            else ""
        }
        st.global.{kind} [%d8], {bank}11;""",
        3,
        shared=".shared .align 8 .b8 s[512];",
    )
    info = np.iinfo(dtype)
    memory = rng.integers(0, 40, cells).astype(dtype)
    operands = rng.integers(info.min, info.max, 64, dtype=dtype)
    if name[:3] in ("inc", "dec"):
        operands = rng.integers(0, 30, 64).astype(dtype)
    first, old = memory.copy(), np.zeros(64, dtype)
    run(text, memory, operands, old, block=64)
    with np.errstate(over="ignore"):
        for cell in range(cells):
            steps = []
            for i in range(cell, 64, cells):
                made = f(int(old[i]), int(operands[i])) & (2 ** (8 * size) - 1)
                steps.append((int(old[i]), int(np.array(made, f"u{size}").astype(dtype))))
            assert is_a_walk(steps, int(first[cell]), int(memory[cell]))


def is_a_walk(steps: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether steps from a value to the next can follow each other, from the first value to the
    last: each value is left as often as it is reached (Euler), and all are reached from the first.
    """
    balance = Counter({first: 1})
    balance[last] -= 1
    followers: dict[int, set[int]] = {}
    for before, after in steps:
        balance[before] -= 1
        balance[after] += 1
        followers.setdefault(before, set()).add(after)
    reached, new = {first}, [first]
    while new:
        found = followers.get(new.pop(), set()) - reached
        reached |= found
        new += found
    return not any(balance.values()) and set(followers) <= reached


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f64", np.float64)])
def test_sums_of_floats(rng: np.random.Generator, kind: str, dtype: Any) -> None:
    bank, size = ("%f", 4) if kind == "f32" else ("%g", 8)
    text = kernel(
        f"""
        mul.wide.u32 %d4, %r3, {size};
        add.u64 %d5, %d1, %d4;
        ld.global.{kind} {bank}1, [%d5];
        red.global.add.{kind} [%d0], {bank}1;""",
        2,
    )
    data, total = rng.normal(0, 1, 256).astype(dtype), np.zeros(1, dtype)
    run(text, total, data, block=128, grid=2)
    unit = float(np.finfo(dtype).eps) / 2
    exact = math.fsum(map(float, data))
    assert abs(float(total[0]) - exact) <= 255 * unit * float(np.abs(data).sum())


def test_sums_of_halves(rng: np.random.Generator) -> None:
    text = kernel(
        """
        mul.wide.u32 %d4, %r3, 4;
        add.u64 %d5, %d1, %d4;
        ld.global.b32 %r5, [%d5];
        atom.global.add.noftz.f16x2 %r6, [%d0], %r5;""",
        2,
    )
    data, total = rng.normal(0, 1, (32, 2)).astype(np.float16), np.zeros(2, np.float16)
    run(text, total, data)
    want = np.zeros(2, np.float16)
    for row in data:
        want = (want.astype(np.float64) + row).astype(np.float16)
    assert (total == want).all()


def test_vectors_of_reductions() -> None:
    text = kernel("cvt.rn.f32.u32 %f0, %r0; red.global.add.v2.f32 [%d0], {%f0, 1.0};".replace(
        "1.0", "%f1").replace("red", "mov.f32 %f1, 0f3F800000; red"))  # fmt: skip
    total = np.zeros(2, np.float32)
    run(text, total)
    assert total.tolist() == [496, 32]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap(bits: int) -> None:
    bank = {16: "%h", 32: "%r", 64: "%d"}[bits]
    convert = f"cvt.u{bits}.u32" if bits != 32 else "mov.u32"
    text = kernel(f"""
        {convert} {bank}4, %r0;
        add.u{bits} {bank}5, {bank}4, 1;
        atom.global.cas.b{bits} {bank}6, [%d0], {bank}4, {bank}5;
        cvt.u32.u{bits} %r7, {bank}6;
        st.global.u32 [%d22], %r7;""".replace("cvt.u32.u32", "mov.u32"), 2).replace(
        "    add.u64 %d20", "    add.u64 %d22, %d1, %d21;\n    add.u64 %d20")  # fmt: skip
    memory, old = np.zeros(1, f"u{bits // 8}"), words(32)
    run(text, memory, old)
    assert memory[0] == 32 and (old == np.arange(32)).all()


def test_a_loop_of_compare_and_swap() -> None:
    """A maximum of floats as programs that have no instruction for it write it."""
    text = kernel("""
        cvt.rn.f32.u32 %f0, %r3;
        ld.relaxed.gpu.global.u32 %r4, [%d0];
    TOP:
        mov.b32 %f1, %r4;
        max.f32 %f2, %f0, %f1;
        mov.b32 %r5, %f2;
        atom.global.cas.b32 %r6, [%d0], %r4, %r5;
        setp.ne.u32 %p0, %r6, %r4;
        mov.u32 %r4, %r6;
        @%p0 bra TOP;""")
    most = np.zeros(1, np.float32)
    run(text, most, grid=4)
    assert most[0] == 127
