"""The reference page of the operations, written from their records.

Prints the page; `--write` writes it to `docs/operations.md`, where a test compares it.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from stagefuse.compiler import ops
from stagefuse.dsl.dims import const
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.signature import REQUIRED, OpError, Param
from stagefuse.dsl.types import TensorType

INTERNAL = ("input", "weight", "constant", "dim", "access", "position", "within",
            "update")  # fmt: skip
"""What no program writes: the checker puts it in."""
HEAD = """\
# Operations

Every built-in operation, written from the records in [compiler/ops/](../compiler/ops) by
`python -m stagefuse.compiler.operations_page --write`. [The language](language.md) says how they
are used; lists in the examples stand for tensors.

Operands of one operation have one dtype, which a literal takes; shapes broadcast where the
operation works element by element. The error is that of one rounding to the dtype where nothing
else is said, in units in the last place; a sum of n elements has that of n roundings.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_families()]) + "\n"


def _families() -> Iterator[str]:
    for name in sorted(m.name for m in pkgutil.iter_modules(ops.__path__)):
        module = import_module(f"{ops.__name__}.{name}")
        records = [op for op in getattr(module, "OPS", ()) if op.name not in INTERNAL]
        if records:
            title = re.match(r"[^,;:.]*", module.__doc__ or name)
            yield f"## {title.group() if title else name}\n"
            for op in records:
                yield from _entry(op)


def _entry(op: ops.Op) -> Iterator[str]:
    yield f"### `{_heading(op)}`\n"
    yield f"{op.doc}\n"
    facts = [f"`{_example(op)}` is `{op.example[1]}`."]
    taken = _taken(op)
    if taken:
        facts.insert(0, f"Takes {taken}.")
    if op.ulp > 0.5:
        units = "unit" if op.ulp == 1 else "units"
        facts.append(f"Error: at most {op.ulp:g} {units} in the last place.")
    yield " ".join(facts) + "\n"


def _heading(op: ops.Op) -> str:
    """The operation as it is written, with its parameters."""
    if op.name == "cast":
        return "dtype(x)"
    names = [p.name for p in op.params]
    if op.symbol or not op.user_callable:
        return _infix(op.symbol or op.name, names)
    parts = []
    for param in op.params:
        if param.keyword_only and "*" not in parts:
            parts.append("*")
        parts.append(param.name + ("" if param.default is REQUIRED else f"={param.default}"))
    return f"{op.name}({', '.join(parts)})"


def _infix(symbol: str, operands: list[str]) -> str:
    if len(operands) == 1:
        return f"{symbol} {operands[0]}" if symbol.isalpha() else f"{symbol}{operands[0]}"
    return f" {symbol} ".join(operands)


def _example(op: ops.Op) -> str:
    call = op.example[0]
    if op.user_callable:
        return call
    tree: Any = ast.parse(call, mode="eval").body
    operands = [ast.unparse(argument) for argument in tree.args]
    if op.name == "cast":
        return f"{operands[1]}({operands[0]})"
    return _infix(op.symbol or op.name, operands)


def _taken(op: ops.Op) -> str:
    """The classes of dtypes that the type rule accepts, where the operands alone tell."""
    if any(p.default is REQUIRED and p.kind not in ("tensor", "tensors") for p in op.params):
        return ""
    fine = {name for name, dtype in DTYPES.items() if _accepts(op, dtype)}
    classes = {
        "floats": {n for n, d in DTYPES.items() if d.is_float},
        "integers": {n for n, d in DTYPES.items() if d.is_int},
        "bools": {"bool"},
    }
    if fine == set(DTYPES):
        return "any dtype"
    return " and ".join(name for name, members in classes.items() if members <= fine)


def _accepts(op: ops.Op, dtype: Any) -> bool:
    matrix = TensorType(dtype, (const(2), const(2)))
    args = {p.name: _given(op, p, matrix) for p in op.params}
    try:
        op.infer(args, Facts())
    except OpError:
        return False
    return True


def _given(op: ops.Op, param: Param, matrix: TensorType) -> Any:
    if param.kind == "tensors":
        return [matrix, matrix]
    if param.kind != "tensor":
        return param.default
    if param.group is None and param.name == "c":
        return matrix.with_dtype(DTYPES["bool"])
    if param.group is None and param.name == "indices":
        return TensorType(DTYPES["i64"], (const(2),))
    return matrix


def main() -> None:
    target = Path(__file__).resolve().parents[1] / "docs" / "operations.md"
    if "--write" in sys.argv[1:]:
        target.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
