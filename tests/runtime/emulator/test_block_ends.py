"""Shared memory is used from when its block has started, and not beyond its end."""

from __future__ import annotations

import numpy as np
import pytest

from .kernels import Array, fault, kernel, run, words

SHARED = """
    .shared .align 128 .b8 piece[128];
    .shared .align 8 .b64 full;
"""
COPY = """
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra READY;
    mbarrier.init.shared::cta.b64 [full], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [piece], [%d0], 128, [full];
READY:
"""
WAIT = """
    bar.sync 0;
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0;
    @!%p1 bra AGAIN;
"""
VISIT = """
    mov.u32 %r10, full;
    mov.u32 %r11, %cluster_ctarank;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra READY;
    mbarrier.init.shared::cta.b64 [%r10], 1;
READY:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    xor.b32 %r11, %r11, 1;
    mapa.shared::cluster.u32 %r12, %r10, %r11;
    @%p0 bra ARRIVED;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r12];
ARRIVED:
"""


@pytest.fixture
def source(rng: np.random.Generator) -> Array:
    return rng.integers(0, 1 << 32, 32).astype(np.uint32)


def test_a_copy_that_nobody_waits_for(source: Array) -> None:
    run(kernel(COPY + WAIT, 1, shared=SHARED), source)
    found = fault(kernel(COPY, 1, shared=SHARED), source)
    assert found.kind == "race"
    assert "the block ends and with it shared memory that an asynchronous copy" in str(found)


@pytest.mark.parametrize("end", ["arrive", "arrive.relaxed", "phase"])
def test_an_arrival_at_a_neighbours_barrier(end: str) -> None:
    """Either waits for all of the cluster, or for that arrival: then it may end."""
    sync = f"    barrier.cluster.{end}.aligned;\n    barrier.cluster.wait.aligned;\n"
    run(kernel(VISIT + (sync if end != "phase" else WAIT), 1, shared=SHARED), words(1), grid=2,
        cluster=2)  # fmt: skip


@pytest.mark.parametrize("end", ["", "    barrier.cluster.arrive.aligned;\n"])
def test_an_arrival_at_a_barrier_of_a_block_that_may_have_ended(end: str) -> None:
    """Nobody waits for the neighbour, though all may have arrived."""
    found = fault(kernel(VISIT + end, 1, shared=SHARED), words(1), grid=2, cluster=2)
    assert found.kind == "race"
    assert "the block ends and with it shared memory that block" in str(found)


PUSH = """
    mov.u32 %r10, piece;
    mov.u32 %r11, %cluster_ctarank;
    xor.b32 %r11, %r11, 1;
    mapa.shared::cluster.u32 %r12, %r10, %r11;
    mad.lo.u32 %r12, %r0, 4, %r12;
    st.shared::cluster.u32 [%r12], %r0;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
"""


def test_a_neighbour_that_may_not_have_started() -> None:
    """Any barrier of the cluster shows that all of its blocks run, and what they did does."""
    relaxed = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
    run(kernel(relaxed + PUSH, 1, shared=SHARED), words(1), grid=2, cluster=2)
    told = """
        mov.u32 %r13, %cluster_ctarank;
        setp.eq.u32 %p0, %r13, 0;
        @%p0 st.release.gpu.global.u32 [%d0], 1;
        @%p0 bra END;
    AGAIN:
        ld.acquire.gpu.global.u32 %r14, [%d0];
        setp.eq.u32 %p1, %r14, 0;
        @%p1 bra AGAIN;"""
    end = PUSH.replace("    barrier", "END:\n    barrier", 1)
    run(kernel(told + end, 1, shared=SHARED), words(1), grid=2, cluster=2)
    found = fault(kernel(PUSH, 1, shared=SHARED), words(1), grid=2, cluster=2)
    assert found.kind == "race" and "has started" in str(found)
