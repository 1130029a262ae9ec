"""Where buffers and scratch lie inside a function, and what may overlap."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stagefuse.compiler.evaluate import Evaluator, Known
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Index,
    Kernel,
    SortRow,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, as_expr, const
from stagefuse.dsl.dtypes import I64, DType

from . import scalars
from .bodies import walk
from .ir import Code, Value
from .lost_nans import lost_nans
from .module import Module
from .result_rows import row_in_result
from .scratch import alloc_size, padded


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
        self.code.converts_long = module.level == "v4"
        self.scopes: list[Scope] = [Scope()]
        self.memory: dict[str, Memory] = {}
        self.groups: list[str] = []  # access groups of the loops around
        self.scratch = const(0)
        self.allocas: list[str] = []
        self.tiles: dict[str, tuple[Value, Value]] = {}  # stores that go to the stack for now
        self.places: dict[tuple[Expr, Expr], Value] = {}  # tables, by what is in them
        self.sound: frozenset[int] = frozenset()  # checks and conditions known to hold
        self.has_streams = False
        self.quick_quotients: bool | None = None  # of the loop around, if there is one for each
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

    def _is_fixed(self, value: KernelValue, bound: set[str], besides: str = "") -> bool:
        """Whether a unique value is the same in all iterations of a loop that binds indices, and
        can be computed before it, if an index besides those around it is known."""
        names = self.names(value)
        if self._is_volatile(value) or names & bound:
            return False
        return names <= self._bound_in(self.scopes) | {besides}

    @staticmethod
    def _bound_in(scopes: Sequence[Scope]) -> set[str]:
        """Indices, dimensions, and locals with a % before their names."""
        found: set[str] = set()
        for scope in scopes:
            found |= scope.indices.keys() | {f"%{n}" for n in scope.locals}
        return found

    @abstractmethod
    def index(self, expr: Expr) -> Value:
        """The i64 value of an expression."""
