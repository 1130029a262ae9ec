"""Checking a whole file: every pipeline, and every function that none of them calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from stagefuse.dsl import ast
from stagefuse.dsl.diagnostics import Diagnostic
from stagefuse.dsl.dims import Expr, sym
from stagefuse.dsl.dtypes import F32, I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.program import NO_INPUTS, Pipeline, Program, State, ValueId
from stagefuse.dsl.signature import Builtin
from stagefuse.dsl.source import Source, Span
from stagefuse.dsl.types import TensorType

from . import literals, statements, subscripts, updates
from .agreement import Agreement
from .apply import Arg
from .declared import (
    ConstantSpec,
    Signature,
    Silent,
    TensorSpec,
    generic_classes,
)
from .expressions import evaluate
from .frame import Frame
from .inlining import Inlining
from .modules import Checker, Endless, Headers, ModuleScope
from .record import Recorder
from .report import Failed
from .results import as_declared
from .unify import Declared
from .values import NONE, Dim, Function, Items, Number, Scope, Tensor, Value, is_poison
from .where import gather_facts

REPRESENTATIVE = {"float": F32, "int": I64, "number": F32, "any": F32}


def check(
    module: ast.Module,
    source: Source,
    *,
    builtins: Mapping[str, Builtin],
    load_module: Callable[[str], Source | None] = lambda name: None,
    weights: Callable[[str], Headers] = lambda path: {},
    overrides: Mapping[str, str] | None = None,
) -> tuple[Program, tuple[Diagnostic, ...]]:
    """The checked program of a syntax tree, and everything that is wrong with it.

    `weights` gives the headers of the file at a path, and raises WeightsError; `overrides` are
    paths by the name of the weights. With diagnostics, only the pipelines without errors are there.
    """
    checker = Checker(builtins, load_module, weights, overrides or {})
    pipelines: list[Pipeline] = []
    try:
        scope = checker.enter(module, source, "")
        for item in module.items:
            if isinstance(item, ast.Pipeline) and scope.items.get(item.name) is item:
                before = len(checker.reporter.found)
                with checker.reporter.catching():
                    found = _Entry(checker, scope, item).pipeline()
                    if found is not None and len(checker.reporter.found) == before:
                        pipelines.append(found)
        for item in module.items:
            if isinstance(item, ast.Fn) and scope.items.get(item.name) is item:
                if id(item) not in checker.called:
                    _check_uncalled(checker, scope, item)
        _require_overrides(checker, module, scope)
    except Endless:
        pass
    except RecursionError:
        checker.reporter.report(
            Failed("E0211", "this program is nested too deeply", Span(source, 0, 0))
        )
    program = Program(source, tuple(pipelines), dict(checker.weights))
    return program, checker.reporter.ordered(source.name)


def _require_overrides(checker: Checker, module: ast.Module, scope: ModuleScope) -> None:
    """Weights that are given from outside and that no declaration names."""
    names = {item.name for item in module.items if isinstance(item, ast.WeightsDecl)}
    for name in sorted(set(checker.overrides) - names):
        declared = ", ".join(f"`{n}`" for n in sorted(names)) or "none"
        checker.reporter.report(
            Failed(
                "E0214",
                f"there are no weights `{name}` in this program",
                Span(scope.source, 0, 0),
                notes=[f"it declares: {declared}"],
            )
        )


class _Entry:
    """One pipeline: its inputs and facts, then its body."""

    def __init__(self, checker: Checker, scope: ModuleScope, node: ast.Pipeline) -> None:
        self.checker, self.node = checker, node
        self.recorder = Recorder(Facts(), node.name)
        self.frame = Frame(checker, self.recorder, scope)
        self.signature = Signature(self.frame, own_sizes=True)

    def pipeline(self) -> Pipeline | None:
        """The checked pipeline, or None if its result is wrong. Raises Failed."""
        specs = []
        for param in self.node.params:
            with self.checker.reporter.catching(), suppress(Silent):
                specs.append((param, self._input_spec(param)))
        lines = [s for s in self.node.body if isinstance(s, ast.State)]
        lines = [s for s, own in zip(lines, self.node.body, strict=False) if s is own]
        states = []
        for state in lines:
            with self.checker.reporter.catching(), suppress(Silent):
                states.append((state, self._state_type(state)))
        if len(specs) < len(self.node.params) or len(states) < len(lines):
            return None
        dims = tuple(self.signature.variables)
        self._require_solvable([s.shape.before for _, s in specs], [t.shape for _, t in states])
        gather_facts(self.recorder, self.signature, self.node.where)
        self.frame.dims = {name: sym(name) for name in dims}
        inputs = []
        for param, spec in specs:
            declared = TensorType(_dtype(spec), spec.shape.before)
            self.checker.require_free(param.name, param.span)
            self.frame.locals[param.name] = self.recorder.input(param.name, declared, param.span)
            inputs.append((param.name, declared, param.span))
        begun = [self._begin(state, type) for state, type in states]
        rest = self.node.body[len(lines) :]
        if lines and not rest:
            what = f"the body of `{self.node.name}` has no result"
            raise Failed("E0218", what, lines[-1].span)
        value = statements.body(self.frame, rest, f"`{self.node.name}`")
        if is_poison(value):
            return None
        results = self._results(value)
        kept = [state for state in map(self._kept, begun) if state is not None]
        if len(kept) < len(begun):
            return None
        return Pipeline(
            self.node.name,
            self.node.doc,
            tuple(inputs),
            results,
            self.recorder.types,
            tuple(self.recorder.body),
            self.recorder.facts,
            dims,
            tuple(self.recorder.checks),
            self.node.span,
            tuple(kept),
        )

    # States

    def _state_type(self, node: ast.State) -> TensorType:
        """The declared type of a state. Raises Failed, Silent."""
        self.checker.require_free(node.name, node.name_span)
        taken = {p.name: p.span for p in self.node.params}
        for other in self.node.body:
            if other is node:
                break
            if isinstance(other, ast.State):
                taken[other.name] = other.name_span
        if node.name in taken:
            raise Failed("E0210", f"`{node.name}` is named twice", node.name_span, "again here",
                         [(taken[node.name], "first here")])
        spec = self.signature.spec(node.type)
        if isinstance(spec, ConstantSpec) or spec.shape.rest is not None:
            scalar = {"int": "i64", "float": "f32", "bool": "bool[]"}.get(str(spec))
            raise Failed("E0223", "a state is a tensor with a fixed number of dimensions",
                         node.type.span, help=scalar and f"a scalar is `{scalar}`")
        return TensorType(_dtype(spec), spec.shape.before)

    def _begin(self, node: ast.State, declared: TensorType) -> State | None:
        """The state as it is before the call; None if its initial value is wrong."""
        before = self.recorder.state(node.name, declared, node.name_span)
        self.frame.locals[node.name] = before
        self.frame.states[node.name] = before
        try:
            initial = updates.initial(self.frame, node, declared)
        except subscripts.Poisoned:
            return None
        except Failed as failure:
            self.checker.reporter.report(failure)
            return None
        span = node.name_span
        return State(node.name, declared, initial, before.id, before.id, before.id, span)

    def _kept(self, state: State | None) -> State | None:
        """The state with its value after the call; None if that is wrong."""
        after = None if state is None else self.frame.locals[state.name]
        if state is None or not isinstance(after, Tensor):
            return None
        return replace(state, updated=self.frame.states[state.name].id, after=after.id)

    def _input_spec(self, param: ast.Param) -> TensorSpec:
        if param.name in NO_INPUTS:
            raise Failed(
                "E0210",
                f"an input cannot be called `{param.name}`",
                param.span,
                "in a call from Python this word has a meaning of its own",
                help=f"choose another name, such as `{param.name}_`",
            )
        spec = self.signature.spec(param.type)
        if isinstance(spec, ConstantSpec):
            hint = {"int": "i64", "float": "f32", "bool": "bool[]"}.get(spec.kind)
            raise Failed(
                "E0219",
                "the inputs of a pipeline are tensors",
                param.span,
                f"{spec.kind} is a constant of the compilation",
                help=f"a scalar input is `{param.name}: {hint}`"
                if hint
                else f'write `const {param.name} = "..."`, or give it to a `fn`'
                if spec.kind == "str"
                else 'declare `weights w = "file.safetensors"` at the top',
            )
        if spec.shape.rest is not None:
            raise Failed(
                "E0219",
                "the inputs of a pipeline have a fixed number of dimensions",
                param.type.span,
                help=f"write them out in place of `*{spec.shape.rest}`",
            )
        if param.default is not None:
            raise Failed("E0219", "an input of a pipeline has no default", param.default.span)
        return spec

    def _require_solvable(
        self, inputs: list[tuple[Expr, ...]], states: list[tuple[Expr, ...]]
    ) -> None:
        """Each size must follow from the shapes of the inputs, or be one that a session gives."""
        known = {name for shape in states for size in shape for name in size.symbols()}
        pending = [e for shape in inputs for e in shape]
        while True:
            before = len(known)
            for expr in pending:
                unknown = [n for n in sorted(expr.symbols()) if n not in known]
                slope = expr.coefficient(unknown[0]) if len(unknown) == 1 else None
                if slope is not None and slope.terms:
                    known.add(unknown[0])
            if len(known) == before:
                break
        for name, span in self.signature.variables.items():
            if name not in known:
                raise Failed(
                    "E0219",
                    f"the size `{name}` does not follow from the inputs",
                    span,
                    help=f"use `{name}` alone as a dimension of some input",
                )

    def _results(self, value: Value) -> tuple[tuple[str | None, ValueId], ...]:
        """The results as declared. Raises Failed."""
        signature = Signature(Frame(self.checker, self.recorder, self.frame.module))
        agreement = Agreement(
            self.recorder, signature, f"`{self.node.name}`", self.node.name_span
        )
        agreement.solver.values = dict(self.frame.dims)
        span = self.node.body[-1].span
        value = as_declared(agreement, value, self.node.result, span)
        items = value.items if isinstance(value, Items) else (value,)
        names = value.names if isinstance(value, Items) and value.names else (None,) * len(items)
        found = []
        for name, item in zip(names, items, strict=True):
            if not isinstance(item, Tensor | Number | Dim | Scope) or (
                isinstance(item, Scope) and item.leaf is None
            ):
                raise Failed(
                    "E0205", "the result of a pipeline is a tensor or a tuple of them", span
                )
            tensor = literals.typed(self.recorder, item, None, span)
            found.append((name, tensor.id))
        return tuple(found)


def _dtype(spec: TensorSpec) -> DType:
    assert isinstance(spec.dtype, DType)
    return spec.dtype


_SURE = ("E0201", "E0202", "E0206", "E0209", "E0210", "E0213", "E0214", "E0218", "E0219", "E0220")
"""Codes of what is wrong for every number of dimensions."""


def _may_be_right(failure: Failed) -> bool:
    """Whether a failure of a function that nothing calls might be none for the sizes of a call."""
    notes = " ".join(failure.notes)
    if failure.code == "E0207":
        depends = any(words in notes for words in (" any size ", " at least ", " is in "))
        return depends and "differ for some" not in notes
    return failure.code == "E0208" or (failure.code == "E0203" and "may differ" in notes)


def _check_uncalled(checker: Checker, scope: ModuleScope, node: ast.Fn) -> None:
    """Check a function that nothing calls with its declared types, as far as they tell."""
    recorder = Recorder(Facts(), node.name)
    caller = Frame(checker, recorder, scope)
    signature = Signature(caller, own_sizes=True)
    checker.symbolic = True
    checker.reporter.doubt = _may_be_right
    try:
        with checker.reporter.catching():
            for param in node.params:
                checker.require_free(param.name, param.span)
            signature.generics = generic_classes(node)
            if any(isinstance(d, ast.Star) for p in node.params for d in p.type.dims or ()):
                checker.reporter.doubt = lambda failure: failure.code not in _SURE
            args = _stand_ins(caller, signature, node)
            if args is None:
                return
            gather_facts(recorder, signature, node.where)
            for name in signature.variables:
                recorder.facts.ranges.setdefault(name, (0, None))  # type: ignore[attr-defined]
            recorder.hidden = 1
            call = Inlining(caller, Function(node, scope), args, {}, node.name_span)
            call.value()
    except Silent:
        pass
    finally:
        checker.symbolic = False
        checker.reporter.doubt = None


def _stand_ins(caller: Frame, signature: Signature, node: ast.Fn) -> list[Arg] | None:
    """An argument of the declared type for each parameter; None where there is no such thing."""
    values: dict[str, Value] = {}
    for param in node.params:
        spec = None
        if param.type.dims is None:
            spec = signature.spec(param.type)
        if isinstance(spec, ConstantSpec):
            if param.default is None:
                return None
            values[param.name] = evaluate(caller, param.default)
            caller.locals[param.name] = values[param.name]
    for param in node.params:
        if param.name in values:
            continue
        spec = signature.spec(param.type)
        assert isinstance(spec, TensorSpec)
        if isinstance(param.default, ast.NoneLit):
            values[param.name] = NONE
            continue
        dtype = spec.dtype
        if isinstance(dtype, str):
            dtype = REPRESENTATIVE[signature.generics[dtype]]
        values[param.name] = caller.recorder.input(
            param.name, TensorType(dtype, _shape(signature, spec.shape)), param.span
        )
    return [Arg(values[p.name], p.span) for p in node.params]


def _shape(signature: Signature, declared: Declared) -> tuple[Expr, ...]:
    middle: tuple[Expr, ...] = ()
    if declared.rest is not None:
        signature.variables.setdefault(declared.rest, signature.rests[declared.rest])
        middle = (sym(declared.rest),)
    return (*declared.before, *middle, *declared.after)
