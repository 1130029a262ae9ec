"""Keys and values that are computed of what lies in memory: of codes of 8 bits and scales, say.

A lane computes adjacent features of some keys of each block. What it reads for the next block is
under way while this one is multiplied; it is converted after, and stored in shared memory as copies
would have left it, so that nothing wider than the codes is ever read or written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.fusion.join_decoded import WIDE
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.matmul.computed_operands import (
    joined_loads,
    plain_loads,
    rounded_pairs,
    start_vector,
    vector,
)
from stagefuse.compiler.gpu.memory import Memory, Slot
from stagefuse.compiler.kernel_ir import Attend, Const, Index, Load, Op
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.expressions import symbols_of
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import F32, I32
from stagefuse.dsl.frozen import frozen

from .blocks import Shape, Side
from .exact import ExactAttendWriter
from .online_softmax import Attending

WIDTH = 8
"""Adjacent features that a lane computes: 16 bytes of shared memory in 16 bits, so that lanes
beside each other write to different banks."""
WORDS = {2: 48, 4: 32}
"""Registers of what is read at a time of heads that are wide, by the bytes of an element: products
of f32 need more of them."""
FINITE = ("add", "bitand", "bitor", "bitxor", "cast", "mul", "neg", "round_to", "shl", "shr", "sub")
"""Functions that make no infinity and no NaN of zeros."""


@frozen
class Part:
    """Some features of a key that a lane has started to read: where they go in the first stage, and
    whether they are there."""

    element: KernelValue
    key: Expr
    slot: Slot
    there: Value
    target: Value
    offset: int
    own: Value | None


class ComputingAttending(Attending):
    """One statement being written, as far as its keys and values are computed."""

    def __init__(self, writer: ExactAttendWriter, s: Attend, shape: Shape, kind: str) -> None:
        super().__init__(writer, s, kind, shape.block, shape.bytes)
        self.shape = shape
        self.pending: list[Part] = []
        self.waiting: list[list[Callable[[], None]]] = []

    @property
    def computed(self) -> list[tuple[Side, KernelValue, int]]:
        """The operands that are computed, with where they begin in a stage."""
        shape, s = self.shape, self.s
        behind = shape.keys.elements * shape.size
        both = (shape.keys, s.key_element, 0), (shape.values, s.value_element, behind)
        return [(side, element, at) for side, element, at in both if element is not None]

    def turns(self, side: Side, chunk: int) -> Iterator[tuple[int, int, Value | None]]:
        """How far apart in an operand a lane's chunks lie, along its rows and down, and whether it
        has each."""
        w = self.w
        x, y, wide, down = self.first(side, chunk)
        for i in range(-(-side.inner // chunk // wide)):
            for n in range(-(-side.outer // down)):
                inner, outer, own = x + i * wide * chunk, y + n * down, None
                if (i + 1) * wide * chunk > side.inner:
                    own = w.holds("lt", inner, const(side.inner))
                if (n + 1) * down > side.outer:
                    here = w.holds("lt", outer, const(side.outer))
                    own = here if own is None else own & here
                yield i * wide * chunk, n * down, own

    def first(self, side: Side, chunk: int) -> tuple[Expr, Expr, int, int]:
        """A lane's first chunk, and how many lanes are beside each other and below."""
        lanes = self.w.team.lanes
        wide = min(1 << (side.inner // chunk - 1).bit_length(), lanes)
        return mod(sym("lane"), wide) * chunk, floordiv(sym("lane"), wide), wide, lanes // wide

    def read_ahead(self, block: Expr) -> None:
        """Starts to read what a lane computes of a block of keys, or as much of it as registers
        hold if heads are wide."""
        self.waiting = self._groups(block)
        self._read_next()

    def convert(self, stage: Value) -> None:
        """Computes what was read, stores it in the stage at an offset, and reads more of a block
        if there is more."""
        self._convert(stage)
        self._read_next()

    def convert_all(self, stage: Value) -> None:
        """The same until there is no more."""
        while self.pending:
            self.convert(stage)

    def _read_next(self) -> None:
        for start in self.waiting.pop(0) if self.waiting else ():
            start()

    def _groups(self, block: Expr) -> list[list[Callable[[], None]]]:
        """What starts to read chunks of a block of keys, of which some together are under way."""
        groups = list[list[Callable[[], None]]]()
        room = 0
        for side, element, behind in self.computed:
            words = self._words(element)
            for start in self._chunks(side, element, behind, block):
                if not groups or (self.is_wide and room < words):
                    groups.append([])
                    room = WORDS[self.shape.size]
                groups[-1].append(start)
                room -= words
        return groups

    @property
    def is_wide(self) -> bool:
        return max(self.s.depth, self.s.columns) > WIDE

    def _words(self, element: KernelValue) -> int:
        """Registers that what is read for a chunk takes, about."""

        def words(load: Load) -> int:
            size = self.w.memory[load.buffer].dtype.itemsize
            return max(WIDTH * size // 4, 1) if self.s.feature in symbols_of(load.indices) else 1

        single = sum(map(words, plain_loads(element)))
        return single + sum(max(map(words, some)) for some in joined_loads(element))

    def _chunks(
        self, side: Side, element: KernelValue, behind: int, block: Expr
    ) -> Iterator[Callable[[], None]]:
        """What starts to read each of a lane's chunks of an operand."""
        w, s, shape = self.w, self.s, self.shape
        loads, joined = plain_loads(element), joined_loads(element)
        width = math.gcd(WIDTH, side.features)
        x, y, *_ = self.first(side, width)
        at = self.ring + shape.start + behind
        target = at + w.index((y * side.pitch + x) * shape.size, "i32")
        for along, down, own in self.turns(side, width):
            key, feature = block * side.count + y + down, x + along
            there = w.holds("lt", key, s.hi)
            if side.wide > side.features:
                there = there & w.holds("lt", feature, const(side.features))
            there = there if own is None else there & own
            slot = Slot(s.feature, w.resolve(feature), width)
            offset = (down * side.pitch + along) * shape.size
            part = Part(element, w.resolve(key), slot, there, target, offset, own)
            yield partial(self._start, part, loads, joined)

    def _start(
        self, part: Part, loads: Sequence[Load], joined: Sequence[tuple[Load, ...]]
    ) -> None:
        self.pending.append(part)
        key = {self.s.key: part.key}
        start_vector(self.w, loads, part.slot, key, part.there, joined=joined)

    def _convert(self, stage: Value) -> None:
        w, code = self.w, self.code
        memory = Memory("stage", I32 if self.half else F32, (), "shared", self.ring)
        for part in self.pending:
            finite = all(_is_finite(x) for x in post_order(part.element))
            values = vector(w, part.element, part.slot, {self.s.key: part.key}, part.there, finite)
            if self.half:
                values = rounded_pairs(code, values, self.kind)
            target = part.target + stage
            with w.when(part.own):
                for n in range(0, len(values), 4):
                    at = f"[{target.text}+{part.offset + n * 4}]"
                    w.write(memory, at, values[n : n + 4])
        self.pending, w.under_way = [], {}


def _is_finite(value: KernelValue) -> bool:
    """Whether a part of a value is neither infinite nor NaN if all that is loaded is 0."""
    if isinstance(value, Const):
        return math.isfinite(value.value)
    if isinstance(value, Load):
        return not value.guard
    return isinstance(value, Index) or isinstance(value, Op) and value.fn in FINITE
