"""The sizes and dtypes that a signature speaks of, settled by the arguments of a call."""

from __future__ import annotations

from stagefuse.dsl import ast
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import DType, in_class
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

from . import literals
from .apply import Arg, not_a_tensor, whole
from .declared import ConstantSpec, Signature, TensorSpec, conditions
from .record import Recorder, default_dtype
from .report import Failed, text_of
from .unify import Mismatch, Solver, variable
from .values import (
    NONE,
    Dim,
    NoneValue,
    Number,
    Scope,
    Tensor,
    Text,
    Value,
    describe,
)

Parameter = tuple[ast.Param, TensorSpec, Arg]


class Agreement:
    """The sizes and dtypes that a signature's names stand for in one call.

    `what` is the function as messages have it, `span` the call.
    """

    def __init__(self, recorder: Recorder, signature: Signature, what: str, span: Span) -> None:
        self.recorder, self.signature, self.what, self.span = recorder, signature, what, span
        self.solver = Solver(recorder.facts, self._later)
        self.dtypes: dict[str, tuple[DType, Arg]] = {}
        self.origin: dict[str, str] = {}

    def _later(self, expr: Expr, relation: str, message: str) -> None:
        self.recorder.check(expr, relation, message, self.span)

    def agree(self, given: list[Parameter]) -> dict[str, Tensor]:
        """The arguments as tensors of the declared types, by name. Raises Failed."""
        loaded = [(param, spec, self._loaded(param, arg)) for param, spec, arg in given]
        self._solve_dtypes(loaded)
        found = {param.name: self._typed(param, spec, arg) for param, spec, arg in loaded}
        self._solve_shapes(loaded, found)
        return found

    def constant(self, param: ast.Param, spec: ConstantSpec, arg: Arg) -> Value:
        """The argument of a parameter that is known while compiling. Raises Failed."""
        value = arg.value
        if isinstance(value, NoneValue) and isinstance(param.default, ast.NoneLit):
            return NONE
        found = _as_constant(value, spec.kind)
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
            f"`{param.name}` of {self.what} must be {_A_CONSTANT[spec.kind]}",
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

    def _solve_dtypes(self, given: list[Parameter]) -> None:
        """Generic dtypes: from tensors first, then from literals alone."""
        for literal in (False, True):
            for param, spec, arg in given:
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

    def _solve_shapes(self, given: list[Parameter], tensors: dict[str, Tensor]) -> None:
        waiting = []
        for param, spec, arg in given:
            value = tensors[param.name]
            with self._explaining(param, spec, arg, value):
                pairs = self.solver.pairs(spec.shape, value.type.shape)
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
    ) -> Explaining:
        message = f"`{param.name}` of {self.what} must be {spec}"
        return Explaining(self, message, arg.span, value.type, (param.span, "declared here"))

    def require(self, where: tuple[ast.Where, ...]) -> None:
        """The conditions of the signature, as far as they are not checked later. Raises Failed."""
        facts = self.recorder.facts
        for clause in where:
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


class Explaining:
    """Turns a mismatch of shapes inside the block into a failure with both sides."""

    def __init__(
        self,
        agreement: Agreement,
        message: str,
        span: Span,
        type: TensorType,
        other: tuple[Span, str],
    ) -> None:
        self.agreement, self.message, self.span = agreement, message, span
        self.type, self.other = type, other

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        if not isinstance(problem, Mismatch):
            return
        notes = [problem.message, *problem.notes]
        for name, value in sorted(self.agreement.solver.values.items()):
            origin = self.agreement.origin.get(name)
            word = f" {problem.message} "
            if origin and any(f"{left}{name}{right}" in word for left in " (" for right in " ,)"):
                notes.append(f"{name} is {value}, from `{origin}`")
        raise Failed("E0205", self.message, self.span, str(self.type), [self.other], notes)


_A_CONSTANT = {
    "int": "an integer known while compiling",
    "float": "a number known while compiling",
    "bool": "True or False",
    "str": "a text",
    "weights": "a weights scope",
}


def _as_constant(value: Value, kind: str) -> Value | None:
    """A value as a constant of a kind, or None if it is none."""
    match kind:
        case "int":
            number = whole(value)
            return None if number is None else Number(number)
        case "float":
            if isinstance(value, Number) and not isinstance(value.value, bool):
                return Number(float(value.value))
            number = whole(value)
            return None if number is None else Number(float(number))
        case "bool":
            return value if isinstance(value, Number) and isinstance(value.value, bool) else None
        case "str":
            return value if isinstance(value, Text) else None
        case _:
            return value if isinstance(value, Scope) else None
