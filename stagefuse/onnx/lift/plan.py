"""What is written where it is read and what gets a line of its own, and how long values live."""

from __future__ import annotations

from collections.abc import Sequence

from .program import Apply, Compute, Loop, Statement, Value, own_size

WIDTH = 96
INLINE = 44
"""Characters of an operand that needs no name of its own."""
LINKS = 7
"""Links of a chain of `|>`."""


class Plan:
    """What is written where it is read, and how long values are needed."""

    def __init__(self, body: Sequence[Statement], results: Sequence[Value],
                 wanted: dict[Value, str]) -> None:  # fmt: skip
        self.wanted, self.end = wanted, len(body)
        self.reserved = set(wanted.values())
        self.made = {v: n for n, s in enumerate(body) for v in s.gives}
        readers: dict[Value, list[int]] = {}
        for n, statement in enumerate(body):
            for value in statement.reads:
                readers.setdefault(value, []).append(n)
        self.inline: set[Value] = set()
        self._sizes: dict[Value, int] = {}
        self._links: dict[Value, int] = {}
        kept = set(results) | set(wanted)
        kept |= {v for s in body if isinstance(s, Compute) for v in _bound_operands(s)}
        for statement in body:
            (value, *more) = statement.gives
            uses = readers.get(value, [])
            if not more and len(uses) == 1 and value not in kept:
                self._place(statement, body[uses[0]])
        self.last = self._ends(body, readers, results)

    def _place(self, statement: Statement, reader: Statement) -> None:
        """Have the value of a statement written where its only reader reads it, if that stays
        short: as an operand, or as a link of a chain."""
        if isinstance(statement, Loop) or isinstance(reader, Loop) or _is_stiff(statement):
            return
        if isinstance(reader, Compute) and reader.term.kind == "block":
            return
        (value,) = statement.gives
        is_first = reader.reads[0] is value
        linked = is_first and is_link(reader) and is_link(statement)
        chained = statement.reads and statement.reads[0] in self.inline and linked
        self._links[value] = 1 + (self._links[statement.reads[0]] if chained else 0)
        if self._links[value] >= LINKS:
            return
        size = _size(statement, self._sizes, self.inline)
        if size > (3 * WIDTH if linked else INLINE):
            return
        whole = _size(reader, {**self._sizes, value: size}, self.inline | {value})
        if linked or whole <= WIDTH - 12:
            self.inline.add(value)
            self._sizes[value] = size

    def _ends(self, body: Sequence[Statement], readers: dict[Value, list[int]],
              results: Sequence[Value]) -> dict[Value, int]:  # fmt: skip
        """The statement that needs a value last, where inlined ones count where they stand."""
        place: dict[int, int] = {}
        for n in range(len(body) - 1, -1, -1):
            value = body[n].gives[0]
            if value in self.inline:
                reader = readers[value][0]
                place[n] = place.get(reader, reader)
        last = {v: max(place.get(n, n) for n in ns) for v, ns in readers.items()}
        last.update({v: len(body) for v in results})
        return last


def _bound_operands(statement: Compute) -> list[Value]:
    """Operands that index notation reads by name."""
    if statement.term.kind not in ("index", "reduce"):
        return []
    return [v for v in statement.reads if v.path is None]


def _is_stiff(statement: Statement) -> bool:
    """Whether a statement is always a line: definitions and blocks."""
    return isinstance(statement, Compute) and statement.term.kind in ("index", "block", "reduce")


def is_link(statement: Statement) -> bool:
    """Whether a statement is a call that may be written with `|>` on its first operand."""
    if isinstance(statement, Apply):
        return bool(statement.reads) and statement.reads[0].path is None
    if not isinstance(statement, Compute) or statement.term.kind != "call":
        return False
    args = statement.term.args
    return bool(args) and args[0].is_operand and args[0].kind not in ("weight", "scope")


def _size(statement: Statement, sizes: dict[Value, int], inline: set[Value]) -> int:
    """About how many characters the text of a statement has."""
    total = 0
    for value in statement.reads:
        own = len(value.path) + 4 if value.path is not None else 5
        total += sizes.get(value, 5) if value in inline else own
    if isinstance(statement, Compute):
        return total + own_size(statement.term)
    return total + statement.cost // 2
