"""What a thread of a kernel has under way and issues, read from its PTX.

Bytes that are under way decide how much of a device's bandwidth loads can have (Little's law), and
instructions how long a round of resident blocks is busy beside waiting for them. Both are limits on
one side: of several versions for different sizes the one with most bytes and the instructions of
the first count, and the body of a loop once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from stagefuse.dsl.frozen import frozen

_EVENT = re.compile(
    r"^(?:\$\w+:|\t(@!?%p\d+ )?"
    r"(?:ld\.global\S*?(?:\.v(\d))?\.[a-z](\d+) |(st\.)|bra |shfl|bar\.|atom|vote|match))",
    re.MULTILINE,
)
_TURN = re.compile(r"^(?:(\$\w+):|\t(@!?%p\d+ )?bra (\$\w+);|\tret;)", re.MULTILINE)
_DIVISIONS = {"\tdiv.u32": 20, "\tdiv.u64": 60, "\tdiv.rn.f32": 12}
"""Instructions of SASS that these are, by nvdisasm; of others one is one."""


@frozen
class Flight:
    """`ahead`: bytes of global memory that a thread has loads under way for, before it waits for
    one; 0 where copies bring operands. `instructions`: those that it issues at least."""

    ahead: int
    instructions: int


def flight_of(text: str) -> Flight:
    """Of the PTX of an entry."""
    copies = "cp.async" in text or "mma." in text or "mma_async" in text
    return Flight(0 if copies else _ahead(text), _instructions(text))


def _ahead(text: str) -> int:
    """The most that is loaded between places at which lanes meet or branch. ptxas moves loads over
    stores to what they do not read, but not those that only some lanes do: it branches there."""
    most = ahead = 0
    stored = False
    for event in _EVENT.finditer(text):
        predicated, vector, bits, store = event.groups()
        if store:
            stored = True
            continue
        if not bits or (predicated and stored):
            most, ahead, stored = max(most, ahead), 0, False
        if bits:
            ahead += int(bits) // 8 * int(vector or 1)
    return max(most, ahead)


def _instructions(text: str) -> int:
    """Along the shortest way forward on which lanes have work, rows are as in the first version,
    and loops run once."""
    turns = list(_TURN.finditer(text))
    places = {turn[1]: n for n, turn in enumerate(turns) if turn[1]}
    after = [0] * (len(turns) + 1)  # instructions from behind a turn on
    for n in range(len(turns) - 1, -1, -1):
        end = turns[n + 1].end() if n + 1 < len(turns) else len(text)
        own = _count(text, turns[n].end(), end)
        after[n] = own + (_from(turns[n + 1], n + 1, places, after) if n + 1 < len(turns) else 0)
    first = turns[0].end() if turns else len(text)
    rest = _from(turns[0], 0, places, after) if turns else 0
    return _count(text, text.find("{\n"), first) + rest


def _from(turn: re.Match[str], number: int, places: Mapping[str, int], after: list[int]) -> int:
    """Instructions after a turn, of which those behind it are known."""
    _, predicate, label = turn.groups()
    if label is None:
        return after[number] if turn[1] else 0
    target = places.get(label, 0)
    if target <= number:
        return after[number]
    if not predicate:
        return after[target]
    if label.startswith(("$end", "$long")):  # of a loop, or no work; of rows that are longer
        return after[number]
    return min(after[number], after[target])


def _count(text: str, start: int, end: int) -> int:
    start = max(start - 1, 0)  # the line break before
    lines = text.count("\n\t", start, end)
    lines -= text.count("\n\t.", start, end) + text.count("\n\t//", start, end)
    return lines + sum(n * text.count(name, start, end) for name, n in _DIVISIONS.items())
