"""Calls: built-ins, casts, and functions, which are inlined."""

from __future__ import annotations

from collections.abc import Mapping

from .. import ast
from ..dims import Expr
from ..dtypes import DType, in_class
from ..source import Span
from ..types import TensorType
from . import expressions, literals, statements
from .apply import Arg, Bound, apply, bind, not_a_tensor, whole
from .declared import (
    ConstantSpec,
    Signature,
    Silent,
    Spec,
    TensorSpec,
    conditions,
    generic_classes,
)
from .frame import Frame
from .record import default_dtype
from .report import Failed, text_of
from .unify import Mismatch, Solver, variable
from .values import (
    NONE,
    POISON,
    BuiltinFunction,
    Dim,
    DTypeValue,
    Function,
    Items,
    NoneValue,
    Number,
    Poison,
    Scope,
    Special,
    Tensor,
    Text,
    Value,
    describe,
    is_poison,
)

MAX_DEPTH = 60
PAIRWISE = {"min": "minimum", "max": "maximum"}
"""What `min(a, b)` of sizes and constants is; of a tensor the second argument is an axis."""


def call(
    frame: Frame,
    function: Value,
    args: list[Arg],
    keywords: dict[str, Arg],
    span: Span,
    callee: ast.Expr,
) -> Value:
    """The value of a call. Raises Failed."""
    match function:
        case Poison():
            return POISON
        case BuiltinFunction():
            record = function.record
            pairwise = PAIRWISE.get(record.name)
            if pairwise and len(args) == 2 and isinstance(args[0].value, Number | Dim):
                record = frame.checker.builtins[pairwise]
            return apply(frame.recorder, record, args, keywords, span)
        case DTypeValue():
            bound = bind(f"`{function.dtype}`", ["x"], [], ["x"], args, keywords, span)
            return expressions.cast(frame, function.dtype, Arg(bound["x"].value, span))
        case Special():
            return _special(function.name, args, keywords, span)
        case Function():
            return _Inlining(frame, function, args, keywords, span).value()
    notes = []
    if isinstance(function, Scope):
        notes = ["weights are passed to a function: `nn.linear(x, w.layer)`"]
    raise Failed("E0204", "this cannot be called", callee.span, describe(function), notes=notes)


def _special(name: str, args: list[Arg], keywords: dict[str, Arg], span: Span) -> Value:
    if name == "len":
        bound = bind("`len`", ["x"], [], ["x"], args, keywords, span)
        value = bound["x"].value
        if is_poison(value):
            return POISON
        if isinstance(value, Items):
            return Number(len(value.items))
        if isinstance(value, Scope):
            return Number(len(value.children()))
        raise Failed(
            "E0204",
            "`len` takes a tuple, a list or a weights scope",
            bound["x"].span,
            describe(value),
        )
    bound = bind("`has`", ["scope", "name"], [], ["scope", "name"], args, keywords, span)
    scope, key = bound["scope"].value, bound["name"].value
    if is_poison(scope) or is_poison(key):
        return POISON
    if not isinstance(scope, Scope):
        raise Failed(
            "E0204", "`has` takes a weights scope and a name", bound["scope"].span, describe(scope)
        )
    if isinstance(key, Text):
        return Number(scope.child(key.value) is not None)
    number = whole(key)
    if number is None:
        raise Failed("E0204", "the name is a text or a number", bound["name"].span, describe(key))
    return Number(scope.child(str(number)) is not None)


