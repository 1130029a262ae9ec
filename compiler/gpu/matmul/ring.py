"""A ring of stages in shared memory that one thread fills by tensor copies and warps empty.

Each stage has two barriers. `full` completes when all bytes of the stage have come, `empty` when
all its readers have arrived. Who fills and who reads each go round in their own turn: one that has
been round n times waits for the phase of parity n (filling: the one before it, which on the first
round counts as complete). PTX ISA 9.7.13.15, "mbarrier", and 9.7.9.27, "cp.async.bulk.tensor".
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.frozen import frozen

BARRIER_BYTES = 8


def wait(code: Code, barrier: Value, parity: Value) -> None:
    """Waits until the phase of a parity is complete."""
    done, again = code.fresh("i1"), code.label("wait")
    code.start(again)
    code.line(
        f"mbarrier.try_wait.parity.shared::cta.b64 {done.text}, [{barrier.text}], {parity.text};"
    )
    code.branch_if(done, again, holds=False)


def arrive(code: Code, barrier: Value, guard: Value | None = None) -> None:
    """Counts this thread at a barrier."""
    code.line(f"{code.guarded(guard)}mbarrier.arrive.shared::cta.b64 _, [{barrier.text}];")


def expect(code: Code, barrier: Value, size: int) -> None:
    """Counts this thread at a barrier, which then waits for bytes too."""
    code.line(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier.text}], {size};")


def arrive_in_all(code: Code, barrier: Value, lane: Value, blocks: int, guard: Value) -> None:
    """Counts a warp at the barrier of the same place in each block of its cluster."""
    far = code.pure("mapa.shared::cluster.u32", "i32", barrier, lane & (blocks - 1))
    mine = code.guarded(guard & lane.compare("lt", blocks))
    code.line(f"{mine}mbarrier.arrive.shared::cluster.b64 _, [{far.text}];")


def copy_box(
    code: Code,
    map: Value,
    start: Sequence[Value],
    target: Value,
    barrier: Value,
    blocks: int = 1,
) -> None:
    """Starts to copy a box of a tensor map; `start` is its first element, innermost first. It comes
    to the same place in each of so many blocks of the cluster."""
    at = ", ".join(v.text for v in start)
    way, mask = (".multicast::cluster", f", {(1 << blocks) - 1}") if blocks > 1 else ("", "")
    code.line(
        f"cp.async.bulk.tensor.{len(start)}d.shared::cluster.global.tile."
        f"mbarrier::complete_tx::bytes{way} [{target.text}], [{map.text}, {{{at}}}], "
        f"[{barrier.text}]{mask};"
    )


def copy_pixels(
    code: Code, map: Value, start: Sequence[Value], moves: Sequence[Value], target: Value,
    barrier: Value,
) -> None:  # fmt: skip
    """Starts to copy a column of pixels, which begins at `start`, innermost first, and is moved
    along the axes between the channel and the image."""
    at, by = (", ".join(v.text for v in listed) for listed in (start, moves))
    code.line(
        f"cp.async.bulk.tensor.{len(start)}d.shared::cluster.global.im2col."
        f"mbarrier::complete_tx::bytes [{target.text}], [{map.text}, {{{at}}}], "
        f"[{barrier.text}], {{{by}}};"
    )


def meet(code: Code, blocks: int) -> None:
    """All threads of the cluster wait for each other."""
    if blocks == 1:
        code.line("bar.sync 0;")
        return
    code.line("barrier.cluster.arrive.aligned;")
    code.line("barrier.cluster.wait.aligned;")


def elected(code: Code) -> Value:
    """Whether this lane is the one of its warp, all of whose lanes are here."""
    code.line(f"elect.sync _|{(found := code.fresh('i1')).text}, 0xffffffff;")
    return found


@frozen
class Stage:
    """A stage at hand: its number, where it lies, its barriers, and the parity to wait for."""

    number: Value
    start: Value
    full: Value
    empty: Value
    parity: Value


class Ring:
    """So many stages, each of so many bytes, which blocks of a cluster may fill for each other. The
    barriers follow the stages, or lie where they are told to."""

    def __init__(
        self, writer: FoldWriter, start: Expr, stages: int, size: int, blocks: int = 1,
        barriers: Expr | None = None,
    ) -> None:  # fmt: skip
        self.writer, self.stages, self.size, self.blocks = writer, stages, size, blocks
        self.start = writer.shared_address(start)
        self.barriers = (
            self.start + stages * size if barriers is None else writer.shared_address(barriers)
        )

    @staticmethod
    def bytes_of(stages: int, size: int) -> int:
        """Shared memory of a ring, barriers included."""
        return stages * (size + 2 * BARRIER_BYTES)

    def prepare(self, first: Value, readers: int) -> None:
        """Makes the barriers, by the thread for which `first` holds; then all may use them."""
        code = self.writer.code
        skip = code.label("prepared")
        code.branch_if(first, skip, holds=False)
        with code.branch_scope():
            for n in range(2 * self.stages):
                count = 1 if n < self.stages else readers * self.blocks
                at = f"[{self.barriers.text}+{n * BARRIER_BYTES}]"
                code.line(f"mbarrier.init.shared::cta.b64 {at}, {count};")
            code.line("fence.mbarrier_init.release.cluster;")
        code.start(skip)
        meet(code, self.blocks)

    def turn(self, filling: bool) -> Turn:
        return Turn(self, filling)


class Turn:
    """Where a thread is in a ring."""

    def __init__(self, ring: Ring, filling: bool) -> None:
        self.ring, code = ring, ring.writer.code
        self.number = code.variable("i32", code.const(0, "i32"))
        self.parity = code.variable("i32", code.const(int(filling), "i32"))

    def now(self) -> Stage:
        """The stage at hand, until `step`."""
        ring, code = self.ring, self.ring.writer.code
        number = Value(code, self.number.text, "i32", code.depth)
        full = ring.barriers + number * BARRIER_BYTES
        return Stage(
            number, ring.start + number * ring.size, full, full + ring.stages * BARRIER_BYTES,
            Value(code, self.parity.text, "i32", code.depth),
        )  # fmt: skip

    def step(self, stage: Stage) -> None:
        """Goes on to the next stage."""
        code = self.ring.writer.code
        after = stage.number + 1
        wraps = after.compare("eq", self.ring.stages)
        turned = stage.parity ^ 1
        code.set(self.number, wraps.select(code.const(0, "i32"), after))
        code.set(self.parity, wraps.select(turned, stage.parity))
