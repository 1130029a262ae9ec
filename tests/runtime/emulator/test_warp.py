"""Votes, shuffles, matches, reductions, against loops over lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from .kernels import Array, fault, kernel, line_of, run, words

FULL = 0xFFFFFFFF


def lanes(rng: np.random.Generator, body: str, data: Array, block: int = 64) -> Array:
    """The results in %r4 of lanes that have their word of data in %r5."""
    text = kernel(
        f"""
        mul.wide.u32 %d2, %r3, 4;
        add.u64 %d3, %d1, %d2;
        ld.global.u32 %r5, [%d3];
        mov.u32 %r4, 77;
        {body}
        st.global.u32 [%d20], %r4;""",
        2,
    )
    out = words(len(data))
    run(text, out, data, block=block, grid=len(data) // block)
    return out


def source(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudo-code of the ISA for shfl.sync."""
    segment, clamp = (c >> 8) & 31, c & 31
    bval = b & 31
    top = (lane & segment) | (clamp & ~segment & 31)
    low = lane & segment
    j, inside = {
        "up": (lane - bval, lane - bval >= top),
        "down": (lane + bval, lane + bval <= top),
        "bfly": (lane ^ bval, lane ^ bval <= top),
        "idx": (low | (bval & ~segment & 31), (low | (bval & ~segment & 31)) <= top),
    }[mode]
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(rng: np.random.Generator, mode: str, width: int) -> None:
    data = rng.integers(0, 2**31, 128).astype(np.uint32)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 5, 16, 31):
        got = lanes(rng, f"shfl.sync.{mode}.b32 %r4|%p0, %r5, {b}, {c}, -1;\n"
                    "@!%p0 add.u32 %r4, %r4, 0x80000000;", data)  # fmt: skip
        for i in range(128):
            j, inside = source(mode, i % 32, b, c)
            want = int(data[i - i % 32 + j]) + (0 if inside else 0x80000000)
            assert int(got[i]) == want & FULL, (i, b)


