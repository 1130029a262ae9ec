"""How a writer of code computes values of kernel IR: each once, in the scope that first needs it.

What a value depends on decides how long it is good for: `forget` drops what read memory that the
kernel writes. Nothing here recurses: a fused chain can be thousands of operations deep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from stagefuse.compiler.cpu.bodies import written_buffers
from stagefuse.compiler.cpu.values import Unique, parts, post_order
from stagefuse.compiler.kernel_ir import Checked, Const, Index, Kernel, Load, Local, Value
from stagefuse.dsl.dims import Expr

Written = TypeVar("Written")
"""A value as the writer has it: of LLVM, or in a register."""


@dataclass
class Known(Generic[Written]):
    """What is known inside a loop or branch."""

    values: dict[int, Written] = field(default_factory=dict)  # by identity of the unique value
    locals: dict[str, Written] = field(default_factory=dict)


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[Expr, ...]: ...


class Evaluator(ABC, Generic[Written]):
    """The values of one kernel.

    `scopes` are those around what is being written, `memory` its buffers and scratch by name.
    """

    scopes: Sequence[Known[Written]]
    memory: Mapping[str, Shaped]

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.written = written_buffers(kernel.body)
        self._unique = Unique()
        self._volatile: dict[int, bool] = {}
        self._names: dict[int, frozenset[str]] = {}

    @abstractmethod
    def _constant(self, value: Const) -> Written:
        """A constant in the type that it is computed in."""

    @abstractmethod
    def _position(self, expr: Expr) -> Written:
        """The i64 value of an expression."""

    @abstractmethod
    def _compute(self, value: Value) -> Written:
        """A unique value, of which all that is `_needed` is known."""

    def _needed(self, value: Value) -> tuple[Value, ...]:
        """What is computed before a value: not what only a guarded load may look at."""
        if isinstance(value, Load) and value.guard:
            return value.guard
        return parts(value)

    def value(self, value: Value) -> Written:
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

    def _known(self, value: Value) -> Written | None:
        """What is at hand, for a unique value."""
        if isinstance(value, Const):
            return self._constant(value)
        if isinstance(value, Index):
            return self._position(value.expr)
        if isinstance(value, Local):
            for scope in reversed(self.scopes):
                if value.name in scope.locals:
                    return scope.locals[value.name]
            raise KeyError(f"kernel {self.kernel.name} binds no value {value.name}")
        for scope in reversed(self.scopes):
            if id(value) in scope.values:
                return scope.values[id(value)]
        return None

    def forget(self) -> None:
        """Drops values that read memory which statements write."""
        for scope in self.scopes:
            for key in [k for k in scope.values if self._volatile.get(k, True)]:
                del scope.values[key]

    def _is_volatile(self, value: Value) -> bool:
        """Whether a unique value depends on memory that the kernel writes."""
        if id(value) not in self._volatile:
            for part in post_order(value):
                own = isinstance(part, Load) and part.buffer in self.written
                inside = any(self._volatile[id(p)] for p in parts(part))
                self._volatile[id(part)] = own or inside
        return self._volatile[id(value)]

    def names(self, value: Value) -> frozenset[str]:
        """Index symbols that a unique value depends on; locals with a % before their names."""
        if id(value) not in self._names:
            for part in post_order(value):
                found = frozenset[str]().union(*(self._names[id(p)] for p in parts(part)))
                if isinstance(part, Index):
                    found = part.expr.symbols()
                elif isinstance(part, Local):
                    found = frozenset((f"%{part.name}",))
                elif isinstance(part, Checked):
                    found |= part.extent.symbols() | part.length.symbols()
                elif isinstance(part, Load):
                    for extent in self.memory[part.buffer].shape:
                        found |= extent.symbols()
                self._names[id(part)] = found
        return self._names[id(value)]
