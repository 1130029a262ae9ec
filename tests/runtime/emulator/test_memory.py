"""Loads, stores, spaces, addresses, and the faults of memory."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.compiler.ptx import PtxError
from stagefuse.runtime import emulator

from .kernels import HEAD, fault, kernel, line_of, run, words


@pytest.mark.parametrize("kind", ["b8", "u8", "s8", "u16", "s16", "b32", "s64", "f32", "f64"])
@pytest.mark.parametrize("vector", ["", ".v2", ".v4"])
def test_loads_and_stores(rng: np.random.Generator, kind: str, vector: str) -> None:
    count, size = int(vector[2:] or 1), int(kind[1:]) // 8
    if count * size > 16:
        pytest.skip("no such vector")
    bank = {8: "%d1", 4: "%r1", 2: "%h", 1: "%h"}[size]
    bank = {"f32": "%f", "f64": "%g"}.get(kind, bank)
    names = [f"{bank}{i}" for i in range(4, 4 + count)]
    value = f"{{{', '.join(names)}}}" if vector else names[0]
    text = kernel(
        f"""
        mul.wide.u32 %d2, %r3, {size * count};
        add.u64 %d3, %d0, %d2;
        add.u64 %d4, %d1, %d2;
        ld.global{vector}.{kind} {value}, [%d3];
        st.global{vector}.{kind} [%d4], {value};""",
        2,
    )
    data = rng.integers(0, 256, 64 * size * count, dtype=np.uint8)
    out = np.zeros_like(data)
    run(text, data, out, block=64)
    assert (out == data).all()


def test_narrow_values_are_extended() -> None:
    out = np.zeros(4, np.uint64)
    data = np.array([0x80, 0xFF, 0x7F, 0x01], np.uint8)
    text = kernel(
        """
        ld.global.s8 %r4, [%d1+1];
        ld.global.u8 %r5, [%d1+1];
        cvt.u64.u32 %d2, %r4;
        cvt.u64.u32 %d3, %r5;
        st.global.v2.u64 [%d0], {%d2, %d3};
        ld.global.s8 %d4, [%d1];
        st.global.u64 [%d0+16], %d4;
        st.global.u8 [%d0+24], %d4;""",
        2,
    )
    run(text, out, data, block=1)
    assert out.tolist() == [0xFFFFFFFF, 0xFF, 2**64 - 128, 0x80]


def test_shared_memory_of_each_block() -> None:
    text = kernel(
        """
        shl.b32 %r4, %r0, 2;
        mov.u32 %r5, tile;
        add.u32 %r6, %r5, %r4;
        st.shared.u32 [%r6], %r3;
        bar.sync 0;
        sub.u32 %r7, 124, %r4;
        add.u32 %r8, %r5, %r7;
        ld.shared.u32 %r9, [%r8];
        st.global.u32 [%d20], %r9;""",
        shared=".shared .align 4 .b32 tile[32];",
    )
    out = words(128)
    run(text, out, grid=4)
    assert (out == np.arange(128).reshape(4, 32)[:, ::-1].ravel()).all()


def test_dynamic_shared_memory_and_generic_addresses() -> None:
    text = kernel(
        """
        mov.u32 %r4, dynamic;
        mad.lo.u32 %r5, %r0, 4, %r4;
        st.shared.u32 [%r5+4], %r0;
        cvt.u64.u32 %d2, %r5;
        cvta.shared.u64 %d3, %d2;
        ld.u32 %r6, [%d3+4];
        isspacep.shared %p0, %d3;
        isspacep.global %p1, %d3;
        selp.u32 %r7, 1000, 0, %p0;
        add.u32 %r6, %r6, %r7;
        @%p1 mov.u32 %r6, 0;
        cvta.to.global.u64 %d4, %d20;
        st.u32 [%d4], %r6;""",
        before=".extern .shared .align 16 .b8 dynamic[];",
    )
    out = words(32)
    run(text, out, shared_bytes=33 * 4)
    assert (out == np.arange(32) + 1000).all()
    found = fault(text, out, shared_bytes=32 * 4)
    assert (found.kind, found.thread) == ("out-of-bounds", (31, 0, 0))
    assert found.line == line_of(text, "st.shared.u32")


def test_local_memory() -> None:
    text = kernel(
        """
        mov.u64 %d2, depot;
        cvta.local.u64 %d3, %d2;
        st.u32 [%d3+8], %r0;
        st.local.u32 [depot], %r1;
        ld.local.u32 %r4, [%d2+8];
        ld.u32 %r5, [%d3];
        mad.lo.u32 %r6, %r5, 100, %r4;
        st.global.u32 [%d20], %r6;""",
        shared=".local .align 8 .b8 depot[16];",
    )
    out = words(64)
    run(text, out, grid=2)
    assert (out.reshape(2, 32) == np.arange(32) + np.array([[0], [100]])).all()


def test_variables_of_the_module() -> None:
    before = """
