"""Products of doubles, of bits, and of an A of which half is zero, from the ISA's pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from stagefuse.runtime import emulator

from .kernels import Array, kernel, run
from .test_tensor import BITS, matrix, sizes, words_of

LANE = np.arange(32)
GROUP, IN_GROUP = LANE >> 2, LANE % 4


def product(name: str, inputs: Sequence[Array], count: int, tail: str = "") -> Array:
    """What each lane has of D, as words, of an `mma` whose operands are words `[32][registers]`."""
    bits = inputs[0].itemsize * 8
    bank, first = ("%g" if bits == 64 else "%r"), 10 if bits == 32 else 0
    text, groups, at = "", [], first + count
    for number, x in enumerate(inputs):
        address = f"%d{number + 1}"
        text += f"mad.wide.u32 %d10, %r0, {x.shape[1] * x.itemsize}, {address};\n"
        registers = [f"{bank}{at + i}" for i in range(x.shape[1])]
        text += "".join(f"ld.global.b{bits} {r}, [%d10+{i * x.itemsize}];\n"
                        for i, r in enumerate(registers))  # fmt: skip
        groups.append("{" + ", ".join(registers) + "}")
        at += x.shape[1]
    if tail:  # metadata is one register
        groups[-1] = groups[-1][1:-1]
    results = [f"{bank}{first + i}" for i in range(count)]
    text += f"{name} {{{', '.join(results)}}}, {', '.join(groups)}{tail};\n"
    text += f"mad.wide.u32 %d10, %r0, {count * bits // 8}, %d0;\n"
    text += "".join(f"st.global.b{bits} [%d10+{i * bits // 8}], {r};\n"
                    for i, r in enumerate(results))  # fmt: skip
    out = np.zeros((32, count), inputs[0].dtype)
    source = kernel(text, 1 + len(inputs)).replace(".reg .f64 %g<8>", ".reg .f64 %g<32>")
    run(source, out, *inputs)
    return out


def results(c: Array, count: int) -> Array:
    """The elements of C or D that lanes hold, `[32][count]`."""
    rows = [GROUP + 8 * (i // 2) for i in range(count)]
    return np.stack([c[r, 2 * IN_GROUP + i % 2] for i, r in enumerate(rows)], 1)


@pytest.mark.parametrize("shape", ["m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"])
def test_products_of_doubles(shape: str, rng: np.random.Generator) -> None:
    m, n, k = sizes(shape)
    a, b, c = (rng.integers(-9, 9, s).astype(np.float64) for s in ((m, k), (k, n), (m, n)))
    left = [a[GROUP + down, IN_GROUP + step] for step in range(0, k, 4) for down in range(0, m, 8)]
    right = [b[IN_GROUP + step, GROUP] for step in range(0, k, 4)]
    count = m // 4
    found = product(f"mma.sync.aligned.{shape}.row.col.f64.f64.f64.f64",
                    [np.stack(left, 1), np.stack(right, 1), results(c, count)], count)  # fmt: skip
    assert (found == results(a @ b + c, count)).all()


@pytest.mark.parametrize("shape", ["m8n8k128", "m16n8k128", "m16n8k256"])
@pytest.mark.parametrize("joined", ["xor", "and"])
def test_products_of_bits(shape: str, joined: str, rng: np.random.Generator) -> None:
    m, n, k = sizes(shape)
    a, b = (rng.integers(0, 2**32, (side, k // 32), np.uint64).astype(np.uint32) for side in (m, n))
    c = rng.integers(0, 99, (m, n)).astype(np.uint32)
    count = m // 4
    left = [a[GROUP + down, IN_GROUP + step] for step in range(0, k // 32, 4)
            for down in range(0, m, 8)]  # fmt: skip
    right = [b[GROUP, IN_GROUP + step] for step in range(0, k // 32, 4)]
    op = np.bitwise_xor if joined == "xor" else np.bitwise_and
    expected = np.bitwise_count(op(a[:, None], b[None])).sum(2) + c
    found = product(f"mma.sync.aligned.{shape}.row.col.s32.b1.b1.s32.{joined}.popc",
                    [np.stack(left, 1), np.stack(right, 1), results(c, count)], count)  # fmt: skip
    assert (found == results(expected, count)).all()


SPARSE = [  # shape, type, selector, lanes of each four that hold metadata
    ("m16n8k16", "f16", 2, 1), ("m16n8k32", "f16", 1, 2), ("m16n8k32", "bf16", 0, 2),
    ("m16n8k8", "tf32", 3, 1), ("m16n8k16", "tf32", 1, 2),
    ("m16n8k32", "s8", 1, 2), ("m16n8k64", "u8", 0, 4), ("m16n8k64", "e4m3", 0, 4),
    ("m16n8k64", "s4", 0, 2), ("m16n8k128", "u4", 0, 4),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "kind", "selector", "lanes"), SPARSE)
def test_products_of_sparse_matrices(
    shape: str, kind: str, selector: int, lanes: int, rng: np.random.Generator
) -> None:
    m, n, k = sizes(shape)
    bits = BITS[kind]
    each = 32 // bits
    stored, b = matrix(rng, kind, (m, k // 2)), matrix(rng, kind, (k, n))
    unit = 8 if bits == 4 else bits if bits < 32 else 16
    groups = k * bits // unit // 4
    if kind == "tf32":  # one of two elements: both of its halves
        numbers = np.where(rng.integers(0, 2, (m, groups)), 0b1110, 0b0100)
    else:
        pairs = np.array([i | j << 2 for j in range(4) for i in range(j)])
        numbers = pairs[rng.integers(0, 6, (m, groups))]
    a, per = np.zeros((m, k)), unit // bits
    for row in range(m):
        at = 0
        for group in range(groups):
            for index in (numbers[row, group] & 3, numbers[row, group] >> 2):
                units = 4 * group + index
                columns = [units // 2] if kind == "tf32" else range(units * per, units * per + per)
                if kind == "tf32" and index % 2:
                    continue
                for column in columns:
                    a[row, column] = stored[row, at]
                    at += 1
    meta = np.zeros((32, 1), np.uint32)
    per_lane = 4 if unit == 16 else 8  # numbers of one row that a lane has
    for g in range(8):
        for lane in range(lanes):
            word = 0
            if unit == 16:
                for half, row in enumerate((g, g + 8)):
                    for i in range(per_lane):
                        word |= int(numbers[row, 4 * lane + i]) << 16 * half + 4 * i
            else:
                for i in range(per_lane):
                    word |= int(numbers[g + 8 * (lane % 2), 8 * (lane // 2) + i]) << 4 * i
            meta[4 * g + selector * lanes + lane] = word
    words = stored.shape[1] // each, k // each
    left = np.zeros((32, words[0] // 4 * 2), np.uint32)
    right = np.zeros((32, words[1] // 4), np.uint32)
    for lane in LANE:
        for block in range(words[0] // 4):
            first = (4 * block + IN_GROUP[lane]) * each
            for i, row in enumerate((GROUP[lane], GROUP[lane] + 8)):
                left[lane, 2 * block + i] = words_of(stored[row, first : first + each], kind)[0]
        for block in range(words[1] // 4):
            first = (4 * block + IN_GROUP[lane]) * each
            right[lane, block] = words_of(b[first : first + each, GROUP[lane]], kind)[0]
    total = "s32" if kind[0] in "us" else "f32"
    dtype = np.int32 if total == "s32" else np.float32
    c = rng.integers(-9, 9, (m, n)).astype(dtype)
    name = f"mma.sp::ordered_metadata.sync.aligned.{shape}.row.col.{total}.{kind}.{kind}.{total}"
    accumulators = np.ascontiguousarray(results(c, 4)).view(np.uint32)
    found = product(name, [left, right, accumulators, meta], 4, f", {selector}")
    expected = results(a @ b.astype(np.float64) + c, 4)
    assert (found.view(dtype) == expected).all()


@pytest.mark.parametrize(
    ("kind", "shape", "number", "is_right"),
    [("f16", "m16n8k16", 0, False), ("f16", "m16n8k16", 0b0100, True),
     ("tf32", "m16n8k8", 0b1101, False), ("tf32", "m16n8k8", 0b1110, True)],
)  # fmt: skip
@pytest.mark.parametrize("is_zero", [False, True])
def test_metadata_without_a_place(
    kind: str, shape: str, number: int, is_right: bool, is_zero: bool
) -> None:
    half = np.full((32, 2), 0 if is_zero else 0x3F803F80, np.uint32)
    c, meta = np.zeros((32, 4), np.uint32), np.full((32, 1), number * 0x11111111, np.uint32)
    name = f"mma.sp::ordered_metadata.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"
    if is_right or is_zero:
        product(name, [half, half, c, meta], 4, ", 0")
        return
    with pytest.raises(emulator.Fault, match=rf"metadata {number:#06b} for group 0 of row 0"):
        product(name, [half, half, c, meta], 4, ", 0")


@pytest.mark.parametrize("left", ["row", "col"])
@pytest.mark.parametrize("right", ["row", "col"])
@pytest.mark.parametrize(("result", "before"), [("f32", "f32"), ("f32", "f16"), ("f16", "f16")])
def test_four_products_of_a_warp(
    left: str, right: str, result: str, before: str, rng: np.random.Generator
) -> None:
    """`m8n8k4` of f16 as sm_70 has it, element by element from the ISA's formulas."""
    shapes = {"a": (4, 8, 4), "b": (4, 4, 8), "c": (4, 8, 8)}
    a, b, c = (rng.integers(-9, 9, s).astype(np.float64) for s in shapes.values())

    def place(which: str, lane: int, i: int) -> tuple[int, int, int]:
        quad, t, high = lane % 16 // 4, lane % 4, 4 * (lane >= 16)
        if which == "a":
            return (quad, t + high, i) if left == "row" else (quad, i + high, t)
        if which == "b":
            return (quad, t, i + high) if right == "row" else (quad, i, t + high)
        if which == "f16":
            return quad, t + high, i
        return quad, (lane & 1) + (i & 2) + high, (i & 4) + (lane & 2) + (i & 1)

    def words(x: Array, which: str, count: int, dtype: type) -> Array:
        held = [[x[place(which, lane, i)] for i in range(count)] for lane in range(32)]
        return np.array(held, dtype).view(np.uint32)

    dtypes = {"f32": np.float32, "f16": np.float16}
    inputs = [words(a, "a", 4, np.float16), words(b, "b", 4, np.float16),
              words(c, before, 8, dtypes[before])]  # fmt: skip
    expected = words(a @ b + c, result, 8, dtypes[result])
    found = product(f"mma.sync.aligned.m8n8k4.{left}.{right}.{result}.f16.f16.{before}",
                    inputs, expected.shape[1])  # fmt: skip
    assert (found == expected).all()
