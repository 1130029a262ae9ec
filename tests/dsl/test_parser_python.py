"""Expressions that Python has too mean what Python makes of them."""

from __future__ import annotations

import ast as python
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.dsl import ast
from stagefuse.dsl.parser import parse
from stagefuse.dsl.source import Source

_OPERATORS: dict[type[python.AST], str] = {
    python.Add: "+", python.Sub: "-", python.Mult: "*", python.Div: "/", python.FloorDiv: "//",
    python.Mod: "%", python.Pow: "**", python.MatMult: "@", python.BitAnd: "&", python.BitOr: "|",
    python.BitXor: "^", python.LShift: "<<", python.RShift: ">>", python.USub: "-",
    python.UAdd: "+", python.Invert: "~", python.Not: "not", python.And: "and", python.Or: "or",
    python.Eq: "==", python.NotEq: "!=", python.Lt: "<", python.LtE: "<=", python.Gt: ">",
    python.GtE: ">=",
}  # fmt: skip


def ours(node: Any) -> Any:
    """An expression of ours as nested tuples."""
    match node:
        case None:
            return None
        case ast.Name(name=name):
            return name
        case ast.IntLit(value=value) | ast.FloatLit(value=value) | ast.StrLit(value=value):
            return ("literal", value)
        case ast.BoolLit(value=value):
            return ("literal", value)
        case ast.NoneLit():
            return ("literal", None)
        case ast.EllipsisLit():
            return ("literal", ...)
        case ast.Unary(op=op, operand=operand):
            return (op, ours(operand))
        case ast.Binary(op=op, left=left, right=right):
            return (op, ours(left), ours(right))
        case ast.Attribute(base=base, name=name):
            return (".", ours(base), name)
        case ast.Subscript(base=base, items=items):
            return ("[]", ours(base), *map(ours, items))
        case ast.Slice(start=start, stop=stop, step=step):
            return (":", ours(start), ours(stop), ours(step))
        case ast.Call(fn=fn, args=args, kwargs=kwargs):
            return ("()", ours(fn), *map(ours, args), *((k.name, ours(k.value)) for k in kwargs))
        case ast.TupleExpr(items=items):
            return ("tuple", *map(ours, items))
        case ast.ListLit(items=items):
            return ("list", *map(ours, items))
    raise AssertionError(node)


def pythons(node: Any) -> Any:
    """An expression of Python as nested tuples, in the same form."""
    match node:
        case None:
            return None
        case python.Name(id=name):
            return name
        case python.Constant(value=value):
            return ("literal", value)
        case python.UnaryOp(op=op, operand=operand):
            return (_OPERATORS[type(op)], pythons(operand))
        case python.BinOp(op=op, left=left, right=right):
            return (_OPERATORS[type(op)], pythons(left), pythons(right))
        case python.Compare(left=left, ops=[op], comparators=[right]):
            return (_OPERATORS[type(op)], pythons(left), pythons(right))
        case python.BoolOp(op=op, values=[first, *rest]):
            found = pythons(first)
            for value in rest:
                found = (_OPERATORS[type(op)], found, pythons(value))
            return found
        case python.Attribute(value=value, attr=name):
            return (".", pythons(value), name)
        case python.Subscript(value=value, slice=python.Tuple(elts=items)):
            return ("[]", pythons(value), *map(pythons, items))
        case python.Subscript(value=value, slice=item):
            return ("[]", pythons(value), pythons(item))
        case python.Slice(lower=start, upper=stop, step=step):
            return (":", pythons(start), pythons(stop), pythons(step))
        case python.Call(func=fn, args=args, keywords=kwargs):
            named = ((k.arg, pythons(k.value)) for k in kwargs)
            return ("()", pythons(fn), *map(pythons, args), *named)
        case python.Tuple(elts=items):
            return ("tuple", *map(pythons, items))
        case python.List(elts=items):
            return ("list", *map(pythons, items))
    raise AssertionError(python.dump(node))


def parsed(text: str) -> Any:
    module, problems = parse(Source("test.pipe", f"const A = {text}\n"))
    assert not problems, [problem.message for problem in problems]
    (item,) = module.items
    assert isinstance(item, ast.Const)
    return ours(item.value)


_atoms = st.sampled_from(["a", "b", "c.d", "1", "2.5", "1e-3", "0x1F", "1_000", "True", '"s"'])
_binary = st.sampled_from("+ - * / // % ** @ & | ^ << >> and or".split())
_comparison = st.sampled_from("== != < <= > >=".split())


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, _binary, inner).map(" ".join),
        st.tuples(inner, _comparison, inner).map(lambda t: f"({' '.join(t)})"),
        st.tuples(st.sampled_from(["-", "+", "~", "not "]), inner).map("".join),
        inner.map(lambda e: f"({e})"),
        st.tuples(inner, inner).map(lambda t: f"f({t[0]}, k={t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"x[{t[0]}, {t[1]}:, ::2, None, ...]"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]}, {t[1]})"),
        inner.map(lambda e: f"[{e},]"),
        inner.map(lambda e: f"({e}).t"),
    )


@settings(max_examples=150, deadline=None)
@given(st.recursive(_atoms, _larger, max_leaves=12))
def test_expressions_mean_what_python_makes_of_them(text: str) -> None:
    try:
        expected = python.parse(text, mode="eval").body
    except SyntaxError:
        return
    try:
        wanted = pythons(expected)
    except AssertionError:
        return
    assert parsed(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "-a ** -b", "not a == b", "a - b - c", "a ** b ** c", "-a.b[c](d)", "a << b + c",
        "a & b | c ^ d", "(a < b) < c", "~a % b", "a or b and not c", "()", "(a,)", "[]",
        "x[a]", "x[a,]", "x[:]", "x[a:b:c]", "x[::]", "x[-1, ...]", "f()", "f(a,)",
        "1.", ".5", "1.5.a",
    ],
)  # fmt: skip
def test_precedence_by_example(text: str) -> None:
    expected = pythons(python.parse(text, mode="eval").body)
    assert parsed(text) == expected
