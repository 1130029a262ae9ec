"""Quotients of sizes as sizes of their own: what holds of any sizes holds of them.

The extents of an image that was halved twice are `(H // 2) // 2`, and proofs about its positions
rarely ask for more of them than of a plain size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagefuse.dsl.dims import Atom, Expr, IntLike, as_expr, expr_of, is_size, sym
from stagefuse.dsl.facts import Facts

from .conditions import reached, sharpened


def opaque(
    goal: Expr, facts: Facts, conditions: Sequence[Expr], positions: bool = False
) -> tuple[Expr, Facts, tuple[Expr, ...]] | None:
    """A goal, facts and conditions in which the quotients of sizes are symbols, and from which the
    ones given follow; None if they have no quotients. `positions`: those of positions too, and
    remainders, of which only what the conditions say is known then, and their greatest value."""
    ranges = reached((goal, *conditions), facts)
    ends = [as_expr(e) for pair in ranges.values() for e in pair if e is not None]
    table = {
        atom: sym(f"[{atom}]")
        for expr in (goal, *conditions, *ends)
        for atom in _quotients(expr, positions)
        if facts.is_nonneg(expr_of(atom))
    }
    if not table:
        return None
    fresh = {
        name: (0, facts.interval(expr_of(atom))[1] if positions else None)
        for atom, size in table.items() for name in size.symbols()
    }  # fmt: skip
    plain = Facts({**facts.ranges, **fresh})
    known = sharpened(plain, [c.with_atoms(table) for c in conditions])
    changed: dict[str, tuple[IntLike, IntLike | None]] = {
        name: (as_expr(low).with_atoms(table, known),
               None if high is None else as_expr(high).with_atoms(table, known))
        for name, (low, high) in ranges.items() if known.ranges[name] == facts.ranges[name]
    }  # fmt: skip
    known = known.with_ranges(changed)
    given = tuple(dict.fromkeys(c.with_atoms(table, known) for c in conditions))
    return goal.with_atoms(table, known), known, given


def _quotients(expr: Expr, positions: bool) -> Iterator[Atom]:
    """The outermost quotients of sizes alone; with `positions`
    the innermost ones and remainders, of anything."""
    for monomial, _ in expr.terms:
        for atom, _ in monomial:
            of_sizes = atom.kind == "//" and all(map(is_size, atom.symbols))
            if of_sizes:
                yield atom
                continue
            inner = [a for arg in atom.args for a in _quotients(arg, positions)]
            if positions and atom.kind in ("//", "%") and not inner:
                yield atom
            else:
                yield from inner
