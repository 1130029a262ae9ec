"""Kernel IR to LLVM IR text.

A kernel becomes one function over a range of its flattened parallel loop. Values are computed once
per scope where they are first needed; those that read memory the kernel also writes are computed
anew by every statement. Loops that promise independent iterations carry parallel-access metadata,
and every buffer has its own alias scope, so LLVM's loop vectoriser needs no proof of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.kernel_ir import (
    Alloc,
    Fold,
    For,
    If,
    Kernel,
    Let,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import as_expr, const

from . import (
    byte_tiles,
    cutting,
    pieces,
    scalars,
    trigonometry,
    units,
    vector_math,
    wide_math,
)
from .bodies import is_loop, values_of, walk
from .ir import Value
from .memory import Memory
from .merging import merged
from .module import Module
from .pool import pool_text
from .products import ProductWriter, is_whole, rows_of
from .sort import first_symbol, first_text, sort_symbol, sort_text
from .tile import declaration

AS_WRITTEN = "\n; linked behind the passes\n"
"""Between a module that passes improve, and one of functions that are good as they are written."""
SCALAR_LOADS = '"target-features"="+prefer-no-gather"'
"""Of vectors from scattered places. A gather takes longer on AMD's processors, and on Intel's since
they stop data from leaking through it, and it waits for all of its lines."""


def module_text(kernels: Sequence[Kernel], level: str) -> str:
    """The LLVM module of kernels, their helpers and the thread pool, then that of micro-kernels."""
    kernels = [merged(kernel) for kernel in kernels]
    products = [s for k in kernels for s in walk(k.body) if isinstance(s, TileProduct)]
    module = Module(level, frozenset((s.nr, rows_of(s)) for s in products if not is_whole(s)))
    functions = [KernelWriter(kernel, module).text() for kernel in kernels]
    width = "512" if level == "v4" else "256"
    tail = f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" {SCALAR_LOADS} }}'
    body = "\n".join(functions)
    helpers = [module.helpers[name] for name in sorted(module.helpers)]
    called, wide = _called(body, level)
    helpers = _with_math(body, helpers, called, wide, level)
    declared, apart = _micro_kernels(module, level)
    helpers += declared
    if units.are_used(body):
        helpers.append(units.TEXT)
    text = "\n\n".join([pool_text(), *helpers, body, tail, "\n".join(module.metadata), ""])
    if wide:
        text += wide_math.INLINED + wide_math.definitions(wide, level)
    return text + AS_WRITTEN + "\n\n".join(apart) + "\n" if apart else text


def _called(body: str, level: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The functions of mathematics that kernels call, with their types, and those that have a wide
    form."""
    found = [
        (name, kind)
        for name in {**vector_math.FUNCTIONS, **wide_math.FUNCTIONS}
        for kind in ("float", "double")
        if f"@{vector_math.symbol(name, kind)}(" in body
    ]
    wide = [name for name, kind in found if wide_math.is_wide(name, kind, level)]
    return [x for x in found if not wide_math.is_wide(*x, level)], wide


def _with_math(
    body: str, helpers: Sequence[str], called: Sequence[tuple[str, str]], wide: Sequence[str],
    level: str,
) -> list[str]:  # fmt: skip
    """Helpers with the functions that kernels call, declared where they are wide, and what those
    need."""
    found = [*helpers, *(vector_math.definition(name, kind) for name, kind in called)]
    if wide:
        found.append(wide_math.declarations(wide))
    found += [
        vector_math.scale_text(kind, level)
        for kind, suffix in vector_math.SUFFIX.items()
        if any(f"@sf.scale.{suffix}(" in text for text in found)
    ]
    if "@sf.pow.i64(" in body:
        found.append(scalars.INTEGER_POW)
    if any("@sf.two_over_pi" in text for text in found):
        found.insert(0, trigonometry.table_text())
    return found


