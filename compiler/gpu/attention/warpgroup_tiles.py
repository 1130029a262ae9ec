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

from collections.abc import Callable, Sequence

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.matmul.ring import (
    BARRIER_BYTES,
    Ring,
    Stage,
    Turn,
    arrive,
    copy_box,
    elected,
    expect,
    wait,
)
from stagefuse.compiler.gpu.teams import WARP
from stagefuse.compiler.gpu.tensor_maps import Loops, TensorMap, are_steps, start_of
from stagefuse.compiler.kernel_ir import Attend, Operand
from stagefuse.dsl.dims import Atom, Expr, const, floordiv, mod, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .exact import ExactAttendWriter
from .forms import FORMS, GROUP_ROWS, forms_of
from .online_softmax import Attending, Fragment

GROUP = 128
"""Threads of a warpgroup."""
PANEL = 64  # elements of a row of a panel
ROW_BYTES = 128
CHUNK = 8  # elements in 16 bytes
STAGES = 2
ALIGNMENT = 1024  # of panels
HIGH = 0x40000040
"""The upper half of a descriptor: swizzle of 128 bytes, 1024 bytes between groups of 8 rows."""
FIRST_TURN = 2
"""The barrier at which the first warpgroup waits for its turn; the others' follow."""
MOST_STEPS = 3
"""Dimensions of the batch in a tensor map."""


