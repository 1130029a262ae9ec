"""Races: found where nothing orders two accesses, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from .kernels import fault, kernel, line_of, run, words

TILE = ".shared .align 4 .b32 s[128];"

REDUCTION = """
        mov.u32 %r11, s;
        mad.lo.u32 %r4, %r0, 4, %r11;
        st.shared.u32 [%r4], %r3;
        bar.sync 0;
        mov.u32 %r5, 64;
    TOP:
        setp.ge.u32 %p0, %r0, %r5;
        @%p0 bra NEXT;
        add.u32 %r6, %r0, %r5;
        mad.lo.u32 %r7, %r6, 4, %r11;
        ld.shared.u32 %r8, [%r7];
        ld.shared.u32 %r9, [%r4];
        add.u32 %r9, %r9, %r8;
        st.shared.u32 [%r4], %r9;
    NEXT:
        bar.sync 0;
        shr.u32 %r5, %r5, 1;
        setp.ne.u32 %p1, %r5, 0;
        @%p1 bra TOP;
        setp.ne.u32 %p2, %r0, 0;
        @%p2 ret;
        ld.shared.u32 %r10, [s];
        mul.wide.u32 %d2, %r1, 4;
        add.u64 %d3, %d0, %d2;
        st.global.u32 [%d3], %r10;"""


def test_a_tree_in_shared_memory() -> None:
    text = kernel(REDUCTION, shared=TILE)
    out = words(3)
    run(text, out, grid=3, block=128)
    assert (out == np.arange(384).reshape(3, 128).sum(1)).all()
    first = kernel(REDUCTION.replace("bar.sync 0;", "", 1), shared=TILE)
    found = fault(first, out, grid=3, block=128)
    assert found.kind == "race" and found.line == line_of(first, "ld.shared.u32 %r8")
    inner = kernel(REDUCTION.replace("NEXT:\n        bar.sync 0;", "NEXT:"), shared=TILE)
    assert fault(inner, out, grid=3, block=128).kind == "race"


def test_the_schedule_does_not_matter() -> None:
    """One warp reads what another wrote long before, in the order in which they happen to run."""
    text = kernel(
        """
        setp.lt.u32 %p0, %r0, 32;
        @!%p0 bra READ;
        st.shared.u32 [s+4], 5;
        bra END;
    READ:
        ld.shared.u32 %r4, [s+4];
        st.global.u32 [%d20], %r4;
    END:""",
        shared=TILE,
    )
    assert fault(text, words(64), block=64).kind == "race"
    ordered = text.replace("st.shared.u32 [s+4], 5;", "st.shared.u32 [s+4], 5; bar.arrive 1, 64;")
    ordered = ordered.replace("READ:", "READ: bar.sync 1, 64;")
    run(ordered, words(64), block=64)


def test_who_only_arrives_learns_nothing() -> None:
    """A warp that arrives without waiting does not know what others did before the barrier."""
    text = kernel(
        """
        setp.lt.u32 %p0, %r0, 32;
        @!%p0 bra OTHER;
        bar.arrive 1, 64;
        ld.shared.u32 %r4, [s];
        bra END;
    OTHER:
        setp.ne.u32 %p1, %r0, 32;
        @%p1 bra SKIP;
        st.shared.u32 [s], 1;
    SKIP:
        bar.sync 1, 64;
    END:""",
        shared=TILE,
    )
    assert fault(text, words(64), block=64).kind in ("race", "uninitialised")


def test_blocks_that_write_the_same_place() -> None:
    text = kernel("st.global.u32 [%d0], %r1;")
    assert fault(text, words(1), grid=2, block=1).kind == "race"
    run(kernel("st.global.u32 [%d0], 7;"), words(1), grid=4, block=64)  # the same value
    run(kernel("atom.global.exch.b32 %r4, [%d0], %r1;"), words(1), grid=4, block=64)
    read = kernel("ld.global.u32 %r4, [%d0]; setp.eq.u32 %p0, %r1, 1; "
                  "@%p0 st.global.u32 [%d0], 3;")  # fmt: skip
    assert fault(read, words(1), grid=2, block=1).kind == "race"


def test_atomics_and_plain_accesses_race() -> None:
    text = kernel("setp.eq.u32 %p0, %r1, 0; @%p0 ld.global.u32 %r4, [%d0]; "
                  "@!%p0 red.global.add.u32 [%d0], 1;")  # fmt: skip
    assert fault(text, words(1), grid=2, block=1).kind == "race"
    run(text.replace("ld.global", "ld.relaxed.gpu.global"), words(1), grid=2, block=1)
    run(text.replace("ld.global", "ld.volatile.global"), words(1), grid=2, block=1)


@pytest.mark.parametrize(
    "before, after",
    [
        # its own atomic operation does not hide how a thread made the counter
        ("@%p0 st.shared.u32 [s], 0; @%p0 red.shared.add.u32 [s], 5;",
         "@%p1 red.shared.add.u32 [s], 1;"),
        ("@%p0 st.shared.u32 [s], 0; @%p0 atom.shared.add.u32 %r5, [s], 5;",
         "@%p1 ld.relaxed.cta.shared.u32 %r4, [s];"),
        # nor does it come behind those of others, which it does not look at
        ("@%p1 red.shared.add.u32 [s], 5; @%p0 red.shared.add.u32 [s], 5;",
         "@%p0 ld.shared.u32 %r4, [s];"),
        ("@%p1 red.shared.add.u32 [s], 5; @%p0 atom.shared.add.u32 %r5, [s], 5;",
         "@%p0 st.shared.u32 [s], 9;"),
        ("@%p1 st.relaxed.cta.shared.u32 [s], 5; @%p0 st.relaxed.cta.shared.u32 [s], 4;",
         "@%p0 ld.shared.u32 %r4, [s];"),
        ("red.shared.add.u32 [s], 5;", "@%p1 ld.shared.u32 %r4, [s];"),
    ],
)  # fmt: skip
def test_what_atomic_operations_cover(before: str, after: str) -> None:
    head = "setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r0, 63; setp.eq.u32 %p2, %r0, 7;\n"
    head += "@%p2 st.shared.u32 [s], 0; bar.sync 0;\n"
    run(kernel(f"{head}{before} bar.sync 0; {after}", shared=TILE), words(1), block=64)
    assert fault(kernel(f"{head}{before} {after}", shared=TILE), words(1), block=64).kind == "race"


def test_who_takes_the_last_ticket_comes_behind_the_others() -> None:
    """As it resets a counter that it read: writes to one place have an order."""
    text = kernel("atom.global.add.u32 %r5, [%d0], 1; setp.eq.u32 %p0, %r5, 3;\n"
                  "@%p0 st.global.u32 [%d0], 0;")  # fmt: skip
    out = words(1)
    run(text, out, grid=2, block=2)
    assert out[0] == 0


def test_a_compare_and_swap_may_begin_with_a_plain_read() -> None:
    """As CUDA's programming guide writes atomics that do not exist."""
    text = kernel("""
        ld.global.u32 %r4, [%d0];
    TOP:
        mov.u32 %r5, %r4;
        add.u32 %r6, %r5, 3;
        atom.global.cas.b32 %r4, [%d0], %r5, %r6;
        setp.ne.u32 %p0, %r4, %r5;
        @%p0 bra TOP;""")
    out = words(1)
    run(text, out, grid=3, block=64)
    assert out[0] == 3 * 64 * 3
    other = text.replace("ld.global.u32 %r4, [%d0];", "ld.global.u32 %r4, [%d0]; mov.u64 %d2, %d0;")
    assert fault(other.replace("cas.b32 %r4, [%d0]", "cas.b32 %r4, [%d2]"), words(1), grid=3,
                 block=64).kind == "race"  # fmt: skip
    named = """
        setp.eq.u32 %p1, %r0, 0;
        @%p1 st.shared.u32 [s], 5;
        bar.sync 0;
        mov.u32 %r7, s;
        ld.shared.u32 %r4, [s];
    TOP:
        mov.u32 %r5, %r4;
        add.u32 %r6, %r5, 3;
        atom.shared.cas.b32 %r4, [%r7], %r5, %r6;
        setp.ne.u32 %p0, %r4, %r5;
        @%p0 bra TOP;
        bar.sync 0;
        ld.shared.u32 %r4, [s];
        st.global.u32 [%d20], %r4;"""
    out = words(64)
    run(kernel(named, shared=TILE), out, block=64)
    assert (out == 5 + 64 * 3).all()


