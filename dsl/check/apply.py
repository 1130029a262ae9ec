"""Applying a built-in: arguments to parameters, literals to dtypes, one recorded operation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import BOOL, F32, I64, DType
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.signature import REQUIRED, Builtin, OpError, Param
from stagefuse.dsl.source import Span

from . import literals, shapes
from .foreign import OTHER_PARAMETERS
from .record import Recorder, default_dtype
from .report import Failed, nearest, text_of
from .values import (
    POISON,
    Dim,
    DTypeValue,
    Items,
    NoneValue,
    Number,
    Scope,
    Space,
    Tensor,
    Text,
    Value,
    describe,
    is_poison,
)


@frozen
class Arg:
    """An evaluated argument and where it stands."""

    value: Value
    span: Span
    keyword: Span | None = None


Bound = dict[str, Arg]


def bind(
    what: str,
    names: Sequence[str],
    keyword_only: Sequence[str],
    required: Sequence[str],
    args: Sequence[Arg],
    keywords: Mapping[str, Arg],
    span: Span,
) -> Bound:
    """Arguments by parameter name, as Python binds them. Raises Failed."""
    bound: Bound = {}
    positional = [name for name in names if name not in keyword_only]
    takes = ", ".join(names) if names else "nothing"
    if len(args) > len(positional):
        raise Failed(
            "E0206",
            f"{what} takes {len(positional)} positional "
            f"{'argument' if len(positional) == 1 else 'arguments'}; {len(args)} given",
            args[len(positional)].span,
            notes=[f"the parameters are: {takes}"],
        )
    for name, arg in zip(positional, args, strict=False):
        bound[name] = arg
    for name, arg in keywords.items():
        if name not in names:
            other = OTHER_PARAMETERS.get(name)
            near = other if other in names else nearest(name, names)
            raise Failed(
                "E0206",
                f"{what} has no parameter `{name}`",
                arg.keyword or arg.span,
                notes=[f"the parameters are: {takes}"],
                help=f"write `{near}=`" if near else None,
            )
        if name in bound:
            first = [(bound[name].span, f"`{name}` by its place")]
            raise Failed("E0206", f"`{name}` is given twice", arg.keyword or arg.span, "", first)
        bound[name] = arg
    missing = [name for name in required if name not in bound]
    if missing:
        listed = ", ".join(f"`{name}`" for name in missing)
        raise Failed(
            "E0206", f"{what} needs {listed}", span, notes=[f"the parameters are: {takes}"]
        )
    return bound


def apply(
    recorder: Recorder,
    record: Builtin,
    args: Sequence[Arg],
    keywords: Mapping[str, Arg],
    span: Span,
    what: str | None = None,
) -> Value:
    """The value of a call of a built-in. Raises Failed."""
    params = record.params
    if params and params[0].kind == "tensors":
        _require_list(record.name, args)
    bound = bind(
        what or f"`{record.name}`",
        [p.name for p in params],
        [p.name for p in params if p.keyword_only],
        [p.name for p in params if p.default is REQUIRED],
        args,
        keywords,
        span,
    )
    if any(is_poison(arg.value) for arg in bound.values()):
        return POISON
    call = _Call(recorder, record, bound, span)
    folded = call.folded()
    return folded if folded is not None else call.emit()


def _require_list(name: str, args: Sequence[Arg]) -> None:
    """Raises Failed where tensors stand side by side that should be in a list."""
    apart = list(takewhile(lambda arg: isinstance(arg.value, Tensor), args))
    if len(apart) > 1:
        listed = ", ".join(text_of(arg.span) for arg in apart)
        first, last = apart[0].span, apart[-1].span
        raise Failed(
            "E0204",
            f"`{name}` takes a list of tensors",
            Span(first.source, first.start, last.end),
            help=f"write `{name}([{listed}], ...)`",
        )


class _Call:
    """One application in the making."""

    def __init__(self, recorder: Recorder, record: Builtin, bound: Bound, span: Span) -> None:
        self.recorder, self.record, self.bound, self.span = recorder, record, bound, span
        self.pointwise = bool(getattr(record, "pointwise", False))
        self.tensors: dict[str, list[Arg]] = {}
        self.listed: set[str] = set()
        for param in record.params:
            arg = bound.get(param.name)
            if arg is None or (isinstance(arg.value, NoneValue) and param.default is None):
                continue
            if param.kind == "tensor":
                self.tensors[param.name] = [self._loaded(arg, param)]
            elif param.kind == "tensors":
                self.listed.add(param.name)
                self.tensors[param.name] = self._list(arg, param)

    def _loaded(self, arg: Arg, param: Param) -> Arg:
        """The argument as a tensor or a literal."""
        value = arg.value
        if isinstance(value, Scope) and value.leaf is not None:
            return Arg(self.recorder.weight(value, arg.span), arg.span)
        if isinstance(value, Tensor | Number | Dim):
            return arg
        raise not_a_tensor(f"`{param.name}` of `{self.record.name}`", arg)

    def _list(self, arg: Arg, param: Param) -> list[Arg]:
        if not isinstance(arg.value, Items):
            raise Failed(
                "E0204",
                f"`{param.name}` of `{self.record.name}` is a list of tensors",
                arg.span,
                describe(arg.value),
                help=f"write `[{text_of(arg.span)}]`",
            )
        return [self._loaded(Arg(item, arg.span), param) for item in arg.value.items]

    def folded(self) -> Value | None:
        """The constant that the call is, if its arguments are literals or sizes."""
        if self.listed or not self.tensors:
            return None
        if len(self.tensors) != len(self.bound):
            return None
        values = [arg.value for args in self.tensors.values() for arg in args]
        if any(isinstance(value, Tensor) for value in values):
            return None
        if any(isinstance(value, Dim) for value in values):
            return literals.fold_sizes(self.record.name, values, self.recorder.facts, self.span)
        return literals.fold_numbers(self.record, values, self.span)

    def emit(self) -> Value:
        dtypes = self._group_dtypes()
        typed: dict[str, list[Tensor]] = {}
        for param in self.record.params:
            if param.name in self.tensors:
                typed[param.name] = [
                    literals.typed(self.recorder, arg.value, dtypes.get(param.name), arg.span)
                    for arg in self.tensors[param.name]
                ]
        space = self._lift(typed)
        if self.pointwise:
            self._require_broadcast(typed)
        inputs: dict[str, Any] = {}
        attributes: list[tuple[str, Any]] = []
        operands: list[Tensor] = []
        for param in self.record.params:
            if param.name in typed:
                tensors = typed[param.name]
                operands.extend(tensors)
                types = [tensor.full_type for tensor in tensors]
                inputs[param.name] = types if param.name in self.listed else types[0]
                if param.name in self.listed:
                    attributes.append((f"{param.name}.count", len(tensors)))
            elif param.kind in ("tensor", "tensors"):
                inputs[param.name] = None
            else:
                static = self._static(param)
                inputs[param.name] = static
                attributes.append((param.name, static))
        try:
            types = list(self.record.infer(inputs, self.recorder.facts))
        except OpError as error:
            raise self._refused(error) from error
        for expr, relation, message in self.record.checks(inputs, self.recorder.facts):
            self.recorder.check(expr, relation, message, self.span)
        results = self.recorder.apply(
            self.record.name, operands, attributes, types, self.span, space
        )
        return results[0] if len(results) == 1 else Items(tuple(results))

    def _static(self, param: Param) -> Any:
        arg = self.bound.get(param.name)
        if arg is None:
            return param.default
        if isinstance(arg.value, NoneValue) and param.default is None:
            return None
        return static(param, arg, self.record.name)

    def _group_dtypes(self) -> dict[str, DType]:
        """The dtype that a literal takes, by parameter."""
        groups: dict[str, list[Arg]] = {}
        for param in self.record.params:
            for arg in self.tensors.get(param.name, []):
                groups.setdefault(param.group or f"={param.name}", []).append(arg)
        chosen: dict[str, DType] = {}
        for name, args in groups.items():
            chosen[name] = self._common_dtype(args, shared=not name.startswith("="))
        return {
            p.name: chosen[p.group or f"={p.name}"]
            for p in self.record.params
            if p.name in self.tensors and (p.group or f"={p.name}") in chosen
        }

    def _common_dtype(self, args: list[Arg], shared: bool) -> DType:
        first: tuple[Arg, DType] | None = None
        for arg in args:
            dtype = literals.own_dtype(arg.value)
            if dtype is None:
                continue
            if first is not None and first[1] != dtype and shared:
                raise dtypes_differ(first[0], first[1], arg, dtype)
            first = first or (arg, dtype)
        if first is not None:
            return first[1]
        defaults = [default_dtype(a.value) for a in args if isinstance(a.value, Number)]
        if any(d.is_float for d in defaults):
            return F32
        return I64 if any(d.is_int for d in defaults) else BOOL

    def _lift(self, typed: dict[str, list[Tensor]]) -> Space:
        """Give all operands the axes of index notation; returns them."""
        space: Space = ()
        for tensors in typed.values():
            for tensor in tensors:
                if len(tensor.space) > len(space):
                    space = tensor.space
        if not space:
            return ()
        if not self.pointwise:
            raise Failed(
                "E0215",
                f"`{self.record.name}` cannot be applied inside index notation",
                self.span,
                "here every value is a single element",
                help="apply it to the whole tensor before, on a line of its own",
            )
        for name, tensors in typed.items():
            for tensor, arg in zip(tensors, self.tensors[name], strict=True):
                if tensor.type.rank:
                    raise unindexed(arg, tensor)
            typed[name] = [
                self.recorder.lifted(t, space, self.span) if t.space else t for t in tensors
            ]
        return space

    def _require_broadcast(self, typed: dict[str, list[Tensor]]) -> None:
        seen: tuple[Arg, tuple[Expr, ...]] | None = None
        for name, tensors in typed.items():
            for tensor, arg in zip(tensors, self.tensors[name], strict=True):
                if seen is None:
                    seen = (arg, tensor.full_type.shape)
                    continue
                shape = shapes.broadcast(
                    self.recorder.facts, seen[0], seen[1], arg, tensor.full_type
                )
                seen = (arg if seen[1] == () else seen[0], shape)

    def _refused(self, error: OpError) -> Failed:
        culprit = self.bound.get(error.param) if error.param else None
        others = [
            (arg.span, describe(arg.value))
            for args in self.tensors.values()
            for arg in args
            if not isinstance(arg.value, Number) and (culprit is None or arg.span != culprit.span)
        ]
        span, label = self.span, error.label
        if culprit is not None:
            span, label = culprit.span, error.label or describe(culprit.value)
        advice = None if error.help is None else self._in_their_words(error.help)
        return Failed("E0207", error.message, span, label, others[:3], error.notes, advice)

    def _in_their_words(self, text: str) -> str:
        """Help with the arguments as the user wrote them in place of parameter names."""
        written = {
            name: text_of(self.bound[name].span) for name in self.tensors if name in self.bound
        }

        def argument(match: re.Match[str]) -> str:
            return written.get(match.group(), match.group())

        def code(match: re.Match[str]) -> str:
            return re.sub(r"[A-Za-z_]\w*(?![\w(=])", argument, match.group())

        return re.sub(r"`[^`]*`", code, text)


def static(param: Param, arg: Arg, owner: str) -> Any:
    """The Python value of a static argument. Raises Failed."""
    reader = _STATIC.get(param.kind)
    assert reader is not None, param.kind
    found = reader(arg.value)
    if found is None:
        inside = arg.value.items if isinstance(arg.value, Items) else (arg.value,)
        changing = [value for value in inside if isinstance(value, Tensor)]
        why = "it is needed while compiling"
        if param.kind in ("size", "dims", "parts"):
            why = "sizes follow from the shapes of inputs, not from values that they hold"
        raise Failed(
            "E0208" if changing else "E0204",
            f"`{param.name}` of `{owner}` must be {_WANTED[param.kind]}",
            arg.span,
            describe(changing[0] if changing else arg.value),
            notes=[why] if changing else [],
            help=f"of two values: `{owner}imum(a, b)`"
            if owner in ("min", "max") and param.kind == "axis" else None,
        )
    return found


def whole(value: Value) -> int | None:
    """An integer known while compiling."""
    if isinstance(value, Number) and isinstance(value.value, int):
        return None if isinstance(value.value, bool) else value.value
    return value.expr.as_int() if isinstance(value, Dim) else None


def size(value: Value) -> Expr | None:
    """An integer over sizes."""
    if isinstance(value, Dim):
        return None if value.space else value.expr
    known = whole(value)
    return None if known is None else const(known)


def _each(value: Value, read: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, Items):
        one = read(value)
        return None if one is None else (one,)
    found = tuple(read(item) for item in value.items)
    return None if any(item is None for item in found) else found


def _axis(value: Value) -> Any:
    return _each(value, whole) if isinstance(value, Items) else whole(value)


def _pair(value: Value) -> Any:
    both = _each(value, size) if isinstance(value, Items) else None
    return both if both is not None and len(both) == 2 else None


def _pairs(value: Value) -> Any:
    if isinstance(value, Items) and not any(isinstance(i, Items) for i in value.items):
        both = _pair(value)
        return None if both is None else (both,)
    return _each(value, _pair)


def _number(value: Value) -> Any:
    if isinstance(value, Number):
        return value.value
    return whole(value)


def _float(value: Value) -> Any:
    found = _number(value)
    return None if found is None or isinstance(found, bool) else float(found)


_STATIC: dict[str, Any] = {
    "int": lambda v: whole(v),
    "size": size,
    "float": _float,
    "bool": lambda v: v.value if isinstance(v, Number) and isinstance(v.value, bool) else None,
    "str": lambda v: v.value if isinstance(v, Text) else None,
    "dtype": lambda v: v.dtype if isinstance(v, DTypeValue) else None,
    "axis": _axis,
    "dims": lambda v: _each(v, size),
    "ints": lambda v: _each(v, whole),
    "pairs": _pairs,
    "parts": lambda v: _each(v, size) if isinstance(v, Items) else size(v),
    "scalar": _number,
}
_WANTED = {
    "int": "an integer known while compiling",
    "size": "an integer over sizes",
    "float": "a number known while compiling",
    "bool": "True or False",
    "str": "a text",
    "dtype": "a dtype such as f32",
    "axis": "an axis or a tuple of axes",
    "dims": "a list of sizes",
    "ints": "a list of integers",
    "pairs": "a list of pairs of integers over sizes",
    "parts": "a number of parts or a list of positions",
    "scalar": "a number known while compiling",
}


def not_a_tensor(what: str, arg: Arg) -> Failed:
    """The message for something that is not a tensor where one is needed."""
    notes, help_text = [], None
    if isinstance(arg.value, Scope):
        names = arg.value.children()
        if names:
            notes.append("it holds " + ", ".join(f"`{name}`" for name in names[:8]))
            if "weight" in names:
                help_text = f"name the tensor: `{text_of(arg.span)}.weight`"
    elif isinstance(arg.value, Items) and is_stackable(arg.value):
        help_text = stacked(arg.span)
    elif isinstance(arg.value, Items) and arg.value.bracket != "[":
        letters = [chr(ord("a") + n) for n in range(min(len(arg.value.items), 26))]
        given = [n or a for n, a in zip(arg.value.names, letters, strict=False)] or letters
        help_text = f"bind what it holds: `{', '.join(given)} = {text_of(arg.span)}`"
    return Failed(
        "E0204",
        f"{what} must be a tensor",
        arg.span,
        describe(arg.value),
        notes=notes,
        help=help_text,
    )


def is_stackable(value: Value) -> bool:
    """Whether it stands for a tensor in a list of tensors: a list, or a tuple of numbers."""
    if not isinstance(value, Items):
        return isinstance(value, Number)
    return value.bracket == "[" or all(map(is_stackable, value.items))


def stacked(span: Span) -> str:
    """How items side by side become a tensor, for help."""
    return f"make a tensor of it: `stack({text_of(span)})`"


def unindexed(arg: Arg, tensor: Tensor) -> Failed:
    return Failed(
        "E0215",
        f"`{text_of(arg.span)}` needs an index for each of its dimensions here",
        arg.span,
        str(tensor.type),
        notes=["inside index notation every value is a single element"],
    )


def dtypes_differ(first: Arg, one: DType, second: Arg, other: DType) -> Failed:
    """Two operands that must share a dtype and do not."""
    order = (one.is_float, one.is_int, one.bits), (other.is_float, other.is_int, other.bits)
    weaker, target = (first, other) if order[0] < order[1] else (second, one)
    return Failed(
        "E0202",
        f"these two dtypes differ: {one} and {other}",
        second.span,
        describe(second.value) if not isinstance(second.value, Dim) else f"{other}",
        [(first.span, describe(first.value) if not isinstance(first.value, Dim) else f"{one}")],
        ["there is no implicit conversion"],
        f"convert: `{target}({text_of(weaker.span)})`" if first.span != second.span
        else f"convert one of them: `{target}(...)`",
    )
