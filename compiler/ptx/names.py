"""Names in a function: which are registers, which special registers, which variables and labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from . import syntax as s
from .errors import PtxError
from .shapes import Written

_AXES = re.compile(r"%(n?tid|n?ctaid|cluster_n?ctaid|n?clusterid)")
"""Special registers that are vectors of four, whose last element is 0."""
_SPECIAL = re.compile(
    _AXES.pattern + r"\.[xyzw]|%(laneid|n?warpid|n?smid|gridid"
    r"|is_explicit_cluster|cluster_n?ctarank|lanemask_(eq|le|lt|ge|gt)|clock|clock_hi|clock64"
    r"|globaltimer(_lo|_hi)?|total_smem_size|aggr_smem_size|dynamic_smem_size|current_graph_exec"
    r"|reserved_smem_offset_(begin|end|cap|0|1)|pm\d(_64)?|envreg\d+)"
)
_PARTS = re.compile(r"[bh]\d+")
"""Bytes and halves of a register, as video instructions select them."""


def parts(name: str, count: int) -> list[str]:
    """The registers that a vector of registers stands for."""
    return [f"{name}${letter}" for letter in "xyzw"[:count]]


class Resolve:
    """Turns names into registers and special registers, and gives instructions their `.loc`."""

    def __init__(self, declared: dict[str, str]) -> None:
        self.scopes: list[dict[str, str]] = [declared]
        self.families: list[dict[str, tuple[str, int]]] = [{}]
        self.known: dict[str, s.Operand] = {}
        """What names were found to be, since the last declaration."""
        self.loc: s.Loc | None = None

    def body(self, statements: list[Any]) -> tuple[s.Statement, ...]:
        return tuple([self.statement(x) for x in statements])

    def statement(self, x: Any) -> s.Statement:
        if isinstance(x, Written | s.Instruction):
            return self.instruction(x)
        if isinstance(x, s.Registers):
            self.declare(x)
        elif isinstance(x, s.Variable) and x.space in ("param", "local", "shared", "global"):
            self.scopes[-1].pop(x.name, None)
            self.known = {}
        elif isinstance(x, s.Loc):
            self.loc = x
        elif isinstance(x, s.Scope):
            self.scopes.append({})
            self.families.append({})
            outside, self.known = self.known, {}
            x = s.Scope(self.body(list(x.body)))
            self.known = outside
            self.scopes.pop()
            self.families.pop()
        statement: s.Statement = x
        return statement

    def declare(self, registers: s.Registers) -> None:
        self.known = {}
        for name, count in registers.names:
            if count is None:
                self.scopes[-1][name] = registers.type
            else:
                self.families[-1][name] = (registers.type, count)

    def instruction(self, x: s.Instruction | Written) -> s.Instruction:
        try:
            if isinstance(x, Written):
                return x.resolved(self)
            guard = x.guard
            if guard is not None:
                guard = s.Guard(self.register(guard.register.name), guard.negated)
            operands = tuple(self.operand(o) for o in x.operands)
        except PtxError as error:
            name = ".".join((x.opcode, *x.modifiers))
            raise PtxError(f"`{name}`: {error.message}", line=x.line) from None
        return s.Instruction(x.opcode, x.modifiers, operands, guard, x.line, self.loc)

    def type_of(self, name: str) -> str | None:
        shortest = len(name.rstrip("0123456789"))
        for scope, families in zip(reversed(self.scopes), reversed(self.families), strict=True):
            if name in scope:
                return scope[name]
            for length in range(shortest, len(name)) if families else ():
                family = families.get(name[:length])
                if family is not None and (name[length] != "0" or length == len(name) - 1):
                    if int(name[length:]) < family[1]:
                        return family[0]
        return None

    def register(self, name: str) -> s.Register:
        found = self.known.get(name)
        if isinstance(found, s.Register):
            return found
        kind = self.type_of(name)
        if kind is None:
            raise PtxError(f"`{name}` is not declared")
        self.known[name] = made = s.Register(name, kind)
        return made

    def operand(self, x: s.Operand) -> s.Operand:
        match x:
            case s.Symbol(name, offset):
                return self.symbol(str(name), offset)
            case s.Negated(register):
                return s.Negated(self.register(str(register.name)))
            case s.Vector(elements):
                return s.Vector(tuple(self.operand(e) for e in elements))
            case s.Arguments(elements):
                return s.Arguments(tuple(self.operand(e) for e in elements))
            case s.Pair(first, second):
                return s.Pair(self.operand(first), self.operand(second))
            case s.Address(base, offset, coordinates):
                rest = tuple(self.operand(e) for e in coordinates)
                return s.Address(self.base(self.operand(base)), offset, rest)
            case _:
                return x

    def base(self, x: s.Operand) -> s.Register | s.Symbol | s.Immediate:
        """The base of an address."""
        if not isinstance(x, s.Register | s.Symbol | s.Immediate):
            raise PtxError("no address")
        return x

    def vector(self, name: str) -> s.Operand | None:
        """A vector of registers, or one of its elements: `v`, `v.x`, `v.r`."""
        stem, _, letter = name.partition(".")
        if letter and letter in "xyzwrgba":
            found = parts(stem, 4)["xyzwrgba".index(letter) % 4]
            kind = self.type_of(found)
            return s.Register(found, kind) if kind else None
        whole = [(x, kind) for x in parts(name, 4) if (kind := self.type_of(x))]
        return s.Vector(tuple(s.Register(*x) for x in whole)) if whole else None

    def name(self, name: str) -> s.Operand:
        """What a name stands for."""
        found = self.known.get(name)
        if found is None:
            found = self.known[name] = self.symbol(name, 0)
        return found

    def simple(self, fillings: Sequence[Any]) -> tuple[s.Operand, ...]:
        """Operands that are each a name, or a number that was read."""
        known, name = self.known, self.name
        return tuple([
            known.get(x) or name(x) if x.__class__ is str else x for x in fillings
        ])  # fmt: skip

    def symbol(self, name: str, offset: int) -> s.Operand:
        """What a name stands for, and for a variable the bytes behind its start."""
        found = self.plain(name)
        if isinstance(found, s.Symbol):
            return s.Symbol(name, offset) if offset else found
        if offset:  # `ptxas` adds it, which no manual says
            raise PtxError(f"`{name}{offset:+}`: a number is added to a register only in an "
                           "address; elsewhere `add` does that")  # fmt: skip
        return found

    def plain(self, name: str) -> s.Operand:
        """What a name stands for, without an offset."""
        if name == "_":
            return s.Sink()
        kind = self.type_of(name)
        if kind is not None:
            return s.Register(name, kind)
        vector = self.vector(name)
        if vector is not None:
            return vector
        if name[0] == "%":
            if _AXES.fullmatch(name):
                return s.Vector(tuple(s.Special(f"{name}.{axis}") for axis in "xyzw"))
            if not _SPECIAL.fullmatch(name):
                stem, _, part = name.partition(".")
                if _PARTS.fullmatch(part) and self.type_of(stem) is not None:
                    raise PtxError(f"`{name}`: parts of registers are not known")
                raise PtxError(f"`{name}` is not declared")
            return s.Special(name)
        return s.Symbol(name)
