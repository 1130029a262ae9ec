"""Lanes of a warp are not ordered by themselves: one that releases speaks for itself alone."""

from __future__ import annotations

import numpy as np
import pytest

from .kernels import fault, kernel, line_of, run, words

SYNC = "bar.warp.sync -1;"
SHUFFLE = "shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;"
FENCE = "fence.acq_rel.gpu;"
MESSAGE = """
    setp.ne.u32 %p0, %r1, 0;
    @%p0 bra READER;
    st.global.u32 [%d20], %r0;
    {between}
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra DONE;
    {last}
    mov.u32 %r5, 1;
    st.relaxed.gpu.global.u32 [%d1], %r5;
    bra DONE;
READER:
    ld.relaxed.gpu.global.u32 %r5, [%d1];
    setp.eq.u32 %p1, %r5, 0;
    @%p1 bra READER;
    fence.acq_rel.gpu;
    xor.b32 %r6, %r0, 31;
    mul.wide.u32 %d3, %r6, 4;
    add.u64 %d3, %d0, %d3;
    ld.global.u32 %r7, [%d3];
    st.global.u32 [%d20], %r7;
DONE:
"""


@pytest.mark.parametrize(
    "between, last",
    [(SYNC, FENCE), (FENCE + SYNC, ""), ("bar.sync 0;", FENCE), (SHUFFLE, FENCE)],
    ids=["sync", "fences and sync", "barrier", "shuffle"],
)
def test_lanes_meet_before_one_releases(between: str, last: str) -> None:
    y = words(64)
    run(kernel(MESSAGE.format(between=between, last=last), 2), y, words(1), grid=2)
    assert (y == np.r_[np.arange(32), 31 - np.arange(32)]).all()


@pytest.mark.parametrize("between, last", [("", FENCE), (FENCE, "")], ids=["one", "every lane"])
def test_a_lane_releases_what_others_may_not_have_written(between: str, last: str) -> None:
    text = kernel(MESSAGE.format(between=between, last=last), 2)
    found = fault(text, words(64), words(1), grid=2)
    assert found.kind == "race"


RING = """
    .shared .align 16 .b8 slot[128];
    .shared .align 8 .b64 empty;
"""
READ_AND_FREE = """
    mov.u32 %r10, slot;
    mov.u32 %r11, empty;
    setp.ne.u32 %p0, %r0, 0;
    @!%p0 mbarrier.init.shared::cta.b64 [%r11], 1;
    and.b32 %r12, %r0, 31;
    shl.b32 %r13, %r12, 2;
    add.u32 %r13, %r10, %r13;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 st.shared.u32 [%r13], %r0;
    bar.sync 0;
    @%p1 bra WRITER;
    xor.b32 %r14, %r13, 4;
    ld.shared.u32 %r15, [%r14];
    {between}
    setp.ne.u32 %p2, %r12, 0;
    @!%p2 mbarrier.arrive.shared::cta.b64 _, [%r11];
    bra DONE;
WRITER:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r11], 0;
    @!%p3 bra WRITER;
    st.shared.u32 [%r13], 77;
DONE:
"""


def test_a_slot_that_all_lanes_have_read_is_freed_by_one() -> None:
    run(kernel(READ_AND_FREE.format(between=SYNC), 1, shared=RING), words(64), block=64)
    found = fault(kernel(READ_AND_FREE.format(between=""), 1, shared=RING), words(64), block=64)
    assert found.kind == "race"
    assert "is written here and was read by" in str(found)


BROUGHT = """
    mov.u32 %r10, slot;
    mov.u32 %r11, empty;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra BEHIND;
    mbarrier.init.shared::cta.b64 [%r11], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%d1], 128, [%r11];
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r11], 0;
    @!%p1 bra AGAIN;
BEHIND:
    {between}
    shl.b32 %r13, %r0, 2;
    add.u32 %r13, %r10, %r13;
    {guard} ld.shared.u32 %r15, [%r13];
    {guard} st.global.u32 [%d20], %r15;
"""


@pytest.mark.parametrize(
    "between, guard",
    [(SYNC, ""), ("bar.sync 0;", ""), (SHUFFLE.replace("10", "16"), ""), ("", "@!%p0")],
)
def test_one_lane_waits_for_all_that_meet_it(between: str, guard: str) -> None:
    y, x = words(32), np.arange(5, 37, dtype=np.uint32)
    run(kernel(BROUGHT.format(between=between, guard=guard), 2, shared=RING), y, x)
    assert (y == (x if between else np.r_[5, np.zeros(31)])).all()


def test_one_lane_waits_for_itself_alone() -> None:
    """The others may read before the copy has come, where nothing brings them together."""
    text = kernel(BROUGHT.format(between="", guard=""), 2, shared=RING)
    found = fault(text, words(32), words(32))
    assert found.kind == "race" and found.thread == (1, 0, 0)
    assert found.line == line_of(text, "ld.shared")


@pytest.mark.parametrize(
    "does",
    [
        "shfl.sync.bfly.b32 %r6, %r0, 1, 31, 0x0000ffff;",
        "vote.sync.ballot.b32 %r6, 1, 0x0000ffff;",
        "match.any.sync.b32 %r6, %r0, 0x0000ffff;",
        "redux.sync.add.u32 %r6, %r0, 0x0000ffff;",
        "bar.warp.sync 0x0000ffff;",
        "mov.b32 %r5, 0x0000ffff; shfl.sync.idx.b32 %r6, %r0, 1, 31, %r5;",
    ],
)
def test_a_lane_that_its_mask_does_not_name(does: str) -> None:
    found = fault(kernel(f"    {does}"), words(32))
    assert found.kind == "barrier" and found.thread == (16, 0, 0)
    assert "lane 16 is not in the mask 0x0000ffff" in str(found)
    half = f"    setp.lt.u32 %p0, %r0, 16; @!%p0 bra OUT; {does}\nOUT:\n    bar.sync 0;"
    run(kernel(half), words(32))


@pytest.mark.parametrize(
    "does",
    [
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [s];",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [s], {%r0};",
        "movmatrix.sync.aligned.m8n8.trans.b16 %r6, %r0;",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%f0, %f1, %f2, %f3}, {%r0, %r1}, {%r2}, {%f0, %f1, %f2, %f3};",
    ],
)
def test_half_a_warp_and_a_matrix(does: str) -> None:
    shared = ".shared .align 16 .b32 s[4];"
    write = "st.shared.v4.u32 [s], {%r2, %r2, %r2, %r2}; bar.sync 0;"
    half = f"    {write} setp.lt.u32 %p0, %r0, 16; @%p0 {does}"
    found = fault(kernel(half, shared=shared), words(32))
    assert found.kind == "barrier" and "16 of its lanes have ended" in str(found)
