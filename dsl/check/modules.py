"""Modules: the names of a source file, what they stand for, and files that import files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stagefuse.dsl import ast
from stagefuse.dsl.dtypes import DTYPES, DType, dtype_named
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.signature import Builtin
from stagefuse.dsl.source import Source, Span
from stagefuse.dsl.weights import WeightsError

from .foreign import OTHER_NAMES
from .record import Recorder
from .report import Failed, Reporter, nearest
from .values import (
    POISON,
    BuiltinFunction,
    Dim,
    DTypeValue,
    Function,
    Interval,
    Items,
    Module,
    Number,
    Scope,
    Special,
    Tensor,
    Text,
    Value,
    WeightsHandle,
    describe,
)

Headers = Mapping[str, tuple[DType | str, tuple[int, ...]]]
"""The dtype and shape of each tensor of a weights file; a text is a dtype that is not known."""
SPECIALS = ("has", "len")
RESERVED = ("extern",)
CONSTANT_TYPES = ("int", "float", "bool", "str", "weights")
MAX_STEPS = 100_000


@dataclass
class ModuleScope:
    """The names that a source file defines."""

    name: str
    source: Source
    items: Mapping[str, ast.Item] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)


class Endless(Exception):
    """A program has too many statements to check more of it, which has been reported."""


@dataclass
class Checker:
    """What the check of one program shares: built-ins, files, reports, and how far it has come."""

    builtins: Mapping[str, Builtin]
    load_module: Callable[[str], Source | None]
    open_weights: Callable[[str], Headers]
    overrides: Mapping[str, str]
    reporter: Reporter = field(default_factory=Reporter)
    modules: dict[str, ModuleScope | None] = field(default_factory=dict)
    importing: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    active: list[ast.Fn] = field(default_factory=list)
    called: set[int] = field(default_factory=set)
    steps: int = 0
    least_steps: dict[int, int] = field(default_factory=dict)  # of calls, by the function's id
    symbolic: bool = False

    def step(self, span: Span) -> None:
        """Count one statement. Raises Endless, after reporting it, for a program of too many."""
        self.steps += 1
        self.require_steps(0, span)

    def require_steps(self, more: int, span: Span) -> None:
        """Raises Endless, after reporting it, if that many statements more are too many."""
        if self.steps + more > MAX_STEPS:
            self.reporter.report(
                Failed(
                    "E0208",
                    f"this program unrolls to more than {MAX_STEPS} statements",
                    span,
                    help="index notation and `scan` run over long ranges without unrolling",
                )
            )
            raise Endless

    def is_builtin(self, name: str) -> bool:
        record = self.builtins.get(name)
        known = record is not None and record.user_callable
        return known or name in DTYPES or name in SPECIALS or name in CONSTANT_TYPES[:2]

    def builtin(self, name: str) -> Value | None:
        """A name that every program knows."""
        record = self.builtins.get(name)
        if record is not None and record.user_callable:
            return BuiltinFunction(record)
        if name in DTYPES:
            return DTypeValue(DTYPES[name])
        return Special(name) if name in SPECIALS else None

    def known_names(self) -> list[str]:
        callable_names = [n for n, r in self.builtins.items() if r.user_callable]
        return [*callable_names, *DTYPES, *SPECIALS]

    def require_free(self, name: str, span: Span) -> None:
        """Raises Failed for a name that a program cannot bind."""
        if self.is_builtin(name):
            raise Failed(
                "E0210",
                f"`{name}` is built in and cannot be redefined",
                span,
                help=f"choose another name, such as `{name}_`",
            )

    def _require_distinct(self, item: ast.Item) -> None:
        """Reports parameters of one name, and results."""
        if not isinstance(item, ast.Fn | ast.Pipeline):
            return
        several = item.result.items if isinstance(item.result, ast.TupleType) else ()
        for named in (item.params, [r for r in several if r.name is not None]):
            first: dict[str | None, Span] = {}
            for one in named:
                with self.reporter.catching():
                    if one.name in first:
                        raise Failed("E0210", f"`{one.name}` is named twice", one.span,
                                     "again here", [(first[one.name], "first here")])
                    first[one.name] = one.span

    def enter(self, module: ast.Module, source: Source, name: str) -> ModuleScope:
        """The scope of a parsed file; reports names that are bound twice or built in."""
        items: dict[str, ast.Item] = {}
        scope = ModuleScope(name, source, items)
        first: dict[str, Span] = {}
        for item in module.items:
            span = getattr(item, "name_span", item.span)
            with self.reporter.catching():
                if item.name in RESERVED:
                    raise Failed("E0212", f"`{item.name}` is reserved for later", span)
                if self.is_builtin(item.name):
                    scope.values[item.name] = POISON  # who uses it means this one
                self.require_free(item.name, span)
                self._require_distinct(item)
                if item.name in first:
                    raise Failed(
                        "E0210",
                        f"`{item.name}` is defined twice",
                        span,
                        "again here",
                        [(first[item.name], "first here")],
                    )
                first[item.name] = span
                items[item.name] = item
        for item in module.items:
            if isinstance(item, ast.Import | ast.WeightsDecl | ast.Const):
                if scope.items.get(item.name) is item:
                    self.value(scope, item.name)
        return scope

    def value(self, scope: ModuleScope, name: str) -> Value | None:
        """What a module's name stands for; None if it has no such name."""
        if name in scope.values:
            return scope.values[name]
        item = scope.items.get(name)
        if item is None:
            return None
        if name in scope.open:
            raise Failed("E0211", f"the constant `{name}` is defined by itself", item.span)
        scope.open.append(name)
        found: Value = POISON
        try:
            with self.reporter.catching():
                found = self._evaluate_item(scope, item)
        finally:
            scope.open.pop()
        scope.values[name] = found
        return found

    def _evaluate_item(self, scope: ModuleScope, item: ast.Item) -> Value:
        match item:
            case ast.Import():
                return self._import(item)
            case ast.Const():
                return self._constant(scope, item)
            case ast.WeightsDecl():
                return self._weights(scope, item)
            case ast.Fn():
                return Function(item, scope)
        return Function(_as_function(item), scope)

    def _constant(self, scope: ModuleScope, item: ast.Const) -> Value:
        from .expressions import evaluate
        from .frame import Frame

        recorder = Recorder(Facts(), item.name)
        value = evaluate(Frame(self, recorder, scope), item.value)
        if isinstance(value, Dim) and value.expr.as_int() is not None:
            return value
        if not _is_constant(value):
            raise Failed(
                "E0208", f"`{item.name}` must be a constant", item.value.span, describe(value)
            )
        return value

    def _weights(self, scope: ModuleScope, item: ast.WeightsDecl) -> Value:
        name = item.name if not scope.name else f"{scope.name}.{item.name}"
        path = self.overrides.get(item.name, item.path)
        self.weights[name] = path
        try:
            headers = self.open_weights(path)
        except (WeightsError, OSError) as error:
            raise Failed(
                "E0214",
                str(error),
                item.path_span,
                help=f"the path is relative to the source; `--weights {item.name}=PATH` gives "
                "another" if path == item.path else None,
            ) from error
        tensors = {k: (d, shape) for k, (d, shape) in headers.items() if isinstance(d, DType)}
        unread = {k: d for k, (d, _) in headers.items() if isinstance(d, str)}
        return Scope(WeightsHandle(name, path, tensors, unread), "")

    def _import(self, item: ast.Import) -> Value:
        from stagefuse.dsl.parser import parse, standard_items

        if item.name in self.importing:
            raise Failed("E0213", f"`{item.name}` imports itself", item.span)
        if item.name not in self.modules:
            source = self.load_module(item.name)
            if source is None:
                raise Failed(
                    "E0213",
                    f"there is no module `{item.name}`",
                    item.span,
                    notes=["a module is a file of the standard library or beside the source"],
                )
            if source.is_standard:
                scope = ModuleScope(item.name, source, standard_items(source))
                self.modules[item.name] = scope
                return Module(item.name, scope)
            self.importing.append(item.name)
            try:
                tree, problems = parse(source)
                self.reporter.extend(problems)
                self.modules[item.name] = self.enter(tree, source, item.name)
            finally:
                self.importing.pop()
        found = self.modules[item.name]
        return POISON if found is None else Module(item.name, found)

    def unknown(self, name: str, span: Span, names: list[str]) -> Failed:
        if name in RESERVED:
            return Failed("E0212", f"`{name}` is reserved for later", span)
        advice = None if dtype_named(name) else self.elsewhere(name)
        near = dtype_named(name) or nearest(name, names)
        if advice is None and near is not None:
            advice = f"the nearest name is `{near}`"
        return Failed("E0201", f"unknown name `{name}`", span, help=advice)

    def missing(self, module: Module, name: str, span: Span) -> Failed:
        """What a module lacks."""
        near = nearest(name, module.scope.items)
        if self.is_builtin(name):
            advice: str | None = f"it is built in: write `{name}`"
        elif near is not None:
            advice = f"the nearest name is `{near}`"
        else:
            advice = self.elsewhere(name)
        return Failed("E0201", f"`{module.name}` has no `{name}`", span, help=advice)

    def elsewhere(self, name: str) -> str | None:
        """Where the library has the name, or what is written for it, for help."""
        if self.load_module(name) is not None:
            return f"add `import {name}` at the top"
        if name in OTHER_NAMES:
            return OTHER_NAMES[name]
        for module in (*self.modules, "nn", "math", "image"):
            source = self.load_module(module)
            if source is not None and re.search(rf"^fn {re.escape(name)}\b", source.text, re.M):
                missing = "" if module in self.modules else f", after `import {module}`"
                return f"`{module}` has it: `{module}.{name}`{missing}"
        return None


def _as_function(node: ast.Pipeline) -> ast.Fn:
    """What a call of a pipeline inlines: its signature, its conditions and its body."""
    return ast.Fn(
        node.span, node.name, node.name_span, (), node.params, node.result, node.where, node.body,
        node.doc,
    )  # fmt: skip


def _is_constant(value: Value) -> bool:
    if isinstance(value, Items):
        return all(_is_constant(item) for item in value.items)
    if value is POISON:
        return True
    return isinstance(value, Number | Text | DTypeValue | Interval) and not isinstance(
        value, Tensor
    )
