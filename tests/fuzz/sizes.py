"""Sizes of random programs: sums of products of named ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Dim:
    """A size: the sum of products of names, as ((names, factor), ...) in order."""

    terms: tuple[tuple[tuple[str, ...], int], ...]

    @staticmethod
    def of(value: int | str) -> Dim:
        if isinstance(value, str):
            return Dim((((value,), 1),))
        return Dim((((), value),)) if value else Dim(())

    def _with(self, pairs: Sequence[tuple[tuple[str, ...], int]]) -> Dim:
        found: dict[tuple[str, ...], int] = {}
        for names, factor in pairs:
            key = tuple(sorted(names))
            found[key] = found.get(key, 0) + factor
        return Dim(tuple(sorted((k, f) for k, f in found.items() if f)))

    def __add__(self, other: Dim | int) -> Dim:
        other = Dim.of(other) if isinstance(other, int) else other
        return self._with([*self.terms, *other.terms])

    def __mul__(self, other: Dim) -> Dim:
        return self._with([(a + b, f * g) for a, f in self.terms for b, g in other.terms])

    def at(self, sizes: Sizes) -> int:
        return sum(
            f * int(np.prod([sizes[n] for n in names], dtype=int)) for names, f in self.terms
        )

    def factors(self) -> list[list[Dim]]:
        """Pairs of sizes of which this is the product, one of them a name or a small number."""
        names = {n for term, _ in self.terms for n in term}
        named = [Dim.of(n) for n in names if all(n in term for term, _ in self.terms)]
        numbers = [Dim.of(n) for n in (2, 3, 4) if all(f % n == 0 for _, f in self.terms)]
        pairs = [[d, self._over(d)] for d in sorted([*named, *numbers], key=str)]
        return [p for pair in pairs for p in (pair, pair[::-1])]

    def _over(self, divisor: Dim) -> Dim:
        ((names, factor),) = divisor.terms
        return self._with([(_without(term, names), f // factor) for term, f in self.terms])

    @property
    def number(self) -> int | None:
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    def __str__(self) -> str:
        parts = [
            "*".join([*([str(f)] if f != 1 or not names else []), *names])
            for names, f in reversed(self.terms)
        ]
        return " + ".join(parts).replace("+ -", "- ") or "0"


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    left = list(names)
    for name in others:
        left.remove(name)
    return tuple(left)


Shape = tuple[Dim, ...]
LARGEST: Sizes = {"M": 33, "N": 7, "K": 70}
"""Sizes that no call exceeds."""
MOST = 1 << 21
"""Points that a step of a program may go over at these sizes."""


def points(shape: Sequence[Dim]) -> int:
    """How many elements a shape has at most."""
    return math.prod(d.at(LARGEST) for d in shape)


ONE = Dim.of(1)


def sized(shape: Shape, sizes: Sizes) -> tuple[int, ...]:
    return tuple(d.at(sizes) for d in shape)