@frozen
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
    if depth not in FORMS or columns not in FORMS:
        return False
    queries, keys, values = s
    sides = (Rows(queries, 0, depth, True), Rows(keys, 0, depth, False),
             Rows(values, 0, columns, True))  # fmt: skip
    if not all(x.lies_well(facts) for x in sides):
        return False
    steps = [steps_of(x.operand.offset, loops) for x in sides[1:]]
    if not are_steps([x.strides[0] for x in sides[1:]], facts):
        return False
    return all(
        found is not None
        and len(found) <= MOST_STEPS
        and are_steps([step for *_, step in found], facts)
        for found in steps
    )


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


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class GroupAttending(Attending):
    """One statement being written for warpgroups. `room`: bytes of shared memory of a block. One
    that `stays` for many steps has the results of one beside the keys of the next, and then
    warpgroups do not wait for each other. Queries of warpgroups lie `apart` so many bytes; where
    there is room, they come `ahead` by a warp of their own, else where the results will be."""

    def __init__(self, writer: ExactAttendWriter, s: Attend, kind: str, room: int) -> None:
        forms = forms_of(s.depth, s.columns, (s.score, s.keep))
        self.form = next(form for form in forms if form.rows == s.mr)
        block = self.form.keys
        self.queries = Rows(s.queries, GROUP_ROWS, s.depth, True)
        self.keys, self.values = (
            Rows(s.keys, block, s.depth, False), Rows(s.values, block, s.columns, True)
        )  # fmt: skip
        results = GROUP_ROWS * (s.dst_row.as_int() or 0) * 4
        readers, used = self.form.readers, writer.reserve(0).as_int() or 0
        sizes = [STAGES * self.keys.bytes, STAGES * self.values.bytes]
        queries = readers * self.queries.bytes
        barriers = (4 * STAGES + 2) * BARRIER_BYTES
        first = _aligned(used + barriers)
        self.stays = first + sum(sizes) <= room and results % ALIGNMENT == 0
        self.ahead = self.stays and first + sum(sizes) + queries <= room
        self.apart = results if self.stays and not self.ahead else self.queries.bytes
        if not self.stays:
            first = queries
            used = first + sum(sizes)
        if self.ahead:
            sizes.append(queries)
        super().__init__(writer, s, kind, block, 0)
        total = first + sum(sizes) + (0 if self.stays else barriers)
        writer.reserve(max(total - (writer.reserve(0).as_int() or 0), 0))
        self.warp = floordiv(sym("thread"), 32)
        self.code.tables.add("aligned shared")
        found = []
        for size, stages in zip(sizes, (STAGES, STAGES, 1), strict=False):
            found.append(Ring(writer, const(first), stages, size // stages, 1, const(used)))
            first, used = first + size, used + 2 * stages * BARRIER_BYTES
        self.key_ring, self.value_ring, *more = self.rings = found
        if self.ahead:
            (self.query_ring,) = more
            self.ring = self.query_ring.start

    # Order

    def by_roles(
        self,
        each_step: Callable[[Callable[[], None]], None],
        multiply: Callable[[], None],
        wide: bool,
    ) -> None:
        """All steps of the block. `each_step` writes what it is given for each of them, `multiply`
        a step of those that do so; `wide`: steps are counted in 64 bits."""
        code, thread, readers = self.code, self.w.symbols["thread"], self.form.readers
        for ring in self.rings:
            ring.prepare(thread.compare("eq", 0), readers * GROUP // WARP)
        multiplies = code.label("multiplies")
        few, many = self.form.wide if wide else self.form.registers
        code.branch_if(thread.compare("lt", readers * GROUP), multiplies)
        with code.branch_scope(), self.w.scope():
            code.line(f"setmaxnreg.dec.sync.aligned.u32 {few};")
            self.begin_to_bring(thread - readers * GROUP, each_step)
            code.branch("$end")
        code.start(multiplies)
        code.line(f"setmaxnreg.inc.sync.aligned.u32 {many};")
        self.key_turn, self.value_turn = (
            ring.turn(filling=False) for ring in (self.key_ring, self.value_ring)
        )
        if self.ahead:
            self.query_turn = self.query_ring.turn(filling=False)
        self.read = code.variable("i32", self.value_ring.barriers)  # the values read last
        self.lead = (thread & (WARP - 1)).compare("eq", 0)
        group = self.w.index(floordiv(sym("thread"), GROUP), "i32")
        self.is_last = group.compare("eq", readers - 1)
        self.turn = group + FIRST_TURN
        self.next_turn = self.is_last.select(code.const(FIRST_TURN, "i32"), self.turn + 1)
        if self.form.turns:
            code.line(f"{code.guarded(self.is_last)}bar.arrive {FIRST_TURN}, {2 * GROUP};")
        each_step(multiply)
        if self.form.turns:  # the last one's last turn is followed by none
            first = group.compare("eq", 0)
            code.line(f"{code.guarded(first)}bar.sync {FIRST_TURN}, {2 * GROUP};")

    def span(self) -> tuple[Expr, Expr, Value, Value]:
        """The first block of keys and the one behind the last, also as values."""
        s, w = self.s, self.w
        first = floordiv(s.lo, self.block, w.facts)
        behind = floordiv(s.hi + (self.block - 1), self.block, w.facts)
        return first, behind, w.index(first, "i32"), w.index(behind, "i32")

    # Those that copy

    def begin_to_bring(
        self, thread: Value, each_step: Callable[[Callable[[], None]], None]
    ) -> None:
        """One thread brings keys and values, the warp after its own queries ahead."""
        code, w = self.code, self.w
        keys = code.label("keys")
        code.branch_if(thread.compare("lt", WARP), keys)
        if self.ahead:
            code.branch_if(thread.compare("lt", 2 * WARP), "$end", holds=False)
            with code.branch_scope(), w.scope():
                self.query_turn = self.query_ring.turn(filling=True)
                with w.named(helper=(thread - WARP, const(0), const(WARP - 1))):
                    each_step(lambda: self.bring_ahead((thread - WARP).compare("eq", 0)))
        code.branch("$end")
        code.start(keys)
        with code.branch_scope(), w.scope():
            code.branch_if(elected(code), "$end", holds=False)
            self.maps = [self.map(side) for side in (self.keys, self.values)]
            self.turns = [ring.turn(filling=True) for ring in (self.key_ring, self.value_ring)]
            each_step(self.bring_all)

    def bring_ahead(self, lead: Value) -> None:
        """The queries of a tile, as soon as those before are not needed any more."""
        code = self.code
        _, _, start, end = self.span()
        skip = code.label("none")
        code.branch_if(start.compare("lt", end), skip, holds=False)
        with code.branch_scope(), self.w.scope():
            stage = self.query_turn.now()
            wait(code, stage.empty, stage.parity)
            for group in range(self.form.readers):
                self.copy_queries(sym("helper"), WARP, const(group))
            code.line("cp.async.wait_all;")
            code.line("fence.proxy.async.shared::cta;")
            code.line("bar.warp.sync 0xffffffff;")
            arrive(code, stage.full, lead)
            self.query_turn.step(stage)
        code.start(skip)

    def bring_all(self) -> None:
        """Keys and values of each block, the keys of the next one before the values."""
        code = self.code
        _, _, start, end = self.span()
        block = code.variable("i32", start)
        head, over = code.label("bring"), code.label("brought")
        with code.loop_scope(), self.w.scope():
            code.start(head)
            now = Value(code, block.text, "i32", code.depth)
            code.branch_if(now.compare("le", end), over, holds=False)
            for side, map, turn, late in zip(
                (self.keys, self.values), self.maps, self.turns, (0, 1), strict=True
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

    def write(self) -> None:
        code, w = self.code, self.w
        first, behind, start, end = self.span()
        self.begin_sums()
        zero = code.const(0.0, "float")
        self.scored = [code.variable("float", zero) for _ in range(self.block // 2)]
        some, done = start.compare("lt", end), code.label("attended")
        code.branch_if(some, done, holds=False)
        if self.ahead:
            queries = self.query_turn.now()
            wait(code, queries.full, queries.parity)
        else:
            self.bring_queries()
        with code.branch_scope(), w.scope():
            self.wait_for_turn()
            stage = self.score()
            self.end_turn()
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
        if self.ahead:
            arrive(code, queries.empty, self.lead)
            self.query_turn.step(queries)
        with code.branch_scope(), w.scope():
            code.line("wgmma.wait_group.sync.aligned 0;")
            arrive(code, self.read, self.lead & end.compare("gt", start + 1))
            self.add_values(self.ready())
            code.line("wgmma.wait_group.sync.aligned 0;")
            arrive(code, self.read, self.lead)
        code.start(done)
        self.finish(some)

    def one_block(self, later: Value) -> None:
        """Scores of a block, and the values of the block before it. `later`: it is not the second
        one."""
        code = self.code
        code.line("wgmma.wait_group.sync.aligned 0;")
        arrive(code, self.read, self.lead & later)
        weights = self.ready()
        self.wait_for_turn()
        stage = self.score()
        self.add_values(weights)
        self.end_turn()
        code.line("wgmma.wait_group.sync.aligned 1;")
        arrive(code, stage.empty, self.lead)
        self.weigh(self.fragments())

    def wait_for_turn(self) -> None:
        """Warpgroups start the products of a block one after the other, so that each takes its
        exponentials while the others' products are under way."""
        if self.form.turns:
            self.code.line(f"bar.sync {self.turn.text}, {2 * GROUP};")

    def end_turn(self) -> None:
        """Lets the next warpgroup go on, after the last one the first."""
        if self.form.turns:
            self.code.line(f"bar.arrive {self.next_turn.text}, {2 * GROUP};")

    def bring_queries(self) -> None:
        """Each warpgroup brings its queries; those that are not there become zeros."""
        code = self.code
        thread, group = mod(sym("thread"), GROUP), floordiv(sym("thread"), GROUP)
        self.copy_queries(thread, GROUP, group)
        code.line("cp.async.wait_all;")
        code.line("fence.proxy.async.shared::cta;")
        self.w.barrier()

    def copy_queries(self, lane: Expr, lanes: int, group: Expr) -> None:
        """Starts to copy a warpgroup's queries by so many lanes."""
        w, code, side = self.w, self.code, self.queries
        wide = side.features // CHUNK
        down = max(lanes // wide, 1)
        chunk, row = mod(lane, wide), floordiv(lane, wide)
        memory = w.memory[side.operand.buffer]
        left = w.index(self.s.rows - group * GROUP_ROWS - row, "i32")
        whole, nothing = code.const(16, "i32"), code.const(0, "i32")
        start = group * self.apart + floordiv(chunk, CHUNK) * side.panel + row * ROW_BYTES
        for n in range(side.count // down):
            key = w.index(mod(row + n * down, 8), "i32")
            inside = w.index(mod(chunk, CHUNK), "i32") ^ key
            at = self.ring + w.index(start, "i32") + inside.shl(4)
            size = left.compare("gt", n * down).select(whole, nothing)
            place = side.place(group * GROUP_ROWS + row + n * down, chunk * CHUNK)
            source = w.address(memory, (place, None))
            code.line(
                f"cp.async.cg.shared.global [{at.text}+{n * down * ROW_BYTES}], {source}, 16, "
                f"{size.text};"
            )

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
        group = w.index(floordiv(sym("thread"), GROUP), "i32")
        left = self.ring + group * self.apart
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
