"""What follows from conditions on sizes and positions: expressions that are at least 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from stagefuse.dsl.dims import Atom, Expr, IntLike, Monomial, as_expr, expr_of, sym
from stagefuse.dsl.facts import Facts

COMBINED = 60
"""Pairs of conditions that may be added up for one goal."""


def is_plain(goal: Expr, facts: Facts) -> bool:
    """Whether intervals alone say that it is at least 0, or all its terms over a factor that they
    share, which is never negative: n - n*i is n*(1 - i)."""
    low = facts.interval(goal)[0]
    if low is not None and low >= 0:
        return True
    if len(goal.terms) < 2 or not goal.terms[0][0]:
        return False
    shared = set.intersection(*({atom for atom, _ in monomial} for monomial, _ in goal.terms))
    for atom in sorted(shared):
        least = facts.interval(expr_of(atom))[0]
        if least is not None and least >= 0:
            rest = Expr(tuple(sorted((without(m, atom), c) for m, c in goal.terms)))
            return is_plain(rest, facts)
    return False


def _is_shown(goal: Expr, facts: Facts, left: int = 3) -> bool:
    """Whether intervals say that it is at least 0 once minima and maxima, of which so many may
    nest, are what they are at most or at least: n - min(1, n) is at least n - n."""
    if is_plain(goal, facts):
        return True
    for monomial, coefficient in goal.terms:
        if left == 0 or len(monomial) != 1 or monomial[0][1] != 1:
            continue
        atom = monomial[0][0]
        if atom.kind not in ("min", "max"):
            continue
        rest = goal - Expr(((monomial, coefficient),))
        enough = all if (coefficient > 0) == (atom.kind == "min") else any
        if enough(_is_shown(rest + coefficient * arg, facts, left - 1) for arg in atom.args):
            return True
    return False


def reached(exprs: Iterable[Expr], facts: Facts) -> dict[str, tuple[IntLike, IntLike | None]]:
    """The ranges of all symbols in expressions and in those ranges."""
    found: dict[str, tuple[IntLike, IntLike | None]] = {}
    pending = sorted(frozenset[str]().union(*(e.symbols() for e in exprs)))
    while pending:
        name = pending.pop()
        if name not in found and name in facts.ranges:
            found[name] = facts.ranges[name]
            for end in found[name]:
                if isinstance(end, Expr):
                    pending.extend(end.symbols())
    return found


def expanded(conditions: Iterable[Expr], facts: Facts) -> tuple[Expr, ...]:
    """The conditions, with what each says of the factors and extremes in it."""
    found: dict[Expr, None] = {}
    pending = list(conditions)
    while pending:
        condition = pending.pop()
        if condition not in found:
            found[condition] = None
            pending.extend(_of_factors(condition, facts))
            pending.extend(_of_extremes(condition, facts))
    return tuple(found)


def sharpened(facts: Facts, conditions: Sequence[Expr]) -> Facts:
    """The facts with ranges narrowed by conditions on one symbol: 2*n - 5 >= 0 is n >= 3."""
    ranges: dict[str, tuple[IntLike, IntLike | None]] = {}
    for condition in conditions:
        names = condition.symbols()
        if len(names) != 1:
            continue
        (name,) = names
        slope = condition.coefficient(name)
        times = slope.as_int() if slope is not None else None
        if not times:
            continue
        rest = (condition - times * sym(name)).as_int()
        assert rest is not None
        low, high = ranges.get(name, facts.ranges.get(name, (0, None)))
        known_low = as_expr(low).as_int()
        known_high = None if high is None else as_expr(high).as_int()
        if times > 0 and known_low is not None and -(rest // times) > known_low:
            ranges[name] = (-(rest // times), high)
        elif times < 0 and (high is None or (known_high or 0) > rest // -times):
            ranges[name] = (low, rest // -times)
    return facts.with_ranges(ranges) if ranges else facts


def combined(exprs: Iterable[Expr], conditions: Sequence[Expr], facts: Facts) -> tuple[Expr, ...]:
    """What conditions and ranges say together: Fourier-Motzkin elimination of every symbol.

    Those of `exprs`, innermost positions first: l <= a*i and b*i <= u, for a and b that are never
    negative, is b*l <= a*u. So sizes are large enough for a position to exist.
    """
    names = frozenset[str]().union(*(e.symbols() for e in (*exprs, *conditions)))
    ends = _ends(names, facts)
    own = sum(ends.values(), ())
    also = [e for e in expanded(own, facts) if e not in own]
    found = dict.fromkeys((*conditions, *own, *also))
    new = {e: None for e in also if e not in conditions and not is_plain(e, facts)}
    for name in ends:
        for both in _sums(name, tuple(found), facts):
            if len(new) >= COMBINED:
                return tuple(new)
            if both not in found and not is_plain(both, facts):
                more = [e for e in expanded([both], facts) if e not in found]
                found.update(dict.fromkeys(more))
                new.update(dict.fromkeys(more))
    return tuple(new)


def multiplied(conditions: Sequence[Expr], facts: Facts) -> tuple[Expr, ...]:
    """What conditions say once a quotient in them is multiplied out: from a // b <= r for b >= 1,
    a <= r*b + b - 1; from a // b >= r, a >= r*b."""
    found: dict[Expr, None] = {}
    for condition in conditions:
        for monomial, coefficient in condition.terms:
            if abs(coefficient) != 1 or len(monomial) != 1 or monomial[0][1] != 1:
                continue
            atom = monomial[0][0]
            if atom.kind == "//" and is_plain(atom.args[1] - 1, facts):
                a, b = atom.args
                rest = condition - Expr(((monomial, coefficient),))
                found[rest * b + a if coefficient > 0 else (rest + 1) * b - 1 - a] = None
    return tuple(e for e in found if e not in conditions and not is_plain(e, facts))


