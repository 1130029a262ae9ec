"""What the ISA leaves undefined is a fault, and what only looks like it is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .kernels import fault, kernel, line_of, run, words

ROOT = Path(__file__).parents[3]

# registers that nothing wrote


@pytest.mark.parametrize(
    "body, says",
    [
        ("st.global.u32 [%d20], %r9;", "%r9 holds, which is stored"),
        ("add.u32 %r8, %r9, 1; st.global.u32 [%d20], %r8;", "%r8 holds, which is stored"),
        ("mov.b32 %r8, %r9; st.global.u32 [%d20], %r8;", "%r8 holds, which is stored"),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r9, 1; st.global.u32 [%d20], %r9;", "%r9"),
        ("setp.lt.u32 %p1, %r0, 5; @!%p1 bra L; mov.u32 %r9, 1; L: st.global.u32 [%d20], %r9;",
         "%r9"),
        ("mul.wide.u32 %d3, %r9, 4; add.u64 %d3, %d0, %d3; ld.global.u32 %r8, [%d3];",
         "%d3 holds, which is part of an address"),
        ("@%p3 st.global.u32 [%d20], %r0;", "%p3 holds, which decides"),
        ("setp.eq.u32 %p3, %r9, 0; @%p3 bra L; st.global.u32 [%d20], %r0; L:", "decides"),
        ("selp.u32 %r8, %r9, 3, %p4; setp.ne.u32 %p4, %r0, 40;", None),
        ("setp.lt.u32 %p4, %r0, 3; selp.u32 %r8, 3, %r9, %p4; st.global.u32 [%d20], %r8;", "%r8"),
        ("red.global.add.u32 [%d20], %r9;", "%r9 holds, which is stored"),
        ("mov.u32 %r8, 0; setp.lt.u32 %p1, %r0, 5; T: add.u32 %r8, %r8, %r9; mov.u32 %r9, 1; "
         "setp.lt.u32 %p2, %r8, 4; @%p2 bra T;", "decides"),
        ("mov.b64 %d4, {%r8, %r9}; st.global.u64 [%d0], %d4;", "%d4 holds, which is stored"),
    ],
)  # fmt: skip
def test_registers_that_nothing_wrote(body: str, says: str | None) -> None:
    text = kernel(f"    {body}")
    if says is None:
        run(text, words(32))
        return
    found = fault(text, words(32))
    assert found.kind == "uninitialised" and says in str(found)


FIRST = """
from tests.runtime.emulator.kernels import fault, kernel, words
print(fault(kernel("setp.eq.u32 %p3, %r9, 0; @%p3 st.global.u32 [%d20], %r0;"), words(32)))
"""


def test_the_first_launch_of_a_process_sees_them_too() -> None:
    """What instructions mean is loaded before it is asked which of them pass values on."""
    ran = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, cwd=ROOT)
    assert "%p3 holds, which decides" in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    "body, expected",
    [
        ("setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r9, 1; @%p1 st.global.u32 [%d20], %r9;",
         lambda i: i < 5),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r9, 1; selp.u32 %r8, %r9, 7, %p1; "
         "st.global.u32 [%d20], %r8;", lambda i: np.where(i < 5, 1, 7)),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r9, 1; add.u32 %r8, %r9, 2; "
         "@%p1 st.global.u32 [%d20], %r8;", lambda i: 3 * (i < 5)),
        ("setp.lt.u32 %p1, %r0, 5; @!%p1 bra L; mov.u32 %r9, 4; bra M; L: mov.u32 %r9, 5; "
         "M: st.global.u32 [%d20], %r9;", lambda i: np.where(i < 5, 4, 5)),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 mov.u32 %r9, 0; setp.eq.u32 %p2, %r9, 0; "
         "and.pred %p2, %p2, %p1; @%p2 st.global.u32 [%d20], 6;", lambda i: 6 * (i < 5)),
        ("mov.b64 %d4, {%r0, %r9}; cvt.u32.u64 %r8, %d4; st.global.u32 [%d20], %r8;",
         lambda i: i),
        ("shfl.sync.bfly.b32 %r9|%p3, %r0, 1, 31, -1; st.global.u32 [%d20], %r9;",
         lambda i: i ^ 1),
    ],
)  # fmt: skip
def test_what_is_dropped_later_may_be_open(body: str, expected: object) -> None:
    y = words(32)
    run(kernel(f"    {body}"), y)
    assert callable(expected)
    assert (y == expected(np.arange(32))).all()


def test_the_loop_that_writes_a_register_before_it_is_read() -> None:
    body = """
    mov.u32 %r8, 0;
