"""Kernel IR to LLVM IR text.

A kernel becomes one function over a range of its flattened parallel loop. Values are computed once
per scope where they are first needed; those that read memory the kernel also writes are computed
anew by every statement. Loops that promise independent iterations carry parallel-access metadata,
and every buffer has its own alias scope, so LLVM's loop vectoriser needs no proof of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from stagefuse.compiler.kernel_ir import (
    Alloc,
    Checked,
    Const,
    Fold,
    For,
    If,
    Index,
    Kernel,
    Let,
    Load,
    Local,
    Op,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, as_expr, const, floordiv
from stagefuse.dsl.dtypes import I64, DType

from . import scalars, vector_math
from .ir import Code, Value
from .pool import pool_text
from .sort import sort_symbol, sort_text
from .tile import TileShape, tile_text
from .values import Unique, parts, post_order

SCRATCH_ALIGN = 64
SHORT_LOOP = 64
UNROLLED, UNROLLED_VALUES = 32, 400
LOWEST = {"f8e4m3": -448.0}


class Module:
    """What the functions of one module share: helper functions and metadata."""

    def __init__(self, level: str) -> None:
        self.level = level
        self.helpers: dict[str, str] = {}
        self.metadata: list[str] = []
        self._known: dict[str, str] = {}

    def node(self, text: str) -> str:
        """The name of a metadata node with this text."""
        if text not in self._known:
            self._known[text] = self.distinct(text)
        return self._known[text]

    def distinct(self, text: str, word: str = "") -> str:
        name = f"!{len(self.metadata)}"
        self.metadata.append(f"{name} = {word}{text}")
        return name

    def loop(self, properties: Sequence[str]) -> str:
        """A new loop identity with properties."""
        name = f"!{len(self.metadata)}"
        self.metadata.append(f"{name} = distinct !{{{', '.join([name, *properties])}}}")
        return name


def module_text(kernels: Sequence[Kernel], level: str) -> str:
    """The LLVM module of kernels, their helpers and the thread pool."""
    module = Module(level)
    functions = [_KernelWriter(kernel, module).text() for kernel in kernels]
    width = "512" if level == "v4" else "256"
    tail = f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" }}'
    body = "\n".join(functions)
    helpers = [module.helpers[name] for name in sorted(module.helpers)]
    helpers += [
        vector_math.definition(name, kind)
        for name in vector_math.FUNCTIONS
        for kind in ("float", "double")
        if f"@{vector_math.symbol(name, kind)}(" in body
    ]
    if "@sf.pow.i64(" in body:
        helpers.append(scalars.INTEGER_POW)
    if any("@sf.two_over_pi" in text for text in helpers):
        helpers.insert(0, vector_math.table_text())
    return "\n\n".join([pool_text(), *helpers, body, tail, "\n".join(module.metadata), ""])


def scratch_bytes(kernel: Kernel) -> Expr:
    """The private memory a thread needs for a kernel."""
    total = const(0)
    for size in _scratch_sizes(kernel.body):
        total = total + size
    return total


def _padded(size: Expr) -> Expr:
    known = size.as_int()
    if known is not None:
        return const(-(-known // SCRATCH_ALIGN) * SCRATCH_ALIGN)
    return floordiv(size + (SCRATCH_ALIGN - 1), SCRATCH_ALIGN) * SCRATCH_ALIGN


def _alloc_size(statement: Alloc) -> Expr:
    size = const(statement.dtype.itemsize)
    for extent in statement.shape:
        size = size * extent
    return _padded(size)


def _scratch_sizes(body: Sequence[Statement]) -> Iterator[Expr]:
    dtypes: dict[str, DType] = {}
    for s in walk(body):
        if isinstance(s, Alloc):
            dtypes[s.name] = s.dtype
            yield _alloc_size(s)
        elif isinstance(s, SortRow):
            yield _padded(as_expr(s.count) * dtypes[s.keys].itemsize)
            yield _padded(as_expr(s.count) * 8)


def walk(body: Sequence[Statement]) -> Iterator[Statement]:
    """Statements, outer before inner, in order."""
    for s in body:
        yield s
        if isinstance(s, For | If):
            yield from walk(s.body)


def written_buffers(body: Sequence[Statement]) -> frozenset[str]:
    """Names that statements write."""
    found = set()
    for s in walk(body):
        if isinstance(s, Store):
            found.add(s.buffer)
        elif isinstance(s, TileProduct):
            found.add(s.dst)
        elif isinstance(s, SortRow):
            found |= {s.keys, s.order}
    return frozenset(found)


@dataclass
class _Memory:
    """A buffer or scratch array inside the function."""

    pointer: Value
    dtype: DType
    shape: tuple[Expr, ...]
    alias: str = ""  # metadata of its accesses


@dataclass
class _Scope:
    """What is known inside a loop or branch."""

    values: dict[int, Value] = field(default_factory=dict)  # by identity of the unique value
    indices: dict[str, Value] = field(default_factory=dict)
    locals: dict[str, Value] = field(default_factory=dict)


Body = Callable[[Value, list[Value]], list[Value]]


class _KernelWriter:
    """Writes the function of one kernel."""

    def __init__(self, kernel: Kernel, module: Module) -> None:
        self.kernel = kernel
        self.module = module
        self.code = Code()
        self.code.flags = " contract"
        self.scopes = [_Scope()]
        self.memory: dict[str, _Memory] = {}
        self.written = written_buffers(kernel.body)
        self.groups: list[str] = []  # access groups of the loops around
        self.scratch = const(0)
        self._unique = Unique()
        self._volatile: dict[int, bool] = {}
        self._names: dict[int, frozenset[str]] = {}

    def text(self) -> str:
        code, kernel = self.code, self.kernel
        args = code.value("%args", "ptr")
        for number, buffer in enumerate(kernel.buffers):
            pointer = self._slot(args, number, "ptr")
            self.memory[buffer.name] = _Memory(pointer, buffer.dtype, buffer.shape)
        for number, name in enumerate(kernel.dims):
            value = self._slot(args, len(kernel.buffers) + number, "i64")
            self.scopes[0].indices[name] = value
        self._allocate()
        self._aliases()
        self._parallel(code.value("%begin", "i64"), code.value("%end", "i64"))
        head = (
            f'define void @"{kernel.name}"(ptr noalias readonly %args, i64 %begin, i64 %end,'
            " ptr %scratch, ptr %status) #0 {"
        )
        return "\n".join([head, "entry:", *code.lines, "  ret void", "}"])

    # memory

    def _slot(self, args: Value, number: int, kind: str) -> Value:
        at = self.code.pure(f"getelementptr i64, ptr {args.text}, i64 {number}", "ptr")
        return self.code.emit(f"load {kind}, ptr {at.text}, align 8", kind)

    def _scratch(self, size: Expr) -> Value:
        offset = self.index(self.scratch)
        self.scratch = self.scratch + size
        return self.code.pure(f"getelementptr i8, ptr %scratch, i64 {offset.text}", "ptr")

    def _allocate(self) -> None:
        """Every Alloc and sort's spare memory gets its place once, at the top."""
        for s in walk(self.kernel.body):
            if isinstance(s, Alloc):
                pointer = self._scratch(_alloc_size(s))
                self.memory[s.name] = _Memory(pointer, s.dtype, s.shape)
            elif isinstance(s, SortRow):
                count = as_expr(s.count)
                dtype = self.memory[s.keys].dtype
                for name, kind in ((s.keys, dtype), (s.order, I64)):
                    pointer = self._scratch(_padded(count * kind.itemsize))
                    self.memory[f"{name} spare"] = _Memory(pointer, kind, (count,))

    def _aliases(self) -> None:
        """A scope of its own for each buffer that is written, one for all others."""
        module = self.module
        domain = module.distinct(f'distinct !{{!"{self.kernel.name}"}}')
        read = module.distinct(f'distinct !{{!"read", {domain}}}')
        scopes = {
            name: module.distinct(f'distinct !{{!"{name}", {domain}}}')
            if name in self.written
            else read
            for name in self.memory
        }
        every = sorted(set(scopes.values()), key=lambda text: int(text[1:]))
        for name, memory in self.memory.items():
            own = module.node(f"!{{{scopes[name]}}}")
            others = [s for s in every if s != scopes[name]]
            memory.alias = f", !alias.scope {own}"
            if others:
                memory.alias += f", !noalias {module.node('!{' + ', '.join(others) + '}')}"

    def _access(self) -> str:
        if not self.groups:
            return ""
        if len(self.groups) == 1:
            return f", !llvm.access.group {self.groups[0]}"
        return f", !llvm.access.group {self.module.node('!{' + ', '.join(self.groups) + '}')}"

    def _address(self, memory: _Memory, indices: Sequence[KernelValue]) -> Value:
        """The place of an element: symbolic offsets are added up before they are written."""
        symbolic, offset, stride = const(0), self.code.const(0, "i64"), const(1)
        for value, extent in reversed(list(zip(indices, memory.shape, strict=True))):
            if isinstance(value, Index):
                symbolic = symbolic + value.expr * stride
            else:
                offset = offset + self.value(value) * self.index(stride)
            stride = stride * extent
        fixed = self.index(symbolic)
        if offset.text == "0":
            offset = fixed
        elif fixed.text != "0":
            offset = offset + fixed
        kind = scalars.MEMORY[memory.dtype.name]
        return self.code.pure(
            f"getelementptr inbounds {kind}, ptr {memory.pointer.text}, i64 {offset.text}", "ptr"
        )

    # values

    @contextmanager
    def _scope(self) -> Iterator[None]:
        self.scopes.append(_Scope())
        with self.code.scope():
            yield
        self.scopes.pop()

    def index(self, expr: Expr) -> Value:
        """The i64 value of an expression."""
        code = self.code
        total: Value | None = None
        for monomial, coefficient in expr.terms:
            factor: Value | None = None
            for atom, power in monomial:
                if atom.kind == "sym":
                    value = self._symbol(atom.name)
                else:
                    a, b = (self.index(arg) for arg in atom.args)
                    value = self._atom(atom.kind, a, b, atom.args[1].as_int())
                for _ in range(power):
                    factor = value if factor is None else factor * value
            if factor is None:
                factor = code.const(coefficient, "i64")
            elif coefficient != 1:
                factor = factor * coefficient
            total = factor if total is None else total + factor
        return total or code.const(0, "i64")

    def _symbol(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope.indices:
                return scope.indices[name]
        raise KeyError(f"kernel {self.kernel.name} binds no index {name}")

    def _atom(self, kind: str, a: Value, b: Value, divisor: int | None) -> Value:
        if kind in ("min", "max"):
            return self.code.intrinsic(f"s{kind}", a, b)
        if divisor is not None and divisor > 0 and divisor & (divisor - 1) == 0:
            return a.ashr(divisor.bit_length() - 1) if kind == "//" else a & (divisor - 1)
        if divisor is not None and divisor > 0:
            quotient, rest = a / divisor, self.code.pure(f"srem i64 {a.text}, {divisor}", "i64")
            low = rest.compare("lt", 0)
            if kind == "//":
                return low.select(quotient - 1, quotient)
            return low.select(rest + divisor, rest)
        quotient, rest = scalars.integer_division(self.code, a, b, unsigned=False)
        return quotient if kind == "//" else rest

    def value(self, value: KernelValue) -> Value:
        """A value of kernel IR, computed here unless it is known."""
        value = self._unique(value)
        self._is_volatile(value)
        stack = [value]
        while stack:
            top = stack[-1]
            if self._known(top) is not None:
                stack.pop()
                continue
            missing = [p for p in self._needed(top) if self._known(p) is None]
            stack.extend(missing)
            if not missing:
                self.scopes[-1].values[id(top)] = self._compute(top)
        result = self._known(value)
        assert result is not None
        return result

    def _known(self, value: KernelValue) -> Value | None:
        """What is at hand, for a unique value."""
        if isinstance(value, Const):
            return self.code.const(value.value, scalars.REGISTER[value.dtype.compute.name])
        if isinstance(value, Index):
            return self.index(value.expr)
        if isinstance(value, Local):
            for scope in reversed(self.scopes):
                if value.name in scope.locals:
                    return scope.locals[value.name]
            raise KeyError(f"kernel {self.kernel.name} binds no value {value.name}")
        for scope in reversed(self.scopes):
            if id(value) in scope.values:
                return scope.values[id(value)]
        return None

    def _needed(self, value: KernelValue) -> tuple[KernelValue, ...]:
        """What is computed before a value: not what only a guarded load may look at."""
        if isinstance(value, Load) and value.guard:
            return value.guard
        return parts(value)

    def _compute(self, value: KernelValue) -> Value:
        if isinstance(value, Load):
            return self._load(value)
        if isinstance(value, Checked):
            return self._checked(value, [])
        assert isinstance(value, Op)
        args = [self.value(a) for a in value.args]
        if value.fn == "cast":
            return scalars.convert(self.code, args[0], value.args[0].dtype, value.dtype)
        if value.fn == "round_to":
            return scalars.round_to(self.code, args[0], value.to or value.dtype)
        return scalars.apply(self.code, value.fn, args, value.args[-1].dtype.compute)

    def _load(self, load: Load) -> Value:
        memory = self.memory[load.buffer]
        if not load.guard:
            return self._read(memory, load.indices)
        code = self.code
        holds = self.value(load.guard[0])
        for condition in load.guard[1:]:
            holds = holds & self.value(condition)
        inside, after = code.label("load"), code.label("loaded")
        kind = scalars.REGISTER[memory.dtype.name]
        fill = code.const(load.fill, kind)
        before = code.block
        code.branch_if(holds, inside, after)
        code.start(inside)
        with self._scope():
            found = self._read(memory, load.indices)
        end = code.block
        code.branch(after)
        code.start(after)
        return code.emit(f"phi {kind} [ {fill.text}, %{before} ], [ {found.text}, %{end} ]", kind)

    def _read(self, memory: _Memory, indices: Sequence[KernelValue]) -> Value:
        at = self._address(memory, indices)
        kind = scalars.MEMORY[memory.dtype.name]
        raw = self.code.emit(
            f"load {kind}, ptr {at.text}, align {memory.dtype.itemsize}"
            f"{memory.alias}{self._access()}",
            kind,
        )
        return scalars.from_memory(self.code, raw, memory.dtype)

    def _checked(self, checked: Checked, guards: Sequence[KernelValue]) -> Value:
        """The position, after noting one out of range unless a guard fails."""
        code = self.code
        given, extent = self.value(checked.value), self.index(checked.extent)
        place = given.compare("lt", 0).select(given + extent, given)
        inside = place.compare("lt", extent, unsigned=True) & extent.compare("gt", 0)
        fine = inside
        for guard in guards:
            fine = fine | (self.value(guard) ^ 1)
        self.module.helpers["sf.report"] = REPORT
        report, after = code.label("report"), code.label("checked")
        code.branch_if(fine, after, report)
        code.start(report)
        code.line(f"call void @sf.report(ptr %status, i64 {checked.site + 1}, i64 {given.text})")
        code.branch(after)
        code.start(after)
        return inside.select(place, 0)

    # statements

    def statements(self, body: Sequence[Statement]) -> None:
        for s in body:
            self.statement(s)
            self._forget()

    def _forget(self) -> None:
        """Drops values that read memory which statements write."""
        for scope in self.scopes:
            for key in [k for k in scope.values if self._volatile.get(k, True)]:
                del scope.values[key]

    def _is_volatile(self, value: KernelValue) -> bool:
        """Whether a unique value depends on memory that the kernel writes."""
        if id(value) not in self._volatile:
            for part in post_order(value):
                own = isinstance(part, Load) and part.buffer in self.written
                inside = any(self._volatile[id(p)] for p in parts(part))
                self._volatile[id(part)] = own or inside
        return self._volatile[id(value)]

    def statement(self, s: Statement) -> None:
        if isinstance(s, Let):
            self.scopes[-1].locals[s.name] = self.value(s.value)
        elif isinstance(s, Store):
            self._store(s)
        elif isinstance(s, For):
            self._for(s)
        elif isinstance(s, Fold):
            self._fold(s)
        elif isinstance(s, If):
            self._if(s)
        elif isinstance(s, TileProduct):
            self._tile(s)
        elif isinstance(s, SortRow):
            self._sort(s)
        elif not isinstance(s, Alloc):
            raise TypeError(f"unknown statement {s}")

    def _store(self, s: Store) -> None:
        memory = self.memory[s.buffer]
        value = scalars.to_memory(self.code, self.value(s.value), memory.dtype)
        at = self._address(memory, s.indices)
        self.code.line(
            f"store {value.type} {value.text}, ptr {at.text}, align {memory.dtype.itemsize}"
            f"{memory.alias}{self._access()}"
        )

    def _if(self, s: If) -> None:
        code = self.code
        inside, after = code.label("then"), code.label("endif")
        code.branch_if(self.value(s.condition), inside, after)
        code.start(inside)
        with self._scope():
            self.statements(s.body)
        code.branch(after)
        code.start(after)

    def _for(self, s: For) -> None:
        innermost = not any(is_loop(x) for x in walk(s.body))

        def body(i: Value, _: list[Value]) -> list[Value]:
            self.scopes[-1].indices[s.index] = i
            self.statements(s.body)
            return []

        lo, hi = self.index(s.lo), self.index(s.hi)
        ahead = list(_values_of(s.body, self.written))
        short = _at_most(s.hi - s.lo, SHORT_LOOP) or _at_most(s.hi, SHORT_LOOP)
        self._loop(lo, hi, [], body, ahead, {s.index}, s.vector, innermost, short)

    def _loop(
        self,
        lo: Value,
        hi: Value,
        start: list[Value],
        body: Body,
        ahead: Sequence[KernelValue],
        bound: set[str],
        parallel: bool,
        innermost: bool,
        short: bool = False,
    ) -> list[Value]:
        """A counted loop with accumulators; checks among `ahead` that it does not change go
        before it. A `short` loop is widened once, not interleaved."""
        code = self.code
        enter, loop, after = code.label("enter"), code.label("loop"), code.label("after")
        before = code.block
        code.branch_if(lo.compare("lt", hi), enter, after)
        code.start(enter)
        with self._scope():
            self._hoist(ahead, bound)
            group = self.module.distinct("distinct !{}") if parallel and innermost else ""
            if group:
                self.groups.append(group)
            entered = code.block
            code.branch(loop)
            code.start(loop)
            heads = len(code.lines)
            i = code.value(code.fresh("i"), "i64")
            totals = [code.value(code.fresh("s"), v.type) for v in start]
            with self._scope():
                results = body(i, totals)
            latch = code.block
            following = code.emit(f"add nsw i64 {i.text}, 1", "i64")
            again = code.emit(f"icmp slt i64 {following.text}, {hi.text}", "i1")
            code.branch_if(again, loop, after, self._loop_metadata(group, innermost, short))
            phis = [
                f"  {i.text} = phi i64 [ {lo.text}, %{entered} ], [ {following.text}, %{latch} ]"
            ]
            for first, total, result in zip(start, totals, results, strict=True):
                phis.append(
                    f"  {total.text} = phi {total.type} [ {first.text}, %{entered} ],"
                    f" [ {result.text}, %{latch} ]"
                )
            code.lines[heads:heads] = phis
            if group:
                self.groups.pop()
        code.start(after)
        return [
            code.emit(
                f"phi {first.type} [ {first.text}, %{before} ], [ {result.text}, %{latch} ]",
                first.type,
            )
            for first, result in zip(start, results, strict=True)
        ]

    def _loop_metadata(self, group: str, innermost: bool, short: bool) -> str:
        if not innermost:
            return ""
        properties = []
        if group:
            properties.append(self.module.node(f'!{{!"llvm.loop.parallel_accesses", {group}}}'))
        if short:
            properties.append(self.module.node('!{!"llvm.loop.interleave.count", i32 1}'))
            properties.append(self.module.node('!{!"llvm.loop.unroll.disable"}'))
        return f", !llvm.loop {self.module.loop(properties)}"

    def _hoist(self, ahead: Sequence[KernelValue], bound: set[str]) -> None:
        """Computes the checks that a loop would repeat, each under the guards around it."""
        done: set[int] = set()
        stack: list[tuple[KernelValue, tuple[KernelValue, ...]]] = [
            (self._unique(value), ()) for value in ahead
        ]
        checks: list[tuple[Checked, tuple[KernelValue, ...]]] = []
        while stack:
            value, guards = stack.pop()
            if id(value) in done:
                continue
            done.add(id(value))
            if isinstance(value, Checked):
                checks.append((value, guards))
            inner = guards
            if isinstance(value, Load):
                inner = (*guards, *value.guard)
                stack.extend((part, guards) for part in value.guard)
            rest = value.indices if isinstance(value, Load) else parts(value)
            stack.extend((part, inner) for part in rest)
        for value, guards in reversed(checks):
            fixed = all(self._is_fixed(v, bound) for v in (value, *guards))
            if fixed and self._known(value) is None:
                self.scopes[-1].values[id(value)] = self._checked(value, guards)

    def _is_fixed(self, value: KernelValue, bound: set[str]) -> bool:
        names = self._free(value)
        if self._is_volatile(value) or names & bound:
            return False
        known: set[str] = set()
        for scope in self.scopes:
            known |= scope.indices.keys() | {f"%{n}" for n in scope.locals}
        return names <= known

    def _free(self, value: KernelValue) -> frozenset[str]:
        """Index symbols a unique value depends on, and locals with a % before their names."""
        if id(value) not in self._names:
            for part in post_order(value):
                names = frozenset().union(*(self._names[id(p)] for p in parts(part)))
                if isinstance(part, Index):
                    names = part.expr.symbols()
                elif isinstance(part, Local):
                    names = frozenset((f"%{part.name}",))
                elif isinstance(part, Checked):
                    names |= part.extent.symbols()
                elif isinstance(part, Load):
                    for extent in self.memory[part.buffer].shape:
                        names |= extent.symbols()
                self._names[id(part)] = names
        return self._names[id(value)]

    def _fold(self, s: Fold) -> None:
        if s.kind in ("argmax", "argmin"):
            result = self._fold_position(s)
        elif is_unrolled(s):
            result = self._fold_unrolled(s)
        else:
            result = self._fold_nest(s, s.kind, s.dtype, lambda total, at: self._step(s, total))
        self.scopes[-1].locals[s.name] = result

    def _step(self, s: Fold, total: Value) -> Value:
        return combine(self.code, s.kind, total, self.value(s.value), s.dtype)

    def _fold_unrolled(self, s: Fold) -> Value:
        """A fold over a few positions, written out."""
        code = self.code
        total = code.const(identity(s.kind, s.dtype), scalars.REGISTER[s.dtype.name])
        extents = [range(extent.as_int() or 0) for _, extent in s.loops]
        for place in itertools.product(*extents):
            with self._inner_scope():
                for (name, _), position in zip(s.loops, place, strict=True):
                    self.scopes[-1].indices[name] = code.const(position, "i64")
                total = self._step(s, total)
        return total

    @contextmanager
    def _inner_scope(self) -> Iterator[None]:
        """A scope for other bindings in the same block: written values stay usable after."""
        self.scopes.append(_Scope())
        yield
        self.scopes.pop()

    def _fold_nest(
        self, s: Fold, kind: str, dtype: DType, step: Callable[[Value, Value], Value]
    ) -> Value:
        """The loops of a fold around one accumulator; `step` also gets the flat position."""
        code = self.code
        zero = code.const(0, "i64")

        def nest(number: int, total: Value, position: Value) -> Value:
            name, extent = s.loops[number]
            last = number == len(s.loops) - 1
            size = self.index(extent)

            def body(i: Value, totals: list[Value]) -> list[Value]:
                self.scopes[-1].indices[name] = i
                at = position * size + i if number else i
                return [step(totals[0], at) if last else nest(number + 1, totals[0], at)]

            bound = {n for n, _ in s.loops[number:]}
            return self._loop(zero, size, [total], body, [s.value], bound, False, last)[0]

        start = code.const(identity(kind, dtype), scalars.REGISTER[dtype.name])
        return nest(0, start, zero) if s.loops else step(start, zero)

    def _fold_position(self, s: Fold) -> Value:
        """argmax and argmin in two passes that both vectorise: the extreme, then its place."""
        code, dtype = self.code, s.value.dtype.compute
        kind = s.kind.removeprefix("arg")
        extreme = self._fold_nest(
            s, kind, dtype, lambda total, at: combine(code, kind, total, self.value(s.value), dtype)
        )

        def step(total: Value, at: Value) -> Value:
            value = self.value(s.value)
            found = value.compare("eq", extreme)
            if value.is_float:
                found = found | value.is_nan()
            return code.intrinsic("smin", total, found.select(at, (1 << 63) - 1))

        place = self._fold_nest(s, "min", I64, step)
        return place.compare("eq", (1 << 63) - 1).select(code.const(0, "i64"), place)

    def _tile(self, s: TileProduct) -> None:
        dst, a, panel = self.memory[s.dst], self.memory[s.a], self.memory[s.panel]
        shape = TileShape(scalars.REGISTER[dst.dtype.name], s.nr, s.accumulate)
        if {dst.dtype, a.dtype, panel.dtype} != {dst.dtype} or dst.dtype.bits < 32:
            raise TypeError("a tile product takes f32 or f64 throughout")
        self.module.helpers[shape.symbol] = tile_text(shape, self.module.level)

        def place(memory: _Memory, offset: Expr) -> str:
            at = self.index(offset)
            pointer = self.code.pure(
                f"getelementptr {shape.element}, ptr {memory.pointer.text}, i64 {at.text}", "ptr"
            )
            return f"ptr {pointer.text}"

        numbers = {
            name: f"i64 {self.index(expr).text}"
            for name, expr in (
                ("dst_row", s.dst_row), ("a_row", s.a_row), ("a_col", s.a_col),
                ("rows", s.rows), ("depth", s.depth),
            )
        }  # fmt: skip
        self.code.line(
            f"call void @{shape.symbol}({place(dst, s.dst_offset)}, {numbers['dst_row']},"
            f" {place(a, s.a_offset)}, {numbers['a_row']}, {numbers['a_col']},"
            f" {place(panel, s.panel_offset)}, {numbers['rows']}, {numbers['depth']})"
        )

    def _sort(self, s: SortRow) -> None:
        dtype = self.memory[s.keys].dtype
        symbol = sort_symbol(dtype, s.descending)
        self.module.helpers[symbol] = sort_text(dtype, s.descending)
        pointers = [
            f"ptr {self.memory[name].pointer.text}"
            for name in (s.keys, s.order, f"{s.keys} spare", f"{s.order} spare")
        ]
        count = self.index(as_expr(s.count))
        self.code.line(f"call void @{symbol}({', '.join(pointers)}, i64 {count.text})")

    # the parallel loop

    def _parallel(self, begin: Value, end: Value) -> None:
        """The range of the flattened loop. A body without loops runs along the last index."""
        kernel = self.kernel
        flat = not any(
            is_loop(x) or isinstance(x, TileProduct | SortRow) for x in walk(kernel.body)
        )
        if not kernel.parallel:
            self.statements(kernel.body)
            return
        if flat and len(kernel.parallel) > 1:
            self._rows(begin, end)
            return
        extents = [self.index(extent) for _, extent in kernel.parallel]

        def body(i: Value, _: list[Value]) -> list[Value]:
            self._bind(i, extents)
            self.statements(kernel.body)
            return []

        self._loop(begin, end, [], body, self._ahead(), self._bound(), flat, flat)

    def _ahead(self) -> list[KernelValue]:
        return list(_values_of(self.kernel.body, self.written))

    def _bound(self) -> set[str]:
        return {name for name, _ in self.kernel.parallel}

    def _bind(self, flat: Value, extents: Sequence[Value]) -> None:
        """The parallel indices at a position of the flattened loop."""
        code, rest = self.code, flat
        names = [name for name, _ in self.kernel.parallel]
        for name, extent in reversed(list(zip(names[1:], extents[1:], strict=True))):
            quotient = code.pure(f"udiv i64 {rest.text}, {extent.text}", "i64")
            self.scopes[-1].indices[name] = rest - quotient * extent
            rest = quotient
        self.scopes[-1].indices[names[0]] = rest

    def _rows(self, begin: Value, end: Value) -> None:
        """Rows of the last parallel index, each a loop that can be vectorised."""
        code, kernel = self.code, self.kernel
        extents = [self.index(extent) for _, extent in kernel.parallel]
        name, width = kernel.parallel[-1][0], extents[-1]
        head, run, done = code.label("rows"), code.label("row"), code.label("done")
        before = code.block
        code.branch(head)
        code.start(head)
        at = code.value(code.fresh("at"), "i64")
        spot = len(code.lines)
        code.branch_if(at.compare("lt", end), run, done)
        code.start(run)
        with self._scope():
            row = code.pure(f"udiv i64 {at.text}, {width.text}", "i64")
            first = at - row * width
            left = first + (end - at)
            stop = code.intrinsic("smin", width, left)
            rest = row
            outer = list(zip(kernel.parallel[1:-1], extents[1:-1], strict=True))
            for (outer_name, _), extent in reversed(outer):
                quotient = code.pure(f"udiv i64 {rest.text}, {extent.text}", "i64")
                self.scopes[-1].indices[outer_name] = rest - quotient * extent
                rest = quotient
            self.scopes[-1].indices[kernel.parallel[0][0]] = rest

            def body(i: Value, _: list[Value]) -> list[Value]:
                self.scopes[-1].indices[name] = i
                self.statements(kernel.body)
                return []

            self._loop(first, stop, [], body, self._ahead(), {name}, True, True)
            following = at + (stop - first)
        latch = code.block
        code.branch(head)
        code.lines.insert(
            spot, f"  {at.text} = phi i64 [ %begin, %{before} ], [ {following.text}, %{latch} ]"
        )
        code.start(done)


def is_unrolled(s: Fold) -> bool:
    """Whether a fold is short enough to be written out, so that a loop around it can be wide."""
    extents = [extent.as_int() for _, extent in s.loops]
    count = math.prod(UNROLLED + 1 if e is None else e for e in extents)
    if None in extents or count > UNROLLED or s.kind.startswith("arg"):
        return False
    return count * len(post_order(s.value)) <= UNROLLED_VALUES


def is_loop(s: Statement) -> bool:
    """Whether a statement becomes a loop of its own."""
    return isinstance(s, For) or (isinstance(s, Fold) and not is_unrolled(s))


def _at_most(expr: Expr, limit: int) -> bool:
    """Whether an expression is plainly no greater than a number."""
    known = expr.as_int()
    if known is not None:
        return known <= limit
    if len(expr.terms) == 1 and expr.terms[0][1] == 1 and len(expr.terms[0][0]) == 1:
        atom, power = expr.terms[0][0][0]
        return power == 1 and atom.kind == "min" and any(_at_most(a, limit) for a in atom.args)
    return False


def _values_of(body: Sequence[Statement], written: frozenset[str]) -> Iterator[KernelValue]:
    """Values that statements always compute: not those inside branches and loops."""
    for s in body:
        if isinstance(s, Let):
            yield s.value
        elif isinstance(s, Store):
            yield from (*s.indices, s.value)


def identity(kind: str, dtype: DType) -> float | int | bool:
    """What a fold of nothing gives."""
    if kind in ("any", "all"):
        return kind == "all"
    if kind in ("sum", "prod"):
        return 0 if kind == "sum" else 1
    if dtype.is_bool:
        return kind == "min"
    if dtype.is_float:
        limit = LOWEST.get(dtype.name, float("-inf"))
        return limit if kind == "max" else -limit
    low = 0 if dtype.kind == "uint" else -(1 << (dtype.bits - 1))
    high = (1 << (dtype.bits - (dtype.kind != "uint"))) - 1
    return low if kind == "max" else high


def combine(code: Code, kind: str, total: Value, value: Value, dtype: DType) -> Value:
    """One step of a fold; sums and products may be reassociated."""
    if kind in ("sum", "prod"):
        if not dtype.is_float:
            return total + value if kind == "sum" else total * value
        word = "fadd" if kind == "sum" else "fmul"
        return code.emit(
            f"{word} reassoc nsz contract {total.type} {total.text}, {value.text}", total.type
        )
    if kind == "any":
        return total | value
    if kind == "all":
        return total & value
    return scalars.extreme(code, total, value, dtype, kind)


REPORT = """
define internal void @sf.report(ptr %status, i64 %site, i64 %value) noinline cold nounwind {
entry:
  %swapped = cmpxchg ptr %status, i64 0, i64 %site seq_cst seq_cst, align 8
  %first = extractvalue { i64, i1 } %swapped, 1
  br i1 %first, label %note, label %done
note:
  %slot = getelementptr i64, ptr %status, i64 1
  store i64 %value, ptr %slot, align 8
  br label %done
done:
  ret void
}
"""