def test_bytes_of_a_word_are_apart() -> None:
    text = kernel("cvt.u64.u32 %d2, %r3; add.u64 %d3, %d0, %d2; cvt.u16.u32 %h0, %r0; "
                  "st.global.u8 [%d3], %h0;")  # fmt: skip
    out = np.zeros(256, np.uint8)
    run(text, out, grid=2, block=128)
    assert (out == np.arange(256) % 128).all()
    narrow = text.replace("add.u64 %d3, %d0, %d2;", "shr.u64 %d2, %d2, 1; add.u64 %d3, %d0, %d2;")
    assert fault(narrow, out, grid=2, block=128).kind == "race"


LAST_BLOCK = """
        setp.ne.u32 %p3, %r0, 0;
        mul.wide.u32 %d2, %r1, 4;
        add.u64 %d3, %d0, %d2;
        add.u64 %d3, %d3, 8;
        add.u32 %r4, %r1, 1;
        @!%p3 st.global.u32 [%d3], %r4;
        mov.u32 %r5, 0;
        @%p3 bra MEET;
        membar.gl;
        atom.global.add.u32 %r5, [%d0], 1;
        membar.gl;
    MEET:
        setp.eq.u32 %p0, %r5, 9;
        bar.red.or.pred %p1, 0, %p0;
        @!%p1 ret;
        setp.ge.u32 %p2, %r0, 10;
        @%p2 ret;
        mul.wide.u32 %d4, %r0, 4;
        add.u64 %d5, %d0, %d4;
        ld.global.u32 %r6, [%d5+8];
        red.global.add.u32 [%d0+4], %r6;"""


