"""Attention by Hopper's warpgroup instructions, of operands in 16 bits.

Each warpgroup of a block has 64 rows of queries. Queries, keys and values lie in shared memory in
panels of 64 elements, rows of 128 bytes whose chunks of 16 are exchanged by the row's number (the
128-byte swizzle of PTX ISA 9.7.15.5); weights are multiplied from registers, where the scores came
(Shah and others, "FlashAttention-3", 2024). While a warpgroup takes the exponentials of a block of
keys, the products of the block before with its values are under way. So that ptxas leaves them
under way, the loop turns between the exponentials and the wait for those products.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagefuse.compiler.kernel_ir import Attend, Operand
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.facts import Facts

from .attend_exact import ExactAttendWriter
from .attend_weights import Attending, Fragment
from .ir import Value

GROUP_ROWS = 64
PANEL = 64  # elements of a row of a panel
ROW_BYTES = 128
CHUNK = 8  # elements in 16 bytes
SLOTS = 2  # blocks of keys, and of values, that shared memory holds
HIGH = 0x40000040
"""The upper half of a descriptor: swizzle of 128 bytes, 1024 bytes between groups of 8 rows."""
GROUPS = {64: 2, 128: 2, 256: 2}
"""Warpgroups of a block, by elements of its wider heads."""
KEYS = {64: 128, 128: 128, 256: 64}
"""Keys at a time: what registers and shared memory hold."""


def groups_of(depth: int, columns: int) -> int:
    """Warpgroups of a block."""
    return GROUPS[max(depth, columns)]


def takes_groups(s: tuple[Operand, ...], depth: int, columns: int, facts: Facts) -> bool:
    """Whether operands of 16 bits lie as warpgroups take them: heads of whole panels, in rows of
    adjacent elements whose chunks are aligned."""
    if depth not in GROUPS or columns not in GROUPS:
        return False
    queries, keys, values = s
    rows = ((queries.across, queries.along), (keys.along, keys.across),
            (values.across, values.along))  # fmt: skip
    for x, (feature, row) in zip(s, rows, strict=True):
        if x.panel or x.run or feature != const(1):
            return False
        if not all(facts.divides(e, CHUNK) for e in (x.offset, row)):
            return False
    return True


@dataclass(frozen=True)
class Rows:
    """An operand's rows in swizzled panels of shared memory."""

    operand: Operand
    count: int
    features: int
    keyed: bool

    @property
    def bytes(self) -> int:
        return self.count * self.features * 2

    @property
    def panel(self) -> int:
        """Bytes of a panel."""
        return self.count * ROW_BYTES

    def place(self, row: Expr, feature: Expr) -> Expr:
        return self.operand.place(row, feature) if self.keyed else self.operand.place(feature, row)


