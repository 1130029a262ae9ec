"""How many statements a call runs at least, told before the first of them is run.

Functions that each call the one before twice are a power of two of statements: to count them one by
one until there are too many takes half a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stagefuse.dsl import ast

MAX_DEPTH = 60
"""Functions that may call one another; what is deeper is not counted."""


def least_steps(
    node: ast.Fn, items: Mapping[str, ast.Item], known: dict[int, int], depth: int = 0
) -> int:
    """Statements of a function and of the functions of its file that it surely calls by name.

    Loops and branches count as one statement. `known` keeps what was counted, by the function's id.
    """
    if id(node) not in known and depth < MAX_DEPTH:
        known[id(node)] = 0  # of a function that calls itself, which is refused elsewhere
        own = {param.name for param in node.params} | set(_bound(node.body))
        total = len(node.body)
        for statement in node.body:
            if isinstance(statement, ast.Assign | ast.ExprStmt):
                for name in _called(statement.value):
                    item = items.get(name)
                    if isinstance(item, ast.Fn) and name not in own:
                        total += least_steps(item, items, known, depth + 1)
        known[id(node)] = total
    return known.get(id(node), 0)


def _called(value: Any) -> Iterator[str]:
    """The names that an expression calls whatever its values are, each as often as it does."""
    if isinstance(value, tuple):
        for item in value:
            yield from _called(item)
    elif isinstance(value, ast.Binary):
        first, operators = value.chain()
        if not any(at.op in ("and", "or") for at in operators):
            yield from _called((first, *(at.right for at in operators)))
    elif isinstance(value, ast.Reduction):
        return
    elif isinstance(value, ast.Node):
        if isinstance(value, ast.Call) and isinstance(value.fn, ast.Name):
            yield value.fn.name
        for part in vars(value).values():
            yield from _called(part)


def _bound(value: Any) -> Iterator[str]:
    """The names that statements bind, and perhaps some more."""
    if isinstance(value, tuple):
        for item in value:
            yield from _bound(item)
    elif isinstance(value, ast.Binary):
        first, operators = value.chain()
        yield from _bound((first, *(at.right for at in operators)))
    elif isinstance(value, ast.Node):
        target = getattr(value, "target", None)
        for part in getattr(target, "items", (target,)):
            if isinstance(part, ast.Name):
                yield part.name
        if isinstance(value, ast.IndexDef | ast.StepDef | ast.Start | ast.Scan | ast.IndexVar):
            yield value.name
        for part in vars(value).values():
            yield from _bound(part)
