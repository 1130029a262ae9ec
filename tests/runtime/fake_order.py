"""Work and memory of the fake GPU: what happens before what, and which bytes are known.

Two accesses to a byte, one of them writing, must be ordered; memory must be alive, and read only
after something wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stagefuse.runtime.errors import DeviceError

READ, WRITE, ATOMIC = "read", "write", "atomic"
Access = tuple["Block", int, int, str]  # begin and end in the block


class Fault(AssertionError):
    """What a GPU would have done in silence."""


@dataclass(eq=False)
class Block:
    """Memory of the device, or page-locked memory here."""

    address: int
    bytes: np.ndarray[Any, Any]
    known: np.ndarray[Any, Any]  # which bytes something wrote
    alive: bool = True
    accesses: list[tuple[int, int, int, str]] = field(default_factory=list)  # op, begin, end


@dataclass(eq=False)
class Op:
    number: int
    before: int  # bit i: op i happens before it
    run: Callable[[], None]
    blocks: list[Block]
    done: bool = False


class Ordered:
    """Ops that have been given to streams, and the blocks of memory that they touch."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.ops: list[Op] = []
        self.blocks: dict[int, Block] = {}
        self.pinned: dict[int, Block] = {}
        self.streams: dict[int, int] = {}  # what its next op comes after
        self.host = 0  # ops that the host knows to be done
        self.broken: Exception | None = None

    def _require(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(fault)
            raise Fault(fault)

    def _at(self, address: int, size: int) -> tuple[Block, int]:
        """Where an address lies that the GPU uses: in its memory, or in what is page-locked."""
        for block in (*self.blocks.values(), *self.pinned.values()):
            if block.address <= address < block.address + max(block.bytes.nbytes, 1):
                begin = address - block.address
                self._require(begin + size <= block.bytes.nbytes, "an access beyond its memory")
                return block, begin
        self._require(False, f"an access to {address:#x}, which is no memory, or freed")
        raise AssertionError

    def _locked(self, host: int, size: int) -> tuple[Block, int] | None:
        for block in self.pinned.values():
            if block.address <= host < block.address + block.bytes.nbytes:
                self._require(
                    host + size <= block.address + block.bytes.nbytes,
                    "a copy beyond page-locked memory",
                )
                return block, host - block.address
        return None

    def _enqueue(self, stream: int, run: Callable[[], None], accesses: list[Access]) -> None:
        self._require(stream in self.streams, "a stream that is closed")
        self.streams[stream] |= self._put(self.streams[stream], run, accesses)

    def _put(self, before: int, run: Callable[[], None], accesses: list[Access]) -> int:
        """A new op; gives what comes before one that follows it."""
        number = len(self.ops)
        before |= self.host
        for block, begin, end, kind in accesses:
            self._require(block.alive, "an access to freed memory")
            for other, first, last, theirs in block.accesses:
                if other == number:
                    continue
                if first < end and begin < last and (kind != theirs or kind == WRITE):
                    ordered = before >> other & 1 or {kind, theirs} == {READ}
                    self._require(bool(ordered), f"a {kind} that nothing orders after a {theirs}")
            block.accesses.append((number, begin, end, kind))

        def checked() -> None:
            for block, begin, end, kind in accesses:
                if kind != WRITE:
                    self._require(
                        bool(block.known[begin:end].all()), "a read of what nothing wrote"
                    )
            run()

        self.ops.append(Op(number, before, checked, [block for block, *_ in accesses]))
        return before | 1 << number

    def _finish(self, mask: int) -> None:
        for op in self.ops:
            if mask >> op.number & 1 and not op.done:
                op.done = True
                try:
                    op.run()
                except DeviceError as error:
                    self.broken = error
                    raise
        self.host |= mask
