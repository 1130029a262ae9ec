"""Dimension variables: solving declared shapes against actual ones.

A declared shape is a list of expressions over variables and perhaps one `*S`. Variables stand for
expressions over the sizes of the pipeline that is being checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stagefuse.dsl.dims import VARIABLE_PREFIX, Expr, floordiv, mod
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen


def variable(name: str) -> str:
    """The symbol of a variable, which no size of a pipeline can be mistaken for."""
    return VARIABLE_PREFIX + name


def shown(expr: Expr) -> str:
    """The text of an expression, variables as the user wrote them."""
    return str(expr).replace(VARIABLE_PREFIX, "")


@frozen
class Declared:
    """A declared shape: expressions around at most one `*name`."""

    before: tuple[Expr, ...]
    rest: str | None = None
    after: tuple[Expr, ...] = ()

    def __str__(self) -> str:
        parts = [shown(e) for e in self.before]
        if self.rest is not None:
            parts.append(f"*{self.rest}")
        parts.extend(shown(e) for e in self.after)
        return ", ".join(parts)

    def fits_rank(self, rank: int) -> bool:
        least = len(self.before) + len(self.after)
        return rank >= least if self.rest is not None else rank == least


class Mismatch(Exception):
    """Two shapes that cannot agree: `declared` and `actual` say which dimensions."""

    def __init__(self, message: str, notes: list[str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.notes = notes or []


def differ_for_some(facts: Facts, a: Expr, b: Expr) -> bool:
    """Whether the two are known to differ for some sizes; False where that cannot be decided.

    Two different polynomials in plain sizes differ somewhere; `//`, `%`, `min` and `max` may hide
    an equality.
    """
    gap = facts.simplify(a - b)
    if not gap.terms:
        return False
    known = gap.as_int()
    if known is not None:
        return True
    if _sign(facts, gap):
        return True
    return all(atom.kind == "sym" for monomial, _ in gap.terms for atom, _ in monomial)


def _sign(facts: Facts, gap: Expr, choices: int = 4) -> int:
    """1 or -1 where it is known to be above or below 0 for all sizes, else 0.

    A minimum or a maximum is one of two expressions: both are tried, of up to so many.
    """
    low, high = facts.bounds(gap)
    if low is not None and low > 0:
        return 1
    if high is not None and high < 0:
        return -1
    atoms = (atom for monomial, _ in gap.terms for atom, _ in monomial)
    chosen = next((atom for atom in atoms if atom.kind in ("min", "max")), None)
    if chosen is None or choices == 0:
        return 0
    first, second = (
        _sign(facts, facts.simplify(gap.with_atoms({chosen: end}, facts)), choices - 1)
        for end in chosen.args
    )
    return first if first == second else 0


@dataclass
class Solver:
    """The variables of one call, and what is still to be shown."""

    facts: Facts
    check: Callable[[Expr, str, str], None]
    values: dict[str, Expr] = field(default_factory=dict)
    rests: dict[str, tuple[Expr, ...]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def substituted(self, expr: Expr) -> Expr:
        known = {variable(name): value for name, value in self.values.items()}
        return self.facts.simplify(expr.substitute(known, self.facts))

    def unknowns(self, expr: Expr) -> list[str]:
        return sorted(
            name[len(VARIABLE_PREFIX) :]
            for name in expr.symbols()
            if name.startswith(VARIABLE_PREFIX) and name[len(VARIABLE_PREFIX) :] not in self.values
        )

    def pairs(self, declared: Declared, actual: tuple[Expr, ...]) -> list[tuple[Expr, Expr, int]]:
        """Declared and actual dimensions side by side; `*S` is bound. Raises Mismatch."""
        if not declared.fits_rank(len(actual)):
            wanted = len(declared.before) + len(declared.after)
            least = "at least " if declared.rest is not None else ""
            raise Mismatch(f"{least}{dimensions(wanted)} expected, {len(actual)} found")
        head, tail = len(declared.before), len(actual) - len(declared.after)
        if declared.rest is not None:
            self._bind_rest(declared.rest, actual[head:tail])
        found = [(d, a, i) for i, (d, a) in enumerate(zip(declared.before, actual, strict=False))]
        found += [
            (d, a, tail + i)
            for i, (d, a) in enumerate(zip(declared.after, actual[tail:], strict=True))
        ]
        return found

    def _bind_rest(self, name: str, actual: tuple[Expr, ...]) -> None:
        known = self.rests.setdefault(name, actual)
        same = len(known) == len(actual) and all(
            self.facts.prove_eq(a, b) for a, b in zip(known, actual, strict=True)
        )
        if not same:
            was, now = ", ".join(map(str, known)), ", ".join(map(str, actual))
            raise Mismatch(f"`*{name}` is [{was}] in one place and [{now}] in another")

    def solve_plain(self, pairs: Iterable[tuple[Expr, Expr, int]]) -> list[tuple[Expr, Expr, int]]:
        """Bind the dimensions that are a variable alone; returns the pairs that are left."""
        left = []
        for declared, actual, axis in pairs:
            name = declared.as_symbol()
            if name and name.startswith(VARIABLE_PREFIX):
                plain = name[len(VARIABLE_PREFIX) :]
                if plain not in self.values:
                    self.values[plain] = actual
                    continue
            left.append((declared, actual, axis))
        return left

    def settle(self, declared: Expr, actual: Expr, axis: int) -> bool:
        """Solve or compare one dimension; False if too much is unknown yet. Raises Mismatch."""
        unknown = self.unknowns(declared)
        expected = self.substituted(declared)
        if not unknown:
            self._require_equal(declared, expected, actual, axis)
            return True
        if len(unknown) > 1:
            return False
        symbol = variable(unknown[0])
        slope = expected.coefficient(symbol)
        factor = slope.as_int() if slope is not None else None
        if slope is None or not slope.terms:
            return False
        rest = expected.substitute({symbol: 0}, self.facts)
        gap = actual - rest
        if factor is not None and abs(factor) == 1:
            value = gap * factor
        else:
            remainder = mod(gap, slope, self.facts)
            known = remainder.as_int()
            text = f"dimension {axis} must be {shown(declared)}; it is {actual}"
            if known:
                raise Mismatch(text, [f"no `{unknown[0]}` gives {actual}"])
            if known is None:
                self.check(remainder, "==0", text)
            value = floordiv(gap, slope, self.facts)
        low, high = self.facts.bounds(value)
        if high is not None and high < 0:
            raise Mismatch(
                f"dimension {axis} must be {shown(declared)}; it is {actual}",
                [f"`{unknown[0]}` would be {value}, and a size is never negative"],
            )
        if low is None or low < 0:
            if not self.facts.is_nonneg(value):
                self.check(value, ">=0", f"`{unknown[0]}`, which is {value}, must not be negative")
        self.values[unknown[0]] = value
        return True

    def _require_equal(self, declared: Expr, expected: Expr, actual: Expr, axis: int) -> None:
        if self.facts.prove_eq(expected, actual):
            return
        written = shown(declared)
        was = f"{written}, which is {expected}," if written != str(expected) else written
        text = f"dimension {axis} must be {was} and is {actual}"
        if differ_for_some(self.facts, expected, actual):
            raise Mismatch(text, range_notes(self.facts, expected, actual))
        filled = _without_zero(self.facts, expected, actual)
        if _sign(filled, filled.simplify(expected - actual)):
            want, found = filled.simplify(expected), filled.simplify(actual)
            known = (want, found) == (expected, actual)
            own = "they differ" if known else f"it must be {want} and is {found}"
            raise Mismatch(text, [f"where no size is 0 {own}"])
        self.check(expected - actual, "==0", text)


def _without_zero(facts: Facts, *expressions: Expr) -> Facts:
    """The facts where no size in the expressions is 0."""
    names = {name for expr in expressions for name in expr.symbols()}
    ends = {name: facts.ranges.get(name, (0, None)) for name in names}
    return facts.with_ranges({n: (1, high) for n, (low, high) in ends.items() if low == 0})


def dimensions(count: int) -> str:
    return "1 dimension" if count == 1 else f"{count} dimensions"


def larger_sizes(facts: Facts, names: Iterable[str], holds: Callable[[Facts], bool]) -> str | None:
    """Help for what holds where a size is a little larger than it may be; None for all else."""
    ends = {name: facts.ranges.get(name, (0, None)) for name in sorted(names)}
    for least in range(1, 9):
        raised = {
            name: (least, high)
            for name, (low, high) in ends.items()
            if isinstance(low, int) and low < least and (high is None or isinstance(high, int))
        }
        for chosen in (*({name: ends} for name, ends in raised.items()), raised):
            if chosen and holds(facts.with_ranges(chosen)):
                stated = [f"{n} in {least}..={high or 4096}" for n, (_, high) in chosen.items()]
                noun = "size" if len(stated) == 1 else "sizes"
                return f"state the range of the {noun}, such as `where {', '.join(stated)}`"
    return None


def range_notes(facts: Facts, *expressions: Expr) -> list[str]:
    """What is known of the sizes in the expressions: `T is in 1..=512`."""
    names = sorted({name for expr in expressions for name in expr.symbols()})
    return [f"{name} is {range_text(facts, name)}" for name in names]


def range_text(facts: Facts, name: str) -> str:
    low, high = facts.ranges.get(name, (0, None))
    text = f"in {low}..={high}" if high is not None else f"any size from {low}"
    by = [str(number) for known, number in facts.divisible if known.as_symbol() == name]
    return f"{text}, a multiple of {' and '.join(by)}" if by else text
