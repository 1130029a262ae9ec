"""Sizes of which each is bounded by the next: what a chain of any length says of its two ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .dims import Expr, IntLike, as_expr

STEPS = 20
"""How often the distance to a size may be found to be less, on average."""
Edges = Mapping[str, list[tuple[str, int]]]


def edges_of(ranges: Mapping[str, tuple[IntLike, IntLike | None]]) -> Edges:
    """For each symbol s the pairs of t and c for which a range says that s <= t + c."""
    found: dict[str, list[tuple[str, int]]] = {}
    for name, (low, high) in ranges.items():
        for other, c in _ends(high, "min"):
            found.setdefault(name, []).append((other, c))
        for other, c in _ends(low, "max"):
            found.setdefault(other, []).append((name, -c))
    return found


def difference(goal: Expr) -> tuple[str, str, int] | None:
    """The symbols s and t and the number c where an expression is t - s + c."""
    pair: dict[int, str] = {}
    for monomial, sign in goal.terms:
        if monomial:
            atom, power = monomial[0]
            if len(monomial) > 1 or power != 1 or not atom.name or sign in pair:
                return None
            pair[sign] = atom.name
    if sorted(pair) != [-1, 1]:
        return None
    return pair[-1], pair[1], goal.constant()


def is_ordered(edges: Edges, first: str, last: str, most: int) -> bool:
    """Whether a chain says that the first symbol is at most the last plus a number."""
    least, pending, left = {first: 0}, [first], STEPS * len(edges)
    while pending and left:
        name = pending.pop(0)
        for other, c in edges.get(name, ()):
            left = max(left - 1, 0)
            if other not in least or least[name] + c < least[other]:
                least[other] = least[name] + c
                if other == last and least[other] <= most:
                    return True
                pending.append(other)
    return False


def _ends(end: IntLike | None, choice: str, more: int = 0) -> Iterator[tuple[str, int]]:
    """A symbol and what is added to it, of an end of a range or each of those it is chosen of."""
    if end is None:
        return
    expr = as_expr(end)
    more += expr.constant()
    rest = [(monomial, c) for monomial, c in expr.terms if monomial]
    if len(rest) != 1 or rest[0][1] != 1 or len(rest[0][0]) != 1:
        return
    ((atom, power),) = rest[0][0]
    if power == 1 and atom.name:
        yield atom.name, more
    elif power == 1 and atom.kind == choice:
        for part in atom.args:
            yield from _ends(part, choice, more)
