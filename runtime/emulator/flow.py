"""Where the steps of a function may go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagefuse.compiler.ptx import syntax as s

from .program import Code, Scope

ENDS = ("control.ret", "control.exit", "control.trap")
"""Meanings of instructions behind which a function does not go on."""


def following(code: Code, scopes: Sequence[Scope], at: int) -> Iterator[int]:
    """The steps that may come next behind one; `scopes` are those of all steps."""
    step = code.steps[at]
    meaning, goes_on = step.match.form.meaning, step.instruction.guard is not None
    if meaning == "control.bra":
        (target,) = step.instruction.operands
        to = scopes[at].label(target.name) if isinstance(target, s.Symbol) else None
        if to is not None:
            yield to
    elif meaning == "control.brx":
        yield from code.labels
    elif meaning not in ENDS:
        goes_on = True
    if goes_on and at + 1 < len(code.steps):
        yield at + 1


def block_starts(code: Code) -> list[int]:
    """The first steps of parts without branches, in order."""
    leaders = {0, *code.labels}
    for at, step in enumerate(code.steps):
        if step.match.form.meaning.startswith("control."):
            leaders.add(at + 1)
    return sorted(at for at in leaders if at < len(code.steps))