def test_the_last_block_sums_up() -> None:
    """Fences and a counter: the block that comes last reads what all the others wrote."""
    out = words(12)
    run(kernel(LAST_BLOCK), out, grid=10, block=64)
    assert out[1] == 55
    for planted in (
        LAST_BLOCK.replace("membar.gl;", "", 1),
        LAST_BLOCK.replace("membar.gl;\n    MEET", "MEET"),
    ):
        assert fault(kernel(planted), words(12), grid=10, block=64).kind == "race"


LOOK_BACK = """
        setp.ne.u32 %p0, %r0, 0;
        @%p0 bra MEET;
        mul.wide.u32 %d2, %r1, 8;
        add.u64 %d3, %d1, %d2;
        add.u32 %r4, %r1, 1;
        setp.eq.u32 %p1, %r1, 0;
        mov.u32 %r5, 0;
        @%p1 bra GIVE;
    WAIT:
        ld.acquire.gpu.global.u32 %r6, [%d3+-8];
        setp.eq.u32 %p2, %r6, 0;
        @%p2 bra WAIT;
        ld.global.u32 %r5, [%d3+-4];
    GIVE:
        add.u32 %r5, %r5, %r4;
        st.global.u32 [%d3+4], %r5;
        st.release.gpu.global.u32 [%d3], 1;
        st.shared.u32 [s], %r5;
    MEET:
        bar.sync 0;
        ld.shared.u32 %r7, [s];
        st.global.u32 [%d20], %r7;"""


@pytest.mark.parametrize("block", [32, 64])
def test_look_back(block: int) -> None:
    """A chain through blocks: each waits for the one before, which may be in another batch."""
    grid = 700
    out, state = words(grid * block), np.zeros((grid, 2), np.uint32)
    run(kernel(LOOK_BACK, 2, shared=TILE), out, state, grid=grid, block=block)
    sums = np.cumsum(np.arange(1, grid + 1))
    assert (out.reshape(grid, block) == sums[:, None]).all()
    for planted in (("ld.acquire.gpu", "ld.relaxed.gpu"), ("st.release.gpu", "st.relaxed.gpu")):
        text = kernel(LOOK_BACK.replace(*planted), 2, shared=TILE)
        state[:] = 0
        assert fault(text, out, state, grid=20, block=block).kind == "race"


def test_what_a_block_learns_reaches_its_other_threads() -> None:
    """One thread acquires, a barrier passes it on, and other warps read."""
    body = """
        setp.ne.u32 %p0, %r1, 0;
        @%p0 bra READER;
        st.global.u32 [%d20+4], %r0;
        bar.sync 0;
        setp.ne.u32 %p1, %r0, 0;
        @%p1 ret;
        fence.acq_rel.gpu;
        st.relaxed.gpu.global.u32 [%d0], 1;
        ret;
    READER:
        setp.ne.u32 %p1, %r0, 0;
        @%p1 bra MEET;
    WAIT:
        ld.relaxed.gpu.global.u32 %r4, [%d0];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra WAIT;
        fence.acq_rel.gpu;
    MEET:
        bar.sync 0;
        mul.wide.u32 %d4, %r0, 4;
        add.u64 %d5, %d0, %d4;
        ld.global.u32 %r5, [%d5+4];
        add.u64 %d6, %d1, %d4;
        st.global.u32 [%d6], %r5;"""
    data, out = words(129), words(128)
    run(kernel(body, 2), data, out, grid=2, block=128)
    assert (out == np.arange(128)).all()
    for planted in (
        body.replace("bar.sync 0;", "", 1),
        body.replace("fence.acq_rel.gpu;", "", 1),
        body.replace("fence.acq_rel.gpu;\n    MEET", "MEET"),
    ):
        assert fault(kernel(planted, 2), words(129), out, grid=2, block=128).kind == "race"


