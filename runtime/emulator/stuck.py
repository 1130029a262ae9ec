"""Why a launch cannot go on: where threads stand, and what each of them waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import Fault, Stop, shortened

if TYPE_CHECKING:
    from .groups import Group
    from .machine import Batch
    from .program import Step

_REASONS = {
    "mbarrier": "waits for a phase of an mbarrier that never completes",
    "cluster": "waits for threads of the cluster that never come",
    "registers": "waits for registers that no warp gives back",
    "wgmma": "waits for warps of the warpgroup that never come",
}


def stuck(batch: Batch) -> Fault:
    """The fault when no group can go on: why the first one waits."""
    groups = [(g, step, _reason(g, step)) for g, step, _ in batch.waiting.values()]
    g, step, why = (groups or batch.barriers.why())[0]
    kind = "deadlock"
    if not why and "barrier" in step.match.form.meaning:
        kind, why = "barrier", "waits for a barrier that other threads of the warp do not reach"
    why = why or "waits for lanes of its mask that never come"
    return batch.machine.fault(Stop(kind, why, int(g.threads()[0])), step, batch, g)


def places(batch: Batch, told: str = "", most: int = 5) -> str:
    """Where threads stand and why, in words: what most of them wait at first.

    `told` is the reason that the reader knows already.
    """
    groups = [(g, "") for g in batch.ready.values()]
    groups += [(g, _reason(g, step)) for g, step, _ in batch.waiting.values()]
    groups += [(g, why) for g, _, why in batch.barriers.why()]
    found = []
    for g, why in sorted(groups, key=lambda entry: -entry[0].n):
        steps = g.frame.code.steps
        if g.pc < len(steps):
            block, thread = batch.position(int(g.threads()[0]))
            line, x = steps[g.pc].instruction.line, shortened(str(steps[g.pc]))
            who = f"block {block} thread {thread}" + " and others" * (g.n > 1)
            reason = f": {why}" if why not in ("", told) else ""
            found.append(f"{g.n} at line {line} `{x}` ({who}{reason})")
    more = f", and {len(found) - most} groups more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _reason(g: Group, step: Step) -> str:
    """What a group that cannot go on waits for; empty where it is lanes of a warp."""
    explain = g.batch.state.get("why", {}).get(id(step))
    if explain is not None:
        return str(explain(g))
    return _REASONS.get(step.match.form.meaning.split(".")[0], "")