def _sums(name: str, conditions: Sequence[Expr], facts: Facts) -> Iterator[Expr]:
    """Sums of two conditions, of which one bounds a symbol from below and one from above, in which
    it cancels."""
    slopes = [(c, s) for c in conditions if (s := c.coefficient(name)) is not None and s.terms]
    lower = [(c, s) for c, s in slopes if is_plain(s, facts)]
    upper = [(c, -s) for c, s in slopes if is_plain(-s, facts)]
    for least, a in lower:
        for most, b in upper:
            yield b * least + a * most


def _ends(names: Iterable[str], facts: Facts) -> dict[str, tuple[Expr, ...]]:
    """What the ranges of symbols, and of those that these rest on, say: a name comes before all
    that its range rests on."""
    found: dict[str, tuple[Expr, ...]] = {}
    pending = sorted(names)
    while pending:
        name = pending.pop()
        low, high = facts.ranges.get(name, (0, None))
        here = [sym(name) - low]
        if high is not None:
            here.append(as_expr(high) - sym(name))
        found.pop(name, None)
        found[name] = tuple(here)
        pending.extend(sorted(frozenset[str]().union(*(e.symbols() for e in here)) - {name}))
    return found


def _of_extremes(condition: Expr, facts: Facts) -> Iterator[Expr]:
    """From max(0, a) >= 1: a >= 1, since the 0 is not; from min(a, b) >= c: both are. So too from
    c - min(0, a) >= 1 with a, and from c - max(a, b) >= 0 with both."""
    for monomial, coefficient in condition.terms:
        if abs(coefficient) != 1 or len(monomial) != 1 or monomial[0][1] != 1:
            continue
        atom = monomial[0][0]
        if atom.kind not in ("min", "max"):
            continue
        rest = condition - Expr(((monomial, coefficient),))
        both = (atom.kind == "min") == (coefficient > 0)
        for part, other in (atom.args, atom.args[::-1]):
            if both or is_plain(-1 - (rest + coefficient * part), facts):
                yield rest + coefficient * other


def _of_factors(condition: Expr, facts: Facts) -> Iterator[Expr]:
    """From b*d - x >= 1 where neither b nor x is negative: b >= 1 and d >= 1; from a // 3 >= 2:
    a >= 6."""
    rising = {atom for monomial, c in condition.terms if c > 0 for atom, _ in monomial}
    terms: list[tuple[Monomial, int]] = []
    least = 0
    for monomial, c in condition.terms:
        if not monomial:
            least = -c
        elif c > 0 or any(atom in rising for atom, _ in monomial):
            terms.append((monomial, c))
        elif not _is_shown(Expr(((monomial, -c),)), facts):
            return
    if least < 1 or not terms:
        return
    common = set.intersection(*({a for a, _ in m} for m, _ in terms))
    for atom in sorted(common):
        if not _is_shown(expr_of(atom), facts):
            continue
        rest = Expr(tuple((without(m, atom), c) for m, c in terms))
        yield expr_of(atom) - 1
        if rest.as_int() is None:
            yield rest - 1
        elif (
            condition == expr_of(atom) - least
            and atom.kind == "//"
            and (by := atom.args[1].as_int()) is not None
        ):
            yield atom.args[0] - by * least


def without(monomial: Monomial, atom: Atom) -> Monomial:
    """A monomial over one of its factors."""
    lower = ((a, p - (a == atom)) for a, p in monomial)
    return tuple((a, p) for a, p in lower if p)
