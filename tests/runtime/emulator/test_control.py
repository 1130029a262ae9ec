"""Branches, divergence, calls, barriers, and launches that never end."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.compiler.ptx import PtxError
from stagefuse.runtime import emulator

from .kernels import HEAD, REGISTERS, fault, kernel, line_of, run, words


def test_divergence_meets_again() -> None:
    text = kernel("""
        mov.u32 %r4, 0;
        and.b32 %r5, %r0, 3;
        setp.lt.u32 %p0, %r5, 2;
        @%p0 bra LOW;
        setp.eq.u32 %p1, %r5, 2;
        @%p1 bra TWO;
        mov.u32 %r4, 30;
        bra JOIN;
    TWO:
        mov.u32 %r4, 20;
        bra JOIN;
    LOW:
        mov.u32 %r4, 10;
    JOIN:
        activemask.b32 %r6;
        popc.b32 %r7, %r6;
        add.u32 %r4, %r4, %r7;
        st.global.u32 [%d20], %r4;""")
    out = words(256)
    record = run(text, out, grid=2, block=128)
    assert (out == np.array([10, 10, 20, 30])[np.arange(256) % 4] + 32).all()
    assert record.instructions["activemask.b32"] == 256


def test_loops_of_different_lengths() -> None:
    text = kernel("""
        mov.u32 %r4, 0; mov.u32 %r5, 0;
    TOP:
        setp.gt.u32 %p0, %r5, %r0;
        @%p0 bra OUT;
        add.u32 %r4, %r4, %r5;
        add.u32 %r5, %r5, 1;
        bra TOP;
    OUT:
        st.global.u32 [%d20], %r4;""")
    out = words(64)
    run(text, out, block=64)
    i = np.arange(64)
    assert (out == i * (i + 1) // 2).all()


def test_jump_tables() -> None:
    text = kernel("""
        and.b32 %r4, %r0, 3;
        mov.u32 %r5, 7;
    TABLE: .branchtargets A, B, C, A;
        brx.idx %r4, TABLE;
    A:  mov.u32 %r5, 1; bra END;
    B:  mov.u32 %r5, 2; bra END;
    C:  mov.u32 %r5, 3;
    END:
        st.global.u32 [%d20], %r5;""")
    out = words(32)
    run(text, out)
    assert (out == np.array([1, 2, 3, 1])[np.arange(32) % 4]).all()


FUNCTIONS = f"""
.func (.param .b32 result) triple(.param .b32 x)
{{
    .reg .b32 %r<4>; .reg .pred %p<2>;
    ld.param.b32 %r0, [x];
    setp.gt.u32 %p0, %r0, 20;
    @%p0 bra BIG;
    mul.lo.u32 %r1, %r0, 3;
    st.param.b32 [result], %r1;
    ret;
BIG:
    add.u32 %r1, %r0, 5000;
    st.param.b32 [result], %r1;
    ret;
}}
.func (.reg .b32 out) twice(.reg .b32 x)
{{
{REGISTERS}
    .param .b32 p; .param .b32 q;
    st.param.b32 [p], x;
    call (q), triple, (p);
    ld.param.b32 %r1, [q];
    add.u32 out, %r1, %r1;
    ret;
}}
"""


def test_calls() -> None:
    text = kernel(
        """
        setp.eq.u32 %p0, %r0, 7;
        mov.u32 %r5, 1;
        @%p0 bra SKIP;
        {
        .reg .b32 t;
        call (t), twice, (%r0);
        mov.b32 %r5, t;
        }
    SKIP:
        {
        .param .b32 a; .param .b32 b;
        st.param.b32 [a], 9;
        mov.u64 %d3, triple;
    PROTO: .callprototype (.param .b32 _) _ (.param .b32 _);
        call (b), %d3, (a), PROTO;
        ld.param.b32 %r6, [b];
        }
        mad.lo.u32 %r5, %r6, 100000, %r5;
        st.global.u32 [%d20], %r5;""",
        before=FUNCTIONS,
    )
    out = words(32)
    run(text, out)
    i = np.arange(32)
    want = np.where(i == 7, 1, np.where(i > 20, 2 * (i + 5000), 6 * i))
    assert (out == want + 2700000).all()


def test_printf_and_assertions() -> None:
    before = """
.extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);
.extern .func __assertfail (.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d,
                            .param .b64 e);
.global .align 1 .b8 format[] = {105, 61, 37, 100, 32, 120, 61, 37, 46, 50, 102, 10, 0};"""
    text = kernel(
        """
        mov.u64 %d2, local; cvta.local.u64 %d3, %d2;
        st.local.u32 [%d2], %r0;
        cvt.rn.f64.u32 %g0, %r0;
        st.local.f64 [%d2+8], %g0;
        mov.u64 %d4, format; cvta.global.u64 %d5, %d4;
        {
        .param .b64 a; .param .b64 b; .param .b32 r;
        st.param.b64 [a], %d5;
        st.param.b64 [b], %d3;
        call.uni (r), vprintf, (a, b);
        ld.param.b32 %r5, [r];
        }""",
        before=before,
        shared=".local .align 8 .b8 local[16];",
    )
    record = run(text, words(3), block=3)
    assert record.printed == ("i=0 x=0.00\n", "i=1 x=1.00\n", "i=2 x=2.00\n")
    printing = "call.uni (r), vprintf, (a, b);"
    failing = text.replace("ld.param.b32 %r5, [r];", "").replace(
        printing, "st.param.b32 [r], 7; call.uni __assertfail, (a, a, r, a, a);")  # fmt: skip
    found = fault(failing, words(3), block=3)
    assert found.kind == "trap" and "assertion `i=%d" in found.message


def test_threads_of_a_warp_hand_over_through_memory() -> None:
    """A spin loop in one lane waits for another lane of its own warp."""
    text = kernel("""
        setp.eq.u32 %p0, %r0, 0;
        @%p0 bra WAIT;
        setp.ne.u32 %p1, %r0, 31;
        @%p1 bra END;
        st.global.u32 [%d0+8], 55;
        st.release.gpu.global.u32 [%d0], 1;
        bra END;
    WAIT:
        ld.acquire.gpu.global.u32 %r4, [%d0];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra WAIT;
        ld.global.u32 %r5, [%d0+8];
        st.global.u32 [%d0+4], %r5;
    END:""")
    out = words(4)
    run(text, out)
    assert out.tolist() == [1, 55, 55, 0]


def test_blocks_wait_for_later_ones() -> None:
    """A barrier of the whole grid, with more blocks than run together at first."""
    text = kernel(
        """
        setp.ne.u32 %p0, %r0, 0;
        @%p0 bra DONE;
        atom.acq_rel.gpu.global.add.u32 %r4, [%d0], 1;
        mov.u32 %r5, %nctaid.x;
    WAIT:
        ld.acquire.gpu.global.u32 %r6, [%d0];
        setp.lt.u32 %p1, %r6, %r5;
        @%p1 bra WAIT;
    DONE:
        bar.sync 0;
        ld.relaxed.gpu.global.u32 %r7, [%d0];
        mul.wide.u32 %d2, %r3, 4;
        add.u64 %d3, %d1, %d2;
        st.global.u32 [%d3], %r7;""",
        2,
    )
    count, out = words(1), words(64 * 600)
    run(text, count, out, grid=600, block=64)
    assert (out == 600).all()


def test_locks() -> None:
    text = kernel("""
    TOP:
        atom.acquire.gpu.global.cas.b32 %r4, [%d0], 0, 1;
        setp.ne.u32 %p0, %r4, 0;
        @%p0 bra TOP;
        ld.global.u32 %r5, [%d0+4];
        add.u32 %r5, %r5, 1;
        st.global.u32 [%d0+4], %r5;
        atom.release.gpu.global.exch.b32 %r4, [%d0], 0;""")
    out = words(2)
    run(text, out, grid=3, block=40)
    assert out.tolist() == [0, 120]


def test_warps_with_different_tasks() -> None:
    """A producer and a consumer warp hand buffers over through named barriers."""
    text = kernel(
        """
        mov.u32 %r4, 0;
        shl.b32 %r10, %r0, 2;
        setp.ge.u32 %p0, %r0, 32;
        @%p0 bra CONSUMER;
    PRODUCER:
        mad.lo.u32 %r5, %r4, 100, %r0;
        st.shared.u32 [%r10], %r5;
        bar.arrive 1, 64;
        bar.sync 2, 64;
        add.u32 %r4, %r4, 1;
        setp.lt.u32 %p1, %r4, 5;
        @%p1 bra PRODUCER;
        bra END;
    CONSUMER:
        mov.u32 %r7, 0;
    AGAIN:
        bar.sync 1, 64;
        ld.shared.u32 %r6, [%r10+-128];
        add.u32 %r7, %r7, %r6;
        bar.arrive 2, 64;
        add.u32 %r4, %r4, 1;
        setp.lt.u32 %p1, %r4, 5;
        @%p1 bra AGAIN;
        st.global.u32 [%d20], %r7;
    END:""",
        shared=".shared .align 4 .b32 s[32];",
    )
    out = words(128)
    run(text, out, grid=2, block=64)
    assert (out.reshape(2, 64)[:, 32:] == 1000 + 5 * np.arange(32)).all()
    assert fault(text.replace("bar.arrive 2, 64;\n        add", "add"), out, block=64).kind in (
        "deadlock", "race")  # fmt: skip
    assert fault(text.replace("bar.sync 2, 64;", ""), out, block=64).kind in (
        "deadlock", "race")  # fmt: skip


def test_barriers_that_count() -> None:
    text = kernel("""
        setp.lt.u32 %p0, %r0, 20;
        barrier.red.popc.u32 %r4, 0, %p0;
        setp.lt.u32 %p1, %r0, 1000;
        barrier.red.and.pred %p2, 0, %p1;
        bar.red.or.pred %p3, 1, !%p1;
        selp.u32 %r5, 100, 0, %p2;
        selp.u32 %r6, 1000, 0, %p3;
        add.u32 %r4, %r4, %r5;
        add.u32 %r4, %r4, %r6;
        st.global.u32 [%d20], %r4;""")
    out = words(128)
    run(text, out, grid=2, block=64)
    assert (out == 120).all()


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ("setp.lt.u32 %p0, %r0, 16; @!%p0 bra B;\nbar.sync 0;\nB: mov.u32 %r4, 0;", "barrier",
         "16 came and 48 went on behind the barrier and ended"),
        ("mov.u32 %r4, %r0;\nTOP: bar.sync 0; add.u32 %r4, %r4, 16; setp.lt.u32 %p0, %r4, 128;"
         "@%p0 bra TOP; st.global.u32 [%d20], %r4;", "barrier",
         "48 came and 16 went on behind the barrier and ended"),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bra A; bar.sync 0; bra B;\nA: bar.sync 0;\nB:",
         "barrier", "of the warp do not reach"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 exit; bar.sync 0, 64;", "deadlock", "and 32 came"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bra A; call f, ();\nA: mov.u32 %r4, 0;", "barrier",
         "32 went on behind the barrier and ended"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bra A; bar.sync 1; bra B;\nA: bar.sync 2;\nB:",
         "deadlock", "barrier 1 waits for 64 threads, and 32 came"),
        ("bar.sync 0, 33;", "barrier", "no number of warps"),
        ("bar.sync 16;", "barrier", "no barrier 16"),
        ("TOP: ld.volatile.global.u32 %r4, [%d0]; setp.eq.u32 %p0, %r4, 0; @%p0 bra TOP;",
         "deadlock", "never happens"),
    ],
)  # fmt: skip
def test_what_never_ends(body: str, kind: str, says: str) -> None:
    text = kernel(body, before=".func f()\n{\n    bar.sync 0;\n    ret;\n}")
    found = fault(text, words(64), block=64)
    assert found.kind == kind and says in found.message, found


def test_lanes_that_never_come() -> None:
    text = kernel("""
        setp.lt.u32 %p0, %r0, 8;
        @%p0 bra A;
        shfl.sync.idx.b32 %r4, %r0, 0, 31, -1;
        bra B;
    A:  bar.sync 1, 64;
    B:""")
    found = fault(text, words(64), block=64)
    assert found.kind == "deadlock"
    assert found.line == line_of(text, "shfl")


def test_launches_that_make_no_sense() -> None:
    module = emulator.load(kernel("", 0).replace("{", ".reqntid 64, 1, 1\n{", 1))
    for wrong in ({"block": 32}, {"block": 64, "grid": 0}, {"block": (64, 1, 1, 1)}):
        with pytest.raises(ValueError):
            module.launch("k", **{"grid": 1, **wrong}, args=[])
    with pytest.raises(ValueError, match="no kernel `j`; there is k"):
        module.launch("j", grid=1, block=64, args=[])


@pytest.mark.left_open  # %warpid, where a warp happens to be (PTX ISA, special registers)
def test_the_grid_and_special_registers() -> None:
    names = ["tid.x", "tid.y", "tid.z", "ctaid.x", "ctaid.y", "ctaid.z", "ntid.x", "nctaid.y",
             "laneid", "warpid", "lanemask_lt", "lanemask_ge", "nwarpid"]  # fmt: skip
    body = "".join(f"mov.u32 %r4, %{n}; st.global.u32 [%d3+{4 * i}], %r4;\n"
                   for i, n in enumerate(names))  # fmt: skip
    text = f"""{HEAD}
