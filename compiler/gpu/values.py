"""Values of kernel IR in registers: each is computed once where it is first needed.

Loads of what the kernel never writes are reused wherever their address is the same, so that a row
that several loops read comes from memory once. `active` is a predicate under which alone memory
may be touched: lanes beyond the end of a loop go along with the others. A loop may handle several
adjacent elements per lane (`Group`); accesses that are contiguous and aligned are then one vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stagefuse.compiler.cpu.values import parts
from stagefuse.compiler.evaluate import Evaluator
from stagefuse.compiler.kernel_ir import (
    Checked,
    Const,
    Index,
    Kernel,
    Load,
    Op,
    TileProduct,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.expressions import symbols_of
from stagefuse.dsl.dims import Expr, const, minimum
from stagefuse.dsl.facts import Facts

from . import packed, scalars
from .index import IndexWriter
from .ir import Value
from .lines import Scope as LineScope
from .memory import Group, Memory, Place, Scope

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


class ValueWriter(IndexWriter, Evaluator[Value]):
    """The body of a kernel, as far as its values go."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        IndexWriter.__init__(self, facts)
        Evaluator.__init__(self, kernel)
        self.memory: dict[str, Memory] = {}
        self.scopes: list[Scope] = [Scope()]
        self.active: Value | None = None
        self.group: Group | None = None
        self.fetched: dict[tuple[object, ...], tuple[Value, ...]] | None = None
        """What was read while nothing is stored, or None where something may be."""
        self.under_way: dict[tuple[str, ...], tuple[Value, ...]] = {}
        self.together = 1  # positions from a multiple of this on share what is the same for them
        self.lines: dict[int, int] = {}  # of the source, by unique value
        self.structure: list[str] = []
        """How its products and its attention are computed, in words, as they are written."""
        self.status: Value | None = None
        self.noted: list[tuple[Value, int, Value]] | None = None
        """Positions out of range that are to be noted later, and where they are."""
        self._strides: dict[str, tuple[Expr, ...]] = {}
        self._offsets: dict[int, tuple[Sequence[KernelValue], Expr]] = {}  # by identity of indices
        self._starts: dict[tuple[str, Expr], tuple[Value, object]] = {}  # and their scopes

    # Scopes

    @contextmanager
    def scope(self, known: Scope | None = None) -> Iterator[None]:
        self.scopes.append(Scope() if known is None else known)
        try:
            yield
        finally:
            self.scopes.pop()

    @contextmanager
    def when(self, condition: Value | None) -> Iterator[None]:
        """Memory is touched only where a condition holds too."""
        before = self.active
        if condition is not None and condition.known != 1:
            self.active = condition if before is None else before & condition
        try:
            yield
        finally:
            self.active = before

    @contextmanager
    def by(self, lane: Value | None) -> Iterator[None]:
        """Memory is touched by a lane for others, where there is such a condition: what it read
        they do not have, so that it is not known after."""
        with self.when(lane), self.scope(self.scopes[-1] if lane is None else None):
            yield

    # Values

    def _constant(self, value: Const) -> Value:
        return self.code.const(value.value, scalars.REGISTER[value.dtype.compute.name])

    def _position(self, expr: Expr) -> Value:
        return self.index(expr, "i64")

    def _needed(self, value: KernelValue) -> tuple[KernelValue, ...]:
        """What is computed before a value: not what only a guarded load may look at, and not
        positions, which are summed and compared as expressions."""
        if isinstance(value, Load):
            return value.guard or tuple(i for i in value.indices if not isinstance(i, Index))
        if isinstance(value, Op) and value.fn in COMPARISONS:
            return value.args if None in map(_as_expr, value.args) else ()
        return parts(value)

    def _compute(self, value: KernelValue) -> Value:
        before = self.code.loc
        self.code.loc = self.lines.get(id(value), before)
        found = self._evaluated(value)
        self.code.loc = before
        return found

    def _evaluated(self, value: KernelValue) -> Value:
        if isinstance(value, Load):
            return self._load(value)
        if isinstance(value, Checked):
            return self._checked(value)
        assert isinstance(value, Op)
        if len(value.args) == 2 and value.args[0].dtype.name == "i64":
            small = self._small_comparison(value)
            if small is not None:
                return small
        args = [self.value(a) for a in value.args]
        self.code.contract = True
        if value.fn == "cast":
            return scalars.convert(self.code, args[0], value.args[0].dtype, value.dtype)
        if value.fn == "round_to":
            return scalars.round_to(self.code, args[0], value.to or value.dtype)
        if value.to is not None:
            return scalars.SHORT[value.fn](self.code, args[0])
        return scalars.apply(self.code, value.fn, args, value.args[-1].dtype.compute)

    def _small_comparison(self, op: Op) -> Value | None:
        """A comparison of index expressions, in 32 bits if they fit."""
        a, b = map(_as_expr, op.args)
        if op.fn not in COMPARISONS or a is None or b is None:
            return None
        if self.group is not None and self.is_common(op.fn, a - b, self.group):
            with self.binding(**{**self.bound, self.group.name: self.group.first}):
                return self.holds(op.fn, a, b)
        return self.holds(op.fn, a, b)

    def holds(self, relation: str, a: Expr, b: Expr) -> Value:
        """A comparison of expressions."""
        x, y = self.resolve(a), self.resolve(b)
        kind = "i32" if self.is_small(x) and self.is_small(y) else "i64"
        return self._value(x, kind).compare(relation, self._value(y, kind))

    def all_of(self, conditions: Sequence[KernelValue]) -> Value | None:
        found: Value | None = None
        for condition in conditions:
            value = self.value(condition)
            found = value if found is None else found & value
        return found

    def _checked(self, checked: Checked) -> Value:
        """The position, after noting one out of range."""
        if checked.proved:
            return self.value(checked.value)
        code = self.code
        given, extent = self.value(checked.value), self.index(checked.extent, "i64")
        place = given.compare("lt", 0).select(given + extent, given)
        if checked.length != const(1):
            extent = self.index(checked.extent - checked.length + 1, "i64")
        inside = place.compare("lt", extent, unsigned=True) & extent.compare("gt", 0)
        wrong = inside ^ 1
        self.report(wrong if self.active is None else wrong & self.active, checked.site + 1, given)
        return inside.select(place, code.const(0, "i64"))

    @contextmanager
    def choosing(self, s: TileProduct, row: Expr | None = None) -> Iterator[None]:
        """Inside, names stand for the positions from data that a product takes its matrices from,
        or, where a row is given, for those of that row or the last one."""
        found: dict[str, tuple[Value, Expr, Expr]] = {}
        place = {} if row is None else {"i": self.resolve(minimum(row, s.rows - 1))}
        with self.scope(), self.binding(**{**self.bound, **place}):
            for name, value in zip(s.chosen, s.positions, strict=True):
                if ("i" in symbols_of([value])) != (row is not None):
                    continue
                assert isinstance(value, Checked)
                position = self.value(value)
                if self.is_small(self.resolve(value.extent)):
                    position = position.to("trunc", "i32")
                found[name] = position, const(0), value.extent - 1
        if not found:
            yield
            return
        with self.named(**found):
            yield

    @contextmanager
    def noting_late(self) -> Iterator[None]:
        """Inside, where nothing branches, positions are noted at the end and each once, so that
        no load waits for a branch."""
        before, self.noted = self.noted, []
        yield
        found, self.noted = self.noted, before
        if not found:
            return
        some = found[0][0]
        for wrong, _, _ in found[1:]:
            some = some | wrong
        after = self.code.label("inside")
        if len(found) > 1:
            self.code.branch_if(some, after, holds=False)
        with self.code.branch_scope():
            for note in found:
                self.report(*note)
        self.code.start(after)

    def report(self, wrong: Value, site: int, given: Value) -> None:
        """Notes a position in the status unless one is noted already."""
        code = self.code
        assert self.status is not None
        if self.noted is not None:
            if all((wrong, site, given) != n for n in self.noted):
                self.noted.append((wrong, site, given))
            return
        after = code.label("fine")
        code.branch_if(wrong, after, holds=False)
        before = code.fresh("i64")
        code.line(f"atom.global.cas.b64 {before.text}, [{self.status.text}], 0, {site};")
        first = code.fresh("i1")
        code.write("setp.eq.s64", first, before, code.const(0, "i64"))
        code.line(f"@{first.text} st.global.b64 [{self.status.text}+8], {given.text};")
        code.start(after)

    # Memory

    def _load(self, load: Load) -> Value:
        memory = self.memory[load.buffer]
        if not load.guard:
            return self._read(memory, self.place(memory, load.indices), 0, self._even(load))
        condition = self.all_of(load.guard)
        with self.when(condition), self.scope():
            place = self.place(memory, load.indices)
            found = self._read(memory, place, load.fill, self._even(load))
        fill = self.code.const(load.fill, found.type)
        if condition is None or (load.fill == 0 and str(load.fill) != "-0.0"):
            return found
        return condition.select(found, fill)

    def _even(self, load: Load) -> bool:
        """Whether a load's guards and what it adds from data are the same for a group."""
        if self.group is None:
            return False
        group, added = self.group, (i for i in load.indices if not isinstance(i, Index))
        return all(group.name not in self.names(self._unique(v)) for v in added) and all(
            self._holds_for_all(guard, group) for guard in load.guard
        )

    def _holds_for_all(self, condition: KernelValue, group: Group) -> bool:
        """Whether a condition is the same for a group."""
        if group.name not in self.names(self._unique(condition)):
            return True
        if not isinstance(condition, Op):
            return False
        if condition.fn in ("and", "or", "not"):
            return all(self._holds_for_all(a, group) for a in condition.args)
        exprs = [_as_expr(a) for a in condition.args]
        if len(exprs) != 2 or exprs[0] is None or exprs[1] is None:
            return False
        return self.is_common(condition.fn, exprs[0] - exprs[1], group)

    def strides(self, memory: Memory) -> tuple[Expr, ...]:
        if memory.name not in self._strides:
            found, step = [], const(1)
            for extent in reversed(memory.shape):
                found.append(step)
                step = step * extent
            self._strides[memory.name] = tuple(reversed(found))
        return self._strides[memory.name]

    def place(self, memory: Memory, indices: Sequence[KernelValue]) -> Place:
        """The position of an element: symbolic offsets are added up before they are written."""
        symbolic, offset = self.symbolic(memory, indices), None
        for value, stride in zip(indices, self.strides(memory), strict=True):
            if not isinstance(value, Index):
                part = self.value(value) * self.index(stride, "i64")
                offset = part if offset is None else offset + part
        return symbolic, offset

    def symbolic(self, memory: Memory, indices: Sequence[KernelValue]) -> Expr:
        """The sum of the offsets that are expressions; the kernel keeps its indices alive."""
        if id(indices) not in self._offsets:
            total = const(0)
            for value, stride in zip(indices, self.strides(memory), strict=True):
                if isinstance(value, Index):
                    total = total + value.expr * stride
            self._offsets[id(indices)] = indices, total
        return self._offsets[id(indices)][1]

    def _read(self, memory: Memory, place: Place, fill: float, even: bool) -> Value:
        if memory.space == "registers":
            return self._read_cell(memory, place)
        at, count, number = self._access_of(memory, place, even)
        raw = self._access(memory, at, count)[number]
        return scalars.from_memory(self.code, raw, memory.dtype)

    def _access_of(self, memory: Memory, place: Place, even: bool) -> tuple[str, int, int]:
        """What reads an element: the address, how many elements, and which of them it is."""
        vector = self.vector_of(memory, place) if even else None
        if vector is not None and self.group is not None:
            part = self.group.part(memory.dtype.itemsize)
            return self.address(memory, (vector, place[1])), part.width, part.at
        if self.group is not None and self.divides(self.group.width, self.group.first):
            # what is the same for all elements of the group is read once
            place = self.without_carry(self.resolve(place[0]), self.group.width), place[1]
        return self.address(memory, place), 1, 0

    def vector_of(self, memory: Memory, place: Place) -> Expr | None:
        """The position of a group's first element, if the group is one aligned vector, or of the
        part of it that is one here."""
        if self.group is None:
            return None
        group, (expr, offset) = self.group.part(memory.dtype.itemsize), place
        start = self.facts.replaced(expr, {**self.bound, group.name: group.first})
        if expr.coefficient(group.name) != const(1) and not self._is_row(expr, start, group):
            return None
        if not self.divides(group.width, start):
            return None
        if offset is not None:  # from data: a whole number of rows
            strides = [s for s in self.strides(memory) if s != const(1)]
            if not all(self.divides(group.width, s) for s in strides):
                return None
        return start

    def _is_row(self, expr: Expr, start: Expr, group: Group) -> bool:
        """Whether the last element of a group is as far from the first as it is within it: with
        divisors that the group's width divides, so are those between."""
        last = group.width - 1
        end = self.facts.replaced(expr, {**self.bound, group.name: group.first + last})
        return self.without_carry(end, group.width) - start == const(last)

    def _forget_bounds(self) -> None:
        super()._forget_bounds()
        self._starts = {}

    def address(self, memory: Memory, place: Place) -> str:
        """The text of an address: loops outside first, the constant part as an offset."""
        code, offset = self.code, place[1]
        expr = self.resolve(place[0])
        if self.together > 1:
            expr = self.without_carry(expr, self.together)
        size = memory.dtype.itemsize
        assert memory.start is not None
        wide = memory.start.type
        fixed = expr.terms[0][1] if expr.terms and not expr.terms[0][0] else 0
        at = self._moving_part(memory.start, expr - fixed, size)
        if offset is not None:
            at = at + (offset * size).to("trunc", wide)
        fixed *= size
        if abs(fixed) > 1 << 30:
            at, fixed = at + code.const(fixed, wide), 0
        return f"[{at.text}+{fixed}]" if fixed else f"[{at.text}]"

    def _moving_part(self, start: Value, expr: Expr, size: int) -> Value:
        """An address without its constant part, as long as where it was computed is open."""
        scopes, key = self.code.scopes, (start.text, expr)
        known = self._starts.get(key)
        if known is not None:
            at, scope = known
            if at.depth < len(scopes) and scopes[at.depth] is scope:
                return at
        at = start
        for part in self._by_depth(expr):
            for some in self._by_width(part, start.type):
                at = at + self._scaled(some, size, start.type)
        self._starts[key] = at, scopes[at.depth]
        return at

    def _scaled(self, expr: Expr, size: int, wide: str) -> Value:
        if wide == "i32":
            return self._value(expr, "i32") * size
        if not self.is_small(expr):
            return self._value(expr * size, "i64")
        value = self._value(expr, "i32")
        if size == 1 or value.known is not None:
            return (value.to("sext", "i64")) * size
        return self.code.pure("mul.wide.s32", "i64", value, self.code.const(size, "i32"))

    def _by_width(self, expr: Expr, wide: str) -> list[Expr]:
        """Terms that take 64 bits, and those that do not, which are scaled and added at once."""
        if wide == "i32" or self.is_small(expr):
            return [expr]
        terms = [Expr((t,)) for t in expr.terms]
        small = sum((t for t in terms if self.is_small(t)), const(0))
        return [e for e in (expr - small, small) if e != const(0)]

    def _by_depth(self, expr: Expr) -> list[Expr]:
        """An expression's terms, those that change in the same loop together."""
        groups: dict[int, list[object]] = {}
        for monomial, coefficient in expr.terms:
            names = [name for atom, _ in monomial for name in atom.symbols]
            depth = max([self.symbols[n].depth for n in names], default=0)
            groups.setdefault(depth, []).append((monomial, coefficient))
        return [Expr(tuple(groups[d])) for d in sorted(groups)]  # type: ignore[arg-type]

    def _access(self, memory: Memory, at: str, count: int) -> tuple[Value, ...]:
        """Elements read from an address, in the types they are loaded in."""
        code = self.code
        key = self._key_of(memory, at, count)
        scope = self._reads(memory, key)
        if scope is not None:
            return tuple(scope.known[(*key, str(n))] for n in range(count))
        if self.fetched is not None and not memory.constant:
            place = (*key, code.scopes[-1])
            if place not in self.fetched:
                self.fetched[place] = self._loaded(memory, at, count)
            return self.fetched[place]
        found = self._loaded(memory, at, count)
        if memory.constant:
            level = max(v.depth for v in found)
            code.scopes[level].known.update({(*key, str(n)): v for n, v in enumerate(found)})
        return found

    def _reads(self, memory: Memory, key: tuple[str, ...]) -> LineScope | None:
        """The scope that knows what an access reads."""
        scopes = self.code.scopes if memory.constant else []
        return next((scope for scope in scopes if (*key, "0") in scope.known), None)

    def _key_of(self, memory: Memory, at: str, count: int) -> tuple[str, ...]:
        return "load", memory.name, at, str(count), self.active.text if self.active else ""

    def _loaded(self, memory: Memory, at: str, count: int) -> tuple[Value, ...]:
        words = self.under_way.get(self._key_of(memory, at, count))
        words = words or self.read_words(memory, at, count)
        if not packed.is_packed(memory.dtype, count):
            return words
        return packed.unpacked(self.code, words, memory.dtype)

    def read_words(
        self, memory: Memory, at: str, count: int, into: tuple[Value, ...] = ()
    ) -> tuple[Value, ...]:
        """The registers that elements from an address are loaded into: given or new ones."""
        code, dtype = self.code, memory.dtype
        is_packed = packed.is_packed(dtype, count)
        kind = "i32" if is_packed else scalars.RAW[dtype.name]
        number = count * dtype.itemsize // 4 if is_packed else count
        found = into or tuple(code.fresh(kind) for _ in range(number))
        if self.active is not None and self.active.known != 1:
            for register in found:
                code.set(register, code.const(0, kind))
        space = "global.nc" if memory.constant else memory.space
        name = "b32" if is_packed else scalars.ACCESS[dtype.name]
        form = f"ld.{space}{packed.suffix(number)}.{name}"
        code.write(form, packed.listed(found), at, guard=self.active)
        return found

    def write(self, memory: Memory, at: str, values: Sequence[Value]) -> None:
        """Stores adjacent elements."""
        code = self.code
        raw = [self._held(scalars.to_memory(code, v, memory.dtype)) for v in values]
        name = scalars.ACCESS[memory.dtype.name].replace("s", "b", 1)
        if packed.is_packed(memory.dtype, len(raw)) or packed.are_clamped(code, raw, memory.dtype):
            raw, name = packed.packed(code, raw, memory.dtype), "b32"
        form = f"st.{memory.space}{packed.suffix(len(raw))}.{name}"
        code.write(form, at, packed.listed(raw), guard=self.active)

    def _held(self, value: Value) -> Value:
        """The value in a register."""
        if value.text[0] == "%":
            return value
        bits = {"half": "b16", "float": "f32", "double": "f64", "i64": "b64"}.get(value.type, "b32")
        return self.code.pure(f"mov.{bits}", value.type, value)

    # Scratch in registers

    def _read_cell(self, memory: Memory, place: Place) -> Value:
        kind = scalars.REGISTER[memory.dtype.compute.name]
        cell = memory.cells.get(self.resolve(place[0]))
        if cell is None:
            return self.code.const(0, kind)
        return self.code.variable(kind, cell)

    def write_cell(self, memory: Memory, place: Place, value: Value) -> None:
        key = self.resolve(place[0])
        if memory.dtype.is_small_float:
            value = scalars.to_memory(self.code, value, memory.dtype)
            value = scalars.from_memory(self.code, value, memory.dtype)
        if key not in memory.cells:
            memory.cells[key] = self.code.fresh(value.type)
        self.code.set(memory.cells[key], value, self.active)


def _as_expr(value: KernelValue) -> Expr | None:
    if isinstance(value, Const):
        return const(int(value.value))
    return value.expr if isinstance(value, Index) else None
