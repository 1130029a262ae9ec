"""Kernel IR values made unique, so that equal ones are one object, however they were built.

Everything here walks without recursion: a fused chain can be thousands of operations deep.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from stagefuse.compiler.kernel_ir import Checked, Const, Index, Load, Local, Op, Value
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.facts import Facts


def parts(value: Value) -> tuple[Value, ...]:
    """The values a value is made of."""
    if isinstance(value, Load):
        return (*value.indices, *value.guard)
    if isinstance(value, Op):
        return value.args
    if isinstance(value, Checked):
        return (value.value,)
    return ()


class Unique:
    """The one object for each value. -0.0 and 0.0 differ, as do 1, 1.0 and True."""

    def __init__(self) -> None:
        self._of: dict[int, Value] = {}
        self._by_key: dict[Hashable, Value] = {}
        self._kept: list[Value] = []  # identities stay taken

    def __call__(self, value: Value) -> Value:
        stack = [value]
        while stack:
            top = stack[-1]
            if id(top) in self._of:
                stack.pop()
                continue
            missing = [p for p in parts(top) if id(p) not in self._of]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            self._add(top)
        return self._of[id(value)]

    def _add(self, value: Value) -> None:
        made = self._by_key.setdefault(self._key(value), self._rebuilt(value))
        self._of[id(value)] = self._of[id(made)] = made
        self._kept += [value, made]

    def _ids(self, values: Sequence[Value]) -> tuple[int, ...]:
        return tuple(id(self._of[id(v)]) for v in values)

    def _key(self, value: Value) -> Hashable:
        if isinstance(value, Const):
            return ("const", repr(value.value), value.dtype.name)
        if isinstance(value, Index):
            return ("index", value.expr)
        if isinstance(value, Local):
            return ("local", value.name)
        if isinstance(value, Load):
            places, guards = self._ids(value.indices), self._ids(value.guard)
            return ("load", value.buffer, places, guards, repr(value.fill))
        if isinstance(value, Op):
            return (value.fn, self._ids(value.args), value.dtype.name, value.to)
        place = (value.extent, value.length, value.site, value.proved)
        return ("checked", self._ids((value.value,)), place)

    def _rebuilt(self, value: Value) -> Value:
        def own(values: Sequence[Value]) -> tuple[Value, ...]:
            return tuple(self._of[id(v)] for v in values)

        if isinstance(value, Load):
            return replace(value, indices=own(value.indices), guard=own(value.guard))
        if isinstance(value, Op):
            return replace(value, args=own(value.args))
        if isinstance(value, Checked):
            return replace(value, value=own((value.value,))[0])
        return value


def post_order(value: Value) -> list[Value]:
    """A value and all it is made of, parts first, each once."""
    found: list[Value] = []
    seen: set[int] = set()
    stack: list[tuple[Value, bool]] = [(value, False)]
    while stack:
        top, ready = stack.pop()
        if ready:
            found.append(top)
        elif id(top) not in seen:
            seen.add(id(top))
            stack.append((top, True))
            stack.extend((p, False) for p in parts(top))
    return found


def renamed(value: Value, names: Mapping[str, Expr], facts: Facts | None = None) -> Value:
    """A value with expressions in place of index symbols; simplified by facts, if there are."""
    made: dict[int, Value] = {}

    def own(values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(made[id(v)] for v in values)

    for part in post_order(value):
        new = part
        if isinstance(part, Index):
            new = Index(part.expr.substitute(names, facts))
        elif isinstance(part, Load):
            new = replace(part, indices=own(part.indices), guard=own(part.guard))
        elif isinstance(part, Op):
            new = replace(part, args=own(part.args))
        elif isinstance(part, Checked):
            new = replace(part, value=own((part.value,))[0])
        made[id(part)] = new
    return made[id(value)]
