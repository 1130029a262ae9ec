"""Threads that end without coming to where others wait for them.

As threads end, barriers for all threads that only wait for these open (PTX ISA, `exit`), and so do
shuffles and votes that name them in their mask ("all non-exited threads"). So a thread may return
before a barrier. A thread that leaves a barrier out and goes on with what stands *behind* it is
another thing: the barrier is in a branch or a loop that threads take differently, which CUDA C++
leaves undefined ("__syncthreads() is allowed in conditional code but only if the conditional
evaluates identically across the entire thread block"; of a mask, "all non-exited threads named in
mask must execute the same intrinsic").

What tells them apart is the kernel's flow. Steps that a barrier may be followed by and that do not
lead to it again are *behind* it; who was at one of them and is missed at the barrier passed it by.
Branches and returns do not count: compilers give a kernel one `ret` for all that return.

So it is within each function that is called, for what its threads do until they return: a thread
that went on there and one that waits there must be in a call of one number from one place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s

from .errors import Stop
from .flow import block_starts, following
from .program import Code, Program, Scope, Step

if TYPE_CHECKING:
    from .groups import Call, Frame
    from .machine import Batch, Group, Machine

Array = NDArray[Any]
_STATE = "passed by"
_WORD = 64
"""Bits of a word of what is noted."""


def note_steps_behind(program: Program, code: Code, scopes: Sequence[Scope]) -> None:
    """Lets steps of a function that are behind a barrier note which threads came there.

    Barriers between which no branch is are passed by together, and have one number.
    """
    names = _that_wait(program)
    sites = [at for at, step in enumerate(code.steps)
             if _waits_for_all(step) or _has_mask(step) or _calls(step, names)]  # fmt: skip
    if not sites:
        return
    starts = block_starts(code)
    ends = [*starts[1:], len(code.steps)]
    after = {a: tuple(following(code, scopes, b - 1)) for a, b in zip(starts, ends, strict=True)}
    before: dict[int, list[int]] = {a: [] for a in starts}
    for a, following_blocks in after.items():
        for b in following_blocks:
            before[b].append(a)
    does = {a: _first_that_does(code, a, b) for a, b in zip(starts, ends, strict=True)}
    numbers: dict[int, int] = {}
    """Of each part without branches that has barriers."""
    for site in sites:
        block = starts[bisect_right(starts, site) - 1]
        code.barrier_sites[site] = numbers.setdefault(block, len(numbers))
    marks: dict[int, int] = {}
    for block, number in numbers.items():
        behind = _reached(after, block) - _reached(before, block) - {block}
        doing = {a for a in behind if does[a] is not None}
        for a in doing:
            if not doing.issuperset(before[a]):
                marks[a] = marks.get(a, 0) | 1 << number
    for a, mask in marks.items():
        at = does[a]
        assert at is not None
        _note(code.steps[at], mask)


@dataclass
class _Noted:
    """What is known of the calls of a function from one place, for each thread."""

    behind: Array
    """Of its last call, bits of the sites that it was behind: `[words][threads]`."""
    calls: Array
    """How many there were."""

    @classmethod
    def of(cls, batch: Batch, frame: Frame, callers: tuple[Call, ...]) -> _Noted:
        """What is noted of a frame with these callers."""
        known: dict[tuple[Any, ...], _Noted] = batch.state.setdefault(_STATE, {})
        key = (frame, *((caller, pc) for caller, pc, _ in callers))
        if key not in known:
            words = max(frame.code.barrier_sites.values(), default=0) // _WORD + 1
            known[key] = cls(
                np.zeros((words, batch.threads), np.uint64), np.zeros(batch.threads, np.int64)
            )
        return known[key]


def called(g: Group) -> None:
    """A group has come into a function: what it did in calls before counts no longer."""
    if g.frame.code.barrier_sites:
        noted, sel = _Noted.of(g.batch, g.frame, g.stack), slice(None) if g.sel is None else g.sel
        noted.behind[:, sel] = 0
        noted.calls[sel] += 1


def passed_by(batch: Batch, g: Group) -> Array | None:
    """Which threads of a batch ended and passed by where a group waits; `None` for none."""
    found: Array | None = None
    here = [*((frame, pc) for frame, pc, _ in g.stack), (g.frame, g.pc)]
    for depth, (frame, pc) in enumerate(here):
        number = frame.code.barrier_sites.get(pc)
        if number is None:
            continue
        noted, threads = _Noted.of(batch, frame, g.stack[:depth]), g.threads()
        word, bit = divmod(number, _WORD)
        passed = (noted.behind[word] >> np.uint64(bit) & np.uint64(1) != 0) & ~batch.alive
        if depth:
            calls = np.zeros(batch.blocks, np.int64)
            calls[batch.block_of[threads]] = noted.calls[threads]
            passed &= noted.calls == calls[batch.block_of]
        found = passed if found is None else found | passed
    return found


def check_named(batch: Batch, g: Group, masks: Array) -> None:
    """Raises: Stop where masks name lanes that passed this by and ended."""
    passed = passed_by(batch, g)
    if passed is None or not passed.any():
        return
    lanes = np.packbits(passed.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0]
    missed = lanes[g.threads() // 32] & masks.astype(np.uint32)
    if missed.any():
        at = int(np.flatnonzero(missed)[0])
        lane = int(missed[at]).bit_length() - 1
        raise Stop("barrier", f"its mask names lane {lane}, which went on behind it without and "
                   "ended", int(g.threads()[at]))  # fmt: skip


def _has_mask(step: Step) -> bool:
    """Whether a step waits for lanes of a warp that it names."""
    form = step.match.form
    return form.meaning == "barrier.warp" or "converge" in form.effects and any(
        spec.name == "m" for spec in form.specs
    )


def _waits_for_all(step: Step) -> bool:
    """Whether a step is a barrier for which no number of threads is given."""
    operands = {"barrier.sync": 1, "barrier.red": 3}.get(step.match.form.meaning)
    return len(step.instruction.operands) == operands


def _that_wait(program: Program) -> set[str]:
    """Names of functions that wait for threads of the block or a warp, or use some that do."""
    if program.that_wait is None:
        codes = program.codes
        found = {name for name, code in codes.items()
                 if any(_waits_for_all(x) or _has_mask(x) for x in code.steps)}  # fmt: skip
        size = -1
        while found and size != len(found):
            size = len(found)
            found |= {name for name, code in codes.items() if not found.isdisjoint(code.mentions)}
        program.that_wait = found
    return program.that_wait


def _calls(step: Step, names: set[str]) -> bool:
    """Whether a step calls one of some functions, or one that is not known."""
    if step.match.form.meaning != "control.call":
        return False
    target = next(x for x in step.instruction.operands if isinstance(x, s.Symbol | s.Register))
    return bool(names) if isinstance(target, s.Register) else target.name in names


def _first_that_does(code: Code, first: int, last: int) -> int | None:
    """The first of some steps that is no branch, return or end."""
    steps = range(first, last)
    return next((at for at in steps if not _only_moves(code.steps[at])), None)


def _only_moves(step: Step) -> bool:
    meaning = step.match.form.meaning
    return meaning.startswith("control.") and meaning != "control.call"


def _reached(edges: Mapping[int, Iterable[int]], start: int) -> set[int]:
    """All that edges lead to from a start, and the start only if they lead back to it."""
    found: set[int] = set()
    waiting = list(edges[start])
    while waiting:
        at = waiting.pop()
        if at not in found:
            found.add(at)
            waiting.extend(edges[at])
    return found


def _note(step: Step, mask: int) -> None:
    """Lets a step note that its threads came to it, for the barriers of a mask."""
    words = [(at, np.uint64(bits)) for at in range(-(-mask.bit_length() // _WORD))
             if (bits := mask >> at * _WORD & (1 << _WORD) - 1)]  # fmt: skip

    def note(g: Group) -> None:
        noted = _Noted.of(g.batch, g.frame, g.stack)
        for word, bits in words:
            noted.behind[word, slice(None) if g.sel is None else g.sel] |= bits

    if step.run is not None:
        step.run = _then(note, step.run)
    elif step.control is not None:
        control = step.control

        def noting(machine: Machine, g: Group, step: Step) -> bool:
            note(g)
            return control(machine, g, step)

        step.control = noting


def _then(first: Callable[[Group], None], second: Callable[[Group], None]) -> Any:
    def both(g: Group) -> None:
        first(g)
        second(g)

    return both