class GroupAttending(Attending):
    """One statement being written for warpgroups."""

    def __init__(self, writer: ExactAttendWriter, s: Attend, kind: str) -> None:
        block = KEYS[max(s.depth, s.columns)]
        self.queries = Rows(s.queries, s.mr, s.depth, True)
        self.keys = Rows(s.keys, block, s.depth, False)
        self.values = Rows(s.values, block, s.columns, True)
        size = self.queries.bytes + SLOTS * (self.keys.bytes + self.values.bytes)
        super().__init__(writer, s, kind, block, size)
        self.code.tables.add("aligned shared")

    # Order

    def write(self) -> None:
        code, w, s = self.code, self.w, self.s
        first = floordiv(s.lo, self.block, w.facts)
        behind = floordiv(s.hi + (self.block - 1), self.block, w.facts)
        start, end = w.index(first, "i32"), w.index(behind, "i32")
        self.begin_sums()
        zero = code.const(0.0, "float")
        self.scored = [code.variable("float", zero) for _ in range(self.block // 2)]
        some = start.compare("lt", end)
        nothing, done = code.const(0, "i32"), code.label("attended")
        code.branch_if(some, done, holds=False)
        with code.branch_scope(), w.scope():
            self.bring(self.queries, const(0), s.rows, self.ring, None)
            self.bring_keys(first, nothing, None)
            code.line("cp.async.commit_group;")
            more = (start + 1).compare("lt", end)
            self.bring_keys(first + 1, code.const(self.keys.bytes, "i32"), more)
            self.bring_values(first, nothing, None)
            code.line("cp.async.commit_group;")
            self.arrive(1)
            self.score(nothing)
            code.line("wgmma.wait_group.sync.aligned 0;")
            with w.named(**{"kb'": (start, first, first)}):
                self.weigh(self.fragments())
            block = code.variable("i32", start + 1)
            slot = code.variable("i32", code.const(1, "i32"))
        head, over = code.label("keys"), code.label("last")
        with code.loop_scope(), w.scope():
            code.start(head)
            now, at = (Value(code, v.text, "i32", code.depth) for v in (block, slot))
            code.branch_if(now.compare("lt", end), over, holds=False)
            with w.named(**{"kb'": (now, first, behind - 1)}):
                self.step(now, at, end)
            code.write("add.s32", block, block, code.const(1, "i32"))
            code.write("xor.b32", slot, slot, code.const(1, "i32"))
            code.branch(head)
        code.start(over)
        with code.branch_scope(), w.scope():
            code.line("wgmma.wait_group.sync.aligned 0;")
            self.arrive(0)
            weights = self.ready()
            self.add_values(Value(code, slot.text, "i32", code.depth) ^ 1, weights)
            code.line("wgmma.wait_group.sync.aligned 0;")
        code.start(done)
        self.finish(some)

    def step(self, now: Value, at: Value, end: Value) -> None:
        """Scores of block number `now`, in slot `at`, and the values of the block before it."""
        code, before = self.code, at ^ 1
        code.line("wgmma.wait_group.sync.aligned 0;")
        self.arrive(0)
        weights = self.ready()
        self.score(at * self.keys.bytes)
        self.add_values(before, weights)
        self.bring_keys(sym("kb'") + 1, before * self.keys.bytes, (now + 1).compare("lt", end))
        self.bring_values(sym("kb'"), at * self.values.bytes, None)
        code.line("cp.async.commit_group;")
        code.line("wgmma.wait_group.sync.aligned 1;")
        self.weigh(self.fragments())

    def arrive(self, under_way: int) -> None:
        """All lanes' copies, but for so many groups, are there for everyone's products."""
        self.code.line(f"cp.async.wait_group {under_way};")
        self.code.line("fence.proxy.async.shared::cta;")
        self.code.line("bar.sync 0;")

    def fragments(self) -> list[Fragment]:
        here = [Value(self.code, v.text, "float", self.code.depth) for v in self.scored]
        return [here[n : n + 4] for n in range(0, len(here), 4)]

    def ready(self) -> list[Value]:
        """The weights as left operands of products."""
        code = self.code
        return [
            code.emit(f"cvt.rn.{self.kind}x2.f32", "i32", b, a)
            for a, b in zip(self.scored[::2], self.scored[1::2], strict=True)
        ]

    # Copies

    def bring_keys(self, block: Expr, slot: Value, some: Value | None) -> None:
        at = self.ring + self.queries.bytes + slot
        self.bring(self.keys, block * self.block, self.s.hi, at, some)

    def bring_values(self, block: Expr, slot: Value, some: Value | None) -> None:
        at = self.ring + (self.queries.bytes + SLOTS * self.keys.bytes) + slot
        self.bring(self.values, block * self.block, self.s.hi, at, some)

    def bring(self, side: Rows, begin: Expr, end: Expr, target: Value, some: Value | None) -> None:
        """Brings rows from `begin` on; those not below `end` become zeros."""
        w, code, lanes = self.w, self.code, self.w.team.lanes
        wide = side.features // CHUNK
        down = lanes // wide
        chunk, row = mod(sym("lane"), wide), floordiv(sym("lane"), wide)
        inside = w.index(mod(chunk, CHUNK), "i32") ^ w.index(mod(row, 8), "i32")
        start = w.index(floordiv(chunk, CHUNK) * side.panel + row * ROW_BYTES, "i32")
        at = target + start + inside.shl(4)
        left = w.index(end - begin - row, "i32")
        memory = w.memory[side.operand.buffer]
        whole, nothing = code.const(16, "i32"), code.const(0, "i32")
        for n in range(-(-side.count // down)):
            own = some
            if (n + 1) * down > side.count:
                here = w.holds("lt", row + n * down, const(side.count))
                own = here if own is None else own & here
            size = left.compare("gt", n * down).select(whole, nothing)
            source = w.address(memory, (side.place(begin + row + n * down, chunk * CHUNK), None))
            code.line(
                f"{code.guarded(own)}cp.async.cg.shared.global "
                f"[{at.text}+{n * down * ROW_BYTES}], {source}, 16, {size.text};"
            )

    # Products

    def score(self, slot: Value) -> None:
        """Starts the products of queries and the keys in a slot."""
        code, w = self.code, self.w
        group = w.index(floordiv(sym("lane"), 2 * GROUP_ROWS), "i32")
        left = self.ring + group * (GROUP_ROWS * ROW_BYTES)
        right = self.ring + self.queries.bytes + slot
        sums = ", ".join(v.text for v in self.scored)
        code.line("wgmma.fence.sync.aligned;")
        for n, k in enumerate(range(0, self.s.depth, 16)):
            panel, inside = divmod(k, PANEL)
            a = self.descriptor(left + (panel * self.queries.panel + inside * 2), 1)
            b = self.descriptor(right + (panel * self.keys.panel + inside * 2), 1)
            code.line(
                f"wgmma.mma_async.sync.aligned.m64n{self.block}k16.f32.{self.kind}.{self.kind} "
                f"{{{sums}}}, {a.text}, {b.text}, {int(n > 0)}, 1, 1, 0, 0;"
            )
        code.line("wgmma.commit_group.sync.aligned;")

    def add_values(self, slot: Value, weights: list[Value]) -> None:
        """Corrects the sums so far, and starts to add the values in a slot, weighted."""
        code = self.code
        start = self.ring + (self.queries.bytes + SLOTS * self.keys.bytes)
        right = start + slot * self.values.bytes
        sums = ", ".join(v.text for v in self.sums)
        for n, x in enumerate(self.sums):
            code.write("mul.rn.f32", x, x, self.factors[n % 4 // 2])
        code.line("wgmma.fence.sync.aligned;")
        for k in range(0, self.block, 16):
            a = ", ".join(v.text for v in weights[k // 4 :][:4])
            b = self.descriptor(right + k * ROW_BYTES, self.values.panel >> 4)
            code.line(
                f"wgmma.mma_async.sync.aligned.m64n{self.s.columns}k16.f32.{self.kind}."
                f"{self.kind} {{{sums}}}, {{{a}}}, {b.text}, 1, 1, 1, 1;"
            )
        code.line("wgmma.commit_group.sync.aligned;")

    def descriptor(self, address: Value, leading: int) -> Value:
        """Where a matrix lies; `leading`: units of 16 bytes between its panels."""
        code = self.code
        low = ((address & 0x3FFFF).lshr(4)) | (leading << 16)
        found = code.fresh("i64")
        code.write("mov.b64", found, f"{{{low.text}, {code.const(HIGH, 'i32').text}}}")
        return found
