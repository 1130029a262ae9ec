"""wmma: fragments of no stated layout, loaded, multiplied and stored."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.ptx.table.wmma import _REGISTERS

from .kernels import fault, kernel, run

DTYPES: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32,
                          "u8": np.uint8, "s8": np.int8, "f32": np.float32,
                          "s32": np.int32}  # fmt: skip
CASES = [(kind, shape) for kind, shapes in _REGISTERS.items() for shape in shapes if kind != "f64"]


def sizes(shape: str) -> tuple[int, int, int]:
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    return int(m), int(n), int(k)


def registers(start: int, count: int, bank: str = "%r") -> str:
    return "{" + ", ".join(f"{bank}{i}" for i in range(start, start + count)) + "}"


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("layouts", ["row.col", "col.row"])
def test_products(rng: np.random.Generator, kind: str, shape: str, layouts: str) -> None:
    m, n, k = sizes(shape)
    na, nb = _REGISTERS[kind][shape]
    result = "s32" if kind in ("u8", "s8") else "f32"
    bank = "%r" if result == "s32" else "%f"
    start = 40 if result == "s32" else 10
    la, lb = layouts.split(".")
    a = rng.integers(0, 5, (m, k)).astype(DTYPES[kind])
    b = rng.integers(0, 5, (k, n)).astype(DTYPES[kind])
    c = rng.integers(-9, 9, (m, n + 4)).astype(DTYPES[result])
    kinds = result if kind == "f16" else f"{kind}.{kind}.{result}"
    text = kernel(
        f"""
        wmma.load.a.sync.aligned.{la}.{shape}.global.{kind} {registers(4, na)}, [%d0], {
            k if la == "row" else m
        };
        wmma.load.b.sync.aligned.{lb}.{shape}.{kind} {registers(20, nb)}, [%d1];
        mov.u32 %r3, {n + 4};
        wmma.load.c.sync.aligned.row.{shape}.global.{result} {
            registers(start, 8, bank)
        }, [%d2], %r3;
        wmma.mma.sync.aligned.{layouts}.{shape}.{result}.{kinds} {registers(start, 8, bank)},
            {registers(4, na)}, {registers(20, nb)}, {registers(start, 8, bank)};
        wmma.store.d.sync.aligned.row.{shape}.global.{result} [%d2], {registers(start, 8, bank)},
            %r3;""",
        3,
    )
    want = c.copy()
    want[:, :n] += (a.astype(np.float64) @ b.astype(np.float64)).astype(DTYPES[result])
    run(text, np.ascontiguousarray(a if la == "row" else a.T),
        np.ascontiguousarray(b if lb == "row" else b.T), c)  # fmt: skip
    assert (c == want).all()


def test_f16_accumulators_through_shared_memory(rng: np.random.Generator) -> None:
    shape = "m16n16k16"
    text = kernel(f"""
        mul.wide.u32 %d4, %r0, 16;
        add.u64 %d5, %d1, %d4;
        ld.global.v4.u32 {registers(4, 4)}, [%d5];
        mov.u32 %r9, s;
        mad.lo.u32 %r8, %r0, 16, %r9;
        st.shared.v4.u32 [%r8], {registers(4, 4)};
        bar.sync 0;
        wmma.load.a.sync.aligned.row.{shape}.shared.f16 {registers(10, 8)}, [s], 16;
        wmma.load.b.sync.aligned.col.{shape}.shared.f16 {registers(20, 8)}, [s], 16;
        mov.b32 %r40, 0; mov.b32 %r41, 0; mov.b32 %r42, 0; mov.b32 %r43, 0;
        wmma.mma.sync.aligned.row.col.{shape}.f16.f16 {registers(40, 4)}, {registers(10, 8)},
            {registers(20, 8)}, {registers(40, 4)};
        wmma.store.d.sync.aligned.row.{shape}.global.f16 [%d0], {registers(40, 4)}, 16;""", 2,
        shared=".shared .align 16 .b8 s[512];")  # fmt: skip
    a, d = rng.integers(-2, 3, (16, 16)).astype(np.float16), np.zeros((16, 16), np.float16)
    run(text, d, a)
    assert (d == a @ a.T).all()
    assert fault(text.replace("bar.sync 0;", ""), d, a).kind == "race"


def test_products_of_doubles(rng: np.random.Generator) -> None:
    text = kernel(
        """
        wmma.load.a.sync.aligned.row.m8n8k4.global.f64 {%g0}, [%d0], 4;
        wmma.load.b.sync.aligned.col.m8n8k4.f64 {%g1}, [%d1];
        mov.u32 %r3, 10;
        wmma.load.c.sync.aligned.row.m8n8k4.global.f64 {%g2, %g3}, [%d2], %r3;
        wmma.mma.sync.aligned.row.col.m8n8k4.rn.f64.f64.f64.f64 {%g2, %g3}, {%g0}, {%g1},
            {%g2, %g3};
        wmma.store.d.sync.aligned.row.m8n8k4.global.f64 [%d2], {%g2, %g3}, %r3;""",
        3,
    )
    a, b, c = (rng.integers(-9, 9, s).astype(np.float64) for s in ((8, 4), (8, 4), (8, 10)))
    want = c.copy()
    want[:, :8] += a @ b.T
    run(text, a, b, c)
    assert (c == want).all()


def packed(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Rows of small elements as bytes, the first element lowest."""
    each = 8 // bits
    parts = (values.astype(np.uint8) & ((1 << bits) - 1)).reshape(len(values), -1, each)
    found = np.zeros(parts.shape[:2], np.uint8)
    for i in range(each):
        found |= parts[:, :, i] << (i * bits)
    return found


@pytest.mark.parametrize(
    ("kind", "shape", "joined"),
    [("u4", "m8n8k32", ""), ("s4", "m8n8k32", ""), ("b1", "m8n8k128", "xor"),
     ("b1", "m8n8k128", "and")],
)  # fmt: skip
@pytest.mark.parametrize("apart", [0, 1])
def test_small_elements(
    rng: np.random.Generator, kind: str, shape: str, joined: str, apart: int
) -> None:
    """`apart`: how many times 16 bytes lie between rows."""
    bits, k = int(kind[1]), sizes(shape)[2]
    low, high = {"u4": (0, 16), "s4": (-8, 8), "b1": (0, 2)}[kind]
    a, b = (rng.integers(low, high, (8, k)) for _ in range(2))
    gap = 16 * apart
    rooms = [np.pad(packed(x, bits), ((0, 0), (0, gap))) for x in (a, b)]
    c = rng.integers(-99, 99, (8, 8)).astype(np.int32)
    pitch = k + gap * 8 // bits
    product = f"wmma.mma.{joined}.popc" if joined else "wmma.mma"
    text = kernel(f"""
        wmma.load.a.sync.aligned.row.{shape}.global.{kind} {{%r4}}, [%d0], {pitch};
        wmma.load.b.sync.aligned.col.{shape}.{kind} {{%r5}}, [%d1], {pitch};
        wmma.load.c.sync.aligned.row.{shape}.s32 {{%r6, %r7}}, [%d2], 8;
        {product}.sync.aligned.row.col.{shape}.s32.{kind}.{kind}.s32 {{%r8, %r9}}, {{%r4}}, {{%r5}},
            {{%r6, %r7}};
        wmma.store.d.sync.aligned.col.{shape}.s32 [%d3], {{%r8, %r9}};""", 4)  # fmt: skip
    want = c + (np.abs(a[:, None] - b[None]).sum(2) if joined == "xor" else a @ b.T)
    got = np.zeros_like(c)
    run(text, *rooms, c, got)
    assert (got.T == want).all()
