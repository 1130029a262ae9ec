"""Threads that end without coming to a barrier of their whole block.

As threads end, barriers for all threads that only wait for these open (PTX ISA, `exit`; from sm_70
on "bar.sync applies per thread and waits for all that have not ended"). So a thread may return
before a barrier. A thread that leaves a barrier out and goes on with what stands *behind* it is
another thing: the barrier is in a branch or a loop that threads of a block take differently, which
CUDA C++ leaves undefined ("__syncthreads() is allowed in conditional code but only if the
conditional evaluates identically across the entire thread block").

What tells them apart is the kernel's flow. Steps that a barrier may be followed by and that do not
lead to it again are *behind* it; who was at one of them and is missed at the barrier passed it by.
Branches and returns do not count: compilers give a kernel one `ret` for all that return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s

from .flow import block_starts, following
from .program import Code, Program, Scope, Step

if TYPE_CHECKING:
    from .machine import Batch, Group, Machine

Array = NDArray[Any]
MOST_SITES = 64
"""How many barriers of a kernel are told apart: there are few with more."""
_STATE = "passed by"


def note_steps_behind(program: Program, code: Code, scopes: Sequence[Scope]) -> None:
    """Lets steps of a kernel that are behind a barrier note which threads came there."""
    names = _with_barriers(program)
    if not names:
        return
    sites = [at for at, step in enumerate(code.steps)
             if _waits_for_all(step) or _calls(step, names)][:MOST_SITES]  # fmt: skip
    if not sites:
        return
    starts = block_starts(code, [at + 1 for at in sites])
    ends = [*starts[1:], len(code.steps)]
    after = {a: tuple(following(code, scopes, b - 1)) for a, b in zip(starts, ends, strict=True)}
    before: dict[int, list[int]] = {a: [] for a in starts}
    for a, following_blocks in after.items():
        for b in following_blocks:
            before[b].append(a)
    does = {a: _first_that_does(code, a, b) for a, b in zip(starts, ends, strict=True)}
    marks: dict[int, int] = {}
    for number, site in enumerate(sites):
        block = max(a for a in starts if a <= site)
        behind = _reached(after, block) - _reached(before, block) - {block}
        doing = {a for a in behind if does[a] is not None}
        for a in doing:
            if not doing.issuperset(before[a]):
                marks[a] = marks.get(a, 0) | 1 << number
    code.barrier_sites = {site: number for number, site in enumerate(sites)}
    for a, mask in marks.items():
        at = does[a]
        assert at is not None
        _note(code.steps[at], np.uint64(mask))


def passed_by(batch: Batch, g: Group) -> Array | None:
    """Which threads of a batch passed the barrier by that a group waits at; `None` for none."""
    noted = batch.state.get(_STATE)
    if noted is None:
        return None
    code, at = (g.stack[0][0].code, g.stack[0][1]) if g.stack else (g.frame.code, g.pc)
    number = code.barrier_sites.get(at)
    if number is None:
        return None
    found: Array = noted >> np.uint64(number) & np.uint64(1) != 0
    return found


def _waits_for_all(step: Step) -> bool:
    """Whether a step is a barrier for which no number of threads is given."""
    operands = {"barrier.sync": 1, "barrier.red": 3}.get(step.match.form.meaning)
    return len(step.instruction.operands) == operands


def _with_barriers(program: Program) -> set[str]:
    """Names of functions that wait for all threads of the block, or call some that do."""
    codes = program.codes
    found = {name for name, code in codes.items() if any(map(_waits_for_all, code.steps))}
    size = -1
    while found and size != len(found):
        size = len(found)
        found |= {name for name, code in codes.items() if not found.isdisjoint(code.mentions)}
    return found


def _calls(step: Step, names: set[str]) -> bool:
    if step.match.form.meaning != "control.call":
        return False
    return any(isinstance(x, s.Symbol) and x.name in names for x in step.instruction.operands)


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


def _note(step: Step, mask: np.uint64) -> None:
    """Lets a step note that its threads came to it, for the barriers of a mask."""

    def note(g: Group) -> None:
        noted = g.batch.state.get(_STATE)
        if noted is None:
            noted = g.batch.state[_STATE] = np.zeros(g.batch.threads, np.uint64)
        noted[slice(None) if g.sel is None else g.sel] |= mask

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