def test_a_message_names_both_sides() -> None:
    text = kernel("st.shared.u32 [s], %r1; bar.sync 0; ld.shared.u32 %r4, [s];\n"
                  "setp.eq.u32 %p0, %r0, 40; @%p0 st.shared.u32 [s], 9;", shared=TILE)  # fmt: skip
    found = fault(text, words(1), block=64)
    assert found.kind == "race" and "written here and was" in found.message
    assert found.thread == (40, 0, 0) and "block (0, 0, 0) thread" in found.message
    line = line_of(text, "st.shared.u32 [s], %r1")
    assert found.other_line == line
    assert f"in `ld.shared.u32 %r4, [s];` (PTX line {line})" in found.message


@pytest.mark.left_open
def test_the_search_can_be_left_out() -> None:
    run(kernel("st.global.u32 [%d0], %r1;"), words(1), grid=2, block=1, races=False)
    text = kernel("ld.shared.u32 %r4, [s]; st.global.u32 [%d20], %r4;", shared=TILE)
    assert fault(text, words(32)).kind == "uninitialised"
    run(text, words(32), unwritten=False)


HANDED = """
        setp.ne.u32 %p0, %r1, 0;
        @%p0 bra READER;
        st.global.u32 [%d0+4], 5;
        st.release.gpu.global.u32 [%d0], 1;
        ret;
    READER:
        ld.acquire.gpu.global.u32 %r4, [%d0];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra READER;
        ld.global.u32 %r5, [%d0+4];"""


def test_scopes_that_are_too_small() -> None:
    """What is released for the block, or acquired so, hands nothing over to another block."""
    run(kernel(HANDED), words(2), grid=2, block=1)
    for planted in (("release.gpu", "release.cta"), ("acquire.gpu", "acquire.cta")):
        assert fault(kernel(HANDED.replace(*planted)), words(2), grid=2, block=1).kind == "race"
    fences = HANDED.replace("st.release.gpu", "fence.acq_rel.gpu; st.relaxed.gpu").replace(
        "ld.acquire.gpu.global.u32 %r4, [%d0];",
        "ld.relaxed.gpu.global.u32 %r4, [%d0]; fence.acq_rel.gpu;",
    )
    run(kernel(fences), words(2), grid=2, block=1)
    narrow = fences.replace("fence.acq_rel.gpu", "fence.acq_rel.cta", 1)
    assert fault(kernel(narrow), words(2), grid=2, block=1).kind == "race"
    counter = "atom.cta.global.add.u32 %r4, [%d0], 1;"
    assert fault(kernel(counter), words(1), grid=2, block=32).kind == "race"
    run(kernel(counter), words(1), grid=1, block=64)
    run(kernel(counter.replace("cta", "gpu")), words(1), grid=2, block=32)


RELAYED = """
        mul.wide.u32 %d2, %r0, 4;
        setp.ne.u32 %p0, %r1, 0;
        @%p0 bra READER;
        add.s64 %d3, %d0, %d2;
        st.global.u32 [%d3+4], 5;
        membar.gl;
        bar.sync 0;
        setp.ne.u32 %p1, %r0, 0;
        @%p1 ret;
        atom.global.add.u32 %r4, [%d0], 1;
        ret;
    READER:
        setp.ne.u32 %p1, %r0, 0;
        @%p1 bra MET;
    AGAIN:
        ld.relaxed.gpu.global.u32 %r4, [%d0];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra AGAIN;
    MET:
        bar.sync 0;
        FENCE;
        ld.global.u32 %r5, [%d0+4];"""


def test_fences_behind_a_barrier_complete_what_one_thread_read() -> None:
    """The last block of a reduction: one thread counts, all fence behind the barrier."""
    for fence in ("membar.gl", "fence.sc.gpu"):
        run(kernel(RELAYED.replace("FENCE", fence)), words(65), grid=2, block=64)
    for fence in ("fence.acq_rel.gpu", "membar.cta", "bar.sync 0"):
        text = kernel(RELAYED.replace("FENCE", fence))
        assert fault(text, words(65), grid=2, block=64).kind == "race"


