"""Bodies as statements on values: what is folded into functions and loops, and then written."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stagefuse.dsl.types import TensorType

from .terms import Term, operands


class Value:
    """What a statement gives, or an input, a parameter, or a path below the weights.

    A path is `base` (None for `w`) and dotted names; it stands for a tensor or, as `is_scope`, for
    the weights of a layer.
    """

    __slots__ = ("base", "hint", "is_scope", "maker", "name", "path", "type")

    def __init__(self, type: TensorType | None = None, hint: str = "", name: str = "",
                 path: str | None = None, base: Value | None = None,
                 is_scope: bool = False) -> None:  # fmt: skip
        self.type, self.hint, self.name = type, hint, name
        self.path, self.base, self.is_scope = path, base, is_scope
        self.maker: Statement | None = None


class Statement(ABC):
    """Something computed: `reads` are its operands, `gives` its results."""

    reads: list[Value]
    gives: list[Value]

    def _owns(self) -> None:
        for value in self.gives:
            value.maker = self

    @property
    @abstractmethod
    def key(self) -> object:
        """Equal for statements that may be the same one in a function."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """About how many characters it takes."""


class Compute(Statement):
    """An operation of a term, on operands and numbers that may be others than the term's."""

    def __init__(self, term: Term, reads: Sequence[Value], numbers: Sequence[Term | Value],
                 gives: list[Value]) -> None:  # fmt: skip
        self.term, self.reads, self.numbers, self.gives = term, list(reads), list(numbers), gives
        kinds = tuple((v.path is not None, v.is_scope) for v in self.reads)
        self._key = skeleton(term), kinds, len(gives)
        paths = sum(len(v.path) for v in self.reads if v.path is not None)
        self._cost = own_size(term) + 4 * len(self.reads) + paths + 4
        self._owns()

    @property
    def key(self) -> object:
        return self._key

    @property
    def cost(self) -> int:
        return self._cost


@dataclass(eq=False)
class Function:
    """A body under a name. A parameter is a value, or a number if it has no type and no scope."""

    name: str
    params: list[Value]
    body: list[Statement]
    results: list[Value]


class Apply(Statement):
    """A call of a function."""

    def __init__(self, function: Function, reads: list[Value], numbers: list[Term | Value],
                 gives: list[Value]) -> None:  # fmt: skip
        self.function, self.reads, self.numbers, self.gives = function, reads, numbers, gives
        self._owns()

    @property
    def key(self) -> object:
        kinds = tuple((v.path is not None, v.is_scope) for v in self.reads)
        return self.function.name, kinds, len(self.gives)

    @property
    def cost(self) -> int:
        return 10 + 8 * (len(self.reads) + len(self.numbers)) + 6 * len(self.gives)


class Loop(Statement):
    """A body once for every row of `items`, which are bound to `targets`.

    `carried` are (what it begins with, what the body reads, what the body leaves); `gives` are
    values of the last turn, one for each of `leaves`.
    """

    def __init__(self, targets: list[Value], items: list[list[Value | Term]],
                 carried: list[tuple[Value, Value, Value]], body: list[Statement],
                 leaves: list[Value], gives: list[Value], outer: list[Value]) -> None:  # fmt: skip
        self.targets, self.items, self.carried, self.body = targets, items, carried, body
        self.leaves, self.gives, self.outer = leaves, gives, outer
        self.reads = [*(c[0] for c in carried), *outer,
                      *(v for row in items for v in row if isinstance(v, Value))]  # fmt: skip
        self._owns()

    @property
    def key(self) -> object:
        return id(self)

    @property
    def cost(self) -> int:
        return 40 + sum(s.cost for s in self.body)


@dataclass
class Program:
    """Statements with their results; functions in the order in which they are defined."""

    body: list[Statement]
    results: list[Value]
    functions: list[Function] = field(default_factory=list)


