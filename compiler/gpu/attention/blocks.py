"""How attention is cut into blocks: rows of queries, keys at a time, and where they lie."""

from __future__ import annotations

from stagefuse.compiler.kernel_ir import COMPUTED, Attend, Operand
from stagefuse.dsl.dims import Expr, const, floordiv, mod
from stagefuse.dsl.frozen import frozen

STAGE_BYTES = 96 << 10
"""Shared memory of a block on every arch."""
STAGES = 2
MOST_STAGES = 4
"""Where warps share rows: of few rows, what takes time is to bring the keys."""
QUERY_BYTES = 256
QUERY_BYTES_BESIDE = 128
"""Of a query that stays in registers, alone and beside what is under way to be converted."""


def rows_of_block(depth: int, columns: int, size: int) -> int:
    """Rows of a block, 16 for each warp; `size`: bytes of an element."""
    return 64 if max(depth, columns) * size <= 512 else 32


@frozen
class Side:
    """An operand on its way through shared memory, cut along its keys (or rows of queries).

    `features`: elements of a key; `wide`: with the padding that products need. `keyed`: whether
    the key is the first index of the operand. `along`: whether memory runs along the keys; then so
    do rows in shared memory, which are `pitch` elements apart.
    """

    operand: Operand
    count: int
    features: int
    wide: int
    keyed: bool
    along: bool
    pitch: int

    @property
    def outer(self) -> int:
        return self.wide if self.along else self.count

    @property
    def inner(self) -> int:
        return self.count if self.along else self.wide

    @property
    def elements(self) -> int:
        return self.outer * self.pitch

    @property
    def steps(self) -> tuple[int, int]:
        """Elements between neighbouring keys and neighbouring features in shared memory."""
        return (1, self.pitch) if self.along else (self.pitch, 1)

    def strides(self) -> tuple[Expr, Expr]:
        """Elements between neighbouring keys and neighbouring features in memory."""
        x = self.operand
        return (x.along, x.across) if self.keyed else (x.across, x.along)

    def place(self, block: Expr, key: Expr, feature: Expr) -> Expr:
        """Where an element of the key of this number in a block of keys lies."""
        x = self.operand
        if self.keyed:
            return x.place(block * self.count + key, feature)
        if not x.panel:
            return x.place(feature, block * self.count + key)
        parts = x.panel // self.count  # blocks of a panel
        inside = mod(block, parts) * self.count + key
        start = x.offset + feature * x.along
        return start + floordiv(block, parts) * x.step + inside * x.across


def side(
    operand: Operand, count: int, features: int, keyed: bool, size: int, spread: bool
) -> Side:
    """The layout of an operand. `spread`: features are taken across lanes, keys along registers."""
    unit = 16 if size == 2 else 8
    wide = -(-features // unit) * unit
    key, feature = (operand.along, operand.across) if keyed else (operand.across, operand.along)
    along = operand != COMPUTED and key == const(1) and feature != const(1)
    padding = 8 if size == 2 or (along and spread) else 4
    return Side(
        operand, count, features, wide, keyed, along, (count if along else wide) + padding
    )  # fmt: skip


@frozen
class Shape:
    """Sizes of a block; `held`: queries stay in registers, and leave their place to the keys if
    they are many.
    `ways`: warps that share rows and divide a block of keys; `computes`: keys or values are
    computed, a block ahead."""

    queries: Side
    keys: Side
    values: Side
    size: int
    held: bool
    ways: int
    computes: bool

    @property
    def share(self) -> int:
        """Keys of a block that a warp takes."""
        return self.block // self.ways

    @property
    def stages(self) -> int:
        """Blocks of keys that shared memory holds."""
        if self.ways == 1 or self.computes:
            return STAGES
        return max(STAGES, min((STAGE_BYTES - self.start) // self.stage_bytes, MOST_STAGES))

    @property
    def block(self) -> int:
        """Keys at a time."""
        return self.keys.count

    @property
    def query_bytes(self) -> int:
        return self.queries.elements * self.size

    @property
    def stage_bytes(self) -> int:
        return (self.keys.elements + self.values.elements) * self.size

    @property
    def start(self) -> int:
        """Where the stages begin."""
        return 0 if self.held and self.ways == 1 else self.query_bytes

    @property
    def bytes(self) -> int:
        return max(self.query_bytes, self.start + self.stages * self.stage_bytes)


def shape_of(s: Attend, size: int) -> Shape:
    """The most keys at a time that shared memory has room for, and registers."""
    held = s.depth * size <= (QUERY_BYTES if not s.feature else QUERY_BYTES_BESIDE)
    unit = 16 if size == 2 else 8
    most = 64 if size == 2 else 32
    whole = s.keys.panel or (most if s.ways == 1 else unit * s.ways)
    for block in (n for n in range(whole, 0, -unit * s.ways) if whole % n == 0):
        found = Shape(
            side(s.queries, s.mr, s.depth, True, size, False),
            side(s.keys, block, s.depth, False, size, True),
            side(s.values, block, s.columns, True, size, False),
            size,
            held,
            s.ways,
            s.feature != "",
        )
        if found.bytes <= STAGE_BYTES:
            break
    return found