def test_such_fences_order_what_went_on_by_flags() -> None:
    """Block 1 reads the flag of block 0 and sets that of block 2, with no fence of its own."""
    text = kernel("""
        setp.eq.u32 %p0, %r1, 0;
        @%p0 st.global.u32 [%d0+8], 5;
        @%p0 FENCE;
        @%p0 st.volatile.global.u32 [%d0], 1;
        @%p0 ret;
        setp.eq.u32 %p1, %r1, 2;
        @%p1 bra LAST;
    AGAIN:
        ld.volatile.global.u32 %r4, [%d0];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra AGAIN;
        st.volatile.global.u32 [%d0+4], 1;
        ret;
    LAST:
        ld.volatile.global.u32 %r4, [%d0+4];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra LAST;
        FENCE;
        ld.global.u32 %r5, [%d0+8];""")
    run(text.replace("FENCE", "membar.gl"), words(3), grid=3, block=1)
    weak = text.replace("FENCE", "fence.acq_rel.gpu")
    assert fault(weak, words(3), grid=3, block=1).kind == "race"


def test_the_scope_of_a_block_is_enough_inside_it() -> None:
    body = HANDED.replace("%r1, 0", "%r3, 32").replace("setp.ne", "setp.ge").replace(".gpu", ".cta")
    body = "setp.eq.u32 %p5, %r0, 0; setp.eq.u32 %p6, %r0, 32; or.pred %p7, %p5, %p6;\n" + (
        "@!%p7 ret;\n" + body)  # fmt: skip
    run(kernel(body), words(2), block=64)
    assert fault(kernel(body.replace("st.release.cta", "st.relaxed.cta")), words(2),
                 block=64).kind == "race"  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "races"),
    [
        ("0f3F800000", "0f3F800001", False),  # 1 and the next number
        ("0f3F800000", "0f3F900000", True),  # 1 and 1.125
        ("0f3F800000", "0fBF800001", True),  # of another sign
        ("100", "101", True),  # integers, which are no normal floats
    ],
)
def test_lanes_that_store_to_one_place(low: str, high: str, races: bool) -> None:
    """Roundings of one sum may: Triton lets all lanes store what they reduced."""
    body = f"""
        mov.b32 %r4, {low}; mov.b32 %r5, {high};
        and.b32 %r6, %r0, 1;
        setp.eq.u32 %p0, %r6, 0;
        selp.b32 %r7, %r4, %r5, %p0;
        st.shared.b32 [s], %r7;"""
    text = kernel(body, shared=TILE)
    if races:
        assert "different values to one place" in fault(text, words(1)).message
    else:
        run(text, words(1))


IN_STEP = """
    mov.u32 %r7, 0;
    mul.lo.u32 %r4, %r0, 4; mov.u32 %r5, s; add.u32 %r5, %r5, %r4;
    st.volatile.shared.u32 [%r5], %r0;
    bar.warp.sync -1;
    ld.volatile.shared.u32 %r6, [%r5];
    setp.lt.u32 %p0, %r0, 16;
    @%p0 ld.volatile.shared.u32 %r7, [%r5+64];
    @%p0 add.u32 %r6, %r6, %r7;
    bar.warp.sync -1;
    st.volatile.shared.u32 [%r5], %r6;
    bar.warp.sync -1;
    setp.lt.u32 %p0, %r0, 8;
    @%p0 ld.volatile.shared.u32 %r7, [%r5+32];
    st.global.u32 [%d20], %r7;"""


def test_lanes_do_not_run_in_step() -> None:
    """Volatile shared memory handed from lane to lane, as reductions before Volta did."""
    run(kernel(IN_STEP, shared=TILE), words(32))
    first, _, rest = IN_STEP.partition("bar.warp.sync -1;")
    before, _, after = IN_STEP.rpartition("bar.warp.sync -1;")
    for text, lane in ((first + rest, 16), (before + after, 8)):
        found = fault(kernel(text, shared=TILE), words(32))
        assert found.kind == "race"
        assert f"was written by lane {lane} of this warp" in found.message


def test_a_lane_may_wait_for_another_one() -> None:
    body = """
        mov.u32 %r5, s;
        setp.eq.u32 %p0, %r0, 0;
        @%p0 st.volatile.shared.u32 [%r5], 0;
        bar.warp.sync -1;
        setp.eq.u32 %p1, %r0, 7;
        @%p1 bra WRITES;
    WAITS:
        ld.volatile.shared.u32 %r6, [%r5];
        setp.eq.u32 %p0, %r6, 0;
        @%p0 bra WAITS;
        bra DONE;
    WRITES:
        st.volatile.shared.u32 [%r5], 1;
    DONE:"""
    run(kernel(body, shared=TILE), words(1))
