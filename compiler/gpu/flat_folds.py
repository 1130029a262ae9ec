"""Folds over axes that lie behind each other in all that they read: one loop goes over all axes.

Of means over the height and width of an image, say, an element lies at `(h * W + w) * C + c`: in a
loop over `h * W + w` lanes share all places, and many loads are under way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stagefuse.compiler.cpu.values import parts
from stagefuse.compiler.kernel_ir import Fold, Index, Load, Value
from stagefuse.compiler.lower.expressions import symbols_of
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.facts import Facts

if TYPE_CHECKING:
    from .values import ValueWriter

FLAT = "flat'"


def places_of(s: Fold) -> Iterator[dict[str, Expr]]:
    """The places of a fold whose extents are known, in order."""
    extents = [range(extent.as_int() or 0) for _, extent in s.loops]
    for place in itertools.product(*extents):
        yield {name: const(p) for (name, _), p in zip(s.loops, place, strict=True)}


class Flat(NamedTuple):
    """The loops of a fold as one: how many places it has, and what is known of sizes in it."""

    loops: tuple[tuple[str, Expr], ...]
    extent: Expr
    facts: Facts

    def at(self, place: Expr) -> dict[str, Expr]:
        """The indices of the loops at a place of the one."""
        found = {}
        for name, extent in reversed(self.loops[1:]):
            found[name] = mod(place, extent, self.facts)
            place = floordiv(place, extent, self.facts)
        return {**found, self.loops[0][0]: place}


def flat_of(writer: ValueWriter, folds: Sequence[Fold]) -> Flat | None:
    """The loops that folds have in common as one, if all they read lies in its order."""
    loops = tuple((name, writer.resolve(extent)) for name, extent in folds[0].loops)
    total = const(1)
    for _, extent in loops:
        total = total * extent
    facts = writer.facts.at_element([n for n, _ in loops], [e for _, e in loops])
    flat = Flat(loops, total, facts.with_ranges({FLAT: (0, total - 1)}))
    bound = {**writer.bound, **flat.at(sym(FLAT))}
    if len(loops) > 1 and all(_is_flat(writer, flat, bound, s.value) for s in folds):
        return flat
    return None


def _is_flat(writer: ValueWriter, flat: Flat, bound: dict[str, Expr], value: Value) -> bool:
    """Whether loads alone depend on the loops, each at a place linear in that of the one."""
    own = {name for name, _ in flat.loops}
    if not own & symbols_of([value]):
        return True
    if not isinstance(value, Load):
        return not isinstance(value, Index) and all(
            _is_flat(writer, flat, bound, part) for part in parts(value)
        )
    memory = writer.memory[value.buffer]
    others = (*value.guard, *(i for i in value.indices if not isinstance(i, Index)))
    if memory.space != "global" or own & symbols_of(others):
        return False
    place = flat.facts.replaced(writer.symbolic(memory, value.indices), bound)
    atoms = [atom for monomial, _ in place.terms for atom, _ in monomial]
    return all(FLAT not in a.symbols or a.kind == "sym" for a in atoms)
