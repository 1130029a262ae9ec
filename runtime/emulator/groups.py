"""Threads of a batch at the same place: their registers, who called, which threads they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.dsl.frozen import frozen

from .memory import CALL_PARAM, Arena
from .program import Code
from .values import stored_dtype

if TYPE_CHECKING:
    from .machine import Batch

Array = NDArray[Any]
Selection = Array | slice | None
MOST_PLACES = 64
"""How many places a group notes: a loop that looks at more of them is none that waits."""
Call = tuple["Frame", int, tuple[Any, ...]]
"""A caller: its frame, the instruction that called, what takes the results."""


class Frame:
    """A call of a function by threads of a batch: registers, parameters, where locals begin."""

    def __init__(self, batch: Batch, code: Code, depth: int, local_base: int) -> None:
        self.code, self.depth, self.local_base = code, depth, local_base
        self.regs: list[Array | None] = [None] * len(code.registers)
        self.open: dict[int, Array] = {}
        """For registers that are followed, which threads have a value that nothing wrote."""
        self.stack: Array | None = None
        """Where each thread's stack ended before the call first grew it, else -1."""
        self.params = [
            Arena("param", batch.threads * size, limit=size, stride=size)
            for size in code.param_sizes
        ]

    def param_address(self, number: int) -> int:
        return CALL_PARAM | number << 32


class Group:
    """Threads of a batch at the same instruction. `sel` is `None` for all of the batch's."""

    __slots__ = ("batch", "frame", "regs", "pc", "stack", "sel", "n", "turn", "looks", "rounds",
                 "seen", "places", "gave_way")  # fmt: skip

    def __init__(
        self, batch: Batch, frame: Frame, pc: int, stack: tuple[Call, ...],
        sel: Selection, n: int, turn: int = 0,
    ) -> None:  # fmt: skip
        self.batch, self.frame, self.pc, self.stack = batch, frame, pc, stack
        self.regs = frame.regs
        self.sel, self.n, self.turn = sel, n, turn
        self.looks = False
        """Whether it looked at memory that others may write, since its last turn."""
        self.gave_way: tuple[int, ...] = ()
        """The progress each time that others ran before the release at which it stands."""
        self.places: set[Any] = set()
        """What it looked at since loops were last looked at: addresses, or barriers."""
        self.rounds = 0
        """How often it jumped back."""
        self.seen: tuple[int, int] | None = None
        """What it found a long while ago, for loops in which nothing changes."""

    def threads(self) -> Array:
        """The threads, as sorted indices within the batch."""
        sel = self.sel
        if sel is None:
            return self.batch.all_threads
        return self.batch.all_threads[sel] if isinstance(sel, slice) else sel

    def of(self, values: Array) -> Array:
        """The elements of an array over the batch that belong to these threads."""
        return values if self.sel is None else values[self.sel]

    def narrow(self, held: Array, count: int) -> None:
        """Keeps the threads where `held`, of which there are `count`."""
        self.sel, self.n = compact(self.threads()[held]), count

    def split(self, held: Array, count: int) -> Group:
        """A group of the threads where `held`; this one is not changed."""
        sel = compact(self.threads()[held])
        made = Group(self.batch, self.frame, self.pc, self.stack, sel, count, self.turn)
        made.looks, made.places = self.looks, set(self.places)
        return made

    def fresh(self, slot: int) -> Array:
        """A register that nothing wrote, whose value is not defined: here 0xCD in each byte."""
        dtype = stored_dtype(self.frame.code.registers[slot])
        size = self.batch.threads * dtype.itemsize
        if dtype.kind == "b":
            made: Array = np.zeros(self.batch.threads, np.bool_)
        else:
            made = np.full(size, 0xCD, np.uint8).view(dtype)
        self.regs[slot] = made
        return made

    def special(self, name: str) -> Array:
        """The values of a special register."""
        return self.of(self.batch.special(name))

    def look(self, addresses: Array) -> None:
        """Notes that it looks at memory, or a barrier there, which others may change."""
        self.looks = True
        if len(self.places) < MOST_PLACES:
            self.places.add((self.pc, int(addresses[0]), int(addresses[-1])))

    def checksum(self) -> int:
        """A number that is very likely another one when some register changes."""
        found = 0
        for slot, values in enumerate(self.regs):
            if values is not None and values.dtype.names is None:
                raw = self.of(values).view(f"u{values.dtype.itemsize}")
                found = hash((found, slot, int(raw.sum(dtype=np.uint64)), int(raw[0])))
        return found

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.frame, self.pc, self.stack)


def compact(threads: Array) -> Selection:
    """Sorted threads, as a slice where they have no gaps."""
    if len(threads) and int(threads[-1]) - int(threads[0]) + 1 == len(threads):
        return slice(int(threads[0]), int(threads[-1]) + 1)
    return threads


@frozen
class Geometry:
    """For the threads of so many blocks: their indices, within the block, and the block."""

    threads: Array
    within: Array
    block_of: Array


def merge(into: Group, other: Group) -> None:
    """Adds the threads of another group at the same place."""
    flags = np.zeros(into.batch.threads, np.bool_)
    flags[into.threads()] = True
    flags[other.threads()] = True
    threads = np.flatnonzero(flags)
    into.n = len(threads)
    into.sel = None if into.n == into.batch.threads else compact(threads)
    into.turn = max(into.turn, other.turn)
    into.looks |= other.looks
    into.places |= other.places