.visible .entry k(.param .u64 p)
{{
{REGISTERS}
    ld.param.u64 %d0, [p];
    mov.u32 %r10, %ctaid.z; mov.u32 %r11, %ctaid.y; mov.u32 %r12, %ctaid.x;
    mad.lo.u32 %r13, %r10, 2, %r11; mad.lo.u32 %r13, %r13, 3, %r12;
    mov.u32 %r10, %tid.z; mov.u32 %r11, %tid.y; mov.u32 %r12, %tid.x;
    mad.lo.u32 %r14, %r10, 2, %r11; mad.lo.u32 %r14, %r14, 10, %r12;
    mad.lo.u32 %r15, %r13, 60, %r14;
    mul.wide.u32 %d2, %r15, {4 * len(names)};
    add.u64 %d3, %d0, %d2;
    {body}
    ret;
}}"""
    out = np.zeros((4, 2, 3, 3, 2, 10, len(names)), np.uint32)
    run(text, out, grid=(3, 2, 4), block=(10, 2, 3))
    cz, cy, cx, tz, ty, tx = np.indices(out.shape[:-1])
    linear = tx + 10 * (ty + 2 * tz)
    lane = linear % 32
    want = [tx, ty, tz, cx, cy, cz, 10, 2, lane, None, (1 << lane) - 1,
            (0xFFFFFFFF << lane) & 0xFFFFFFFF, 64]  # fmt: skip
    for i, expected in enumerate(want):
        assert expected is None or (out[..., i] == expected).all(), names[i]
    assert (out[..., names.index("warpid")] < 64).all()


def test_recursion_with_memory_of_each_call() -> None:
    before = f"""
