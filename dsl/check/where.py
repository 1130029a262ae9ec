"""What the `where` of a signature says of its sizes: facts, and that some sizes are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import lcm

from stagefuse.dsl import ast
from stagefuse.dsl.dims import Expr, as_expr, maximum, minimum
from stagefuse.dsl.facts import Facts

from .declared import Condition, Signature, Silent, conditions, range_ends
from .record import Recorder, divided
from .report import Failed
from .unify import range_text

Ranges = dict[str, tuple[Expr | int, Expr | int | None]]

MOST_TRIED = 5_000
"""How many sizes are tried before it is left open whether one meets all conditions."""


def gather_facts(recorder: Recorder, signature: Signature, where: tuple[ast.Where, ...]) -> Facts:
    """Ranges and divisibility of a `where`; what else it says is checked at the call.

    Reports conditions that never hold, and sizes of which none meets all conditions on them.
    """
    ranges: Ranges = {name: (0, None) for name in signature.variables}
    divisible: list[tuple[Expr, Expr | int]] = []
    stated: list[Condition] = []
    wrong: set[str] = set()
    for clause in where:
        with signature.frame.checker.reporter.catching():
            try:
                found = conditions(signature, clause)
                for condition in found:
                    _add_fact(ranges, divisible, *condition[:2])
                names = {name for expr, *_ in found for name in expr.symbols()}
                before, wrong = wrong, wrong | names
                _require_possible(signature, clause, found)
                wrong = before
            except Silent:
                continue
            for expr, relation, text, span in found:
                if expr.as_int() is None:
                    stated.append((expr, relation, text, span))
    facts = recorder.facts = Facts(_whole(ranges, divisible), tuple(divisible))
    for expr, relation, text, span in stated:
        recorder.check(expr, relation, f"{text} must hold", span)
    _require_sizes(signature, facts, stated, wrong)
    return facts


def _require_possible(signature: Signature, clause: ast.Where, found: Sequence[Condition]) -> None:
    """Raises Failed for a clause that holds for no sizes, whatever else is known of them."""
    for expr, relation, text, span in found:
        known = expr.as_int()
        if known is not None and (known != 0 if relation == "==0" else known < 0):
            raise Failed("E0217", f"`{text}` never holds", span)
    if isinstance(clause, ast.WhereRange):
        low, high = range_ends(signature, clause.range)
        gap = (high - low).as_int()
        if gap is not None and gap < 0:
            raise Failed("E0217", f"`{clause.name}` has an empty range", clause.span)


def _require_sizes(
    signature: Signature, facts: Facts, stated: Sequence[Condition], wrong: set[str]
) -> None:
    """Reports sizes that no value satisfies, but for the `wrong` ones, which are reported."""
    for reason in (_crossed, _never, _unmet):
        for name in facts.ranges:
            own = [c for c in stated if name in c[0].symbols()]
            label = None if name in wrong else reason(facts, name, own)
            if label is None:
                continue
            wrong |= {other for expr, *_ in own for other in expr.symbols()}
            spans = list(dict.fromkeys(span for *_, span in own))
            with signature.frame.checker.reporter.catching():
                others = [(span, "") for span in spans[:-1]]
                raise Failed("E0217", f"no size is left for `{name}`", spans[-1], label, others)


def _crossed(facts: Facts, name: str, own: Sequence[Condition]) -> str | None:
    """What to say of a size whose least value is above its greatest."""
    low, high = facts.ranges[name]
    room = None if high is None else facts.bounds(as_expr(high) - low)[1]
    if room is None or room >= 0:
        return None
    return f"{name} is at least {low} and at most {high}"


def _never(facts: Facts, name: str, own: Sequence[Condition]) -> str | None:
    """What to say of a condition that fails within the ranges of its sizes."""
    for expr, relation, text, _ in own:
        least, most = facts.bounds(expr)
        too_large = relation == "==0" and least is not None and least > 0
        if too_large or (most is not None and most < 0):
            known = ", ".join(f"{n} is {range_text(facts, n)}" for n in sorted(expr.symbols()))
            return f"{known}, where `{text}` never holds"
    return None


def _unmet(facts: Facts, name: str, own: Sequence[Condition]) -> str | None:
    """What to say of conditions on one size that no value meets, by trying the values."""
    low, high = facts.ranges[name]
    alone = [c for c in own if c[0].symbols() == {name}]
    first, last = as_expr(low).as_int(), None if high is None else as_expr(high).as_int()
    hard = [c for c in alone if not _in_range(c, name)]
    if not hard or first is None:
        return None
    turn = _period(hard)
    stop = min(n for n in (last, None if turn is None else first + turn - 1, first + MOST_TRIED)
               if n is not None)  # fmt: skip
    if any(all(_holds(c, name, value) for c in alone) for value in range(first, stop + 1)):
        return None
    if stop == last:
        return f"no number in {first}..={last} meets {'this' if len(hard) == 1 else 'all of these'}"
    return "no number meets all of these" if turn is not None and stop < first + turn else None


def _in_range(condition: Condition, name: str) -> bool:
    """Whether it is a bound of the size, which its range holds."""
    slope = condition[0].coefficient(name)
    return condition[1] == ">=0" and slope is not None and slope.as_int() in (1, -1)


def _holds(condition: Condition, name: str, value: int) -> bool:
    found = condition[0].evaluate({name: value})
    return found == 0 if condition[1] == "==0" else found >= 0


def _period(found: Sequence[Condition]) -> int | None:
    """After how many numbers conditions on one size repeat; None where they do not."""
    turn = 1
    for expr, *_ in found:
        for monomial, _ in expr.terms:
            for atom, _ in monomial:
                by = atom.args[1].as_int() if atom.kind == "%" else None
                inner = atom.args[0].terms if atom.kind == "%" else ()
                if not by or any(a.kind != "sym" for powers, _ in inner for a, _ in powers):
                    return None
                turn = lcm(turn, by)
    return turn


def _add_fact(
    ranges: Ranges, divisible: list[tuple[Expr, Expr | int]], expr: Expr, relation: str
) -> None:
    if relation == "==0":
        _add_equality(ranges, divisible, expr)
        return
    for name in sorted(expr.symbols()):
        slope = expr.coefficient(name)
        factor = slope.as_int() if slope is not None else None
        if factor not in (1, -1) or name not in ranges:
            continue
        rest = expr.substitute({name: 0})
        low, high = ranges[name]
        if factor == 1:
            bound = -rest
            if not _depends(ranges, bound, name):
                ranges[name] = (_tighter(bound, low, True), high)
                return
        elif not _depends(ranges, rest, name):
            ranges[name] = (low, rest if high is None else _tighter(rest, high, False))
            return


def _add_equality(ranges: Ranges, divisible: list[tuple[Expr, Expr | int]], expr: Expr) -> None:
    """What an expression that is 0 says: a divisor, or what a size is."""
    pair = divided(expr)
    if pair is not None:
        divisible.append(pair)
    for name in sorted(expr.symbols()):
        slope = expr.coefficient(name)
        if slope is None or slope.as_int() not in (1, -1) or name not in ranges:
            continue
        value = (expr.substitute({name: 0})) * -(slope.as_int() or 1)
        low, high = ranges[name]
        if value.as_int() is not None:
            upper = value if high is None else _tighter(value, high, False)
            ranges[name] = (_tighter(value, low, True), upper)
            return
        if (low, high) == (0, None) and not _depends(ranges, value, name):
            ranges[name] = (value, value)
            return


def _whole(ranges: Ranges, divisible: Sequence[tuple[Expr, Expr | int]]) -> Ranges:
    """Ranges that end at multiples, of sizes that with a number more are multiples of another."""
    found = dict(ranges)
    for expr, by in divisible:
        more = expr.constant()
        name, number = (expr - more).as_symbol(), as_expr(by).as_int()
        if name is None or name not in found or number is None or number < 1:
            continue
        low, high = found[name]
        low = _rounded(low, number, more, True)
        high = None if high is None else _rounded(high, number, more, False)
        least, most = as_expr(low).as_int(), None if high is None else as_expr(high).as_int()
        if least is None or most is None or least <= most:
            found[name] = (low, high)
    return found


def _rounded(end: Expr | int, number: int, more: int, is_low: bool) -> Expr | int:
    """The first within an end that with `more` is a multiple; the end is a number, or one of
    several ends."""
    value, atom = as_expr(end).as_int(), as_expr(end).as_atom()
    if value is not None:
        past = (value + more) % number
        return value - past + (number if is_low and past else 0)
    if atom is None or atom.kind != ("max" if is_low else "min"):
        return end
    ends = [as_expr(_rounded(each, number, more, is_low)) for each in atom.args]
    return reduce(maximum if is_low else minimum, ends)


def _tighter(bound: Expr, known: Expr | int, is_low: bool) -> Expr | int:
    pick = maximum if is_low else minimum
    found = pick(bound, known, Facts())
    if as_expr(known).as_int() == 0 and is_low and Facts().is_nonneg(bound):
        found = bound
    value = found.as_int()
    return found if value is None else value


def _depends(
    ranges: Mapping[str, tuple[Expr | int, Expr | int | None]], bound: Expr, name: str
) -> bool:
    """Whether the bound leads back to the size that it is to bound."""
    seen: set[str] = set()
    pending = set(bound.symbols())
    while pending:
        symbol = pending.pop()
        if symbol == name:
            return True
        if symbol in seen:
            continue
        seen.add(symbol)
        for end in ranges.get(symbol, (0, None)):
            if end is not None:
                pending |= as_expr(end).symbols()
    return False
