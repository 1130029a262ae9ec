"""Expressions of the language as terms: equal ones are one object, and names are gone.

A term is an operation on operands, or a leaf. What an operation says besides its operands (axes,
sizes, keywords) are terms too, without an operation in them: they are part of how it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from stagefuse.dsl.types import TensorType

OPERATIONS = frozenset(("call", "binary", "unary", "sub", "index", "reduce", "block"))
LEAVES = frozenset(("input", "weight", "scope", "item"))
"""What may be an operand beside operations: `item` is one result of an operation with several."""


class Term:
    """`kind` and `value` say what it is, `args` what it is made of.

    | kind | value | args |
    |---|---|---|
    | input, size, name, local | the name | |
    | weight | the tensor's key | |
    | literal | the type's name and the number, text or None | |
    | call | the function's name, names of the last arguments | the arguments |
    | binary, unary | the sign | operands |
    | sub | | the base and what stands in brackets |
    | slice | | start, stop, step; `absent` where one is left out |
    | list, tuple | | items |
    | range | whether the end is included | start, stop |
    | index, reduce | names of the indices, and the kind of reduction | the body, ranges |
    | scope | what its tensors are called below it, and how each is stored | tensors |
    | item | which result, of how many | the operation |
    | block | a statement's text with `{}` for operands, and the names it binds | operands |

    `free` are the indices that occur unbound, `type` the type where the checker gave it, `hint`
    the value's name in the model, and `serial` grows with every term that is made. `computes`
    tells whether there is a tensor in it, `sizes` which sizes it names outside its operands.
    """

    __slots__ = ("args", "computes", "free", "hint", "is_operand", "is_operation", "kind", "serial",
                 "sizes", "type", "value")  # fmt: skip

    def __init__(self, kind: str, value: Any, args: tuple[Term, ...], serial: int) -> None:
        self.kind, self.value, self.args, self.serial = kind, value, args, serial
        free: frozenset[str] = frozenset().union(*(a.free for a in args))
        if kind == "local":
            free = frozenset((value,))
        elif kind in ("index", "reduce"):
            free -= frozenset(value[1])
        self.free: frozenset[str] = free
        self.computes = _computes(self)
        self.is_operation = kind in OPERATIONS and not free and self.computes
        self.is_operand = kind in LEAVES or self.is_operation
        self.sizes: frozenset[str] = frozenset((value,)) if kind == "size" else frozenset()
        if kind != "size" and not self.is_operand:
            self.sizes = self.sizes.union(*(a.sizes for a in args))
        self.type: TensorType | None = None
        self.hint = ""

    @property
    def number(self) -> float | None:
        """The value of a literal number, signed or not, or a scalar made of one."""
        if self.kind == "literal" and self.value[0] in ("int", "float"):
            return float(self.value[1])
        if self.kind == "name" and self.value == "math.INF":
            return math.inf
        if self.kind == "unary" and self.value == "-" and self.args[0].number is not None:
            return -self.args[0].number
        if self.kind == "call" and self.value[0] in ("f32", "f64", "f16", "bf16"):
            return self.args[0].number if len(self.args) == 1 else None
        return None

    @property
    def rank(self) -> int | None:
        return None if self.type is None else self.type.rank

    def is_call(self, *names: str) -> bool:
        return self.kind == "call" and self.value[0] in names

    def __repr__(self) -> str:
        return f"{self.kind} {self.value!r}({', '.join(f'%{a.serial}' for a in self.args)})"


def _computes(term: Term) -> bool:
    """Whether there is a tensor in it: arithmetic of sizes and numbers is part of other terms."""
    if term.kind in ("call", "index", "reduce", "block"):
        return term.number is None  # `f32(0.5)` is a number
    return any(a.is_operand or a.computes for a in term.args)


def operands(term: Term) -> list[Term]:
    """The operands of an operation or scope, in order, each as often as it occurs."""
    found: list[Term] = []

    def visit(part: Term) -> None:
        if part.is_operand:
            found.append(part)
        else:
            for arg in part.args:
                visit(arg)

    for arg in term.args:
        visit(arg)
    return found


Rule: TypeAlias = "Callable[[Terms, Term], Term | None]"


class Terms:
    """Makes terms, each once, and rewrites every new one until no rule applies."""

    def __init__(self, rules: tuple[Rule, ...] = ()) -> None:
        self.rules = rules
        self._made: dict[Any, Term] = {}
        self._rewritten: dict[Term, Term] = {}

    def make(self, kind: str, value: Any = None, *args: Term) -> Term:
        """The term, not rewritten."""
        key = (kind, value, tuple(a.serial for a in args))
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = Term(kind, value, args, len(self._made))
        return found

    def rewritten(self, term: Term) -> Term:
        """What the rules make of a term whose parts are rewritten already."""
        if term in self._rewritten:
            return self._rewritten[term]
        found = term
        for rule in self.rules:
            new = rule(self, term)
            if new is not None and new is not term:
                if new.type is None:
                    new.type = term.type
                found = self.rewritten(new)
                found.hint = found.hint or term.hint
                break
        self._rewritten[term] = found
        return found

    def typed(self, term: Term, type: TensorType, hint: str = "") -> Term:
        """The term with the type that the checker gave it, rewritten."""
        if term.type is None:
            term.type = type
            self._rewritten.pop(term, None)
        term.hint = term.hint or hint
        return self.rewritten(term)

    # Shorthands for rules

    def literal(self, value: Any) -> Term:
        return self.make("literal", (type(value).__name__, value))

    def call(self, name: str, *args: Term, like: Term | None = None, **named: Term) -> Term:
        """A call; `like` is a term of the same type."""
        found = self.make("call", (name, tuple(named)), *args, *named.values())
        if like is not None and found.type is None:
            found.type, found.hint = like.type, like.hint
        return found

    def ints(self, values: tuple[int, ...]) -> Term:
        return self.make("list", None, *(self.literal(v) for v in values))


def named(term: Term) -> dict[str, Term]:
    """The arguments of a call that are given by name."""
    names = term.value[1]
    return dict(zip(names, term.args[len(term.args) - len(names) :], strict=True))


def positional(term: Term) -> tuple[Term, ...]:
    return term.args[: len(term.args) - len(term.value[1])]


def integers(term: Term) -> tuple[int, ...] | None:
    """The items of a list or tuple of plain integers, or one integer."""
    if term.kind in ("list", "tuple"):
        found = [integers(a) for a in term.args]
        if any(f is None or len(f) != 1 for f in found):
            return None
        return tuple(f[0] for f in found if f is not None)
    if term.kind == "unary" and term.value == "-":
        inner = integers(term.args[0])
        return None if inner is None or len(inner) != 1 else (-inner[0],)
    if term.kind == "literal" and term.value[0] == "int":
        return (term.value[1],)
    return None


def within(term: Term) -> Iterator[Term]:
    """The term and all its parts, operations below operands included."""
    seen, stack = {term}, [term]
    while stack:
        part = stack.pop()
        yield part
        for arg in part.args:
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