def test_shuffle_by_a_register(rng: np.random.Generator) -> None:
    data = rng.integers(0, 32, 64).astype(np.uint32)
    got = lanes(rng, "mul.lo.u32 %r6, %r0, 3; shfl.sync.idx.b32 %r4, %r6, %r5, 31, -1;", data)
    assert (got == 3 * (np.arange(64) // 32 * 32 + data)).all()


def test_part_of_a_warp(rng: np.random.Generator) -> None:
    """Two halves of a warp shuffle apart, each with its own mask."""
    data = rng.integers(0, 99, 32).astype(np.uint32)
    got = lanes(
        rng,
        """
        setp.lt.u32 %p0, %r0, 16;
        @%p0 bra LOW;
        shfl.sync.bfly.b32 %r4, %r5, 1, 31, 0xffff0000;
        bra END;
    LOW:
        shfl.sync.bfly.b32 %r4, %r5, 2, 31, 0x0000ffff;
    END:""",
        data,
        block=32,
    )
    i = np.arange(32)
    assert (got == data[np.where(i < 16, i ^ 2, i ^ 1)]).all()


def test_lanes_that_ended_do_not_matter(rng: np.random.Generator) -> None:
    data = rng.integers(0, 99, 32).astype(np.uint32)
    got = lanes(rng, "setp.ge.u32 %p0, %r0, 20; @%p0 exit; redux.sync.add.u32 %r4, %r5, -1;",
                data, block=32)  # fmt: skip
    assert (got[:20] == data[:20].sum()).all() and not got[20:].any()


def test_votes(rng: np.random.Generator) -> None:
    data = rng.integers(0, 2, 128).astype(np.uint32)
    data[32:64], data[64:96] = 1, 0
    body = "setp.ne.u32 %p0, %r5, 0; "
    rows = data.reshape(4, 32).astype(bool)
    votes = {"all": rows.all(1), "any": rows.any(1), "uni": rows.all(1) | ~rows.any(1)}
    for op, want in votes.items():
        got = lanes(rng, f"{body} vote.sync.{op}.pred %p1, %p0, -1; selp.u32 %r4, 1, 0, %p1;", data)
        assert (got == np.repeat(want, 32)).all()
        got = lanes(rng, f"{body} vote.sync.{op}.pred %p1, !%p0, -1; selp.u32 %r4, 1, 0, %p1;",
                    1 - data)  # fmt: skip
        assert (got == np.repeat(want, 32)).all()
    got = lanes(rng, f"{body} vote.sync.ballot.b32 %r4, %p0, -1;", data)
    bits = (rows * (1 << np.arange(32, dtype=np.uint64))).sum(1)
    assert (got == np.repeat(bits, 32)).all()


def test_matches(rng: np.random.Generator) -> None:
    data = rng.integers(0, 6, 128).astype(np.uint32)
    data[:32] = 4
    rows = data.reshape(4, 32)
    weights = 1 << np.arange(32, dtype=np.uint64)
    got = lanes(rng, "match.any.sync.b32 %r4, %r5, -1;", data)
    want = [[int(weights[row == x].sum()) for x in row] for row in rows]
    assert (got.reshape(4, 32) == np.array(want)).all()
    got = lanes(rng, "cvt.u64.u32 %d4, %r5; match.any.sync.b64 %r4, %d4, -1;", data)
    assert (got.reshape(4, 32) == np.array(want)).all()
    got = lanes(rng, "match.all.sync.b32 %r4|%p0, %r5, -1; @%p0 add.u32 %r4, %r4, 2;", data)
    assert (got.reshape(4, 32) == np.array([[1], [0], [0], [0]])).all()


OPERATIONS: dict[str, Callable[[Array], int]] = {
    "add.u32": lambda x: int(x.sum(dtype=np.uint64)), "min.u32": lambda x: int(x.min()),
    "max.u32": lambda x: int(x.max()), "min.s32": lambda x: int(x.view(np.int32).min()),
    "max.s32": lambda x: int(x.view(np.int32).max()), "add.s32": lambda x: int(x.sum()),
    "and.b32": lambda x: int(np.bitwise_and.reduce(x)),
    "or.b32": lambda x: int(np.bitwise_or.reduce(x)),
    "xor.b32": lambda x: int(np.bitwise_xor.reduce(x)),
}  # fmt: skip


@pytest.mark.parametrize("op", OPERATIONS)
def test_reductions(rng: np.random.Generator, op: str) -> None:
    data = rng.integers(0, 2**32, 64, dtype=np.uint32)
    got = lanes(rng, f"redux.sync.{op} %r4, %r5, -1;", data)
    want = [OPERATIONS[op](row) & FULL for row in data.reshape(2, 32)]
    assert (got == np.repeat(want, 32)).all()
    got = lanes(rng, "mov.u32 %r4, 0; setp.ge.u32 %p0, %r0, 40; @%p0 bra E; "
                f"setp.lt.u32 %p0, %r0, 8; @%p0 bra E; and.b32 %r6, %r0, 32; setp.ne.u32 %p1, %r6,"
                f" 0; @%p1 bra E; redux.sync.{op} %r4, %r5, 0xffffff00;\nE:", data)  # fmt: skip
    assert (got[8:32] == OPERATIONS[op](data[8:32]) & FULL).all() and not got[32:].any()


def test_elect(rng: np.random.Generator) -> None:
    data = np.zeros(64, np.uint32)
    got = lanes(rng, "elect.sync %r4|%p0, -1; @%p0 add.u32 %r4, %r4, 9;", data)
    assert (got == np.where(np.arange(64) % 32 == 0, 9, 0)).all()
    got = lanes(rng, "setp.lt.u32 %p1, %r0, 5; @%p1 bra E;\n elect.sync %r4|%p0, 0xffffffe0;\n"
                "selp.u32 %r4, 100, %r4, %p0;\nE:", data, block=32)  # fmt: skip
    assert got[5] == 100 and (got[6:32] == 5).all()


def test_a_warp_meets_at_its_barrier(rng: np.random.Generator) -> None:
    text = kernel(
        """
        shl.b32 %r6, %r0, 2;
        st.shared.u32 [%r6], %r0;
        bar.warp.sync -1;
        xor.b32 %r7, %r6, 4;
        ld.shared.u32 %r4, [%r7];
        st.global.u32 [%d20], %r4;""",
        shared=".shared .align 4 .b32 s[64];",
    )
    out = words(64)
    run(text, out, block=64)
    assert (out == np.arange(64) ^ 1).all()
    assert fault(text.replace("bar.warp.sync -1;", ""), out, block=64).kind == "race"


@pytest.mark.skipif("config.getoption('--hardware', default=False)", reason="undefined there")
def test_what_a_lane_that_ended_has_is_not_known(rng: np.random.Generator) -> None:
    """A sum over lanes of which some ended is no sum; reading them and not using it is allowed."""
    data = rng.integers(0, 99, 32).astype(np.uint32)
    got = lanes(rng, """setp.ge.u32 %p0, %r0, 24; @%p0 exit;
        shfl.sync.down.b32 %r4, %r5, 8, 31, -1;
        setp.ge.u32 %p1, %r0, 16; @%p1 mov.b32 %r4, %r5;""", data, block=32)  # fmt: skip
    assert (got[:16] == data[8:24]).all() and (got[16:24] == data[16:24]).all()


@pytest.mark.parametrize(
    ("block", "does", "how"),
    [
        (32, "@%p0 exit; shfl.sync.down.b32 %r4, %r0, 8, 31, -1;", "is stored"),
        (24, "shfl.sync.down.b32 %r4, %r0, 8, 31, -1;", "is stored"),
        (32, "@%p0 exit; shfl.sync.bfly.b32 %r4, %r0, 8, 31, -1; add.u32 %r5, %r4, %r0;"
         "shfl.sync.bfly.b32 %r4, %r5, 16, 31, -1;", "is used"),
        (32, "@%p0 exit; shfl.sync.idx.b32 %r4, %r0, 30, 31, -1; setp.eq.u32 %p1, %r4, 0;"
         "@%p1 bra END;", "decides"),
    ],
)  # fmt: skip
def test_what_depends_on_a_lane_that_ended(block: int, does: str, how: str) -> None:
    body = f"setp.ge.u32 %p0, %r0, 24; {does} st.global.u32 [%d20], %r4;\nEND:"
    text = kernel(body.replace(";", ";\n"))
    found = fault(text, words(32), block=block)
    assert found.kind == "uninitialised" and how in found.message
    assert found.line == line_of(text, "shfl")


@pytest.mark.parametrize("does", ["shfl.sync.idx.b32 %r4, %r2, 1, 31, -1;", "bar.warp.sync -1;",
                                  "redux.sync.add.u32 %r4, %r0, -1;"])  # fmt: skip
def test_lanes_of_a_mask_that_pass_by(does: str) -> None:
    """A mask may name lanes that returned before, and none that go on behind what it is for."""
    body = "mov.u32 %r4, 1; setp.ge.u32 %p0, %r0, 16; {0} {1} {2} st.global.u32 [%d20], %r4;"
    out = words(32)
    run(kernel(body.format("@%p0 ret;", does, "")), out)
    assert out[:16].all() and not out[16:].any()
    text = kernel(body.format("@%p0 bra OVER;\n", does, "\nOVER:"))
    found = fault(text, out)
    assert (found.kind, found.line) == ("barrier", line_of(text, does.split()[0]))
    assert "names lane 31" in found.message
