"""Threads that end before a barrier of their block, and barriers with a count."""

from __future__ import annotations

import numpy as np
import pytest

from .kernels import fault, kernel, line_of, run, words


@pytest.mark.parametrize(
    "body",
    [
        "setp.ge.u32 %p0, %r0, 80; @%p0 ret; bar.sync 0; st.global.u32 [%d20], %r0;",
        "setp.ge.u32 %p0, %r0, 80; @!%p0 bra A; bra B;\n"
        "A: bar.sync 0; st.global.u32 [%d20], %r0;\nB:",
        # those that end do so last, and let the barrier open
        """setp.lt.u32 %p0, %r0, 80; mov.u32 %r4, 0; @%p0 bra A;
        B: add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 50; @%p1 bra B; ret;
        A: bar.sync 0; bar.sync 0; st.global.u32 [%d20], %r0;""",
        # threads return from a loop, each where its own work ends
        """mov.u32 %r4, %r0;
        TOP: setp.ge.u32 %p0, %r4, 128; @%p0 bra END; st.global.u32 [%d20], %r0;
        setp.ge.u32 %p0, %r0, 80; @%p0 bra END; barrier.red.and.pred %p2, 0, !%p0; @!%p2 trap;
        add.u32 %r4, %r4, 16; bra TOP;
        END:""",
        # a block that spins must not keep the other one's barrier shut
        """setp.ne.u32 %p1, %r1, 0; @%p1 bra SPIN; setp.ge.u32 %p0, %r0, 80; @%p0 ret; bar.sync 0;
        st.global.u32 [%d20], %r0; @%p0 bra END; st.release.gpu.global.u32 [%d1], 1; bra END;
        SPIN: ld.acquire.gpu.global.u32 %r4, [%d1]; setp.eq.u32 %p2, %r4, 0; @%p2 bra SPIN;
        END:""",
    ],
)  # fmt: skip
def test_threads_that_return_before_a_barrier(body: str) -> None:
    """Barriers of all threads wait for none that has ended (PTX ISA, `exit`)."""
    out = words(128)
    run(kernel(body, 2), out, words(1), block=128, grid=2 if "SPIN" in body else 1)
    assert (out[:80] == np.arange(80)).all()


@pytest.mark.parametrize("barrier", ["bar.sync 1, 64;", "barrier.sync 1, 64;",
                                     "barrier.red.popc.u32 %r4, 1, 64, %p1;"])  # fmt: skip
def test_a_count_of_threads_is_one_of_warps(barrier: str) -> None:
    """Lanes that ended, or that a block's last warp never had, are counted with their warp."""
    text = kernel(f"""
        setp.lt.u32 %p0, %r0, 20; @%p0 ret; setp.ge.u32 %p1, %r0, 0;
        {barrier}
        st.global.u32 [%d20], %r0;""")
    out = words(64)
    run(text, out, block=50)
    assert (out[20:50] == np.arange(20, 50)).all() and not out[:20].any()


def test_what_a_thread_wrote_that_returned_before_a_barrier() -> None:
    """It was not at the barrier, which so orders nothing for it."""
    text = kernel("""
        mul.lo.u32 %r4, %r0, 4; mov.u32 %r5, s; add.u32 %r4, %r4, %r5;
        st.shared.u32 [%r4], %r0;
        setp.ge.u32 %p0, %r0, 32; @%p0 ret;
        bar.sync 0;
        ld.shared.u32 %r6, [%r4+128];
        st.global.u32 [%d20], %r6;""", shared=".shared .b32 s[64];")
    found = fault(text, words(64), block=64)
    assert (found.kind, found.line) == ("race", line_of(text, "ld.shared"))


WAITS = """
.func waits(.reg .b64 a, .reg .b32 v, .reg .b32 c)
{
    .reg .pred p;
    setp.eq.u32 p, c, 0;
    @p bra ON;
    BARRIER
ON:
    st.global.u32 [a], v;
    ret;
}
"""


@pytest.mark.parametrize("barrier, message", [
    ("bar.sync 0;", "waits for 64 threads, of which 40 came and 24 went on behind"),
    ("bar.warp.sync -1;", "its mask names lane 31, which went on behind it"),
])  # fmt: skip
def test_a_barrier_in_a_function_that_some_threads_pass_by(barrier: str, message: str) -> None:
    """The kernel itself does nothing behind the call."""
    body = "setp.lt.u32 %p0, %r0, 40; selp.u32 %r4, 1, 0, %p0; call waits, (%d20, %r0, %r4);"
    text = kernel(body, before=WAITS.replace("BARRIER", barrier))
    found = fault(text, words(64), block=64)
    assert (found.kind, found.line) == ("barrier", line_of(text, barrier[:8]))
    assert message in str(found)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_threads_that_end_between_calls_of_a_function_with_a_barrier(barrier: str) -> None:
    """They were at the barrier in their calls, or no thread was in those of that number."""
    text = kernel("""
        mov.u32 %r4, 0;
    TOP:
        and.b32 %r5, %r4, 1;
        call waits, (%d20, %r0, %r5);
        add.u32 %r4, %r4, 1;
        setp.eq.u32 %p0, %r4, 3; setp.ge.and.u32 %p0, %r0, 40, %p0; @%p0 bra END;
        setp.lt.u32 %p1, %r4, 6; @%p1 bra TOP;
    END:""", before=WAITS.replace("BARRIER", barrier))  # fmt: skip
    out = words(64)
    run(text, out, block=64)
    assert (out == np.arange(64)).all()
