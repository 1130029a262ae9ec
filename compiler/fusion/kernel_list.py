"""Kernels in an order, found by the nodes that they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from stagefuse.compiler.graph import Ref

from .groups import Group


class KernelList:
    """Kernels in order. What a kernel in it computes does not change."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.listed: list[Group] = []
        self.present: set[Group] = set()
        self.computing: dict[int, set[Group]] = {}  # by member
        self.holding: dict[Ref, set[Group]] = {}  # by the value that a root holds in its place
        for group in groups:
            self._insert(len(self.listed), group)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.listed)

    def reading(self, ref: Ref, users: Iterable[int]) -> Iterator[Group]:
        """The kernels that compute one of the users of a value, or have a root hold it; in no
        order, and some several times."""
        yield from self.holding.get(ref, ())
        for user in users:
            yield from self.computing.get(user, ())

    def replace(self, old: Sequence[Group], *new: Group) -> None:
        """Puts kernels in the place of the last of several."""
        place = 1 + max(map(self.listed.index, old))
        for group in new:
            self._insert(place, group)
            place += 1
        for group in dict.fromkeys(old):
            self.listed.remove(group)
            self.present.discard(group)
            for member in group.members:
                self.computing[member].discard(group)
            for ref, _ in group.placed.values():
                self.holding[ref].discard(group)

    def insert(self, group: Group, reader: Group) -> None:
        """Puts a kernel before one that reads what it makes."""
        self._insert(self.listed.index(reader), group)

    def _insert(self, place: int, group: Group) -> None:
        self.listed.insert(place, group)
        self.present.add(group)
        for member in group.members:
            self.computing.setdefault(member, set()).add(group)
        for ref, _ in group.placed.values():
            self.holding.setdefault(ref, set()).add(group)
