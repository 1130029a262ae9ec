"""Where buffers and scratch lie inside a function, and what may overlap."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stagefuse.compiler.bounds import size_of
from stagefuse.compiler.evaluate import Evaluator, Known
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Index,
    Kernel,
    Load,
    SortRow,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.kernel_text import values_of
from stagefuse.dsl.dims import Expr, as_expr, const
from stagefuse.dsl.dtypes import I64, DType

from . import scalars
from .bodies import walk
from .ir import Code, Value
from .lost_nans import lost_nans
from .module import Module
from .result_rows import row_in_result
from .scratch import alloc_size, padded
from .values import post_order

WORD = 4
"""Bytes that a gather reads at least."""


def is_gathered(indices: Sequence[KernelValue]) -> bool:
    """Whether a position is read from data."""
    return any(not isinstance(value, Index) for value in indices)


@dataclass
class Memory:
    """A buffer or scratch array inside the function."""

    pointer: Value
    dtype: DType
    shape: tuple[Expr, ...]
    alias: str = ""  # metadata of its accesses


@dataclass
class Scope(Known[Value]):
    """What is known inside a loop or branch."""

    indices: dict[str, Value] = field(default_factory=dict)
    sums: dict[Expr, Value] = field(default_factory=dict)  # of many sizes


Body = Callable[[Value, list[Value]], list[Value]]


class MemoryWriter(Evaluator[Value]):
    """The function of a kernel, as far as its memory goes."""

    def __init__(self, kernel: Kernel, module: Module) -> None:
        super().__init__(kernel)
        self.module = module
        self.code = Code()
        self.code.flags = " contract"
        self.scopes: list[Scope] = [Scope()]
        self.memory: dict[str, Memory] = {}
        self.groups: list[str] = []  # access groups of the loops around
        self.scratch = const(0)
        self.allocas: list[str] = []
        self.tiles: dict[str, tuple[Value, Value]] = {}  # stores that go to the stack for now
        self.places: dict[tuple[Expr, Expr], Value] = {}  # tables, by what is in them
        self.words: dict[str, tuple[Value, Value]] = {}  # by pointer
        self.has_streams = False
        self.row_in_result = row_in_result(kernel)
        self.lost_nans = lost_nans(kernel)
        self.scratch_row: Value | None = None  # of the row that may lie in a result's place
        self.results = {b.name for b in kernel.buffers if b.mode == "out"}

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
                pointer = self._scratch(alloc_size(s))
                self.memory[s.name] = Memory(pointer, s.dtype, s.shape)
                if self.row_in_result is not None and s.name == self.row_in_result.row:
                    self.scratch_row = pointer
            elif isinstance(s, SortRow):
                count = as_expr(s.count)
                dtype = self.memory[s.keys].dtype
                for name, kind in ((s.keys, dtype), (s.order, I64)):
                    pointer = self._scratch(padded(count * kind.itemsize))
                    self.memory[f"{name} spare"] = Memory(pointer, kind, (count,))

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
        if self.row_in_result is not None:
            scopes[self.row_in_result.row] = scopes[self.row_in_result.store.buffer]
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

    def _words(self) -> None:
        """For buffers of bytes that are gathered, where words may be read and the last place of
        one. A buffer of less than a word is copied, so that none is that the kernel writes."""
        code, read = self.code, [b for b in self.kernel.buffers if b.name not in self.written]
        buffers = [b for b in read if b.dtype.bits == 8]
        body = walk(self.kernel.body) if buffers else ()
        loads = (part for s in body for value in values_of(s) for part in post_order(value))
        gathered = {p.buffer for p in loads if isinstance(p, Load) and is_gathered(p.indices)}
        for buffer in buffers:
            memory = self.memory[buffer.name]
            if buffer.name not in gathered:
                continue
            count, spare = self.index(size_of(buffer.shape)), code.fresh("word")
            self.allocas.append(f"  {spare} = alloca i{8 * WORD}, align {WORD}")
            pointer = code.value(spare, "ptr")
            for place in range(WORD - 1):
                after, copy = code.label("short"), code.label("copy")
                small = count.compare("lt", WORD) & count.compare("gt", place)
                code.branch_if(small, copy, after)
                code.start(copy)
                byte = code.emit(f"load i8, ptr {self._byte_at(memory.pointer, place)}", "i8")
                code.line(f"store i8 {byte.text}, ptr {self._byte_at(pointer, place)}")
                code.branch(after)
                code.start(after)
            small = count.compare("lt", WORD)
            most = small.select(code.const(0, "i64"), count - WORD)
            self.words[memory.pointer.text] = (small.select(pointer, memory.pointer), most)

    def _byte_at(self, pointer: Value, place: int) -> str:
        return self.code.emit(f"getelementptr i8, ptr {pointer.text}, i64 {place}", "ptr").text

    def _address(self, memory: Memory, indices: Sequence[KernelValue]) -> Value:
        kind, offset = scalars.MEMORY[memory.dtype.name], self._offset(memory, indices)
        return self.code.pure(
            f"getelementptr inbounds {kind}, ptr {memory.pointer.text}, i64 {offset.text}", "ptr"
        )

    def _offset(self, memory: Memory, indices: Sequence[KernelValue]) -> Value:
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
        return offset

    @abstractmethod
    def index(self, expr: Expr) -> Value:
        """The i64 value of an expression."""
