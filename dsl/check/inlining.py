"""One call of a function: its arguments against its signature, then its body."""

from __future__ import annotations

from collections.abc import Mapping

from stagefuse.dsl import ast
from stagefuse.dsl.source import Span

from . import expressions, statements
from .agreement import Agreement, Parameter
from .apply import Arg, Bound, bind
from .declared import ConstantSpec, Signature, Silent, Spec, generic_classes
from .frame import Frame
from .report import Failed
from .results import as_declared
from .unrolled import MAX_DEPTH, least_steps
from .values import NONE, POISON, Function, NoneValue, Value, is_poison


class Inlining:
    """A call of a function with arguments."""

    def __init__(
        self,
        caller: Frame,
        function: Function,
        args: list[Arg],
        keywords: Mapping[str, Arg],
        span: Span,
    ) -> None:
        self.node, self.span = function.node, span
        self.args, self.keywords = args, keywords
        self.checker, self.recorder = caller.checker, caller.recorder
        self.frame = Frame(self.checker, self.recorder, function.module, space=caller.space)
        module = function.module.name
        self.what = f"`{module}.{self.node.name}`" if module else f"`{self.node.name}`"

    def value(self) -> Value:
        """The result of the call. Raises Failed."""
        node = self.node
        names = [p.name for p in node.params]
        required = [p.name for p in node.params if p.default is None]
        bound = bind(self.what, names, [], required, self.args, self.keywords, self.span)
        if any(node is running for running in self.checker.active):
            raise Failed(
                "E0211",
                f"{self.what} calls itself",
                self.span,
                others=[(node.name_span, "a function is inlined and cannot recurse")],
            )
        self.checker.called.add(id(node))
        if len(self.checker.active) >= MAX_DEPTH:
            raise Failed(
                "E0211",
                f"functions call one another more than {MAX_DEPTH} deep",
                self.span,
                help="bind what an inner call gives to a name, and pass it on",
            )
        self._add_defaults(bound)
        if any(is_poison(arg.value) for arg in bound.values()):
            return POISON
        least = least_steps(node, self.frame.module.items, self.checker.least_steps)
        self.checker.require_steps(least, self.span)
        self.checker.active.append(node)
        try:
            with self.recorder.inside(self.span, node.name):
                return self._inlined(bound)
        except Silent:
            return POISON
        finally:
            self.checker.active.pop()

    def _add_defaults(self, bound: Bound) -> None:
        outer = Frame(self.checker, self.recorder, self.frame.module)
        for param in self.node.params:
            if param.name not in bound and param.default is not None:
                value = expressions.evaluate(outer, param.default)
                bound[param.name] = Arg(value, param.default.span)

    def _inlined(self, bound: Bound) -> Value:
        node = self.node
        signature = Signature(self.frame, generic_classes(node))
        agreement = Agreement(self.recorder, signature, self.what, self.span)
        self.frame.locals.update(agreement.agree(self._tensors(agreement, bound)))
        agreement.require(node.where)
        self.frame.dims = dict(agreement.solver.values)
        self.frame.dtypes = {name: dtype for name, (dtype, _) in agreement.dtypes.items()}
        value = statements.body(self.frame, node.body, self.what)
        if is_poison(value):
            return POISON
        return as_declared(agreement, value, node.result, node.body[-1].span)

    def _tensors(self, agreement: Agreement, bound: Bound) -> list[Parameter]:
        """The parameters that are tensors; the others become names of the body.

        Constants come first, since the types of tensors may speak of them.
        """
        specs: dict[str, Spec] = {}
        for param in sorted(self.node.params, key=lambda p: p.type.dims is not None):
            spec = agreement.signature.spec(param.type)
            if isinstance(spec, ConstantSpec):
                found = agreement.constant(param, spec, bound[param.name])
                self.frame.locals[param.name] = found
            specs[param.name] = spec
        tensors: list[Parameter] = []
        for param in self.node.params:
            spec, arg = specs[param.name], bound[param.name]
            if isinstance(spec, ConstantSpec):
                continue
            if isinstance(arg.value, NoneValue) and isinstance(param.default, ast.NoneLit):
                self.frame.locals[param.name] = NONE
            else:
                tensors.append((param, spec, arg))
        return tensors
