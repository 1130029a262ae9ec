"""A translated body as source: functions, the pipeline's lines, and the tensors that they name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from stagefuse.dsl import ast
from stagefuse.dsl.dims import as_expr
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType
from stagefuse.onnx.body import Body, parsed
from stagefuse.onnx.names import Names
from stagefuse.onnx.text import type_text

from . import activations, attention, layers, quantised, views
from .layout import Layout
from .program import Function, Program, Value, demanded, program_of, reachable
from .reading import Reader
from .repeats import fold
from .scopes import Naming, named_weights
from .terms import Term, Terms, operands

Array: TypeAlias = "np.ndarray[Any, Any]"
MOST_TRIED = 2000
"""Terms of a program that is folded in both ways, the inner first and the outer first."""
RULES = (*views.RULES, *layers.RULES, *quantised.RULES, *activations.RULES, *attention.RULES)


@frozen
class Lifted:
    """Text without the signature: functions whole, the pipeline's body, its results."""

    functions: list[str]
    lines: list[str]
    arrays: dict[str, Array]


def lifted(
    body: Body, inputs: Sequence[tuple[str, TensorType]], results: Sequence[tuple[str, str]],
    arrays: dict[str, Array],
) -> Lifted:
    """`inputs` are names with types, `results` what each is called and its expression."""
    terms = Terms(RULES)
    weights = {
        key: TensorType(dtype, tuple(map(as_expr, shape)))
        for key, (dtype, shape) in body.headers.items()
    }
    reader = Reader(terms, dict(inputs), list(body.frame.dims), body.weights, weights, body.hints)
    for line in body.lines:
        reader.line(line.tree, line.text, line.types)
    roots = [_root(reader, text) for _, text in results]
    order = reachable(roots)
    naming = named_weights(order, _hints(order), arrays, reader.kept)
    ways = (True, False) if len(order) <= MOST_TRIED else (True,)
    tries = [_written(in_order, roots, naming, body, inputs, results, inner_first)
             for in_order in (order, demanded(roots)) for inner_first in ways]  # fmt: skip
    functions, lines = min(tries, key=lambda t: sum(map(len, (*t[0], *t[1]))))
    return Lifted(functions, lines, naming.stored())


def _hints(order: Sequence[Term]) -> dict[Term, str]:
    """What values scopes are read for. One whose name has no path is called by what reads it."""
    found: dict[Term, str] = {}
    for term in reversed(order):
        if "/" not in term.hint:
            found.setdefault(term, term.hint)
        else:
            found[term] = term.hint
        if term.kind != "scope":
            found.update((part, found[term]) for part in operands(term))
    return found


def _written(
    order: Sequence[Term], roots: Sequence[Term], naming: Naming, body: Body,
    inputs: Sequence[tuple[str, TensorType]], results: Sequence[tuple[str, str]],
    inner_first: bool,
) -> tuple[list[str], list[str]]:
    """Functions and lines, for operations in one order."""
    program = Program(*program_of(order, roots, naming.paths))
    fold(program, list(naming.claims), inner_first)
    taken = [*(name for name, _ in inputs), *body.frame.dims, *(f.name for f in program.functions)]
    around = Names([*body.frame.dims, *(f.name for f in program.functions)], body.weights)
    functions = [_function(f, around.within(())) for f in program.functions]
    layout = Layout(Names(taken, body.weights))
    wanted: dict[Value, str] = {}
    for value, (name, _) in zip(program.results, results, strict=True):
        if value.maker is not None:
            wanted.setdefault(value, name)
    layout.body(program.body, program.results, wanted)
    last = ", ".join(layout.value(v, layout.empty)[0] for v in program.results)
    return functions, _joined([*layout.lines, f"    {last}"])


def _root(reader: Reader, text: str) -> Term:
    statement = parsed(f"result = {text}")
    assert isinstance(statement, ast.Assign)
    return reader.expression(statement.value)


def _joined(lines: list[str]) -> list[str]:
    """A body whose last line names what the line before has just bound ends with that."""
    if len(lines) < 2 or "," in lines[-1] or lines[-1].startswith("     "):
        return lines
    name = lines[-1].strip()
    at = next((n for n in range(len(lines) - 2, -1, -1) if not lines[n].startswith("     ")), None)
    if at is None or not lines[at].startswith(f"    {name} = "):
        return lines
    return [*lines[:at], lines[at].replace(f"{name} = ", "", 1), *lines[at + 1 : -1]]


def _function(function: Function, names: Names) -> str:
    """The text of a function; `names` are those that are taken around it."""
    layout = Layout(names)
    params = []
    for param in function.params:
        if param.name == "number":
            kind, name = ("int" if param.path == "int" else "float"), names.fresh(param.hint or "a")
        elif param.is_scope or param.type is None:
            kind, name = "weights", names.fresh("p")
        else:
            kind = type_text(param.type)
            name = names.fresh(param.hint)
        layout.texts[param] = (name, 15)
        params.append(f"{name}: {kind}")
    layout.body(function.body, function.results)
    last = ", ".join(layout.value(v, layout.empty)[0] for v in function.results)
    head = f"fn {function.name}({', '.join(params)}):"
    return "\n".join([head, *_joined([*layout.lines, f"    {last}"])])
