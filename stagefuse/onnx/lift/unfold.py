"""Functions that are not worth a name any more, written out where they are called.

What repeats inside is folded first, so that a function called a dozen times may be left with one or
two calls, in the function of a whole layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from .program import Apply, Compute, Function, Loop, Program, Statement, Value
from .terms import Term


def unfold(program: Program, is_worth: Callable[[Function, int], bool]) -> None:
    """Write out all functions of which `is_worth` says no, given how often each is called."""
    while True:
        calls = [s for s in _statements(program) if isinstance(s, Apply)]
        counts = {f: sum(c.function is f for c in calls) for f in program.functions}
        gone = next((f for f, n in counts.items() if not is_worth(f, n)), None)
        if gone is None:
            break
        program.functions.remove(gone)
        program.body = _without(program.body, gone, program.results)
        for function in program.functions:
            function.body = _without(function.body, gone, function.results)
    _rename(program.functions)


def _statements(program: Program) -> Iterator[Statement]:
    """All statements, those of functions and loops included."""
    stack = [*program.body, *(s for f in program.functions for s in f.body)]
    while stack:
        statement = stack.pop()
        yield statement
        if isinstance(statement, Loop):
            stack += statement.body


def _without(body: list[Statement], gone: Function, results: list[Value]) -> list[Statement]:
    """A body without calls of a function; its `results` are replaced in place."""
    copier = _Copier(gone)
    made = copier.body(body)
    results[:] = [copier.value(v) for v in results]
    return made


def _rename(functions: Sequence[Function]) -> None:
    """Numbers that tell functions of one name apart begin again."""
    taken = set[str]()
    for function in functions:
        word = re.sub(r"\d+$", "", function.name)
        free = (n for k in range(1, len(functions) + 1)
                if (n := word if k == 1 else f"{word}{k}") not in taken)  # fmt: skip
        function.name = next(free)
        taken.add(function.name)


class _Copier:
    """Copies statements, where values stand for others and one function is written out."""

    def __init__(self, gone: Function) -> None:
        self.gone = gone
        self.known: dict[Value, Value | Term] = {}

    def value(self, value: Value) -> Value:
        found = self.given(value)
        assert isinstance(found, Value)
        return found

    def given(self, value: Value | Term) -> Value | Term:
        """What stands for a value or number: a path below a scope goes on from that scope's."""
        if isinstance(value, Term) or value in self.known:
            return value if isinstance(value, Term) else self.known[value]
        if value.base is None or value.base not in self.known:
            return value
        base = self.value(value.base)
        path = ".".join(p for p in (base.path, value.path) if p)
        above = base if base.path is None else base.base
        made = Value(value.type, value.hint, path=path, base=above, is_scope=value.is_scope)
        self.known[value] = made
        return made

    def body(self, body: Iterable[Statement]) -> list[Statement]:
        return [made for s in body for made in self.statement(s)]

    def statement(self, statement: Statement) -> list[Statement]:
        if isinstance(statement, Apply) and statement.function is self.gone:
            given = [*statement.reads, *statement.numbers]
            inner = _Copier(self.gone)
            for param, own in zip(self.gone.params, given, strict=True):
                inner.known[param] = self.given(own)
            made = inner.body(self.gone.body)
            for value, result in zip(statement.gives, self.gone.results, strict=True):
                self.known[value] = inner.given(result)
            return made
        reads = [self.value(v) for v in statement.reads]
        if isinstance(statement, Loop):
            return [self.loop(statement)]
        assert isinstance(statement, Compute | Apply)
        numbers = [self.given(n) for n in statement.numbers]
        gives = self.made(statement.gives)
        if isinstance(statement, Apply):
            return [Apply(statement.function, reads, numbers, gives)]
        return [Compute(statement.term, reads, numbers, gives)]

    def made(self, values: Sequence[Value]) -> list[Value]:
        """Values of a copy for those of a statement."""
        found = [Value(v.type, v.hint, v.name, v.path, v.base, v.is_scope) for v in values]
        self.known.update(zip(values, found, strict=True))
        return found

    def loop(self, loop: Loop) -> Loop:
        items = [[self.given(v) for v in row] for row in loop.items]
        begins = [self.value(b) for b, _, _ in loop.carried]
        outer = [self.value(v) for v in loop.outer]
        targets = self.made(loop.targets)
        inside = self.made([i for _, i, _ in loop.carried])
        body = self.body(loop.body)
        ends = [self.value(out) for _, _, out in loop.carried]
        carried = list(zip(begins, inside, ends, strict=True))
        leaves = [self.value(v) for v in loop.leaves]
        return Loop(targets, items, carried, body, leaves, self.made(loop.gives), outer)