.const .align 4 .f32 table[4] = {0f3F800000, 2.0, 3.0, 4.0};
.visible .global .align 4 .u32 counter = 7;
.global .align 8 .u64 pointers[2] = {counter, generic(table)};"""
    text = kernel(
        """
        and.b32 %r4, %r0, 3;
        mul.wide.u32 %d2, %r4, 4;
        mov.u64 %d3, table;
        add.u64 %d4, %d3, %d2;
        ld.const.f32 %f0, [%d4];
        st.global.f32 [%d20], %f0;
        setp.ne.u32 %p0, %r0, 0;
        @%p0 ret;
        ld.global.u64 %d5, [pointers];
        ld.global.u64 %d7, [pointers+8];
        ld.u32 %r5, [%d5];
        ld.f32 %f1, [%d7+4];
        cvt.rzi.u32.f32 %r7, %f1;
        add.u32 %r6, %r5, %r7;
        st.global.u32 [counter], %r6;""",
        before=before,
    )
    module = emulator.load(text)
    out = np.zeros(32, np.float32)
    for expected in (9, 11):
        module.launch("k", grid=1, block=32, args=[out])
        assert module.globals["counter"].tolist() == [expected]
    assert (out == np.tile([1, 2, 3, 4], 8)).all()
    found = fault(kernel("st.global.u32 [%d1], %r0;", 2, before), out, emulator.Pointer(out, 0))
    assert found.kind == "race"  # all lanes write different values to one word


def test_structs_by_value() -> None:
    text = f"""{HEAD}
