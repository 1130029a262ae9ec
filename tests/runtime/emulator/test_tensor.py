"""Matrix instructions against the ISA's pictures of their fragments, and cp.async."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from .kernels import Array, fault, kernel, run, words

SHAPES = [
    # shape, A type, B type, C type, registers of A, B, C
    ("m16n8k8", "f16", "f16", "f32", 2, 1, 4), ("m16n8k16", "f16", "f16", "f32", 4, 2, 4),
    ("m16n8k8", "f16", "f16", "f16", 2, 1, 2), ("m16n8k16", "f16", "f16", "f16", 4, 2, 2),
    ("m16n8k8", "bf16", "bf16", "f32", 2, 1, 4), ("m16n8k16", "bf16", "bf16", "f32", 4, 2, 4),
    ("m16n8k4", "tf32", "tf32", "f32", 2, 1, 4), ("m16n8k8", "tf32", "tf32", "f32", 4, 2, 4),
    ("m16n8k32", "e4m3", "e5m2", "f32", 4, 2, 4), ("m16n8k32", "e5m2", "e4m3", "f32", 4, 2, 4),
    ("m16n8k16", "e4m3", "e5m2", "f32", 2, 1, 4), ("m16n8k16", "e5m2", "e5m2", "f16", 2, 1, 2),
    ("m16n8k32", "e4m3", "e4m3", "f16", 4, 2, 2),
    ("m8n8k16", "u8", "s8", "s32", 1, 1, 2), ("m16n8k16", "s8", "u8", "s32", 2, 1, 4),
    ("m16n8k32", "s8", "s8", "s32", 4, 2, 4), ("m16n8k64", "s4", "u4", "s32", 4, 2, 4),
    ("m8n8k32", "u4", "s4", "s32", 1, 1, 2), ("m16n8k32", "u4", "u4", "s32", 2, 1, 4),
]  # fmt: skip
TYPES: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32,
                         "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
                         "u8": np.uint8, "s8": np.int8, "f32": np.float32,
                         "s32": np.int32}  # fmt: skip
BITS = {"tf32": 32, "f16": 16, "bf16": 16, "e4m3": 8, "e5m2": 8, "u8": 8, "s8": 8, "u4": 4,
        "s4": 4}  # fmt: skip


def sizes(shape: str) -> tuple[int, int, int]:
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


def matrix(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> Array:
    if kind[0] in "us":
        bits = int(kind[1:])
        low = -(1 << bits - 1) if kind[0] == "s" else 0
        return rng.integers(low, low + (1 << bits), shape)
    return rng.integers(-8, 9, shape).astype(np.float64) / 4  # exact in every type


def words_of(values: Array, kind: str) -> Array:
    """A row of elements as 32-bit words, the first element lowest."""
    if kind in ("u4", "s4"):
        nibbles = values.astype(np.int64) & 15
        return (nibbles.reshape(-1, 8) << 4 * np.arange(8)).sum(1).astype(np.uint32)
    return np.ascontiguousarray(values.astype(TYPES[kind])).view(np.uint32)


def fragments(a: Array, b: Array, kinds: tuple[str, str]) -> tuple[Array, Array]:
    """What each lane holds, from the ISA's formulas: groupID = lane >> 2, and lane % 4."""
    (m, k), each = a.shape, 32 // BITS[kinds[0]]
    blocks = k // (4 * each)
    left = np.zeros((32, blocks * m // 8), np.uint32)
    right = np.zeros((32, blocks), np.uint32)
    for lane in range(32):
        group, t = lane >> 2, lane % 4
        at = 0
        for block in range(blocks):
            first = block * 4 * each + t * each
            for row in (group, group + 8)[: m // 8]:
                left[lane, at] = words_of(a[row, first : first + each], kinds[0])[0]
                at += 1
            right[lane, block] = words_of(b[first : first + each, group], kinds[1])[0]
    return left, right


@pytest.mark.parametrize(("shape", "a_kind", "b_kind", "c_kind", "na", "nb", "nc"), SHAPES)
def test_mma(
    rng: np.random.Generator, shape: str, a_kind: str, b_kind: str, c_kind: str, na: int, nb: int,
    nc: int,
) -> None:  # fmt: skip
    m, n, k = sizes(shape)
    a, b = matrix(rng, a_kind, (m, k)), matrix(rng, b_kind, (k, n))
    c = matrix(rng, "s8" if c_kind == "s32" else c_kind, (m, n))
    left, right = fragments(a, b, (a_kind, b_kind))
    group, t = np.arange(32) >> 2, np.arange(32) % 4
    dtype = TYPES[c_kind]
    places = [(group + 8 * (i // 2), 2 * t + i % 2) for i in range(m // 4)]
    acc = np.stack([c[at] for at in places], 1).astype(dtype)
    acc = np.ascontiguousarray(acc).view(np.uint32)
    bank = "%f" if c_kind == "f32" else "%r"

    def load(first: int, count: int, to: str, start: int) -> str:
        return "".join(f"ld.global.b32 {to}{start + i}, [%d2+{4 * (first + i)}];\n"
                       for i in range(count))  # fmt: skip

    def group_of(to: str, start: int, count: int) -> str:
        return "{" + ", ".join(f"{to}{start + i}" for i in range(count)) + "}"

    kinds = f"{c_kind}.{a_kind}.{b_kind}.{c_kind}"
    total = na + nb + nc
    text = kernel(
        f"""
        mad.wide.u32 %d2, %r0, {4 * total}, %d1;
        {load(0, na, "%r", 10)}{load(na, nb, "%r", 20)}{load(na + nb, nc, bank, 30)}
        mma.sync.aligned.{shape}.row.col.{kinds} {group_of(bank, 40, nc)}, {group_of("%r", 10, na)},
            {group_of("%r", 20, nb)}, {group_of(bank, 30, nc)};
        mad.wide.u32 %d3, %r0, {4 * nc}, %d0;
        """
        + "".join(f"st.global.b32 [%d3+{4 * i}], {bank}{40 + i};\n" for i in range(nc)),
        2,
    )
    out = np.zeros((32, nc), np.uint32)
    run(text, out, np.ascontiguousarray(np.concatenate([left, right, acc], 1)))
    want = a.astype(np.float64) @ b.astype(np.float64) + c
    got = np.ascontiguousarray(out).view(dtype)
    for i, at in enumerate(places):
        assert (got[:, i].astype(np.float64) == want[at]).all()


def test_mma_of_f64(rng: np.random.Generator) -> None:
    a, b, c = (rng.integers(-9, 9, s).astype(np.float64) for s in ((8, 4), (4, 8), (8, 8)))
    group, t = np.arange(32) >> 2, np.arange(32) % 4
    data = np.stack([a[group, t], b[t, group], c[group, 2 * t], c[group, 2 * t + 1]], 1)
    text = kernel(
        """
        mad.wide.u32 %d2, %r0, 32, %d1;
        ld.global.v2.f64 {%g0, %g1}, [%d2];
        ld.global.v2.f64 {%g2, %g3}, [%d2+16];
        mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%g4, %g5}, {%g0}, {%g1}, {%g2, %g3};
        mad.wide.u32 %d3, %r0, 16, %d0;
        st.global.v2.f64 [%d3], {%g4, %g5};""",
        2,
    )
    out = np.zeros((32, 2))
    run(text, out, np.ascontiguousarray(data))
    want = a @ b + c
    assert (out[:, 0] == want[group, 2 * t]).all() and (out[:, 1] == want[group, 2 * t + 1]).all()


def test_integer_products_saturate() -> None:
    text = kernel("""
        mov.b32 %r4, 0x7f7f7f7f; mov.b32 %r5, 0x7ffffff0;
        mma.sync.aligned.m16n8k16.row.col.satfinite.s32.s8.s8.s32 {%r6, %r7, %r8, %r9},
            {%r4, %r4}, {%r4}, {%r5, %r5, %r5, %r5};
        mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r10, %r11, %r12, %r13},
            {%r4, %r4}, {%r4}, {%r5, %r5, %r5, %r5};
        sub.u32 %r6, %r6, %r10;
        st.global.u32 [%d20], %r6;""")
    out = words(32)
    run(text, out)
    wrapped = (0x7FFFFFF0 + 16 * 127 * 127) & 0xFFFFFFFF
    assert (out == (0x7FFFFFFF - wrapped) & 0xFFFFFFFF).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_from_and_to_shared_memory(
    rng: np.random.Generator, count: int, trans: str
) -> None:
    names = ", ".join(f"%r{10 + i}" for i in range(count))
    stores = "".join(f"st.global.b32 [%d3+{4 * i}], %r{10 + i};\n" for i in range(count))
    text = kernel(f"""
        mad.wide.u32 %d2, %r0, 16, %d1;
        ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d2];
        mul.lo.u32 %r8, %r0, 16;
        st.shared.v4.u32 [%r8], {{%r4, %r5, %r6, %r7}};
        bar.sync 0;
        and.b32 %r9, %r0, 31;
        and.b32 %r16, %r0, 32;
        xor.b32 %r17, %r9, 1;
        add.u32 %r17, %r17, %r16;
        mul.lo.u32 %r17, %r17, 16;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r17];
        mad.wide.u32 %d3, %r0, {4 * count}, %d0;
        {stores}
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r17], {{{names}}};
        bar.sync 0;
        ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r8];
        st.global.v4.u32 [%d2], {{%r4, %r5, %r6, %r7}};""", 2,
        shared=".shared .align 16 .b8 s[1024];")  # fmt: skip
    data = rng.integers(0, 65536, (2, 4, 8, 8)).astype(np.uint16)
    back, out = data.copy(), np.zeros((2, 32, count), np.uint32)
    run(text, out, back, block=64)
    assert (back == data).all()
    rows = data[:, :, [1, 0, 3, 2, 5, 4, 7, 6]]  # the addresses exchange neighbours
    for j in range(count):
        for lane in range(32):
            row, first = lane // 4, 2 * (lane % 4)
            pair = (
                rows[:, j, first : first + 2, row] if trans else rows[:, j, row, first : first + 2]
            )
            want = pair[:, 0].astype(np.uint32) | pair[:, 1].astype(np.uint32) << 16
            assert (out[:, lane, j] == want).all()


def test_movmatrix(rng: np.random.Generator) -> None:
    text = kernel("""
        ld.global.u32 %r4, [%d20];
        movmatrix.sync.aligned.m8n8.trans.b16 %r5, %r4;
        st.global.u32 [%d20], %r5;""")
    data = rng.integers(0, 65536, (8, 8)).astype(np.uint16)
    got = data.copy()
    run(text, got)
    assert (got == data.T).all()


PIPELINE = """
        mul.lo.u32 %r4, %r0, 16;
        mad.wide.u32 %d2, %r0, 16, %d1;
        cp.async.cg.shared.global [%r4], [%d2], 16;
        cp.async.commit_group;
        cp.async.ca.shared.global [%r4+512], [%d2+512], 8, 4;
        cp.async.ca.shared.global [%r4+520], [%d2+512], 8, 0;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.u32 %r5, [%r4+4];
        cp.async.wait_all;
        ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r4+512];
        bar.sync 0;
        add.u32 %r5, %r5, %r6;
        add.u32 %r5, %r5, %r7;
        add.u32 %r5, %r5, %r8;
        st.global.u32 [%d20], %r5;"""


def test_copies_arrive_where_they_are_waited_for(rng: np.random.Generator) -> None:
    shared = ".shared .align 16 .b8 s[1024];"
    data, out = rng.integers(0, 1000, (64, 4)).astype(np.uint32), words(32)
    run(kernel(PIPELINE, 2, shared=shared), out, data)
    assert (out == data[:32, 1] + data[32:, 0]).all()
    early = PIPELINE.replace("cp.async.wait_group 1;", "cp.async.wait_group 2;")
    assert fault(kernel(early, 2, shared=shared), out, data).kind == "race"
    early = PIPELINE.replace("cp.async.wait_all;", "")
    assert fault(kernel(early, 2, shared=shared), out, data).kind == "race"
    without = kernel(early, 2, shared=shared)
    assert fault(without, out, data, races=False).kind == "uninitialised"
    wide = PIPELINE.replace("[%d2], 16;", "[%d2+1024], 16;")
    assert fault(kernel(wide, 2, shared=shared), out, data).kind == "out-of-bounds"
