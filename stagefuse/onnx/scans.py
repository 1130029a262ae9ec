"""`Loop` and `Scan` as a `scan` of the language: their body once, for any number of turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .errors import Refused
from .node import Val
from .text import size_text

if TYPE_CHECKING:
    from .translate import Translator

Inputs = Callable[[str, list[Val]], Sequence[Val | None]]
"""The inputs of the body, given the name of the turn and what is carried."""
Turn = Callable[[Sequence[Val | None]], Sequence[Val | None]]
"""The results of the body for its inputs."""


@frozen
class Steps:
    """A body to be run `count` times, from the values `states`; `hints` name them and what is
    gathered. The first `skipped` results of the body are neither."""

    body: Turn
    count: Expr
    states: Sequence[Val]
    hints: Sequence[str]
    inputs: Inputs
    skipped: int = 0
    backward: Sequence[int] = ()


def write(owner: Translator, steps: Steps) -> tuple[list[Val], list[Val]]:
    """What is carried last and what is gathered, after a line that is a scan.

    Raises Refused if the body is none, such as one that changes the shape of what it carries.
    """
    outer, names = owner.body, owner.names
    turn = names.value("turn")
    carried = [
        Val(names.value(h), s.type, None, s.depends)
        for h, s in zip(steps.hints, steps.states, strict=False)
    ]
    owner.body = outer.within(turn, steps.count, {c.text: c.type for c in carried})
    try:
        found = _results(owner, steps, steps.inputs(turn, carried))
        texts = [owner.materialize(v) for v in found]
        lines = [line.text for line in owner.body.lines]
    finally:
        owner.body = outer
    count = len(carried)
    moving = [k for k in range(count) if texts[k] != carried[k].text]
    starts: list[str] = []
    for k, state in enumerate(steps.states):
        if k in moving:
            starts.append(f"{carried[k].text} = {owner.materialize(state)}")
        else:
            outer.add(f"{carried[k].text} = {owner.materialize(state)}")
    gathered = [names.value(h) for h in steps.hints[count:]]
    for k, name in enumerate(gathered):
        back = k < len(steps.backward) and steps.backward[k]
        at = size_text(steps.count - 1 - sym(turn)) if back else turn
        lines = [*lines, f"{name}[{at}] = {texts[count + k]}"]
    # what is gathered may be what was carried into the turn, so that is bound again last
    if moving:
        lines = [*lines, f"{', '.join(carried[k].text for k in moving)} = "
                         f"{', '.join(texts[k] for k in moving)}"]  # fmt: skip
    if lines:
        head = f"scan {turn} in 0..{size_text(steps.count)}"
        head += f" with {', '.join(starts)}:" if starts else ":"
        outer.add("\n".join([head, *(f"    {part}" for x in lines for part in x.split("\n"))]))
    depends = frozenset[str]().union(*(v.depends for v in (*steps.states, *found)))
    made = [Val(n, outer.tensor(n), None, depends) for n in (*(c.text for c in carried), *gathered)]
    return made[:count], made[count:]


def _results(owner: Translator, steps: Steps, inputs: Sequence[Val | None]) -> list[Val]:
    """The results of the body at a turn, but for those skipped. Raises Refused."""
    before = len(owner.problems)
    found = steps.body(inputs)
    problems = owner.problems[before:]
    del owner.problems[before:]
    if problems:
        first = problems[0]
        raise Refused(f"{first.message} (in its node {first.op})", first.need,
                      first.attribute, first.inputs)  # fmt: skip
    for value in found[: steps.skipped]:
        if value is None or value.known is None or not bool(value.known.reshape(-1)[0]):
            raise Refused("a loop whose end depends on data", "a number of turns that is known",
                          inputs=sorted(value.depends) if value is not None else ())  # fmt: skip
    kept = [v for v in found[steps.skipped :] if v is not None]
    if len(kept) != len(found) - steps.skipped:
        raise Refused("a result of a loop's body is missing")
    return kept


def count_of(value: Val) -> Expr | None:
    """A known number of turns: a number, or a size."""
    if value.known is None:
        return None
    number = value.known.reshape(-1)[0]
    return number if isinstance(number, Expr) else const(max(int(number), 0))