class _Inlining:
    """One call of a function: arguments against its signature, then its body."""

    def __init__(
        self,
        caller: Frame,
        function: Function,
        args: list[Arg],
        keywords: Mapping[str, Arg],
        span: Span,
    ) -> None:
        self.caller, self.node, self.span = caller, function.node, span
        self.args, self.keywords = args, keywords
        self.checker, self.recorder = caller.checker, caller.recorder
        self.frame = Frame(self.checker, self.recorder, function.module, space=caller.space)
        module = function.module.name
        self.what = f"`{module}.{self.node.name}`" if module else f"`{self.node.name}`"
        self.solver = Solver(self.recorder.facts, self._later)
        self.dtypes: dict[str, tuple[DType, Arg]] = {}
        self.origin: dict[str, str] = {}

    def _later(self, expr: Expr, relation: str, message: str) -> None:
        self.recorder.check(expr, relation, message, self.span)

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
        if len(self.checker.active) >= MAX_DEPTH:
            raise Failed("E0211", "functions are nested too deeply", self.span)
        self.checker.called.add(id(node))
        self._add_defaults(bound)
        if any(is_poison(arg.value) for arg in bound.values()):
            return POISON
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
        self._bind_arguments(bound)
        self._require_conditions()
        self.frame.dims = dict(self.solver.values)
        self.frame.dtypes = {name: dtype for name, (dtype, _) in self.dtypes.items()}
        value = statements.body(self.frame, self.node.body, self.what)
        if is_poison(value):
            return POISON
        return self._result(value)

    def _bind_arguments(self, bound: Bound) -> None:
        node = self.node
        self.signature = Signature(self.frame, generic_classes(node))
        constants = [p for p in node.params if p.type.dims is None]
        specs: dict[str, Spec] = {}
        for param in sorted(node.params, key=lambda p: p not in constants):
            spec = self.signature.spec(param.type)
            if isinstance(spec, ConstantSpec):
                arg = bound[param.name]
                self.frame.locals[param.name] = self._constant(param, spec, arg)
            specs[param.name] = spec
        tensors = []
        for param in node.params:
            spec = specs[param.name]
            if not isinstance(spec, TensorSpec):
                continue
            arg = bound[param.name]
            if isinstance(arg.value, NoneValue) and isinstance(param.default, ast.NoneLit):
                self.frame.locals[param.name] = NONE
                continue
            tensors.append((param, spec, self._loaded(param, arg)))
        self._solve_dtypes(tensors)
        for param, spec, arg in tensors:
            self.frame.locals[param.name] = self._typed(param, spec, arg)
        self._solve_shapes(tensors)

    def _constant(self, param: ast.Param, spec: ConstantSpec, arg: Arg) -> Value:
        value = arg.value
        if isinstance(value, NoneValue) and isinstance(param.default, ast.NoneLit):
            return NONE
        found: Value | None = None
        match spec.kind:
            case "int":
                number = whole(value)
                found = None if number is None else Number(number)
            case "float":
                if isinstance(value, Number) and not isinstance(value.value, bool):
                    found = Number(float(value.value))
                elif whole(value) is not None:
                    found = Number(float(whole(value) or 0))
            case "bool":
                if isinstance(value, Number) and isinstance(value.value, bool):
                    found = value
            case "str":
                found = value if isinstance(value, Text) else None
            case "weights":
                found = value if isinstance(value, Scope) else None
        if found is not None:
            return found
        changing = isinstance(value, Tensor | Dim)
        notes, help_text = [], None
        if changing and spec.kind != "weights":
            notes = [f"a parameter of type {spec.kind} is a constant of the compilation"]
            dtype = {"int": "i64", "float": "f32", "bool": "bool[]"}.get(spec.kind)
            help_text = f"for a value that changes, declare it `{dtype}`" if dtype else None
        raise Failed(
            "E0208" if changing else "E0204",
            f"`{param.name}` of {self.what} must be {_a(spec.kind)}",
            arg.span,
            describe(value),
            [(param.span, "declared here")],
            notes,
            help_text,
        )

    def _loaded(self, param: ast.Param, arg: Arg) -> Arg:
        if isinstance(arg.value, Scope) and arg.value.leaf is not None:
            return Arg(self.recorder.weight(arg.value, arg.span), arg.span)
        if isinstance(arg.value, Tensor | Number | Dim):
            return arg
        failure = not_a_tensor(f"`{param.name}` of {self.what}", arg)
        failure.others = ((param.span, "declared here"),)
        raise failure

    def _solve_dtypes(self, tensors: list[tuple[ast.Param, TensorSpec, Arg]]) -> None:
        """Generic dtypes: from tensors first, then from literals alone."""
        for literal in (False, True):
            for param, spec, arg in tensors:
                if not isinstance(spec.dtype, str):
                    continue
                own = literals.own_dtype(arg.value)
                if (own is None) != literal:
                    continue
                if own is None:
                    if spec.dtype in self.dtypes:
                        continue
                    assert isinstance(arg.value, Number)
                    own = default_dtype(arg.value)
                known = self.dtypes.get(spec.dtype)
                if known is None:
                    self._require_class(param, spec, own, arg)
                    self.dtypes[spec.dtype] = (own, arg)
                elif known[0] != own:
                    raise Failed(
                        "E0202",
                        f"these two dtypes differ: {known[0]} and {own}",
                        arg.span,
                        describe(arg.value),
                        [(known[1].span, describe(known[1].value))],
                        [
                            f"both are `{spec.dtype}` of {self.what}",
                            "there is no implicit conversion",
                        ],
                        f"convert: `{known[0]}({text_of(arg.span)})`",
                    )

    def _require_class(self, param: ast.Param, spec: TensorSpec, own: DType, arg: Arg) -> None:
        assert isinstance(spec.dtype, str)
        wanted = self.signature.generics[spec.dtype]
        if not in_class(own, wanted):
            text = {"float": "a float", "int": "an integer", "number": "a number"}[wanted]
            fix = "f32" if wanted in ("float", "number") else "i64"
            raise Failed(
                "E0204",
                f"`{param.name}` of {self.what} must have {text} dtype, not {own}",
                arg.span,
                describe(arg.value),
                [(param.span, f"`{spec.dtype}` is any {wanted} dtype")],
                help=f"convert: `{fix}({text_of(arg.span)})`",
            )

    def _typed(self, param: ast.Param, spec: TensorSpec, arg: Arg) -> Tensor:
        """The argument as a tensor of the declared dtype."""
        dtype = spec.dtype if isinstance(spec.dtype, DType) else self.dtypes[spec.dtype][0]
        own = literals.own_dtype(arg.value)
        if own is not None and own != dtype:
            raise Failed(
                "E0204",
                f"`{param.name}` of {self.what} must be {spec}",
                arg.span,
                describe(arg.value) if not isinstance(arg.value, Dim) else "i64",
                [(param.span, "declared here")],
                ["there is no implicit conversion"],
                f"convert: `{dtype}({text_of(arg.span)})`",
            )
        return literals.typed(self.recorder, arg.value, dtype, arg.span)

    def _solve_shapes(self, tensors: list[tuple[ast.Param, TensorSpec, Arg]]) -> None:
        waiting = []
        for param, spec, arg in tensors:
            value = self.frame.locals[param.name]
            assert isinstance(value, Tensor)
            shape = value.type.shape
            with self._explaining(param, spec, arg, value):
                pairs = self.solver.pairs(spec.shape, shape)
                left = self.solver.solve_plain(pairs)
                for name in self.solver.values:
                    self.origin.setdefault(name, param.name)
                waiting.append((param, spec, arg, value, left))
        progress = True
        while progress and waiting:
            progress = False
            for param, spec, arg, value, left in waiting:
                with self._explaining(param, spec, arg, value):
                    rest = [pair for pair in left if not self.solver.settle(*pair)]
                for name in self.solver.values:
                    self.origin.setdefault(name, param.name)
                progress = progress or len(rest) < len(left)
                left[:] = rest
        for param, spec, arg, _value, left in waiting:
            if left:
                names = " and ".join(f"`{n}`" for n in self.solver.unknowns(left[0][0]))
                raise Failed(
                    "E0205",
                    f"{names} of {self.what} cannot be found from the arguments",
                    arg.span,
                    help="name each size alone somewhere in the signature",
                    others=[(param.span, str(spec))],
                )

    def _explaining(
        self, param: ast.Param, spec: TensorSpec, arg: Arg, value: Tensor
    ) -> _Explaining:
        return _Explaining(
            self,
            f"`{param.name}` of {self.what} must be {spec}",
            arg.span,
            str(value.type),
            (param.span, "declared here"),
        )

    def _require_conditions(self) -> None:
        facts = self.recorder.facts
        for clause in self.node.where:
            for expr, relation, text, span in conditions(self.signature, clause):
                found = self.solver.substituted(expr)
                if self.solver.unknowns(found):
                    continue
                low, high = facts.bounds(found)
                holds = facts.is_nonneg(found) if relation == ">=0" else facts.prove_eq(found, 0)
                if holds:
                    continue
                never = (high is not None and high < 0) or (
                    relation == "==0" and low is not None and low > 0
                )
                message = f"{self.what} needs `{text}`"
                if never:
                    values = [
                        f"{name} is {value}"
                        for name, value in sorted(self.solver.values.items())
                        if variable(name) in expr.symbols()
                    ]
                    raise Failed(
                        "E0217", message, self.span, others=[(span, "asked for here")], notes=values
                    )
                self._later(found, relation, message)

    def _result(self, value: Value) -> Value:
        declared = self.node.result
        if declared is None:
            return value
        if isinstance(declared, ast.TypeExpr):
            return self.one_result(value, declared, self.node.body[-1].span)
        return self.several_results(value, declared, self.node.body[-1].span)

    def several_results(self, value: Value, declared: ast.TupleType, span: Span) -> Value:
        count = len(declared.items)
        if not isinstance(value, Items) or len(value.items) != count:
            raise Failed(
                "E0205",
                f"{self.what} declares {count} results",
                span,
                describe(value),
                [(declared.span, "declared here")],
            )
        found = [
            self.one_result(item, part.type, span)
            for item, part in zip(value.items, declared.items, strict=True)
        ]
        return Items(tuple(found), "(", tuple(part.name for part in declared.items))

    def one_result(self, value: Value, node: ast.TypeExpr, span: Span) -> Value:
        """A result as its declared type. Raises Failed."""
        spec = self.signature.spec(node)
        if isinstance(spec, ConstantSpec):
            if spec.kind == "bool" and isinstance(value, Tensor) and not value.type.shape:
                return value
            param = ast.Param(node.span, "the result", node, None)
            return self._constant(param, spec, Arg(value, span))
        self._require_known(spec)
        if isinstance(value, Scope) and value.leaf is not None:
            value = self.recorder.weight(value, span)
        if not isinstance(value, Tensor | Number | Dim):
            raise Failed(
                "E0205",
                f"the result of {self.what} must be {spec}",
                span,
                describe(value),
                [(node.span, "declared here")],
            )
        dtype = spec.dtype if isinstance(spec.dtype, DType) else None
        if dtype is None:
            assert isinstance(spec.dtype, str)
            known = self.dtypes.get(spec.dtype)
            own = literals.own_dtype(value)
            if known is None and own is None:
                own = default_dtype(value) if isinstance(value, Number) else None
            dtype = known[0] if known else own
            assert dtype is not None
        own = literals.own_dtype(value)
        if own is not None and own != dtype:
            raise Failed(
                "E0205",
                f"the result of {self.what} must be {spec}",
                span,
                describe(value),
                [(node.span, "declared here")],
                [f"the dtype is {own}"]
                + ([f"`{spec.dtype}` is {dtype} here"] if isinstance(spec.dtype, str) else []),
                f"convert: `{dtype}({text_of(span)})`" if len(text_of(span)) < 60 else None,
            )
        tensor = literals.typed(self.recorder, value, dtype, span)
        place = (node.span, "declared here")
        with _Explaining(
            self, f"the result of {self.what} must be {spec}", span, str(tensor.type), place
        ):
            pairs = self.solver.pairs(spec.shape, tensor.type.shape)
            for pair in self.solver.solve_plain(pairs):
                if not self.solver.settle(*pair):
                    raise Mismatch(f"dimension {pair[2]} cannot be compared with {pair[1]}")
        return self._as_declared(tensor, spec)

    def _require_known(self, spec: TensorSpec) -> None:
        """The sizes of a result follow from those of the parameters. Raises Failed."""
        unknown = [n for e in (*spec.shape.before, *spec.shape.after)
                   for n in self.solver.unknowns(e)]
        if spec.shape.rest is not None and spec.shape.rest not in self.solver.rests:
            unknown.append(spec.shape.rest)
        if unknown:
            raise Failed(
                "E0219", f"the size `{unknown[0]}` does not follow from the parameters", spec.span,
                f"no parameter of {self.what} has it",
                help="write the size as an expression, or leave the result undeclared",
            )

    def _as_declared(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        """The tensor, its shape written as the signature has it where both were proved equal."""
        if tensor.space or spec.shape.rest is not None:
            return tensor
        shape = tuple(self.solver.substituted(expr) for expr in spec.shape.before)
        facts = self.recorder.facts
        proved = all(facts.prove_eq(a, b) for a, b in zip(shape, tensor.type.shape, strict=True))
        if not proved or shape == tensor.type.shape:
            return tensor
        found = TensorType(tensor.type.dtype, shape)
        self.recorder.types[tensor.id] = found
        return Tensor(tensor.id, found)


class _Explaining:
    """Turns a mismatch of shapes inside the block into a failure with both sides."""

    def __init__(
        self,
        inlining: _Inlining,
        message: str,
        span: Span,
        label: str,
        other: tuple[Span, str],
    ) -> None:
        self.inlining, self.message, self.span = inlining, message, span
        self.label, self.other = label, other

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        if not isinstance(problem, Mismatch):
            return
        notes = [problem.message, *problem.notes]
        for name, value in sorted(self.inlining.solver.values.items()):
            origin = self.inlining.origin.get(name)
            word = f" {problem.message} "
            if origin and any(f"{left}{name}{right}" in word for left in " (" for right in " ,)"):
                notes.append(f"{name} is {value}, from `{origin}`")
        raise Failed("E0205", self.message, self.span, self.label, [self.other], notes)


def _a(kind: str) -> str:
    return {
        "int": "an integer known while compiling",
        "float": "a number known while compiling",
        "bool": "True or False",
        "str": "a text",
        "weights": "a weights scope",
    }[kind]
