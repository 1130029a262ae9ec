"""What shapes that do not fit say of the sizes that a model was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import gcd, prod

from stagefuse.dsl.dims import Expr, const, sym

Ends = tuple[int, int | None]
"""The least and the greatest that a size may be."""
FURTHEST = 1 << 16
"""Sizes that are tried."""
BROADCASTS = frozenset(
    ("Add", "And", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mul", "Or", "Sub", "Where")
)
"""Ops whose operands have the same sizes, or 1."""
OTHERS = (101, 211, 307, 401, 503)
"""What the other sizes are meanwhile."""


def minima(size: Expr) -> list[tuple[str, int]]:
    """The sizes that occur in `min(number, ...)`, with the greatest of all of them at which that
    is not the number: 32 for both in `min(64, P + T)`."""
    found = []
    for monomial, _ in size.terms:
        for atom, _ in monomial:
            inner = [a for a in atom.args if isinstance(a, Expr)]
            numbers = [n for a in inner if (n := a.as_int()) is not None]
            rest = [a for a in inner if a.as_int() is None]
            if atom.kind == "min" and len(numbers) == len(rest) == 1:
                last = _up_to(rest[0], numbers[0])
                found += [(name, last) for name in rest[0].symbols() if last]
            found += [pair for a in inner for pair in minima(a)]
    return found


def maxima(size: Expr) -> list[tuple[str, int]]:
    """The size that occurs in `max(0, ...)`, with the least at which that is more than 0: what a
    window without elements gives is rarely meant."""
    found = []
    for monomial, _ in size.terms:
        for atom, _ in monomial:
            inner = [a for a in atom.args if isinstance(a, Expr)]
            rest = [a for a in inner if a.as_int() is None]
            if atom.kind == "max" and len(rest) == len(inner) - 1 == len(rest[0].symbols()):
                least = at_least(rest[0], 1)
                found += [] if least is None else [(name, least[1]) for name in least[0]]
            found += [pair for a in inner for pair in maxima(a)]
    return found


def quotients(size: Expr) -> dict[str, int]:
    """The sizes that occur divided, with the number by which (of 6*H by 4, 2), 2 for none."""
    atoms = [atom for monomial, _ in size.terms for atom, _ in monomial if atom.args]
    found: dict[str, int] = {}
    for atom in atoms:
        inner = [a for a in atom.args if isinstance(a, Expr)]
        for a in inner:
            by = inner[-1].as_int() or 2
            shared = gcd(by, *(c for monomial, c in a.terms if monomial))
            by = by // shared if shared < by else by
            found |= dict.fromkeys(a.symbols(), by) if atom.kind == "//" else quotients(a)
    return found


def unfolded(shape: Sequence[Expr], asked: Sequence[Expr]) -> dict[str, int]:
    """The one size that a reshape to a shape with -1 takes apart, with the number by which: T by 2
    where [B, T, 4] becomes [B, -1, 8]."""
    known = [size for size in asked if size.as_int() != -1]
    whole, part = (prod(sizes, start=const(1)) for sizes in (shape, known))
    if len(known) == len(asked) or len(whole.terms) != 1 or len(part.terms) != 1:
        return {}
    (have, times), (want, by) = whole.terms[0], part.terms[0]
    left = dict(have)
    for atom, power in want:
        left[atom] = left.get(atom, 0) - power
    names = [atom.name for atom, power in left.items() if power]
    by //= gcd(times, by)
    one = len(names) == 1 and set(left.values()) <= {0, 1} and by > 1 and names[0]
    return {names[0]: by} if one else {}


def equal_at(a: Expr, b: Expr) -> tuple[str, Ends] | None:
    """The one size, and the first values of it, for which two numbers of elements are equal
    whatever the other sizes are. An exporter wrote it into a shape."""
    rest = a - b
    for name in sorted(rest.symbols()):
        others: Mapping[str, int] = dict(zip(sorted(rest.symbols() - {name}), OTHERS, strict=False))
        if len(others) < len(rest.symbols()) - 1:
            return None

        def fits(value: int, name: str = name, others: Mapping[str, int] = others) -> bool:
            return rest.evaluate({**others, name: value}) == 0

        def holds(value: int, name: str = name, fits: Callable[[int], bool] = fits) -> bool:
            return fits(value) and rest.substitute({name: value}).as_int() == 0

        low = next((v for v in range(1, FURTHEST) if fits(v)), None)
        if low is not None and holds(low):
            if holds(FURTHEST):
                return name, (low, None)
            high = low
            while holds(high + 1):
                high += 1
            return name, (low, high)
    return None


def at_least(size: Expr, least: int) -> tuple[Sequence[str], int] | None:
    """The sizes in a number, and the least value of all of them at which it is so great."""
    found = _up_to(size, least - 1)
    return (sorted(size.symbols()), found + 1) if found < FURTHEST else None


def _up_to(size: Expr, most: int) -> int:
    """The last value, at most FURTHEST, of all sizes in a growing number at which it is at most
    something; 0 if there is none."""
    low, high = 0, FURTHEST
    while low < high:
        middle = (low + high + 1) // 2
        fits = size.evaluate(dict.fromkeys(size.symbols(), middle)) <= most
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def alike(
    op: str, axis: int, shapes: Sequence[Sequence[Expr]], asked: Sequence[Expr]
) -> list[tuple[Expr, Expr]]:
    """Pairs of sizes that an op takes to be equal. `asked` is the shape that a reshape asks for."""
    if op in BROADCASTS:
        return [pair for a, b in combinations(shapes, 2)
                for pair in zip(reversed(a), reversed(b), strict=False)]  # fmt: skip
    if op == "MatMul" and min(map(len, shapes)) > 1:
        (*first, _, inner), (*second, depth, _) = shapes
        return [(inner, depth), *zip(reversed(first), reversed(second), strict=False)]
    if op == "Concat" and shapes[0]:
        along = axis % len(shapes[0])
        return [(a, b) for other in shapes[1:]
                for k, (a, b) in enumerate(zip(shapes[0], other, strict=False))
                if k != along]  # fmt: skip
    if op == "NonMaxSuppression" and [len(s) for s in shapes[:2]] == [3, 3]:
        return [(shapes[0][0], shapes[1][0]), (shapes[0][1], shapes[1][2])]
    numbers = [v.as_int() for v in asked]
    if op == "Reshape" and -1 in numbers:
        at, sizes = numbers.index(-1), shapes[0]
        before = list(zip(sizes[:-1], asked[:at], strict=False))
        return before + list(zip(reversed(sizes[1:]), reversed(asked[at + 1 :]), strict=False))
    return []


def solved(a: Expr, b: Expr) -> list[tuple[str, Expr]]:
    """Sizes that are something else where a is b: `Q` is `P`, where `P + T` is `Q + T`; those of b
    come first."""
    rest = a - b
    found = []
    for name in sorted(rest.symbols()):
        others = rest.substitute({name: const(0)})
        value = others if others - sym(name) == rest else const(0) - others
        if rest in (others + sym(name), others - sym(name)):
            found.append((name, value))
    whole = [(name, value) for name, value in found if all(c > 0 for _, c in value.terms)]
    return sorted(whole, key=lambda pair: (len(pair[1].terms), pair[0] not in b.symbols()))
