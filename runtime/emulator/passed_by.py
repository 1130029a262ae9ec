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
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s

from .errors import Stop
from .flow import block_starts, following
from .program import Code, Program, Scope, Step

if TYPE_CHECKING:
    from .machine import Batch, Group, Machine

Array = NDArray[Any]
_STATE = "passed by"
_WORD = 64
"""Bits of a word of what is noted."""


def note_steps_behind(program: Program, code: Code, scopes: Sequence[Scope]) -> None:
    """Lets steps of a kernel that are behind a barrier note which threads came there.

    Barriers between which no branch is are passed by together, and have one number.
    """
    names = _with_barriers(program)
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
        _note(code.steps[at], mask, len(numbers))


def passed_by(batch: Batch, g: Group) -> Array | None:
    """Which threads of a batch ended and passed by where a group waits; `None` for none."""
    noted = batch.state.get(_STATE)
    if noted is None:
        return None
    code, at = (g.stack[0][0].code, g.stack[0][1]) if g.stack else (g.frame.code, g.pc)
    number = code.barrier_sites.get(at)
    if number is None:
        return None
    word, bit = divmod(number, _WORD)
    found: Array = (noted[word] >> np.uint64(bit) & np.uint64(1) != 0) & ~batch.alive
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


def _note(step: Step, mask: int, numbers: int) -> None:
    """Lets a step note that its threads came to it, for the barriers of a mask."""
    words = [(n // _WORD, np.uint64(mask >> n & (1 << _WORD) - 1))
             for n in range(0, numbers, _WORD)]  # fmt: skip

    def note(g: Group) -> None:
        noted = g.batch.state.get(_STATE)
        if noted is None:
            noted = np.zeros((len(words), g.batch.threads), np.uint64)
            g.batch.state[_STATE] = noted
        for word, bits in words:
            if bits:
                noted[word, slice(None) if g.sel is None else g.sel] |= bits

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
