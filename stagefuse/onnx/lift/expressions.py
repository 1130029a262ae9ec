"""One operation as text, with no more parentheses than it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stagefuse.onnx.names import weight_path
from stagefuse.onnx.text import literal

from .plan import Plan
from .program import Compute, Value, is_number
from .terms import Term

if TYPE_CHECKING:
    from .layout import Layout

PIPE, RANGE, NOT, COMPARE, SUM, PRODUCT, SIGN, POWER, POSTFIX = 0, 1, 4, 5, 10, 11, 12, 13, 14
PRECEDENCE = {
    "or": 2, "and": 3, "==": 5, "!=": 5, "<": 5, "<=": 5, ">": 5, ">=": 5, "|": 6, "^": 7, "&": 8,
    "<<": 9, ">>": 9, "+": 10, "-": 10, "*": 11, "/": 11, "//": 11, "%": 11, "@": 11, "**": 13,
}  # fmt: skip
ATOM = 15

Text = tuple[str, int]
"""An expression with how tightly its outermost operator binds."""


class TermWriter:
    """The text of one operation; operands and numbers are taken in order."""

    def __init__(self, layout: Layout, statement: Compute, plan: Plan) -> None:
        self.layout, self.plan = layout, plan
        self.reads = iter(statement.reads)
        self.numbers = iter(statement.numbers)

    def text(self, term: Term) -> Text:
        if term.is_operand:
            return self.layout.value(next(self.reads), self.plan)
        if is_number(term):
            number = next(self.numbers)
            text = self.layout.number(number)
            return text, SIGN if text.startswith("-") else ATOM
        return self.of(term)

    def of(self, term: Term) -> Text:
        match term.kind:
            case "size" | "name" | "local" | "input":
                return term.value, ATOM
            case "literal":
                value = term.value[1]
                return (f'"{value}"' if isinstance(value, str) else str(value)), ATOM
            case "absent":
                return "", ATOM
            case "list":
                return f"[{self._joined(term.args)}]", ATOM
            case "tuple":
                comma = "," if len(term.args) == 1 else ""
                return f"({self._joined(term.args)}{comma})", ATOM
            case "slice":
                start, stop, step = (self.text(a)[0] for a in term.args)
                return f"{start}:{stop}" + (f":{step}" if step else ""), ATOM
            case "range":
                a, b = (self._at(t, RANGE + 1) for t in term.args)
                return f"{a}{'..=' if term.value else '..'}{b}", RANGE
            case "call":
                texts = [self.text(a)[0] for a in term.args]
                names = term.value[1]
                at = len(texts) - len(names)
                named = [f"{n}={t}" for n, t in zip(names, texts[at:], strict=True)]
                return f"{term.value[0]}({', '.join([*texts[:at], *named])})", POSTFIX
            case "unary":
                return self._unary(term)
            case "binary":
                return self._binary(term)
            case "sub":
                base = self._at(term.args[0], POSTFIX)
                return f"{base}[{self._joined(term.args[1:])}]", POSTFIX
            case "reduce":
                body = self._at(term.args[0], PRODUCT)
                return f"{term.value[0]}[{self.indices(term)}] {body}", PIPE
            case "index":
                return self.text(term.args[0])[0], ATOM
        raise NotImplementedError(term.kind)

    def indices(self, term: Term) -> str:
        """The indices of a definition or reduction, with their ranges."""
        found = []
        for name, range_ in zip(term.value[1], term.args[1:], strict=True):
            text = self.text(range_)[0]
            found.append(f"{name} in {text}" if text else name)
        return ", ".join(found)

    def _joined(self, terms: Sequence[Term]) -> str:
        return ", ".join(self.text(t)[0] for t in terms)

    def _at(self, term: Term, least: int) -> str:
        text, level = self.text(term)
        return text if level >= least else f"({text})"

    def _unary(self, term: Term) -> Text:
        level = NOT if term.value == "not" else SIGN
        text = self._at(term.args[0], level)
        return f"{term.value} {text}" if term.value == "not" else f"{term.value}{text}", level

    def _binary(self, term: Term) -> Text:
        level = PRECEDENCE[term.value]
        left = self._at(term.args[0], level + (term.value == "**"))
        right = self._at(term.args[1], SIGN if term.value == "**" else level + 1)
        if term.value == "+" and right.startswith("-") and is_number(term.args[1]):
            return f"{left} - {right[1:]}", level
        return f"{left} {term.value} {right}", level


def number_text(term: Term) -> str:
    if term.kind == "unary":
        return f"-{number_text(term.args[0])}"
    return literal(term.value[1])


def path_text(value: Value, texts: dict[Value, Text], weights: str) -> str:
    """`w.encoder.layer[0].query`, or below a parameter or a loop's number."""
    path, base = value.path or "", value.base
    if base is None:
        return weight_path(path, weights)
    root = texts[base][0] if base in texts else base.name
    if base.name == "index":
        above, _, below = path.partition(".?")
        return weight_path(f"{above}.0{below}", weights).replace(
            weight_path(f"{above}.0", weights), f"{weight_path(above, weights)}[{root}]", 1)
    return weight_path(path, root) if path else root
