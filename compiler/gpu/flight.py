"""What a thread of a kernel has under way and issues, read from its PTX.

Bytes that are under way decide how much of a device's bandwidth loads can have (Little's law), and
instructions how long a round of resident blocks is busy beside waiting for them. Both are limits on
one side: of several versions for different sizes the one with most bytes and the instructions of
the first count, and the body of a loop once if the sizes do not say how often it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stagefuse.dsl.dims import Expr, const
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
    one; 0 where copies bring operands. `instructions`: those that it issues at least, by sizes."""

    ahead: int
    instructions: Expr


def flight_of(text: str, loops: Mapping[str, Expr]) -> Flight:
    """Of the PTX of an entry; `loops`: how often those whose head has a label run, if known."""
    copies = "cp.async" in text or "mma." in text or "mma_async" in text
    return Flight(0 if copies else _ahead(text), _instructions(text, loops))


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


def _instructions(text: str, loops: Mapping[str, Expr]) -> Expr:
    """Along the shortest way forward on which lanes have work and rows are as in the first version,
    as often as the loops around them run."""
    turns = list(_TURN.finditer(text))
    places = {turn[1]: n for n, turn in enumerate(turns) if turn[1]}
    counts = _counts(text, turns)
    after = [0] * (len(turns) + 1)  # instructions from before a turn on
    following: list[int | None] = [None] * len(turns)  # the turn after which it goes on
    for n in range(len(turns) - 1, -1, -1):
        ways = [(counts[at + 1] + after[at + 1], at) for at in _behind(turns[n], n, places)]
        after[n], following[n] = min(ways, default=(0, None))
    around = _around(turns, places, loops)
    total = const(counts[0])
    at = following[0] if turns else None
    while at is not None:
        total = total + around[at] * counts[at + 1]
        at = following[at + 1] if at + 1 < len(turns) else None
    return total


def _counts(text: str, turns: Sequence[re.Match[str]]) -> list[int]:
    """Instructions before the first turn, and after each one."""
    starts = [text.find("{\n"), *(turn.end() for turn in turns)]
    ends = [*(turn.end() for turn in turns), len(text)]
    return [_count(text, start, end) for start, end in zip(starts, ends, strict=True)]


def _around(
    turns: Sequence[re.Match[str]], places: Mapping[str, int], loops: Mapping[str, Expr]
) -> list[Expr]:
    """How often what follows each turn runs: a loop goes from its head to the last turn back."""
    last = {turn[3]: n for n, turn in enumerate(turns) if turn[3] in loops}
    around = [const(1)] * len(turns)
    for head, end in last.items():
        for n in range(places[head], end):
            around[n] = around[n] * loops[head]
    return around


def _behind(turn: re.Match[str], number: int, places: Mapping[str, int]) -> Sequence[int]:
    """The turns, this one or a label, after which the ways that count go on."""
    _, predicate, label = turn.groups()
    if label is None:
        return (number,) if turn[1] else ()
    target = places.get(label, 0)
    if target <= number:
        return (number,)
    if not predicate:
        return (target,)
    if label.startswith(("$end", "$long")):  # of a loop, or no work; of rows that are longer
        return (number,)
    return number, target


def _count(text: str, start: int, end: int) -> int:
    start = max(start - 1, 0)  # the line break before
    lines = text.count("\n\t", start, end)
    lines -= text.count("\n\t.", start, end) + text.count("\n\t//", start, end)
    return lines + sum(n * text.count(name, start, end) for name, n in _DIVISIONS.items())
