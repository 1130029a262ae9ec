"""The body under construction: lines of source, each checked as it is added.

The language's own checker gives every value its type, so what the importer believes of shapes is
what a compilation will find.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.resources import files

from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl import ast
from stagefuse.dsl.check import statements
from stagefuse.dsl.check.frame import Frame
from stagefuse.dsl.check.literals import typed
from stagefuse.dsl.check.modules import Checker, ModuleScope
from stagefuse.dsl.check.record import Recorder
from stagefuse.dsl.check.values import Dim, Items, Tensor, Value
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.parser import parse
from stagefuse.dsl.source import Source, Span
from stagefuse.dsl.types import TensorType

from .errors import Refused
from .names import MODULES

MAX_TERMS, MAX_DEGREE, MAX_SIZE = 200, 32, 1 << 62
_HEAD = "pipeline p():\n"
_IMPORTS = "".join(f"import {name}\n" for name in MODULES)


@frozen
class Line:
    """A statement: its text, its syntax tree, and the types of the names that it binds."""

    text: str
    tree: ast.Stmt
    types: dict[str, list[TensorType]]


@dataclass
class Body:
    """Lines of one pipeline, with the checker that follows them.

    `weights` is what the source calls its weights, `hints` are the model's own names of values,
    with the layer that they belong to.
    """

    frame: Frame
    headers: dict[str, tuple[DType, tuple[int, ...]]]
    lines: list[Line]
    weights: str = "w"
    hints: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def start(dims: Mapping[str, tuple[int, int | None]], weights: str = "w") -> Body:
        """An empty body under sizes with their ranges."""
        headers: dict[str, tuple[DType, tuple[int, ...]]] = {}
        checker = Checker(BUILTINS, _standard, lambda path: headers, {}, modules=dict(_library()))
        source = Source("<import>", f'{_IMPORTS}weights {weights} = "{weights}"\n')
        module, _ = parse(source)
        scope = checker.enter(module, source, "")
        facts = Facts({name: (low, high) for name, (low, high) in dims.items()})
        frame = Frame(checker, Recorder(facts, "model"), scope)
        frame.dims = {name: sym(name) for name in dims}
        return Body(frame, headers, [], weights)

    def weight(self, key: str, dtype: DType, shape: tuple[int, ...]) -> None:
        """One more tensor in the weights file."""
        self.headers[key] = (dtype, shape)
        self.frame.module.values.pop(self.weights, None)

    def input(self, name: str, type: TensorType) -> None:
        """An argument of the pipeline."""
        self.frame.locals[name] = self.frame.recorder.input(name, type, _nowhere())

    def add(self, line: str) -> None:
        """A statement. Raises Refused with the checker's words."""
        statement = parsed(line)
        found = self.frame.checker.reporter.found
        known = self.frame.locals
        words = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", line))
        before = {word: known.get(word) for word in words}
        try:
            statements.run(self.frame, [statement], False)
            if found:
                first = next(iter(found.values()))
                notes = "; ".join(first.notes[:2])
                raise Refused(
                    f"{first.message}{f' ({notes})' if notes else ''} in `{line.splitlines()[0]}`"
                )
        finally:
            found.clear()
        bound = [word for word in words if known.get(word) is not before[word]]
        self.lines.append(Line(line, statement, {n: self._types(n) for n in bound}))

    def within(self, turn: str, count: Expr, carried: Mapping[str, TensorType]) -> Body:
        """The body of a scan over `turn`, which carries values of these types, without lines."""
        recorder = self.frame.recorder
        recorder.step(turn, const(0), count, turn)
        inner = Body(replace(self.frame, locals=dict(self.frame.locals)), self.headers, [],
                     self.weights, self.hints)  # fmt: skip
        inner.frame.locals[turn] = Dim(sym(turn))
        for name, type in carried.items():
            inner.input(name, type)
        return inner

    def types(self, name: str) -> list[TensorType]:
        """The type of a bound name, or those of a tuple's items."""
        found = self._types(name)
        for type in found:
            require_sane(type.shape)
        return found

    def _types(self, name: str) -> list[TensorType]:
        value = self.frame.locals[name]
        items: tuple[Value, ...] = value.items if isinstance(value, Items) else (value,)
        return [self._tensor(item).type for item in items]

    def tensor(self, name: str) -> TensorType:
        """The type of a bound name; a number or a size becomes a scalar."""
        (found,) = self.types(name)
        return found

    def _tensor(self, value: Value) -> Tensor:
        return typed(self.frame.recorder, value, None, _nowhere())

    def same(self, a: Expr | int, b: Expr | int) -> bool:
        """Whether two sizes are equal in every call."""
        return self.facts.prove_eq(a, b)

    @property
    def facts(self) -> Facts:
        """What is known of the sizes."""
        return self.frame.recorder.facts


def require_sane(sizes: Sequence[Expr]) -> None:
    """Raises Refused for sizes that only a hostile file has: their arithmetic would never end."""
    for size in sizes:
        degree = max((sum(power for _, power in m) for m, _ in size.terms), default=0)
        high = any(abs(c) >= MAX_SIZE for _, c in size.terms)
        if high or len(size.terms) > MAX_TERMS or degree > MAX_DEGREE:
            raise Refused("a size that is larger, or more complicated, than any tensor's")


@lru_cache(maxsize=4096)
def parsed(line: str) -> ast.Stmt:
    """The syntax tree of one statement; a model is translated again for other sizes, in the same
    words. Raises Refused."""
    text = _HEAD + "".join(f"    {part}\n" for part in line.split("\n"))
    module, problems = parse(Source("<import>", text))
    if problems:
        raise Refused(f"{problems[0].message} in `{line}`")
    (pipeline,) = module.items
    assert isinstance(pipeline, ast.Pipeline)
    return pipeline.body[0]


@cache
def _nowhere() -> Span:
    return Span(Source("<import>", "\n"), 0, 0)


@cache
def _library() -> dict[str, ModuleScope | None]:
    """The modules of the standard library, read once in a process."""
    checker = Checker(BUILTINS, _standard, lambda path: {}, {})
    source = Source("<import>", _IMPORTS)
    checker.enter(parse(source)[0], source, "")
    return checker.modules


def _standard(name: str) -> Source | None:
    path = files("stagefuse.dsl").joinpath("std", f"{name}.pipe")
    if not path.is_file():
        return None
    return Source(f"std/{name}.pipe", path.read_text("utf-8"), is_standard=True)