.visible .entry k(.param .align 8 .b8 s[24], .param .u64 out, .param .u8 small)
{{
    .reg .b32 %r<4>; .reg .b64 %d<8>; .reg .b16 %h<2>; .reg .f64 %g<2>;
    ld.param.u64 %d0, [out];
    ld.param.u32 %r0, [s+4];
    ld.param.f64 %g0, [s+8];
    mov.b64 %d1, s;
    cvta.param.u64 %d2, %d1;
    ld.u64 %d3, [%d2+16];
    ld.param.u64 %d5, [%d1+16];
    ld.param.u8 %h0, [small];
    cvt.u64.u32 %d4, %r0;
    st.global.u64 [%d0], %d4;
    st.global.f64 [%d0+8], %g0;
    st.global.u64 [%d0+16], %d3;
    st.global.u8 [%d0+24], %h0;
    ret;
}}"""
    raw = np.array([(1, 2, 2.5, 99)], "u4,u4,f8,u8").tobytes()
    out = np.zeros(4, np.uint64)
    module = emulator.load(text)
    module.launch("k", grid=1, block=1, args=[raw, out, np.uint8(200)])
    assert out.tolist() == [2, int(np.float64(2.5).view(np.uint64)), 99, 200]
    with pytest.raises(ValueError, match="`s` has 24 bytes, and the argument has 23"):
        module.launch("k", grid=1, block=1, args=[raw[:-1], out, np.uint8(0)])
    with pytest.raises(ValueError, match="3 parameters"):
        module.launch("k", grid=1, block=1, args=[raw, out])


def test_buffers_that_are_not_contiguous_and_pointers_into_them() -> None:
    text = kernel("st.global.u32 [%d20], %r0;")
    whole = words(128)
    run(text, whole[::4])
    assert (whole.reshape(32, 4)[:, 0] == np.arange(32)).all() and not whole[1::4].any()
    run(text, emulator.Pointer(whole, 64))
    assert (whole[16:48] == np.arange(32)).all()
    found = fault(text, emulator.Pointer(whole, 128 * 4 - 64))
    assert (found.kind, found.thread) == ("out-of-bounds", (16, 0, 0))


@pytest.mark.parametrize("below", [4, 0x7F000000])
def test_shared_addresses_below_zero(below: int) -> None:
    body = f"mov.u32 %r4, s; sub.u32 %r4, %r4, {below}; st.shared.u32 [%r4], %r0;"
    found = fault(kernel(f"    {body}", shared=".shared .b32 s[32];"), words(32))
    assert found.kind == "out-of-bounds" and f"at offset -{below} of shared" in str(found)


@pytest.mark.parametrize(
    ("body", "kind", "start"),
    [
        ("ld.global.u32 %r4, [%d20+4];", "out-of-bounds", "ld.global.u32"),
        ("st.global.u32 [%d20+-4], %r0;", "out-of-bounds", "st.global.u32"),
        ("mov.u64 %d2, 0; ld.global.u32 %r4, [%d2];", "out-of-bounds", "mov.u64 %d2"),
        ("add.s64 %d2, %d20, 0x7fffffffff; ld.u32 %r4, [%d2+1];", "out-of-bounds", "add.s64 %d2"),
        ("ld.global.u16 %h0, [%d0+1];", "misaligned", "ld.global.u16"),
        ("ld.global.v2.u32 {%r4, %r5}, [%d0+4];", "misaligned", "ld.global.v2"),
        ("ld.shared.u32 %r4, [s]; st.global.u32 [%d20], %r4;", "uninitialised", "ld.shared"),
        ("ld.shared.u32 %r4, [s+128];", "out-of-bounds", "ld.shared"),
        ("ld.local.u32 %r4, [l+4];", "uninitialised", "ld.local"),
        ("ld.local.u32 %r4, [l+8];", "out-of-bounds", "ld.local"),
        ("trap;", "trap", "trap"),
        ("atom.global.add.u32 %r4, [%d0+128], 1;", "out-of-bounds", "atom"),
        ("atom.shared.add.u32 %r4, [s], 1;", "uninitialised", "atom"),
    ],
)
def test_faults_name_their_place(body: str, kind: str, start: str) -> None:
    arrays = ".shared .align 4 .b32 s[32]; .local .align 4 .b32 l[2];"
    text = '.file 1 "model.cu"'
    text = kernel(f"    .loc 1 77 3\n    {body}", shared=arrays).replace(
        "\n.visible", f"\n{text}\n.visible"
    )
    found = fault(text, words(32))
    assert found.kind == kind
    assert found.line == line_of(text, start)
    assert (found.file, found.source_line) == ("model.cu", 77)
    assert f"{kind}: " in str(found) and "PTX line" in str(found) and "model.cu:77" in str(found)


def test_memory_that_nothing_wrote() -> None:
    text = kernel("ld.global.u32 %r4, [%d20]; add.u32 %r4, %r4, 1; st.global.u32 [%d20], %r4;")
    fresh = emulator.uninitialised(32, np.uint32)
    assert fault(text, fresh).kind == "uninitialised"
    write = kernel("setp.lt.u32 %p0, %r0, 20; @%p0 st.global.u32 [%d20], %r0;")
    run(write, fresh)
    assert (fresh[:20] == np.arange(20)).all()
    found = fault(text, fresh)
    assert (found.kind, found.thread) == ("uninitialised", (20, 0, 0))


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        ("and.b32 %r5, %r4, -256; or.b32 %r6, %r5, %r0; st.u32 [%d2], %r6;", None),
        ("mov.b32 %r5, %r4; st.u32 [%d2+4], %r5; st.u32 [%d2], %r0;", None),
        ("st.u32 [%d2], %r0;", None),
        ("add.u32 %r5, %r4, 1; st.u32 [%d2], %r5;", "uninitialised"),
        ("and.b32 %r5, %r4, 1; setp.eq.u32 %p0, %r5, 0; @%p0 st.u32 [%d2], %r0;", "uninitialised"),
        ("st.global.u32 [%d20], %r4; st.u32 [%d2], %r0;", "uninitialised"),
    ],
)
def test_bits_that_are_put_into_a_word_that_nothing_wrote(does: str, kind: str | None) -> None:
    """As code that is not optimised sets bit-fields of a local struct, and copies its words."""
    text = kernel(
        f"    mov.u64 %d2, l; cvta.local.u64 %d2, %d2; ld.u32 %r4, [%d2]; {does}\n"
        "    ld.u8 %r7, [%d2]; st.global.u32 [%d20], %r7;",
        shared=".local .align 4 .b32 l[2];",
    )
    inferred = text.replace("ld.u32 %r4, [%d2]", "ld.local.u32 %r4, [l]")
    if "%r4" not in does:
        assert fault(inferred, words(32)).kind == "uninitialised"
    for each in (text, inferred) if "%r4" in does else (text,):
        if kind is not None:
            assert fault(each, words(32)).kind == kind
            continue
        out = words(32)
        run(each, out)
        assert (out == np.arange(32)).all()


def test_sixteen_bytes() -> None:
    text = kernel(
        """
        ld.global.b128 %q0, [%d1];
        mov.b128 {%d2, %d3}, %q0;
        mov.b128 %q1, {%d3, %d2};
        st.global.b128 [%d0], %q1;""",
        2,
        shared=".reg .b128 %q<4>;",
    )
    data, out = np.array([5, 6], np.uint64), np.zeros(2, np.uint64)
    run(text, out, data, block=1)
    assert out.tolist() == [6, 5]


def test_moves_of_parts(rng: np.random.Generator) -> None:
    text = kernel("""
        mov.b64 {%r4, %r5}, %d0;
        mov.b32 {%h0, %h1}, 0x00070005;
        mov.b32 %r6, {%h1, %h0};
        mov.b64 %d2, {%h0, %h1, %h0, %h1};
        mov.b64 {%h4, %h5, %h6, %h7}, %d2;
        mov.b64 %d3, {%r4, %r5};
        sub.u64 %d4, %d3, %d0;
        cvt.u32.u64 %r7, %d4;
        add.u32 %r6, %r6, %r7;
        cvt.u32.u16 %r8, %h7;
        mad.lo.u32 %r6, %r8, 1000000, %r6;
        st.global.u32 [%d20], %r6;""")
    out = words(32)
    run(text, out)
    assert (out == 0x00050007 + 7000000).all()


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(PtxError, match="`tex.1d.v4.f32.f32`: textures are not in") as caught:
        emulator.load(kernel("tex.1d.v4.f32.f32 {%f0, %f1, %f2, %f3}, [%d0, {%f0}];"))
    assert caught.value.line == 21


def test_the_record() -> None:
    text = kernel(
        """
        shl.b32 %r4, %r0, 7;
        st.shared.u32 [%r4], %r0;
        ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d0];
        setp.lt.u32 %p0, %r0, 5;
        @%p0 st.global.u32 [%d20], %r5;""",
        shared=".shared .align 4 .b8 s[4096];",
    )
    record = run(text, words(64), grid=2)
    assert record.instructions["st.shared.u32"] == 64
    assert record.bytes["global", "read"] == 64 * 16
    assert record.bytes["global", "written"] == 10 * 4
    assert record.bytes_in("global") == 64 * 16 + 10 * 4
    assert record.bank_conflicts == 2 * 31  # all lanes in one bank
    assert record.lines[line_of(text, "shl.b32")] == 64
    assert record.total == sum(record.instructions.values())


@pytest.mark.parametrize("pick", ["one", "block", "any"])
def test_bank_conflicts(pick: str, rng: np.random.Generator) -> None:
    """Words that all warps, or all blocks, want alike, and words that none does."""
    shape = {"one": (1, 1, 32), "block": (1, 3, 32), "any": (4, 3, 32)}[pick]
    words_of = np.broadcast_to(rng.integers(0, 256, shape), (4, 3, 32)).astype(np.uint32)
    body = """
    ld.global.u32 %r4, [%d20];
    shl.b32 %r4, %r4, 2;
    mov.u32 %r5, s;
    add.u32 %r5, %r5, %r4;
    ld.shared.u32 %r6, [%r5];
    """
    text = kernel(body, shared=".shared .align 4 .b32 s[256];")
    record = run(text, words_of.reshape(-1).copy(), grid=4, block=96, unwritten=False)
    expected = 0
    for warp in words_of.reshape(-1, 32):
        banks = [len({w for w in warp.tolist() if w % 32 == bank}) for bank in range(32)]
        expected += max(banks) - 1
    assert record.bank_conflicts == expected


FOR_PLACES = """
.func store(.reg .b64 a)
{
    .loc 1 7 3
    st.global.u32 [a], 1;
    ret;
}
"""


@pytest.mark.parametrize("body, words_of_it", [
    ("add.u64 %d1, %d1, 8192;", "offset 8192 of p1, which has 4096 bytes"),
    ("sub.u64 %d1, %d0, 8192;", "no memory at 0x1ffffe000, 8192 bytes before p0"),
    ("add.u64 %d1, %d0, 2;", "is no multiple of 4 (offset 2 of p0)"),
])  # fmt: skip
def test_faults_name_the_place_and_its_callers(body: str, words_of_it: str) -> None:
    call = "call store, (%d1);"
    loc = ".loc 1 20 5, function_name $L__name0, inlined_at 1 30 9"
    text = kernel(f"{body}\n{loc}\n{call}", 2, before='.file 1 "k.cu"\n' + FOR_PLACES)
    found = fault(text, words(1024), words(1024))
    assert words_of_it in str(found) and (found.file, found.source_line) == ("k.cu", 7)
    called = f"called at PTX line {line_of(text, call)} (k.cu:20)"
    assert found.callers == (called, "inlined at k.cu:30") and called in str(found)


def test_races_name_the_variable() -> None:
    body = "setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.u32 [s+12], %r0; ld.shared.u32 %r5, [s+12];"
    text = kernel(body, shared=".shared .align 16 .b32 t[4], s[8];")
    assert "offset 28 of shared memory (s + 12) is read here" in str(fault(text, words(32)))


def test_kernels_of_a_module_do_not_share_their_memory() -> None:
    """Shared arrays of other kernels take no room, and names are looked for when loading."""
    one = kernel("st.shared.u32 [s], %r0; ld.shared.u32 %r4, [s+4096];", 1,
                 shared=".shared .align 4 .b32 s[1024];")  # fmt: skip
    many = "".join(
        one[one.index(".visible") :].replace("entry k(", f"entry k{i}(") for i in range(100)
    )
    module = emulator.load(one + many)
    for name in ("k", "k99"):
        with pytest.raises(emulator.Fault) as caught:
            module.launch(name, grid=1, block=1, args=[words(1)])
        assert caught.value.kind == "out-of-bounds"
    with pytest.raises(PtxError, match="`missing` is not declared"):
        emulator.load(kernel("ld.shared.u32 %r4, [missing];"))
    with pytest.raises(PtxError, match="`NOWHERE` is not declared"):
        emulator.load(kernel("bra NOWHERE;"))


def test_whose_shared_memory_an_address_is_in() -> None:
    """`isspacep.shared` is `isspacep.shared::cta` (PTX ISA: "::cta is assumed by default")."""
    text = kernel(
        """
        mov.u64 %d3, s; cvta.shared.u64 %d3, %d3;
        mov.u32 %r5, %cluster_ctarank; xor.b32 %r5, %r5, 1;
        mapa.u64 %d4, %d3, %r5;
        isspacep.shared %p0, %d3; isspacep.shared %p1, %d4;
        isspacep.shared::cta %p2, %d4; isspacep.shared::cluster %p3, %d4;
        selp.u32 %r4, 1, 0, %p0; @%p1 add.u32 %r4, %r4, 10;
        @%p2 add.u32 %r4, %r4, 100; @%p3 add.u32 %r4, %r4, 1000;
        st.global.u32 [%d20], %r4;""",
        shared=".shared .b32 s[4];",
    )
    out = words(64)
    run(text, out, grid=2, cluster=2)
    assert (out == 1001).all()