.func (.param .b32 result) down(.param .b32 x)
{{
{REGISTERS}
    .local .align 4 .b32 mine[2];
    .param .b32 p; .param .b32 q;
    ld.param.b32 %r0, [x];
    mov.u32 %r2, 1;
    setp.eq.u32 %p0, %r0, 0;
    @%p0 bra END;
    st.local.u32 [mine+4], %r0;
    sub.u32 %r1, %r0, 1;
    st.param.b32 [p], %r1;
    call (q), down, (p);
    ld.param.b32 %r2, [q];
    ld.local.u32 %r3, [mine+4];
    mul.lo.u32 %r2, %r2, %r3;
END:
    st.param.b32 [result], %r2;
    ret;
}}
"""
    text = kernel(
        """
        .param .b32 a; .param .b32 b;
        and.b32 %r4, %r0, 7;
        st.param.b32 [a], %r4;
        call (b), down, (a);
        ld.param.b32 %r5, [b];
        st.global.u32 [%d20], %r5;""",
        before=before,
    )
    out = words(32)
    run(text, out)
    assert (out == np.array([1, 1, 2, 6, 24, 120, 720, 5040])[np.arange(32) % 8]).all()
    endless = text.replace("setp.eq.u32 %p0, %r0, 0;", "setp.eq.u32 %p0, %r0, 1000000;")
    assert "nested more than 64 deep" in fault(endless, out).message


def test_a_long_loop_over_volatile_memory_is_no_deadlock() -> None:
    text = kernel(
        """
        mov.u32 %r4, 0; mov.u32 %r5, 0;
        mov.u64 %d2, %d1;
    TOP:
        ld.volatile.global.u32 %r6, [%d2];
        add.u32 %r4, %r4, %r6;
        add.u64 %d2, %d2, 4;
        add.u32 %r5, %r5, 1;
        setp.lt.u32 %p0, %r5, 12000;
        @%p0 bra TOP;
        st.global.u32 [%d20], %r4;""",
        2,
    )
    out = words(32)
    run(text, out, np.arange(12000, dtype=np.uint32))
    assert (out == 12000 * 11999 // 2).all()


def test_a_loop_in_which_nothing_changes_is_a_deadlock() -> None:
    for body in ("L: bra L;", "L: ld.global.u32 %r4, [%d0]; setp.eq.u32 %p0, %r4, 0; @%p0 bra L;"):
        found = fault(kernel(body), words(1))
        assert found.kind == "deadlock" and "32 at line" in found.message


def test_a_deadlock_says_where_threads_stand() -> None:
    text = kernel("""
        setp.lt.u32 %p0, %r0, 32;
        @%p0 bra ONE;
        barrier.sync 1, 64;
        bra END;
    ONE:
        barrier.sync 2, 64;
    END:""")
    found = fault(text, words(1), block=64)
    assert found.kind == "deadlock"
    for number, thread in ((1, 32), (2, 0)):
        line = line_of(text, f"barrier.sync {number}")
        where = f"32 at line {line} `barrier.sync {number}, 64;` (block (0, 0, 0) thread ({thread}"
        why = f"barrier {number} waits for 64 threads, and 32 came"
        assert where in found.message and why in found.message


def test_a_launch_that_takes_too_long() -> None:
    text = kernel(
        """
        mov.u32 %r4, 0;
    L:  add.u32 %r4, %r4, 1;
        setp.lt.u32 %p0, %r4, 4000000000;
        @%p0 bra L;"""
    )
    with pytest.raises(TimeoutError, match=r"k has not ended: 32 at line \d+ "):
        run(text, words(1), time_limit=0.2)


def test_a_target_beyond_hopper_is_refused() -> None:
    with pytest.raises(PtxError, match="sm_100a, and the emulator knows GPUs up to sm_90a"):
        emulator.load(kernel("").replace("sm_90a", "sm_100a"))


def test_who_comes_to_the_end_of_a_function_returns() -> None:
    text = f"""{HEAD}
.func (.param .b32 r) one(.param .b32 a)
{{
    .reg .b32 %x;
    .reg .pred %p;
    ld.param.b32 %x, [a];
    setp.gt.u32 %p, %x, 5;
    add.u32 %x, %x, 1;
    st.param.b32 [r], %x;
    @%p bra END;
    st.param.b32 [r], 9;
END:
}}
.visible .entry k(.param .u64 p)
{{
    .reg .b32 %r<3>;
    .reg .b64 %d<3>;
    ld.param.u64 %d0, [p];
    mov.u32 %r0, %tid.x;
    {{
        .param .b32 a, r;
        st.param.b32 [a], %r0;
        call (r), one, (a);
        ld.param.b32 %r1, [r];
    }}
    mul.wide.u32 %d1, %r0, 4;
    add.u64 %d0, %d0, %d1;
    st.global.u32 [%d0], %r1;
}}
"""
    y = words(32)
    run(text, y)
    assert (y == np.where(np.arange(32) > 5, np.arange(32) + 1, 9)).all()
