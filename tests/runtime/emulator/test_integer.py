"""Integer instructions against Python's integers, which have no size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .apply import apply, check, dtype_of, numbers

SIX = ("u16", "u32", "u64", "s16", "s32", "s64")
Reference = Callable[..., int]


def wrapped(value: int, kind: str) -> int:
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def clamped(value: int, kind: str) -> int:
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    return min(max(value, low), high)


def unsigned(value: int, bits: int) -> int:
    return value & ((1 << bits) - 1)


def trial(
    rng: np.random.Generator, name: str, kinds: tuple[str, ...], result: str, f: Reference,
    **options: Any,
) -> None:  # fmt: skip
    """An instruction on random operands; those of kind `byte` are u32 from 0 to 255."""
    arrays = [
        numbers(rng, "u32") & np.uint32(0xFF) if kind == "byte" else numbers(rng, kind)
        for kind in kinds
    ]
    kinds = tuple("u32" if kind == "byte" else kind for kind in kinds)
    results = [wrapped(int(f(*map(int, xs))), result) for xs in zip(*arrays, strict=True)]
    want = np.array(results, dtype_of(result))
    got = apply(name, list(zip(kinds, arrays, strict=True)), result, **options)
    check(got, want, *arrays)


def quotient(a: int, b: int) -> int:
    if b == 0:
        return -1
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


def remainder(a: int, b: int) -> int:
    return -1 if b == 0 else a - b * quotient(a, b)


@pytest.mark.parametrize("kind", SIX)
@pytest.mark.parametrize(
    ("opcode", "f"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("div", quotient),
        ("rem", remainder),
        ("min", min),
        ("max", max),
    ],
)
def test_two_operands(rng: np.random.Generator, opcode: str, f: Reference, kind: str) -> None:
    trial(rng, f"{opcode}.{kind}", (kind, kind), kind, f)


@pytest.mark.parametrize("kind", SIX)
def test_products(rng: np.random.Generator, kind: str) -> None:
    bits = int(kind[1:])
    trial(rng, f"mul.hi.{kind}", (kind, kind), kind, lambda a, b: a * b >> bits)
    trial(rng, f"mad.hi.{kind}", (kind,) * 3, kind, lambda a, b, c: (a * b >> bits) + c)
    trial(rng, f"mad.lo.{kind}", (kind,) * 3, kind, lambda a, b, c: a * b + c)
    trial(rng, f"sad.{kind}", (kind,) * 3, kind, lambda a, b, c: c + abs(a - b))
    if bits < 64:
        wide = f"{kind[0]}{bits * 2}"
        trial(rng, f"mul.wide.{kind}", (kind, kind), wide, lambda a, b: a * b)
        trial(rng, f"mad.wide.{kind}", (kind, kind, wide), wide, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("half", ["lo", "hi"])
def test_products_of_24_bits(rng: np.random.Generator, kind: str, half: str) -> None:
    def product(a: int, b: int) -> int:
        x, y = (wrapped(v, f"{kind[0]}24") for v in (a, b))
        return x * y >> (16 if half == "hi" else 0)

    trial(rng, f"mul24.{half}.{kind}", (kind, kind), kind, product)
    trial(rng, f"mad24.{half}.{kind}", (kind,) * 3, kind, lambda a, b, c: product(a, b) + c)


def test_saturating(rng: np.random.Generator) -> None:
    two, three = ("s32",) * 2, ("s32",) * 3
    trial(rng, "add.sat.s32", two, "s32", lambda a, b: clamped(a + b, "s32"))
    trial(rng, "sub.sat.s32", two, "s32", lambda a, b: clamped(a - b, "s32"))
    trial(rng, "mad.hi.sat.s32", three, "s32", lambda a, b, c: clamped((a * b >> 32) + c, "s32"))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_abs_and_neg(rng: np.random.Generator, kind: str) -> None:
    trial(rng, f"abs.{kind}", (kind,), kind, abs)
    trial(rng, f"neg.{kind}", (kind,), kind, lambda a: -a)


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
def test_two_halves(rng: np.random.Generator, kind: str) -> None:
    half = kind[:3]

    def both(f: Reference) -> Reference:
        def run(a: int, b: int) -> int:
            low, high = (unsigned(f(*(wrapped(x >> s, half) for x in (a, b))), 16) for s in (0, 16))
            return low | high << 16

        return run

    for opcode, f in (("add", lambda a, b: a + b), ("min", min), ("max", max)):
        trial(rng, f"{opcode}.{kind}", (kind, kind), "u32", both(f))
    if kind == "s16x2":
        trial(rng, "max.relu.s16x2", (kind, kind), "u32", both(lambda a, b: max(a, b, 0)))
        trial(rng, "min.relu.s32", ("s32", "s32"), "s32", lambda a, b: max(min(a, b), 0))


@pytest.mark.parametrize("bits", [32, 64])
def test_bits(rng: np.random.Generator, bits: int) -> None:
    kind = f"b{bits}"
    trial(rng, f"popc.{kind}", (kind,), "u32", lambda a: a.bit_count())
    trial(rng, f"clz.{kind}", (kind,), "u32", lambda a: bits - a.bit_length())
    trial(rng, f"brev.{kind}", (kind,), kind, lambda a: int(f"{a:0{bits}b}"[::-1], 2))


@pytest.mark.parametrize("kind", ["u32", "u64", "s32", "s64"])
def test_bit_fields(rng: np.random.Generator, kind: str) -> None:
    bits = int(kind[1:])

    def find(a: int) -> int:
        return (~a if a < 0 else a).bit_length() - 1

    def extract(a: int, b: int, c: int) -> int:
        """The loop of the ISA."""
        pos, length, msb = b & 0xFF, c & 0xFF, bits - 1
        raw = unsigned(a, bits)
        sbit = 0
        if kind[0] == "s" and length:
            sbit = raw >> min(pos + length - 1, msb) & 1
        return sum(
            ((raw >> pos + i & 1) if i < length and pos + i <= msb else sbit) << i
            for i in range(bits)
        )

    def insert(a: int, b: int, c: int, e: int) -> int:
        pos, length = c & 0xFF, e & 0xFF
        for i in range(length):
            if pos + i >= bits:
                break
            b = b & ~(1 << pos + i) | (a >> i & 1) << pos + i
        return b

    trial(rng, f"bfind.{kind}", (kind,), "u32", find)
    trial(rng, f"bfind.shiftamt.{kind}", (kind,), "u32",
          lambda a: bits - 1 - find(a) if find(a) >= 0 else -1)  # fmt: skip
    trial(rng, f"bfe.{kind}", (kind, "byte", "byte"), kind, extract)
    if kind[0] == "u":
        trial(rng, f"bfi.b{bits}", (f"b{bits}",) * 2 + ("byte",) * 2, f"b{bits}", insert)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_extension_and_masks(rng: np.random.Generator, mode: str) -> None:
    def limit(n: int) -> int:
        return n & 31 if mode == "wrap" else min(n, 32)

    trial(rng, f"szext.{mode}.u32", ("u32", "u32"), "u32", lambda a, b: unsigned(a, limit(b)))
    trial(rng, f"szext.{mode}.s32", ("s32", "u32"), "s32",
          lambda a, b: wrapped(a, f"s{limit(b)}") if limit(b) else 0)  # fmt: skip
    trial(rng, f"bmsk.{mode}.b32", ("b32", "b32"), "b32",
          lambda a, b: ((1 << limit(b)) - 1) << limit(a))  # fmt: skip


@pytest.mark.parametrize("a_kind", ["u32", "s32"])
@pytest.mark.parametrize("b_kind", ["u32", "s32"])
def test_dot_products(rng: np.random.Generator, a_kind: str, b_kind: str) -> None:
    def fields(x: int, bits: int, kind: str) -> list[int]:
        return [wrapped(x >> s, f"{kind[0]}{bits}") for s in range(0, 32, bits)]

    def four(a: int, b: int, c: int) -> int:
        pairs = zip(fields(a, 8, a_kind), fields(b, 8, b_kind), strict=True)
        return c + sum(x * y for x, y in pairs)

    def two(a: int, b: int, c: int, first: int) -> int:
        right = fields(b, 8, b_kind)[first : first + 2]
        return c + sum(x * y for x, y in zip(fields(a, 16, a_kind), right, strict=True))

    kinds = ("b32", "b32", b_kind)
    trial(rng, f"dp4a.{a_kind}.{b_kind}", kinds, b_kind, four)
    trial(rng, f"dp2a.lo.{a_kind}.{b_kind}", kinds, b_kind, lambda a, b, c: two(a, b, c, 0))
    trial(rng, f"dp2a.hi.{a_kind}.{b_kind}", kinds, b_kind, lambda a, b, c: two(a, b, c, 2))


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_parts_of_words(rng: np.random.Generator, parts: int, kind: str) -> None:
    bits = 32 // parts

    def each(f: Reference, sat: bool, a: int, b: int) -> list[int]:
        fields = [[wrapped(x >> s, f"{kind[0]}{bits}") for s in range(0, 32, bits)] for x in (a, b)]
        found = [f(x, y) for x, y in zip(*fields, strict=True)]
        return [clamped(x, f"{kind[0]}{bits}") if sat else x for x in found]

    def joined(fields: list[int]) -> int:
        return sum(unsigned(x, bits) << bits * i for i, x in enumerate(fields))

    operations: dict[str, Reference] = {
        "vadd": lambda a, b: a + b, "vsub": lambda a, b: a - b, "vmin": min, "vmax": max,
        "vabsdiff": lambda a, b: abs(a - b),
        "vavrg": lambda a, b: (a + b) // 2 if (a + b) < 0 else (a + b + 1) // 2,
    }  # fmt: skip
    kinds = (kind, kind, kind)
    for name, f in operations.items():
        op = f"{name}{parts}.{kind}.{kind}.{kind}"
        trial(rng, op, kinds, kind, lambda a, b, c, f=f: joined(each(f, False, a, b)))
        trial(rng, f"{op}.sat", kinds, kind, lambda a, b, c, f=f: joined(each(f, True, a, b)))
        trial(rng, f"{op}.add", kinds, kind, lambda a, b, c, f=f: c + sum(each(f, False, a, b)))


COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": int.__eq__, "ne": int.__ne__, "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__,
    "ge": int.__ge__,
}  # fmt: skip
SECOND: dict[str, Reference] = {"add": lambda a, b: a + b, "min": min, "max": max}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("word", COMPARISONS)
def test_comparisons_of_parts(rng: np.random.Generator, parts: int, kind: str, word: str) -> None:
    bits, f = 32 // parts, COMPARISONS[word]

    def held(a: int, b: int) -> list[int]:
        return [
            int(f(wrapped(a >> s, f"{kind[0]}{bits}"), wrapped(b >> s, f"{kind[0]}{bits}"))) << s
            for s in range(0, 32, bits)
        ]

    op, kinds = f"vset{parts}.{kind}.{kind}.{word}", (kind, kind, "u32")
    trial(rng, op, kinds, "u32", lambda a, b, c: sum(held(a, b)))
    trial(rng, f"{op}.add", kinds, "u32", lambda a, b, c: c + sum(x != 0 for x in held(a, b)))


@pytest.fixture
def by_the_text(is_emulated: bool) -> None:
    """Leaves out GPUs, for which ptxas 13.0 makes something else of scalar video instructions."""
    if not is_emulated:
        pytest.skip("ptxas does not keep to the ISA's text")


@pytest.mark.usefixtures("by_the_text")
@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("a_kind", ["u32", "s32"])
def test_words_and_a_second_operation(
    rng: np.random.Generator, kind: str, a_kind: str
) -> None:  # fmt: skip
    """PTX ISA, scalar video instructions: clamp or cut to the result's type, then the second."""
    operations: dict[str, Reference] = {
        "vadd": lambda a, b: a + b, "vsub": lambda a, b: a - b, "vmin": min, "vmax": max,
        "vabsdiff": lambda a, b: abs(a - b),
    }  # fmt: skip
    ops = {f"{name}.{kind}.{a_kind}.s32": (f, "s32") for name, f in operations.items()}
    for mode, amount in (("clamp", lambda b: min(b, 32)), ("wrap", lambda b: b % 32)):
        ops[f"vshl.{kind}.{a_kind}.u32.{mode}"] = lambda a, b, n=amount: a << n(b), "byte"
        ops[f"vshr.{kind}.{a_kind}.u32.{mode}"] = lambda a, b, n=amount: a >> n(b), "byte"
    for op, (f, b_kind) in ops.items():
        for sat in (False, True):
            fit = clamped if sat else wrapped
            dot = op.rfind(".") if op.startswith("vsh") else len(op)  # .sat stands before the mode
            name = f"{op[:dot]}{'.sat' if sat else ''}{op[dot:]}"
            trial(rng, name, (a_kind, b_kind), kind, lambda a, b, f=f, fit=fit: fit(f(a, b), kind))
            for word, g in SECOND.items():
                trial(rng, f"{name}.{word}", (a_kind, b_kind, kind), kind,
                      lambda a, b, c, f=f, g=g, fit=fit: g(fit(f(a, b), kind), c))  # fmt: skip
    for word, holds in COMPARISONS.items():
        op = f"vset.{a_kind}.s32.{word}"
        trial(rng, op, (a_kind, "s32"), "u32", lambda a, b, h=holds: int(h(a, b)))
        trial(rng, f"{op}.max", (a_kind, "s32", "u32"), "u32",
              lambda a, b, c, h=holds: max(int(h(a, b)), c))  # fmt: skip


@pytest.mark.usefixtures("by_the_text")
@pytest.mark.parametrize("kinds", [("u32", "u32"), ("s32", "u32"), ("u32", "s32"), ("s32", "s32")])
@pytest.mark.parametrize("scale", [0, 7, 15])
def test_multiplied_added_and_scaled(
    rng: np.random.Generator, kinds: tuple[str, str], scale: int
) -> None:
    sign = "s32" if "s32" in kinds else "u32"
    shift = f".shr{scale}" if scale else ""

    def total(a: int, b: int, c: int) -> int:
        return a * b + wrapped(c, sign)

    for result in ("u32", "s32"):
        op, types = f"vmad.{result}.{kinds[0]}.{kinds[1]}", (*kinds, result)
        trial(rng, op + shift, types, result, lambda a, b, c: total(a, b, c) >> scale)
        trial(rng, f"{op}.po{shift}", types, result, lambda a, b, c: total(a, b, c) + 1 >> scale)
        trial(rng, f"{op}.sat{shift}", types, result,
              lambda a, b, c: clamped(total(a, b, c) >> scale, sign))  # fmt: skip
