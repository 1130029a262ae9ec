"""Rings of buffers: who signals lets others run, so that too early a write is met."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.runtime import emulator

from .kernels import fault, kernel, line_of, run, words

RING = """
    setp.ge.u32 %p0, %r0, 32;
    @%p0 bra CONSUMER;
    mov.u32 %r10, 0;
PRODUCE:
    {wait_empty}
    and.b32 %r11, %r10, 1;
    mad.lo.u32 %r12, %r11, 128, %r20;
    shl.b32 %r13, %r10, 5;
    add.u32 %r13, %r13, %r0;
    st.shared.u32 [%r12], %r13;
    {signal_full}
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p1, %r10, 4;
    @%p1 bra PRODUCE;
    ret;
CONSUMER:
    mov.u32 %r10, 0;
CONSUME:
    {wait_full}
    and.b32 %r11, %r10, 1;
    mad.lo.u32 %r12, %r11, 128, %r20;
    ld.shared.u32 %r13, [%r12+-128];
    {signal_empty}
    mad.lo.u32 %r14, %r10, 32, %r0;
    mul.wide.u32 %d3, %r14, 4;
    add.u64 %d3, %d0, %d3;
    st.global.u32 [%d3+-128], %r13;
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p1, %r10, 4;
    @%p1 bra CONSUME;"""
NUMBERED = {
    "wait_empty": "setp.lt.u32 %p2, %r10, 2; and.b32 %r15, %r10, 1; add.u32 %r15, %r15, 3;"
    "@!%p2 bar.sync %r15, 64;",
    "signal_full": "and.b32 %r15, %r10, 1; add.u32 %r15, %r15, 1; bar.arrive %r15, 64;",
    "wait_full": "and.b32 %r15, %r10, 1; add.u32 %r15, %r15, 1; bar.sync %r15, 64;",
    "signal_empty": "setp.gt.u32 %p2, %r10, 1; add.u32 %r15, %r15, 2; @!%p2 bar.arrive %r15, 64;",
}
OBJECTS = {
    "wait_empty": "and.b32 %r15, %r10, 1; mad.lo.u32 %r15, %r15, 8, %r21; shr.u32 %r16, %r10, 1;"
    "xor.b32 %r16, %r16, 1;\nE: mbarrier.try_wait.parity.shared.b64 %p2, [%r15+16], %r16;"
    "@!%p2 bra E;",
    "signal_full": "and.b32 %r15, %r10, 1; mad.lo.u32 %r15, %r15, 8, %r21;"
    "mbarrier.arrive.shared.b64 _, [%r15];",
    "wait_full": "and.b32 %r15, %r10, 1; mad.lo.u32 %r15, %r15, 8, %r21; shr.u32 %r16, %r10, 1;"
    "\nF: mbarrier.try_wait.parity.shared.b64 %p2, [%r15], %r16; @!%p2 bra F;",
    "signal_empty": "mbarrier.arrive.shared.b64 _, [%r15+16];",
}
FLAGS = {
    "wait_empty": "\nE: ld.acquire.cta.shared.u32 %r16, [%r21+8]; add.u32 %r16, %r16, 64;"
    "shl.b32 %r15, %r10, 5; setp.gt.u32 %p2, %r16, %r15; @!%p2 bra E;",
    "signal_full": "bar.warp.sync -1; red.release.cta.shared.add.u32 [%r21], 1;",
    "wait_full": "shl.b32 %r15, %r10, 5; add.u32 %r15, %r15, 31;"
    "\nF: ld.acquire.cta.shared.u32 %r16, [%r21]; setp.gt.u32 %p2, %r16, %r15; @!%p2 bra F;",
    "signal_empty": "bar.warp.sync -1; red.release.cta.shared.add.u32 [%r21+8], 1;",
}


@pytest.mark.parametrize("with_", [NUMBERED, OBJECTS, FLAGS], ids=["numbered", "objects", "flags"])
def test_a_ring_of_buffers(with_: dict[str, str]) -> None:
    """Whoever signals lets the other one run, who so meets what is written too early."""
    setup = """
    mov.u32 %r20, s; mad.lo.u32 %r20, %r0, 4, %r20; mov.u32 %r21, b;
    setp.ne.u32 %p3, %r0, 0; @%p3 bra READY;
    """ + (
        "st.shared.u32 [%r21], 0; st.shared.u32 [%r21+8], 0;" if with_ is FLAGS else
        "".join(f"mbarrier.init.shared.b64 [%r21+{8 * i}], 32;" for i in range(4))
    ) + "\nREADY: bar.sync 0;\n"  # fmt: skip
    shared = ".shared .align 8 .b32 s[64]; .shared .align 8 .b64 b[4];"

    def text(**other: str) -> str:
        return kernel(setup + RING.format(**(with_ | other)), shared=shared)

    out = words(128)
    run(text(), out, block=64)
    assert (out == np.arange(128)).all()
    early = text(wait_empty="")
    found = fault(early, out, block=64)
    assert (found.kind, found.line) == ("race", line_of(early, "st.shared.u32 [%r12]"))
    assert fault(text(wait_full=with_["wait_full"].split("\n")[0] if with_ is not NUMBERED else ""),
                 out, block=64).kind == "race"  # fmt: skip


def test_what_is_read_before_another_block_writes_it() -> None:
    """That is the race it is on a GPU, though nothing was written yet."""
    text = kernel(
        """
        setp.ne.u32 %p0, %r1, 0; @%p0 bra READ;
        mov.u32 %r4, 0;
    LATE: nanosleep.u32 20; add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 5; @%p1 bra LATE;
        st.global.u32 [%d1], %r4;
        ret;
    READ: ld.global.u32 %r5, [%d1];
        st.global.u32 [%d20], %r5;""",
        2,
    )
    memory = emulator.uninitialised((1,), np.uint32)
    found = fault(text, words(2), memory, grid=2, block=1)
    assert (found.kind, found.line) == ("race", line_of(text, "st.global.u32 [%d1]"))
    alone = fault(text.replace("st.global.u32 [%d1], %r4;", ""), words(2), memory, grid=2, block=1)
    assert alone.kind == "uninitialised" and alone.instruction.startswith("ld.global")


@pytest.mark.parametrize("signal", [
    "st.release.gpu.global.u32 [%d1], 1;", "red.release.gpu.global.add.u32 [%d1], 1;",
    "membar.gl; red.global.add.u32 [%d1], 1;",
])  # fmt: skip
@pytest.mark.parametrize("want", [0, 1])
def test_who_looks_once_may_come_before_a_release(signal: str, want: int) -> None:
    text = kernel(f"""
        setp.eq.u32 %p0, %r1, 0;
        @%p0 bra LATE;
        st.global.u32 [%d0], 7;
        {signal}
        bra END;
    LATE:
        atom.global.add.u32 %r6, [%d3], 1;
        setp.lt.u32 %p2, %r6, 5;
        @%p2 bra LATE;
    READ:
        ld.acquire.gpu.global.u32 %r4, [%d1];
        setp.lt.u32 %p1, %r4, {want};
        @%p1 bra READ;
        ld.global.u32 %r5, [%d0];
        st.global.u32 [%d2], %r5;
    END:""", 4)
    data, flag, out, late = (words(1) for _ in range(4))
    if want:
        run(text, data, flag, out, late, grid=2, block=1)
        assert out[0] == 7
    else:
        found = fault(text, data, flag, out, late, grid=2, block=1)
        assert found.kind == "race" and "nothing between" in found.message
