"""How values pass through several occurrences of a stretch of statements."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TypeAlias

from stagefuse.dsl.dims import Expr, sym
from stagefuse.dsl.types import TensorType

from .program import Apply, Compute, Loop, Statement, Value, read_by
from .terms import Term

Place: TypeAlias = tuple[int, int]
"""A statement of the stretch, and the number of an operand or result."""
Group: TypeAlias = tuple[list[Place], list[str]]
"""Operands that are weights, and for each occurrence the path that they are below."""
Path: TypeAlias = tuple[str, ...]
MOST_SCOPES = 7
"""Parameters that scopes of weights may take."""


class Uses:
    """Where each value of a body is made, `made`, and where it is read last."""

    def __init__(self, body: list[Statement], results: Sequence[Value]) -> None:
        self.body = body
        self.made = {v: (n, r) for n, s in enumerate(body) for r, v in enumerate(s.gives)}
        self._last = {value: number for number, value in read_by(body)}
        self._last.update(dict.fromkeys(results, len(body)))

    def last(self, value: Value) -> int:
        """The last statement that reads a value; the number of all if it is a result, or -1."""
        return self._last.get(value, -1)


class Flow:
    """The stretches of one length that begin at `starts`.

    `slots` are all operands, `outs` the results that something outside reads.
    """

    def __init__(self, uses: Uses, starts: list[int], length: int) -> None:
        self.uses, self.body, self.starts, self.length = uses, uses.body, starts, length
        self.outs = sorted({
            (t, r)
            for s in starts
            for t in range(length)
            for r, v in enumerate(self.body[s + t].gives)
            if uses.last(v) >= s + length
        })  # fmt: skip
        first = self.body[starts[0] : starts[0] + length]
        self.slots = [(t, j) for t, s in enumerate(first) for j in range(len(s.reads))]

    def place(self, k: int, value: Value) -> Place | None:
        """The result of an occurrence that a value is, if it is one."""
        number, r = self.uses.made.get(value, (-1, 0))
        t = number - self.starts[k]
        return (t, r) if 0 <= t < self.length else None

    def _places(self, slot: Place) -> list[Place | None]:
        """Which result of its own occurrence a slot reads, in each."""
        return [self.place(k, self.read(k, slot)) for k in range(len(self.starts))]

    def read(self, k: int, slot: Place) -> Value:
        return self.body[self.starts[k] + slot[0]].reads[slot[1]]

    def number(self, k: int, slot: Place) -> Value | Term:
        statement = self.body[self.starts[k] + slot[0]]
        assert isinstance(statement, Compute | Apply)
        return statement.numbers[slot[1]]

    def numbers(self, slot: Place) -> list[Value | Term]:
        return [self.number(k, slot) for k in range(len(self.starts))]

    def _is_consistent(self) -> bool:
        """Whether what is read inside is the same in every occurrence."""
        for slot in self.slots:
            places = self._places(slot)
            if any(p != places[0] for p in places):
                return False
        return not any(isinstance(self.body[self.starts[0] + t], Loop) for t in range(self.length))

    def _outside(self) -> list[Place]:
        """The slots that read tensors made outside the stretch."""
        first = ((s, self.read(0, s)) for s in self.slots)
        return [s for s, v in first if v.path is None and self.place(0, v) is None]

    # Functions

    def is_function(self) -> bool:
        if not self._is_consistent() or not self.outs or self.types() is None:
            return False
        groups = self.scopes
        return groups is not None and all(
            len({self.read(k, members[0]).type for k in range(len(self.starts))}) == 1
            for members, bases in groups
            if self.is_tensor(members, bases)
        )

    def is_tensor(self, members: list[Place], bases: list[str]) -> bool:
        """Whether a group of weights is a single tensor, not a scope."""
        first = self.read(0, members[0])
        return len(members) == 1 and not first.is_scope and first.path == bases[0]

    def parameters(self) -> list[list[Place]]:
        """The slots that read each tensor that must be handed over."""
        return self._alike(self._outside())

    def _alike(self, slots: Sequence[Place]) -> list[list[Place]]:
        """Slots that read the same tensor as others in every occurrence, together."""
        found: dict[tuple[int, ...], list[Place]] = {}
        for slot in slots:
            key = tuple(id(self.read(k, slot)) for k in range(len(self.starts)))
            found.setdefault(key, []).append(slot)
        return list(found.values())

    def types(self) -> list[TensorType] | None:
        """Types of the parameters that fit all occurrences; None if there are none.

        A size that differs, or is computed, gets a name.
        """
        names: dict[tuple[Expr, ...], Expr] = {}
        found, plain, named = [], set(), self._sizes()
        for slot, *_ in self.parameters():
            types = [self.read(k, slot).type for k in range(len(self.starts))]
            first = types[0]
            if first is None or any(
                t is None or t.dtype != first.dtype or t.rank != first.rank for t in types
            ):
                return None
            shape = []
            for axis in range(first.rank):
                sizes = tuple(t.shape[axis] for t in types if t is not None)
                same = all(s == sizes[0] for s in sizes)
                if same and (sizes[0].as_int() is not None or sizes[0].as_symbol() in named):
                    plain |= {sizes[0].as_symbol()}
                    shape.append(sizes[0])
                else:
                    if sizes not in names:
                        taken = [*named, *map(str, names.values())]
                        names[sizes] = _axis_name(first.rank, axis, taken)
                    shape.append(names[sizes])
            found.append(TensorType(first.dtype, tuple(shape)))
        return found if named <= plain else None

    def _sizes(self) -> set[str]:
        """The sizes that the stretch names itself."""
        found = set[str]()
        for t in range(self.length):
            statement = self.body[self.starts[0] + t]
            if isinstance(statement, Compute):
                found.update(*(a.sizes for a in statement.term.args))
                if statement.term.kind == "block":
                    found.add("?")
        return found

    # Loops

    def is_loop(self) -> bool:
        """Whether each turn reads of the turns before only what the one directly before leaves."""
        begin = self.starts[0]
        if not self.outs or any(
            isinstance(s, Loop) for s in self.body[begin : begin + self.length]
        ):
            return False
        last = len(self.starts) - 1
        for k in range(last):
            own = self.body[self.starts[k] : self.starts[k] + self.length]
            end = self.starts[k] + 2 * self.length
            if any(self.uses.last(v) >= end for s in own for v in s.gives):
                return False
        for slot in self.slots:
            places = self._places(slot)
            if any(p != places[0] for p in places):
                return False
        for slot in self._outside():
            before = [self.place(k, self.read(k + 1, slot)) for k in range(last)]
            if any(b is not None for b in before) and any(b != before[0] for b in before):
                return False
        for slots, _ in self.carried():
            if len({id(self.read(0, s)) for s in slots}) > 1:
                return False
        return True

    def carried(self) -> list[tuple[list[Place], Place]]:
        """What a turn leaves for the next, with the slots that read it."""
        found: dict[Place, list[Place]] = {}
        for slot in self._outside():
            out = self.place(0, self.read(1, slot))
            if out is not None:
                found.setdefault(out, []).append(slot)
        return [(slots, out) for out, slots in found.items()]

    def _from_outside(self) -> list[Place]:
        moved = {s for slots, _ in self.carried() for s in slots}
        return [s for s in self._outside() if s not in moved]

    def invariant(self) -> list[Place]:
        return [s for s in self._from_outside()
                if len({id(self.read(k, s)) for k in range(len(self.starts))}) == 1]  # fmt: skip

    def loop_items(self) -> list[list[Place]]:
        """The slots that read each tensor that differs from turn to turn."""
        same = set(self.invariant())
        return self._alike([s for s in self._from_outside() if s not in same])

    # Weights and numbers

    @cached_property
    def scopes(self) -> list[Group] | None:
        """The slots that read weights, grouped under paths that differ: one list of paths each.

        None if there is no such grouping, or it has more than `MOST_SCOPES` groups.
        """
        groups: list[tuple[list[Place], list[Path]]] = []
        turns = range(len(self.starts))
        for slot in self.slots:
            if self.read(0, slot).path is None:
                continue
            values = [self.read(k, slot) for k in turns]
            if any(v.base is not None or v.path is None for v in values):
                return None
            paths = [_parts(v.path or "") for v in values]
            if all(p == paths[0] for p in paths):
                continue
            for members, bases in groups:
                common = [_common(b, p) for b, p in zip(bases, paths, strict=True)]
                if not all(common):
                    continue
                asked = [slot] if common == bases else [*members, slot]
                if self._fits(asked, common):
                    members.append(slot)
                    bases[:] = common
                    break
            else:
                groups.append(([slot], paths))
                if len(groups) > MOST_SCOPES:
                    return None
        return [(members, [".".join(b) for b in bases]) for members, bases in groups]

    def _fits(self, members: Sequence[Place], bases: Sequence[Path]) -> bool:
        """Whether each slot reads the same below the bases in all occurrences."""
        for slot in members:
            first = _parts(self.read(0, slot).path or "")[len(bases[0]) :]
            for k, base in enumerate(bases):
                if _parts(self.read(k, slot).path or "")[len(base) :] != first:
                    return False
        return True

    def varying_numbers(self) -> list[Place]:
        """The numbers that are not the same in all occurrences."""
        found = []
        for t in range(self.length):
            first = self.body[self.starts[0] + t]
            if isinstance(first, Compute | Apply):
                for j, number in enumerate(first.numbers):
                    others = [self.number(k, (t, j)) for k in range(len(self.starts))]
                    if any(o is not number for o in others):
                        found.append((t, j))
        return found


_AXES = {1: "D", 2: "BD", 3: "BTD", 4: "BCHW"}


def _axis_name(rank: int, axis: int, taken: Sequence[str]) -> Expr:
    """A name for a size, by the place of its axis."""
    stem = _AXES[rank][axis] if rank in _AXES else "D"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}{number}", number + 1
    return sym(name)


@lru_cache(maxsize=1 << 16)
def _parts(path: str) -> Path:
    return tuple(path.split("."))


def _common(a: Path, b: Path) -> Path:
    """What two paths begin with."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return a if count == len(a) else a[:count]