TOP:
    setp.eq.u32 %p1, %r8, 0;
    @%p1 bra FIRST;
    st.global.u32 [%d20], %r9;
FIRST:
    add.u32 %r9, %r8, 5;
    add.u32 %r8, %r8, 1;
    setp.lt.u32 %p2, %r8, 3;
    @%p2 bra TOP;
"""
    y = words(32)
    run(kernel(body), y)
    assert (y == 6).all()


# shared memory that nothing wrote

HALF = """
    mov.u32 %r4, s;
    shl.b32 %r5, %r0, 2;
    add.u32 %r4, %r4, %r5;
    setp.lt.u32 %p1, %r0, 20;
    @%p1 st.shared.u32 [%r4], 3;
    bar.sync 0;
    ld.shared.u32 %r6, [%r4];
"""
S = "    .shared .align 8 .b32 s[64];"


@pytest.mark.parametrize(
    "body, expected",
    [
        ("selp.u32 %r7, %r6, 9, %p1; st.global.u32 [%d20], %r7;", (3, 9)),
        ("@!%p1 mov.u32 %r6, 8; st.global.u32 [%d20], %r6;", (3, 8)),
        ("setp.gt.u32 %p2, %r6, 5; and.pred %p3, %p2, %p1; selp.u32 %r7, 1, 2, %p3; "
         "st.global.u32 [%d20], %r7;", (2, 2)),
        ("not.pred %p2, %p1; setp.gt.u32 %p3, %r6, 2; or.pred %p3, %p2, %p3; "
         "@%p3 st.global.u32 [%d20], 5;", (5, 5)),
        ("ld.shared.v2.u32 {_, %r7}, [s+160]; mov.u32 %r7, 4; st.global.u32 [%d20], %r7;", (4, 4)),
        ("@%p1 bra L; bra END; L: st.global.u32 [%d20], %r6; END:", (3, 0)),
    ],
)  # fmt: skip
def test_a_read_that_is_dropped_is_no_fault(body: str, expected: tuple[int, int]) -> None:
    """As in a merge that reads one element beyond its end, and does not take it."""
    y = words(32)
    run(kernel(HALF + body, shared=S), y)
    assert y.tolist() == [expected[0]] * 20 + [expected[1]] * 12


@pytest.mark.parametrize(
    "body, says",
    [
        ("st.global.u32 [%d20], %r6;", "%r6 is stored"),
        ("add.u32 %r7, %r6, 1; st.shared.u32 [%r4], %r7;", "%r7 is used"),
        ("shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;", "%r6 is used"),
        ("atom.shared.add.u32 %r7, [s], %r6;", "%r6 is used"),
        ("setp.gt.u32 %p2, %r6, 5; or.pred %p3, %p2, %p1; @%p3 bra L; L:", "%p3 decides"),
        ("setp.gt.u32 %p2, %r6, 5; not.pred %p3, %p1; and.pred %p3, %p2, %p3; @%p3 bra L; L:",
         "%p3 decides"),
    ],
)  # fmt: skip
def test_the_fault_of_a_read_is_that_of_the_load(body: str, says: str) -> None:
    text = kernel(f"{HALF}\n    {body}", shared=S)
    found = fault(text, words(32))
    assert found.kind == "uninitialised" and found.line == line_of(text, "ld.shared")
    assert found.thread == (20, 0, 0) and "nothing wrote offset 80 of shared" in str(found)
    assert f"{says} at line {line_of(text, body)}" in str(found)


# mbarriers

INIT = "mbarrier.init.shared::cta.b64 [bar], 1;"
INVAL = "mbarrier.inval.shared::cta.b64 [bar];"
ONE = "setp.ne.u32 %p0, %r0, 0; @%p0 bra DONE;"
INITS = f"mov.u32 %r4, bar; setp.eq.u32 %p0, %r0, 0; @%p0 {INIT} bar.warp.sync 0xffffffff;"
COPY_IN = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
COPY_OUT = "cp.async.bulk.global.shared::cta.bulk_group"
BAR = "    .shared .align 16 .b64 bar; .shared .align 16 .b64 other[2];"


@pytest.mark.parametrize(
    "body, says",
    [
        (f"{ONE} {INIT} {INIT}", "initialised again"),
        (f"mov.u32 %r8, 0; {ONE} T: {INIT} add.u32 %r8, %r8, 1; setp.lt.u32 %p1, %r8, 2; "
         "@%p1 bra T;", "initialised again"),
        (INIT, "initialised again"),  # by all lanes
        (f"{ONE} {INIT} ld.shared.b64 %d3, [bar];", "is an mbarrier"),
        (f"{ONE} {INIT} mov.u32 %r4, bar; st.shared.b32 [%r4+4], %r0;", "offset 0x4 of shared"),
        (f"{ONE} {INIT} atom.shared.add.u32 %r4, [bar], 1;", "offset 0x0 of shared"),
        (f"{ONE} {INIT} cp.async.ca.shared.global [bar], [%d0], 8;", "is an mbarrier"),
        (f"{ONE} {INIT} {COPY_IN} [bar], [%d0], 16, [bar];", "is an mbarrier"),
        (f"{ONE} {INIT} {COPY_OUT} [%d0], [bar], 16;", "is an mbarrier"),
        (f"{INITS} stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {{%r0}};", "is an mbarrier"),
        (f"{ONE} {INIT} {INVAL} {INIT} {INVAL} st.shared.b32 [bar], %r0;", None),
        (f"{ONE} st.shared.b64 [bar], 0; {INIT}", None),
    ],
)  # fmt: skip
def test_mbarriers_are_left_alone_until_they_are_invalidated(body: str, says: str | None) -> None:
    text = kernel(f"    {body}\nDONE:", shared=BAR)
    if says is None:
        run(text, words(32))
        return
    found = fault(text, words(32))
    assert found.kind == "barrier" and says in str(found)


def test_blocks_initialise_mbarriers_each_for_itself() -> None:
    run(kernel(f"    {ONE} {INIT}\nDONE:", shared=BAR), words(64), grid=64)


# data that no thread writes


@pytest.mark.parametrize("between", ["", "bar.sync 0;", "membar.gl;"])
def test_reads_through_the_cache_that_is_not_coherent(between: str) -> None:
    text = kernel(f"    st.global.u32 [%d20], %r0; {between} ld.global.nc.u32 %r5, [%d20];")
    found = fault(text, words(32))
    assert found.kind == "race" and "`ld.global.nc`" in str(found)
    assert found.line == line_of(text, "st.global")
    run(text.replace(".nc", ""), words(32))


def test_other_parts_of_an_array_may_be_written() -> None:
    y = np.arange(64, dtype=np.uint32)
    run(kernel("    ld.global.nc.u32 %r5, [%d20+128]; st.global.u32 [%d20], %r5;"), y)
    assert (y[:32] == np.arange(32, 64)).all()
    run(kernel("    ld.global.nc.u32 %r5, [%d20]; st.global.u32 [%d20], %r5;"), y)  # written later


# setmaxnreg


def test_warps_of_a_warpgroup_ask_for_the_same_registers() -> None:
    text = kernel("""
    setp.lt.u32 %p0, %r0, 32;
    @%p0 bra OTHER;
    setmaxnreg.dec.sync.aligned.u32 64;
    bra DONE;
OTHER:
    setmaxnreg.dec.sync.aligned.u32 72;
DONE:""")
    found = fault(text, words(128), block=128)
    assert found.kind == "barrier" and "warpgroup" in str(found)
    run(text.replace("72", "64").replace("%p0, %r0, 32", "%p0, %r0, 500"), words(128), block=128)
