"""Bits, comparisons, selections and moves against Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from .apply import apply, check, dtype_of, numbers, same
from .kernels import kernel, run, words
from .test_integer import trial, unsigned, wrapped


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bitwise(rng: np.random.Generator, bits: int) -> None:
    kind = f"b{bits}"
    trial(rng, f"and.{kind}", (kind, kind), kind, lambda a, b: a & b)
    trial(rng, f"or.{kind}", (kind, kind), kind, lambda a, b: a | b)
    trial(rng, f"xor.{kind}", (kind, kind), kind, lambda a, b: a ^ b)
    trial(rng, f"not.{kind}", (kind,), kind, lambda a: ~a)
    trial(rng, f"cnot.{kind}", (kind,), kind, lambda a: a == 0)


def test_predicates(rng: np.random.Generator) -> None:
    a, b = numbers(rng, "pred"), numbers(rng, "pred")
    for op, want in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        check(apply(f"{op}.pred", [("pred", a), ("pred", b)], "pred"), want)
    check(apply("not.pred", [("pred", a)], "pred"), ~a)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u32", "s16", "s32", "s64"])
def test_shifts(rng: np.random.Generator, kind: str) -> None:
    bits = int(kind[1:])
    trial(rng, f"shr.{kind}", (kind, "u32"), kind, lambda a, b: a >> b)
    if kind[0] == "b":
        trial(rng, f"shl.{kind}", (kind, "u32"), kind, lambda a, b: a << b if b < bits else 0)
    for amount in (0, 3, bits - 1, bits, 99):
        a = numbers(rng, kind)
        want = np.array([wrapped(int(x) >> amount, kind) for x in a], a.dtype)
        check(apply(f"shr.{kind}", [(kind, a), ("u32", amount)], kind), want, a)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shifts(rng: np.random.Generator, mode: str) -> None:
    def amount(c: int) -> int:
        return c & 31 if mode == "wrap" else min(c, 32)

    kinds = ("b32", "b32", "u32")
    trial(rng, f"shf.l.{mode}.b32", kinds, "b32", lambda a, b, c: (b << 32 | a) << amount(c) >> 32)
    trial(rng, f"shf.r.{mode}.b32", kinds, "b32", lambda a, b, c: (b << 32 | a) >> amount(c))


@pytest.mark.parametrize("table", [0x80, 0xFE, 0x96, 0xC0, 0xFC, 0x3C, 0xF8, 0xEA, 0xE2, 0xCA,
                                   0x78, 0x6A, 0x1B, 0xD8, 0x00, 0xFF, 0x2D])  # fmt: skip
def test_lop3(rng: np.random.Generator, table: int) -> None:
    a, b, c = (numbers(rng, "b32") for _ in range(3))
    want = [sum((table >> ((int(x) >> i & 1) << 2 | (int(y) >> i & 1) << 1 | int(z) >> i & 1) & 1)
                << i for i in range(32)) for x, y, z in zip(a, b, c, strict=True)]  # fmt: skip
    operands: list[Any] = [("b32", a), ("b32", b), ("b32", c), ("u32", table)]
    check(apply("lop3.b32", operands, "b32"), np.array(want, np.uint32), a, b, c)
    q = numbers(rng, "pred")
    got, p = apply("lop3.and.b32", [*operands, ("pred", q)], "b32", pair=True)
    check(got, np.array(want, np.uint32))
    check(p, (np.array(want) != 0) & q)


def test_prmt(rng: np.random.Generator) -> None:
    def general(a: int, b: int, c: int) -> int:
        pool = (b << 32 | a).to_bytes(8, "little")
        out = 0
        for i in range(4):
            digit = c >> 4 * i & 15
            byte = pool[digit & 7]
            out |= (0xFF * (byte >> 7) if digit & 8 else byte) << 8 * i
        return out

    trial(rng, "prmt.b32", ("b32",) * 3, "b32", general)
    picks = {
        "f4e": [0x3210, 0x4321, 0x5432, 0x6543], "b4e": [0x5670, 0x6701, 0x7012, 0x0123],
        "rc8": [0x0000, 0x1111, 0x2222, 0x3333], "ecl": [0x3210, 0x3211, 0x3222, 0x3333],
        "ecr": [0x0000, 0x1110, 0x2210, 0x3210], "rc16": [0x1010, 0x3232, 0x1010, 0x3232],
    }  # fmt: skip
    for mode, digits in picks.items():  # the tables of the ISA
        trial(rng, f"prmt.b32.{mode}", ("b32",) * 3, "b32",
              lambda a, b, c, digits=digits: general(a, b, digits[c & 3]))  # fmt: skip


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def held(word: str, a: float, b: float) -> bool:
    """PTX ISA, "Comparison Operators"."""
    nan = math.isnan(a) or math.isnan(b)
    if word in ("num", "nan"):
        return nan == (word == "nan")
    if word[-1] == "u" and word[:-1] in ORDERED:
        return nan or held(word[:-1], a, b)
    word = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(word, word)
    return not nan and bool(eval(f"a {ORDERED[word]} b"))


def values_of(kind: str, a: Any) -> list[float]:
    """Python numbers of an array: bf16 and f16 from their bits."""
    if kind == "bf16":
        return [float(x) for x in (a.astype(np.uint32) << 16).view(np.float32)]
    if kind == "f16":
        return [float(x) for x in a.view(np.float16)]
    return [x.item() for x in a]


@pytest.mark.parametrize("kind", ["u16", "u64", "s32", "b32", "f32", "f64", "f16", "bf16"])
def test_setp(rng: np.random.Generator, kind: str) -> None:
    words = ["eq", "ne"]
    words += ["lt", "le", "gt", "ge"] if kind[0] != "b" or kind == "bf16" else []
    words += ["lo", "ls", "hi", "hs"] if kind[0] == "u" else []
    words += ["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"] if "f" in kind else []
    a, b = numbers(rng, kind), numbers(rng, kind)
    b = np.where(rng.random(len(a)) < 0.3, a, b)
    pairs = list(zip(values_of(kind, a), values_of(kind, b), strict=True))
    c = numbers(rng, "pred")
    for word in words:
        want = np.array([held(word, x, y) for x, y in pairs])
        operands = [(kind, a), (kind, b)]
        check(apply(f"setp.{word}.{kind}", operands, "pred"), want, a, b)
        operands.append(("pred", c))
        check(apply(f"setp.{word}.xor.{kind}", operands, "pred"), want ^ c, a, b, c)
        if kind not in ("f16", "bf16"):
            got = apply(f"setp.{word}.and.{kind}", operands, "pred", pair=True)
            check(got[0], want & c, a, b, c)
            check(got[1], ~want & c, a, b, c)


def test_setp_flushes(rng: np.random.Generator) -> None:
    a = np.array([2.0**-140, -(2.0**-130), 1.0], np.float32)
    zero = np.zeros(3, np.float32)
    check(apply("setp.gt.f32", [("f32", a), ("f32", zero)], "pred"), np.array([True, False, True]))
    check(apply("setp.eq.ftz.f32", [("f32", a), ("f32", zero)], "pred"),
          np.array([True, True, False]))  # fmt: skip


def test_set_and_selections(rng: np.random.Generator) -> None:
    a, b = numbers(rng, "f32"), numbers(rng, "f32")
    want = np.array([held("ltu", x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    two = [("f32", a), ("f32", b)]
    check(apply("set.ltu.u32.f32", two, "u32"), np.where(want, 2**32 - 1, 0).astype(np.uint32))
    check(apply("set.ltu.f32.f32", two, "f32"), want.astype(np.float32))
    check(apply("set.ltu.f16.f32", two, "f16"), np.where(want, 0x3C00, 0).astype(np.uint16))
    check(apply("set.ltu.bf16.f32", two, "bf16"), np.where(want, 0x3F80, 0).astype(np.uint16))
    for kind in ("u16", "s64", "f64"):
        x, y = numbers(rng, kind), numbers(rng, kind)
        got = apply(f"set.lt.f16.{kind}", [(kind, x), (kind, y)], "f16")
        check(got, np.where(x < y, 0x3C00, 0).astype(np.uint16), x, y)
    p = numbers(rng, "pred")
    check(apply("selp.f32", [*two, ("pred", p)], "f32"), np.where(p, a, b))
    for kind in ("b16", "u64", "s32", "f64"):
        x, y, c = numbers(rng, kind), numbers(rng, kind), numbers(rng, "s32")
        got = apply(f"slct.{kind}.s32", [(kind, x), (kind, y), ("s32", c)], kind)
        assert same(got, np.where(c >= 0, x, y))
    c = numbers(rng, "f32")
    got = apply("slct.f32.f32", [*two, ("f32", c)], "f32")
    assert same(got, np.where(c >= 0, a, b))  # NaN is not >= 0


def test_halves_are_compared_apart(rng: np.random.Generator) -> None:
    a, b = numbers(rng, "f16x2"), numbers(rng, "f16x2")
    low, high = apply("setp.lt.f16x2", [("f16x2", a), ("f16x2", b)], "pred", pair=True)
    x, y = (v.view(np.float16).reshape(-1, 2) for v in (a, b))
    check(low, x[:, 0] < y[:, 0])
    check(high, x[:, 1] < y[:, 1])


@pytest.mark.parametrize("kind", ["b16", "u32", "s64", "f32", "f64"])
def test_mov(rng: np.random.Generator, kind: str) -> None:
    a = numbers(rng, kind)
    assert same(apply(f"mov.{kind}", [(kind, a)], kind), a)
    assert dtype_of(kind) == a.dtype and unsigned(-1, 4) == 15


def test_moves_of_vectors() -> None:
    """All is read before anything is written; special registers are vectors, too."""
    text = kernel("""
        mov.v4.u32 {%r4, %r5, %r6, %r7}, %tid;
        mov.v2.u32 {%r4, %r5}, {%r5, %r4};
        .reg .v4 .u32 %v;
        mov.v4.u32 %v, %ntid;
        add.u32 %r6, %r6, %v.w;
        mov.u32 %r7, %tid.w;
        setp.eq.u32 %p0, %r4, 1;
        mul.wide.u32 %d1, %v.x, 16;
        @!%p0 mov.u64 %d1, 0;
        add.u64 %d0, %d0, %d1;
        mul.wide.u32 %d1, %r5, 16;
        add.u64 %d0, %d0, %d1;
        st.global.v4.u32 [%d0], {%r4, %r5, %r6, %r7};""")
    out = words(2 * 5 * 4)
    run(text, out, block=(5, 2, 1))
    assert (out.reshape(2, 5, 4) == [[[y, x, 0, 0] for x in range(5)] for y in range(2)]).all()
