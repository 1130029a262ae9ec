"""Instructions that compilers seldom write, each beside its definition in the ISA."""

from __future__ import annotations

import numpy as np
import pytest

from .kernels import Array, fault, kernel, run, words


def each(body: str, *inputs: Array, out: Array | None = None) -> Array:
    """Runs for 32 lanes, each with its word of every input in %r10, %r11, ...; result in %r20."""
    loads = "".join(f"add.u64 %d10, %d{i + 1}, %d21; ld.global.b32 %r{10 + i}, [%d10];\n"
                    for i in range(len(inputs)))  # fmt: skip
    out = words(32) if out is None else out
    run(kernel(f"{loads}{body}\nst.global.b32 [%d20], %r20;", 1 + len(inputs)), out, *inputs)
    return out


def nth_set(mask: int, base: int, offset: int) -> int:
    """PTX ISA, "fns"."""
    if offset == 0:
        return base if mask >> base & 1 else 0xFFFFFFFF
    at, step, left = base, 1 if offset > 0 else -1, abs(offset)
    while 0 <= at < 32:
        left -= mask >> at & 1
        if left == 0:
            return at
        at += step
    return 0xFFFFFFFF


def test_fns(rng: np.random.Generator) -> None:
    mask = rng.integers(0, 2**32, 32, np.uint64).astype(np.uint32)
    base = rng.integers(0, 32, 32).astype(np.uint32)
    offset = rng.integers(-6, 7, 32).astype(np.int32)
    found = each("fns.b32 %r20, %r10, %r11, %r12;", mask, base, offset)
    assert found.tolist() == [nth_set(*map(int, x)) for x in zip(mask, base, offset, strict=True)]


def test_mad24_clamped() -> None:
    a = np.full(32, 0x7FFFFF, np.int32)
    c = np.full(32, 0x7FFFFFFF, np.int32)
    found = each("mad24.hi.sat.s32 %r20, %r10, %r10, %r11;", a, c)
    assert (found == 0x7FFFFFFF).all()


@pytest.mark.parametrize("joined", ["and", "or", "xor"])
def test_set_with_a_predicate(joined: str, rng: np.random.Generator) -> None:
    a, b = (rng.integers(-3, 3, 32).astype(np.int32) for _ in range(2))
    body = "setp.lt.u32 %p0, %r0, 16;\n"
    op = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joined]
    held = op(a < b, np.arange(32) < 16)
    found = each(f"{body} set.lt.{joined}.u32.s32 %r20, %r10, %r11, %p0;", a, b)
    assert (found.view(np.int32) == np.where(held, -1, 0)).all()
    found = each(f"{body} set.lt.{joined}.f32.s32 %f0, %r10, %r11, !%p0; mov.b32 %r20, %f0;", a, b)
    assert (found.view(np.float32) == op(a < b, np.arange(32) >= 16)).all()


def test_packed_comparisons_with_a_predicate(rng: np.random.Generator) -> None:
    a, b = (rng.integers(-3, 3, 64).astype(np.float16) for _ in range(2))
    body = """setp.lt.u32 %p0, %r0, 16;
        setp.lt.and.f16x2 %p1|%p2, %r10, %r11, %p0;
        selp.u32 %r20, 1, 0, %p1; selp.u32 %r21, 2, 0, %p2; or.b32 %r20, %r20, %r21;"""
    held = (a < b).reshape(32, 2) & (np.arange(32) < 16)[:, None]
    found = each(body, a.view(np.uint32), b.view(np.uint32))
    assert (found == held @ [1, 2]).all()
    found = each(
        """setp.lt.u32 %p0, %r0, 16;
        set.eq.xor.f16x2.f16x2 %r20, %r10, %r11, %p0;""",
        a.view(np.uint32),
        b.view(np.uint32),
    )
    held = (a == b).reshape(32, 2) ^ (np.arange(32) < 16)[:, None]
    assert (found.view(np.float16).reshape(32, 2) == held).all()


def test_fma_out_of_bounds() -> None:
    a = np.array([1.5, 2, 3, 4] * 16, np.float16)
    a.view(np.uint16)[::4] = 0x7FF7  # what a tensor copy fills with
    found = each("fma.rn.oob.f16x2 %r20, %r10, %r11, %r11;", a.view(np.uint32),
                 np.full(64, 2, np.float16).view(np.uint32))  # fmt: skip
    want = np.where(np.arange(64) % 4 == 0, 0, np.nan_to_num(a.astype(np.float64)) * 2 + 2)
    assert (found.view(np.float16) == want).all()


def test_packed_nibbles() -> None:
    a = np.arange(-16, 16, dtype=np.int32)
    found = each("mov.b32 %r12, 5; cvt.pack.sat.s4.s32.b32 %r20, %r10, %r11, %r12;", a, a[::-1])
    high, low = np.clip(a, -8, 7) & 15, np.clip(a[::-1], -8, 7) & 15
    assert (found == (5 << 8 | high << 4 | low).astype(np.uint32)).all()


def test_sixteen_bytes_with_an_order() -> None:
    body = """setp.eq.u32 %p0, %r1, 0;
        @!%p0 bra READ;
        mov.b64 %d2, 1; mov.b64 %d3, 7; mov.b128 %q0, {%d2, %d3};
        st.release.gpu.global.b128 [%d0], %q0;
        ret;
    READ: ld.acquire.gpu.global.b128 %q1, [%d0];
        mov.b128 {%d4, %d5}, %q1;
        setp.eq.u64 %p1, %d4, 0;
        @%p1 bra READ;
        st.global.u64 [%d1], %d5;"""
    text = kernel(body, 2).replace(".reg .f64", ".reg .b128 %q<2>; .reg .f64")
    flag, out = np.zeros(2, np.uint64), np.zeros(1, np.uint64)
    run(text, flag, out, grid=2, block=1)
    assert flag.tolist() == [1, 7] and out[0] == 7


def test_policies_of_a_range() -> None:
    x = words(32)
    body = """createpolicy.range.global.L2::evict_last.L2::evict_unchanged.b64 %d2, [%d0], 64, 128;
        createpolicy.cvt.L2.b64 %d3, %d2;
        st.global.L2::cache_hint.u32 [%d20], %r0, %d3;"""
    run(kernel(body), x)
    assert (x == np.arange(32)).all()


def test_discarded_bytes_may_not_be_read() -> None:
    text = kernel("""
        setp.ne.u32 %p0, %r0, 0; @%p0 ret;
        discard.global.L2 [%d0+128], 128;
        ld.global.u32 %r4, [%d0+AT];
        st.global.u32 [%d0+256], %r4;""")
    run(text.replace("AT", "124"), words(96))
    found = fault(text.replace("AT", "252"), words(96))
    assert found.kind == "uninitialised" and "offset 252 of p0" in str(found)