def program_of(
    order: Sequence[Term], results: Sequence[Term], paths: Mapping[Term, str]
) -> tuple[list[Statement], list[Value]]:
    """Statements for terms, operands first, and the values of results."""
    made: dict[Term, list[Value]] = {}
    body: list[Statement] = []
    counts = {t.args[0]: t.value[1] for t in order if t.kind == "item"}
    for term in order:
        if term.kind in ("weight", "scope"):
            made[term] = [Value(term.type, path=paths[term], is_scope=term.kind == "scope")]
        elif term.kind == "input":
            made[term] = [Value(term.type, name=term.value)]
        elif term.kind == "item":
            made[term] = [made[term.args[0]][term.value[0]]]
            made[term][0].type, made[term][0].hint = term.type, term.hint
        else:
            gives = [Value(term.type, term.hint) for _ in range(counts.get(term, 1))]
            reads = [made[o][0] for o in operands(term)]
            body.append(Compute(term, reads, numbers_of(term), gives))
            made[term] = gives
    return body, [made[r][0] for r in results]


def reachable(results: Sequence[Term]) -> list[Term]:
    """The operations and leaves that results need, operands first, otherwise as they were made."""
    found, stack = set(results), list(results)
    while stack:
        term = stack.pop()
        parts = [] if term.kind in ("weight", "scope", "input") else operands(term)
        for part in parts:
            if part not in found:
                found.add(part)
                stack.append(part)
    return sorted(found, key=lambda t: t.serial)


def demanded(results: Sequence[Term]) -> list[Term]:
    """The same terms, each directly before what needs it first.

    What several layers need and no layer makes, such as a mask, comes before them all.
    """
    place: dict[Term, None] = {}
    stack = [(r, False) for r in (*reversed(results), *reversed(_shared(results)))]
    while stack:
        term, is_done = stack.pop()
        if term in place:
            continue
        parts = [] if term.kind in ("weight", "scope", "input") else operands(term)
        if is_done:
            place[term] = None
        else:
            stack.append((term, True))
            stack += [(p, False) for p in reversed(parts) if p not in place]
    return list(place)


def _shared(results: Sequence[Term]) -> list[Term]:
    """What layers, whose weights are numbered, read of what is in no layer, if it is read twice."""
    inside, reads, shared = set[Term](), set[Term](), dict[Term, None]()
    for term in reachable(results):
        is_leaf = term.kind in ("weight", "scope", "input")
        parts = [] if is_leaf else operands(term)
        tensors = term.args if term.kind == "scope" else (term,) if term.kind == "weight" else ()
        if any(p in inside for p in parts) or any(map(_is_numbered, tensors)):
            inside.add(term)
        for part in parts:
            if term in inside and part not in inside and part in reads and part.is_operation:
                shared[part] = None
            reads.add(part)
    return list(shared)


def _is_numbered(weight: Term) -> bool:
    return any(p.isdigit() for p in re.split(r"[./]", weight.value))


def numbers_of(term: Term) -> list[Term]:
    """The numbers of an operation that are not part of its operands, in order."""
    found: list[Term] = []

    def visit(part: Term) -> None:
        if is_number(part):
            found.append(part)
        elif not part.is_operand:
            for arg in part.args:
                visit(arg)

    for arg in term.args:
        visit(arg)
    return found


def is_number(term: Term) -> bool:
    while term.kind == "unary" and term.value == "-":
        term = term.args[0]
    return term.kind == "literal" and term.value[0] in ("int", "float")


def skeleton(term: Term) -> str:
    """How a term is written, with `#` for operands and kinds of numbers for numbers."""

    def text(part: Term) -> str:
        if part.is_operand:
            return "#"
        if is_number(part):
            return str(_leaf(part).value[0])
        return whole(part)

    def whole(part: Term) -> str:
        return f"{part.kind} {part.value}({','.join(map(text, part.args))})"

    return whole(term)


def own_size(term: Term) -> int:
    """The characters of an operation without its operands."""
    total = {"call": 2, "binary": 3, "sub": 2, "slice": 1, "list": 2, "tuple": 2}.get(term.kind, 1)
    if term.kind == "call":
        total += len(term.value[0]) + sum(len(n) + 1 for n in term.value[1])
    if term.kind in ("size", "name", "local"):
        total = len(term.value)
    if term.kind == "literal":
        total = len(str(term.value[1]))
    return total + sum(2 + (0 if a.is_operand else own_size(a)) for a in term.args)


def _leaf(term: Term) -> Term:
    return _leaf(term.args[0]) if term.kind == "unary" else term


def read_by(body: Sequence[Statement]) -> Iterator[tuple[int, Value]]:
    """Every value that is read, with the number of the statement that reads it."""
    for number, statement in enumerate(body):
        for value in statement.reads:
            yield number, value
