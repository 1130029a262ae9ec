"""Attention by Hopper's warpgroup instructions, of operands in 16 bits, by warps with roles.

Two warpgroups of a block have 64 rows of queries each. Queries, keys and values lie in shared
memory in panels of 64 elements, rows of 128 bytes whose chunks of 16 are exchanged by the row's
number (the 128-byte swizzle of PTX ISA 9.7.15.5); weights are multiplied from registers, where the
scores came (Shah and others, "FlashAttention-3", 2024). One thread of a third warpgroup brings
blocks of keys and of values by tensor copies, each kind into a ring of its own. While a warpgroup
takes the exponentials of a block of keys, its products of the block before with the values are
under way. So that ptxas leaves them under way, the loop turns between the exponentials and the
wait for those products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagefuse.compiler.kernel_ir import Attend, Operand
from stagefuse.dsl.dims import Atom, Expr, const, floordiv, mod, sym
from stagefuse.dsl.facts import Facts

from .attend_exact import ExactAttendWriter
from .attend_weights import Attending, Fragment
from .ir import Value
from .ring import Ring, Stage, Turn, arrive, copy_box, elected, expect, wait
from .tensor_maps import Loops, TensorMap, start_of

GROUP = 128
"""Threads of a warpgroup."""
READERS = 2
"""Warpgroups that multiply."""
GROUP_ROWS = 64
FEW, MANY = 24, 240
"""Registers of a thread that copies, and of one that multiplies: as many as all had before."""
PANEL = 64  # elements of a row of a panel
ROW_BYTES = 128
CHUNK = 8  # elements in 16 bytes
STAGES = 2
ALIGNMENT = 1024  # of panels
HIGH = 0x40000040
"""The upper half of a descriptor: swizzle of 128 bytes, 1024 bytes between groups of 8 rows."""
KEYS = {64: 128, 128: 128, 256: 64}
"""Keys at a time, by elements of the wider heads: what registers and shared memory hold."""
MOST_STEPS = 3
"""Dimensions of the batch in a tensor map."""


@dataclass(frozen=True)
class Rows:
    """An operand in panels of shared memory: `count` rows of `features` elements. `keyed`: rows
    are the first index of the operand."""

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

    @property
    def strides(self) -> tuple[Expr, Expr]:
        """Elements between neighbouring rows, and features, in memory."""
        x = self.operand
        return (x.along, x.across) if self.keyed else (x.across, x.along)

    def place(self, row: Expr, feature: Expr) -> Expr:
        return self.operand.place(row, feature) if self.keyed else self.operand.place(feature, row)

    def lies_well(self, facts: Facts) -> bool:
        """Whether rows are of adjacent elements whose chunks are aligned."""
        row, feature = self.strides
        if self.operand.panel or self.operand.run or feature != const(1):
            return False
        return all(facts.divides(e, CHUNK) for e in (self.operand.offset, row))


def takes_groups(
    s: Sequence[Operand], depth: int, columns: int, loops: Loops, facts: Facts
) -> bool:
    """Whether operands of 16 bits lie as warpgroups take them: heads of whole panels in aligned
    rows, keys and values in steps of the batch."""
    if depth not in KEYS or columns not in KEYS:
        return False
    queries, keys, values = s
    sides = (Rows(queries, 0, depth, True), Rows(keys, 0, depth, False),
             Rows(values, 0, columns, True))  # fmt: skip
    if not all(x.lies_well(facts) for x in sides):
        return False
    steps = [steps_of(x.operand.offset, loops) for x in sides[1:]]
    return all(found is not None and len(found) <= MOST_STEPS for found in steps)


def steps_of(offset: Expr, loops: Loops) -> list[tuple[Expr, Expr, Expr]] | None:
    """The dimensions that an offset moves along with the indices of loops, as (place, extent,
    step); a place is an index, or one divided where several indices share what it finds. None if
    it does not move in steps."""
    found = []
    names = {name for name, _ in loops}
    for name, extent in loops:
        count = shared_by(offset, name) or 1
        whole = offset.substitute({name: sym(name) * count})
        step = whole.coefficient(name)
        if step is None or step.symbols() & names:
            return None
        if step != const(0):
            found.append((floordiv(sym(name), count), floordiv(extent, count), step))
    return found


def shared_by(expr: Expr, name: str) -> int | None:
    """The number that an index is divided by wherever it stands in an expression."""
    found: set[int | None] = set()

    def visit(e: Expr) -> None:
        for monomial, _ in e.terms:
            for atom, _ in monomial:
                if atom == Atom("sym", name):
                    found.add(None)
                elif atom.kind == "//" and atom.args[0].as_symbol() == name:
                    found.add(atom.args[1].as_int())
                else:
                    for arg in atom.args:
                        visit(arg)

    visit(expr)
    return found.pop() if len(found) == 1 else None


class GroupAttending(Attending):
    """One statement being written for warpgroups."""

    def __init__(self, writer: ExactAttendWriter, s: Attend, kind: str) -> None:
        block = KEYS[max(s.depth, s.columns)]
        self.queries = Rows(s.queries, s.mr, s.depth, True)
        self.keys, self.values = (
            Rows(s.keys, block, s.depth, False), Rows(s.values, block, s.columns, True)
        )  # fmt: skip
        starts = [self.queries.bytes]
        for side in (self.keys, self.values):
            size = Ring.bytes_of(STAGES, side.bytes)
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        super().__init__(writer, s, kind, block, starts[-1])
        self.code.tables.add("aligned shared")
        self.key_ring, self.value_ring = (
            Ring(writer, const(start), STAGES, side.bytes)
            for start, side in zip(starts, (self.keys, self.values), strict=False)
        )

    # Order

    def write(self) -> None:
        code, w, s = self.code, self.w, self.s
        thread = w.symbols["lane"]
        for ring in (self.key_ring, self.value_ring):
            ring.prepare(thread.compare("eq", 0), READERS * GROUP // 32)
        first = floordiv(s.lo, self.block, w.facts)
        behind = floordiv(s.hi + (self.block - 1), self.block, w.facts)
        start, end = w.index(first, "i32"), w.index(behind, "i32")
        multiplies = code.label("multiplies")
        code.branch_if(thread.compare("lt", READERS * GROUP), multiplies)
        with code.branch_scope(), w.scope():
            code.line(f"setmaxnreg.dec.sync.aligned.u32 {FEW};")
            code.branch_if(thread.compare("lt", READERS * GROUP + 32), "$end", holds=False)
            code.branch_if(elected(code), "$end", holds=False)
            self.bring_all(start, end)
            code.branch("$end")
        code.start(multiplies)
        code.line(f"setmaxnreg.inc.sync.aligned.u32 {MANY};")
        self.multiply(first, behind, start, end)

    # The thread that copies

    def bring_all(self, start: Value, end: Value) -> None:
        """Keys and values of each block, the keys of the next one before the values."""
        code = self.code
        maps = [self.map(side) for side in (self.keys, self.values)]
        turns = [ring.turn(filling=True) for ring in (self.key_ring, self.value_ring)]
        block = code.variable("i32", start)
        head, over = code.label("bring"), code.label("brought")
        with code.loop_scope(), self.w.scope():
            code.start(head)
            now = Value(code, block.text, "i32", code.depth)
            code.branch_if(now.compare("le", end), over, holds=False)
            for side, map, turn, late in zip(
                (self.keys, self.values), maps, turns, (0, 1), strict=True
            ):
                skip = code.label("none")
                there = (now - late).compare("ge", start) & (now - late).compare("lt", end)
                code.branch_if(there, skip, holds=False)
                with code.branch_scope():
                    self.bring_block(side, map, turn, now - late)
                code.start(skip)
            code.write("add.s32", block, block, code.const(1, "i32"))
            code.branch(head)
        code.start(over)

    def bring_block(self, side: Rows, map: Value, turn: Turn, block: Value) -> None:
        code, w = self.code, self.w
        stage = turn.now()
        wait(code, stage.empty, stage.parity)
        expect(code, stage.full, side.bytes)
        batch = [w.index(place, "i32") for place, _, _ in reversed(self.steps(side))]
        for n in range(side.features // PANEL):
            place = (code.const(n * PANEL, "i32"), block * self.block, *batch)
            copy_box(code, map, place, stage.start + n * side.panel, stage.full)
        turn.step(stage)

    def steps(self, side: Rows) -> list[tuple[Expr, Expr, Expr]]:
        return steps_of(side.operand.offset, self.w.kernel.parallel) or []

    def map(self, side: Rows) -> Value:
        """The tensor map of keys or values."""
        s, steps = self.s, self.steps(side)
        assert s.extent is not None
        x, (row, _) = side.operand, side.strides
        return self.w.tensor_map(
            TensorMap(
                x.buffer, start_of(x.offset, self.w.kernel.parallel),
                (*(extent for _, extent, _ in steps), s.extent, const(side.features)),
                (*(step for _, _, step in steps), row),
                (*(1 for _ in steps), side.count, PANEL),
            )
        )  # fmt: skip

    # Those that multiply

    def multiply(self, first: Expr, behind: Expr, start: Value, end: Value) -> None:
        code, w = self.code, self.w
        self.begin_sums()
        zero = code.const(0.0, "float")
        self.scored = [code.variable("float", zero) for _ in range(self.block // 2)]
        self.key_turn, self.value_turn = (
            ring.turn(filling=False) for ring in (self.key_ring, self.value_ring)
        )
        self.read = code.variable("i32", self.value_ring.barriers)  # the values read last
        self.lead = (w.symbols["lane"] & 31).compare("eq", 0)
        some, done = start.compare("lt", end), code.label("attended")
        code.branch_if(some, done, holds=False)
        self.bring_queries()
        with code.branch_scope(), w.scope():
            stage = self.score()
            code.line("wgmma.wait_group.sync.aligned 0;")
            arrive(code, stage.empty, self.lead)
            with w.named(**{"kb'": (start, first, first)}):
                self.weigh(self.fragments())
        block = code.variable("i32", start + 1)
        head, over = code.label("keys"), code.label("last")
        with code.loop_scope(), w.scope():
            code.start(head)
            now = Value(code, block.text, "i32", code.depth)
            code.branch_if(now.compare("lt", end), over, holds=False)
            with w.named(**{"kb'": (now, first, behind - 1)}):
                self.one_block(now.compare("gt", start + 1))
            code.write("add.s32", block, block, code.const(1, "i32"))
            code.branch(head)
        code.start(over)
        with code.branch_scope(), w.scope():
            code.line("wgmma.wait_group.sync.aligned 0;")
            self.add_values(self.ready())
            code.line("wgmma.wait_group.sync.aligned 0;")
        code.start(done)
        self.finish(some)

    def one_block(self, later: Value) -> None:
        """Scores of a block, and the values of the block before it. `later`: it is not the second
        one."""
        code = self.code
        code.line("wgmma.wait_group.sync.aligned 0;")
        arrive(code, self.read, self.lead & later)
        weights = self.ready()
        stage = self.score()
        self.add_values(weights)
        code.line("wgmma.wait_group.sync.aligned 1;")
        arrive(code, stage.empty, self.lead)
        self.weigh(self.fragments())

    def bring_queries(self) -> None:
        """Each reader brings a part of the queries; those that are not there become zeros."""
        w, code, side, lanes = self.w, self.code, self.queries, self.w.team.lanes
        wide = side.features // CHUNK
        down = lanes // wide  # a multiple of 8: a lane's chunks are exchanged alike
        chunk, row = mod(sym("lane"), wide), floordiv(sym("lane"), wide)
        inside = w.index(mod(chunk, CHUNK), "i32") ^ w.index(mod(row, 8), "i32")
        high = w.index(floordiv(chunk, CHUNK) * side.panel + row * ROW_BYTES, "i32")
        at = self.ring + high + inside.shl(4)
        memory = w.memory[side.operand.buffer]
        left = w.index(self.s.rows - row, "i32")
        whole, nothing = code.const(16, "i32"), code.const(0, "i32")
        for n in range(side.count // down):
            size = left.compare("gt", n * down).select(whole, nothing)
            source = w.address(memory, (side.place(row + n * down, chunk * CHUNK), None))
            code.line(
                f"cp.async.cg.shared.global [{at.text}+{n * down * ROW_BYTES}], {source}, 16, "
                f"{size.text};"
            )
        code.line("cp.async.commit_group;")
        code.line("cp.async.wait_group 0;")
        code.line("fence.proxy.async.shared::cta;")
        w.barrier()

    def fragments(self) -> list[Fragment]:
        here = [Value(self.code, v.text, "float", self.code.depth) for v in self.scored]
        return [here[n : n + 4] for n in range(0, len(here), 4)]

    def ready(self) -> list[Value]:
        """The weights as left operands of products."""
        return [
            self.code.emit(f"cvt.rn.{self.kind}x2.f32", "i32", b, a)
            for a, b in zip(self.scored[::2], self.scored[1::2], strict=True)
        ]

    def score(self) -> Stage:
        """Starts the products of queries and the next keys; where those lie."""
        code, w = self.code, self.w
        stage = self.key_turn.now()
        group = w.index(floordiv(sym("lane"), GROUP), "i32")
        left = self.ring + group * (GROUP_ROWS * ROW_BYTES)
        sums = ", ".join(v.text for v in self.scored)
        wait(code, stage.full, stage.parity)
        code.line("wgmma.fence.sync.aligned;")
        for n, k in enumerate(range(0, self.s.depth, 16)):
            number, inside = divmod(k, PANEL)
            a = self.descriptor(left + (number * self.queries.panel + inside * 2), 1)
            b = self.descriptor(stage.start + (number * self.keys.panel + inside * 2), 1)
            code.line(
                f"wgmma.mma_async.sync.aligned.m64n{self.block}k16.f32.{self.kind}.{self.kind} "
                f"{{{sums}}}, {a.text}, {b.text}, {int(n > 0)}, 1, 1, 0, 0;"
            )
        code.line("wgmma.commit_group.sync.aligned;")
        self.key_turn.step(stage)
        return stage

    def add_values(self, weights: list[Value]) -> None:
        """Corrects the sums so far, and starts to add the next values, weighted."""
        code, stage = self.code, self.value_turn.now()
        sums = ", ".join(v.text for v in self.sums)
        wait(code, stage.full, stage.parity)
        for n, x in enumerate(self.sums):
            code.write("mul.rn.f32", x, x, self.factors[n % 4 // 2])
        code.line("wgmma.fence.sync.aligned;")
        for k in range(0, self.block, 16):
            a = ", ".join(v.text for v in weights[k // 4 :][:4])
            b = self.descriptor(stage.start + k * ROW_BYTES, self.values.panel >> 4)
            code.line(
                f"wgmma.mma_async.sync.aligned.m64n{self.s.columns}k16.f32.{self.kind}."
                f"{self.kind} {{{sums}}}, {{{a}}}, {b.text}, 1, 1, 1, 1;"
            )
        code.line("wgmma.commit_group.sync.aligned;")
        code.set(self.read, stage.empty)
        self.value_turn.step(stage)

    def descriptor(self, address: Value, leading: int) -> Value:
        """Where a matrix lies; `leading`: units of 16 bytes between its panels."""
        code = self.code
        low = ((address & 0x3FFFF).lshr(4)) | (leading << 16)
        found = code.fresh("i64")
        code.write("mov.b64", found, f"{{{low.text}, {code.const(HIGH, 'i32').text}}}")
        return found