def _micro_kernels(module: Module, level: str) -> tuple[list[str], list[str]]:
    """What the module declares of micro-kernels, and their texts with what they share."""
    apart = [module.micro_kernels[name] for name in sorted(module.micro_kernels)]
    helpers = [*map(declaration, apart)]
    of_pieces = any(map(pieces.is_symbol, module.micro_kernels))
    of_bytes = any(map(byte_tiles.is_symbol, module.micro_kernels))
    if of_bytes:
        apart.append(byte_tiles.shared_text(level))
    if of_pieces:
        apart.append(pieces.shared_text())
        helpers += map(cutting.cut_text, sorted(module.cut_columns))
    if of_pieces or (of_bytes and level == "v4"):
        apart.append(pieces.tiles_text())
        helpers.append(pieces.DECLARATIONS)
    return helpers, apart


class KernelWriter(ProductWriter):
    """Writes the function of one kernel."""

    def text(self) -> str:
        code, kernel = self.code, self.kernel
        args = code.value("%args", "ptr")
        for number, buffer in enumerate(kernel.buffers):
            pointer = self._slot(args, number, "ptr")
            self.memory[buffer.name] = Memory(pointer, buffer.dtype, buffer.shape)
        for number, name in enumerate(kernel.dims):
            value = self._slot(args, len(kernel.buffers) + number, "i64")
            self.scopes[0].indices[name] = value
        skip = code.label("skip") if kernel.guarded else ""
        if kernel.guarded:
            run = code.label("run")
            noted = code.emit("load i64, ptr %status, align 8", "i64")
            code.branch_if(noted.compare("eq", 0), run, skip)
            code.start(run)
        self._open()
        self._allocate()
        self._aliases()
        self._tables()
        self._words()
        self._parallel(code.value("%begin", "i64"), code.value("%end", "i64"))
        self._close_caches()
        if kernel.guarded:
            code.branch(skip)
            code.start(skip)
        head = (
            f'define void @"{kernel.name}"(ptr noalias readonly %args, i64 %begin, i64 %end,'
            " ptr %scratch, ptr %status) #0 {"
        )
        if self.has_streams:  # streamed stores are not ordered with others
            code.line("call void @llvm.x86.sse.sfence()")
        return "\n".join([head, "entry:", *self.allocas, *code.lines, "  ret void", "}"])

    # memory

    def statement(self, s: Statement) -> None:
        if isinstance(s, Let):
            self.scopes[-1].locals[s.name] = self.value(s.value)
        elif isinstance(s, Store):
            self._store(s)
        elif isinstance(s, For):
            self._looked_through(s)
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

    def _sort(self, s: SortRow) -> None:
        dtype = self.memory[s.keys].dtype
        symbol = sort_symbol(dtype, s.descending)
        self.module.helpers[symbol] = sort_text(dtype, s.descending)
        pointers = [
            f"ptr {self.memory[name].pointer.text}"
            for name in (s.keys, s.order, f"{s.keys} spare", f"{s.order} spare")
        ]
        count, last = self.index(as_expr(s.count)), "i1 false"
        if s.first is not None:
            symbol = first_symbol(dtype, s.descending)
            self.module.helpers[symbol] = first_text(dtype, s.descending)
            last = f"i64 {self.index(s.first).text}"
        self.code.line(f"call void @{symbol}({', '.join(pointers)}, i64 {count.text}, {last})")

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
        loops = [(name, self.index(extent)) for name, extent in kernel.parallel]

        def body(i: Value, _: list[Value]) -> list[Value]:
            if not flat:
                following = self.code.intrinsic("smin", i + 1, end - 1)
                self._ask_next(kernel.body, following, loops)
            self._bind(i, loops)
            self._place_row()
            self.statements(kernel.body)
            return []

        self._loop(begin, end, [], body, self._ahead(), self._bound(), flat, flat)

    def _ahead(self) -> list[KernelValue]:
        return list(values_of(self.kernel.body))

    def _bound(self) -> set[str]:
        return {name for name, _ in self.kernel.parallel}

    def _rows(self, begin: Value, end: Value) -> None:
        """Rows of the last parallel index, each a loop that can be vectorised."""
        code, kernel = self.code, self.kernel
        *outer, (name, width) = [(name, self.index(extent)) for name, extent in kernel.parallel]
        whole = For(name, const(0), kernel.parallel[-1][1], kernel.body, vector=True)
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
            final = code.pure(f"udiv i64 {(end - 1).text}, {width.text}", "i64")
            self._ask_next([whole], code.intrinsic("smin", row + 1, final), outer)
            self._bind(row, outer)

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
