"""Quotients of sizes as sizes of their own: what holds of any sizes holds of them.

The extents of an image that was halved twice are `(H // 2) // 2`, and proofs about its positions
rarely ask for more of them than of a plain size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagefuse.dsl.dims import APPLY, Atom, Expr, IntLike, as_expr, const, expr_of, sym
from stagefuse.dsl.facts import Facts

from .conditions import sharpened


def opaque(
    goal: Expr, facts: Facts, conditions: Sequence[Expr]
) -> tuple[Expr, Facts, tuple[Expr, ...]] | None:
    """A goal, facts and conditions in which the quotients of sizes are symbols, and from which the
    ones given follow; None if they have no quotients."""
    ranges = _reached((goal, *conditions), facts)
    ends = [as_expr(e) for pair in ranges.values() for e in pair if e is not None]
    table = {
        atom: sym(f"[{atom}]")
        for expr in (goal, *conditions, *ends)
        for atom in _quotients(expr)
        if facts.is_nonneg(expr_of(atom))
    }
    if not table:
        return None
    fresh = {name: (0, None) for size in table.values() for name in size.symbols()}
    plain = Facts({**facts.ranges, **fresh})
    known = sharpened(plain, [_replaced(c, table, None) for c in conditions])
    changed: dict[str, tuple[IntLike, IntLike | None]] = {
        name: (_replaced(as_expr(low), table, known),
               None if high is None else _replaced(as_expr(high), table, known))
        for name, (low, high) in ranges.items() if known.ranges[name] == facts.ranges[name]
    }  # fmt: skip
    known = known.with_ranges(changed)
    given = tuple(dict.fromkeys(_replaced(c, table, known) for c in conditions))
    return _replaced(goal, table, known), known, given


def _reached(exprs: Sequence[Expr], facts: Facts) -> dict[str, tuple[IntLike, IntLike | None]]:
    """The ranges of the symbols in expressions and in those ranges."""
    found: dict[str, tuple[IntLike, IntLike | None]] = {}
    pending = list(frozenset[str]().union(*(e.symbols() for e in exprs)))
    while pending:
        name = pending.pop()
        if name not in found and name in facts.ranges:
            found[name] = facts.ranges[name]
            pending.extend(s for e in found[name] if e is not None for s in as_expr(e).symbols())
    return found


def _quotients(expr: Expr) -> Iterator[Atom]:
    """The outermost quotients of sizes alone, whose names begin with a capital."""
    for monomial, _ in expr.terms:
        for atom, _ in monomial:
            if atom.kind == "//" and all(name[0].isupper() for name in atom.symbols):
                yield atom
            else:
                for arg in atom.args:
                    yield from _quotients(arg)


def _replaced(expr: Expr, table: dict[Atom, Expr], facts: Facts | None) -> Expr:
    """An expression with symbols for atoms."""
    total = const(0)
    for monomial, coefficient in expr.terms:
        product = const(coefficient)
        for atom, power in monomial:
            factor = table.get(atom)
            if factor is None and atom.args:
                a, b = (_replaced(arg, table, facts) for arg in atom.args)
                factor = APPLY[atom.kind](a, b, facts)
            for _ in range(power):
                product = product * (expr_of(atom) if factor is None else factor)
        total = total + product
    return total
