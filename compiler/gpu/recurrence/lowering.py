"""Which recurrences become one kernel on a GPU, of which stages, and for which sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stagefuse.compiler.buffers import size_of
from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.draft import GPU_FORMS, SourceLowering
from stagefuse.compiler.gpu.emit import Entry
from stagefuse.compiler.gpu.reductions.split_reductions import whole
from stagefuse.compiler.gpu.sequences.split_scan import splits
from stagefuse.compiler.gpu.targets import SHARED_LIMIT
from stagefuse.compiler.gpu.teams import WARP
from stagefuse.compiler.graph import Graph, Recurrence, Ref
from stagefuse.compiler.kernel_ir import Buffer, Const, Index, Kernel, Store
from stagefuse.compiler.lower import Lowered, Sites, finish
from stagefuse.compiler.plan import GpuLaunchPlan
from stagefuse.compiler.report import work_of
from stagefuse.compiler.schedule import GPU
from stagefuse.dsl.dims import Expr, const, floordiv, minimum
from stagefuse.dsl.dtypes import DTYPES

from .dots import MOST_ROWS, DotLowering, dotted, lower_dots
from .resident import MOST_BLOCKS, ResidentWriter
from .stage import Stage, Unfit

FORMS = {**GPU_FORMS, "dots": lower_dots}
ROUNDS = 2
"""How often blocks may go round the work of a step. Where there is more, launches that fill the
device are better."""
TILES = "the products of a step are not sums of so few rows and so short that a warp takes them"
LONG = "a step reduces more elements, or scans longer rows, than one block should"
TOO_LARGE = "a step has work for more blocks than should wait for each other"


def regions(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups in order, those of one outermost recurrence together."""
    found: list[Group] = []
    for group in groups:
        if found and (not group.nest or group.nest[:1] != found[-1].nest[:1]):
            yield found
            found = []
        found.append(group)
        if not group.nest:
            yield found
            found = []
    if found:
        yield found


@dataclass(frozen=True, eq=False)
class Resident:
    """A recurrence as one kernel: its writer, the kernels in it, its buffers as the plan numbers
    them, and a factor of its grid that is 1 where it fits and 0 elsewhere."""

    writer: ResidentWriter
    lowered: tuple[Lowered, ...]
    nests: tuple[tuple[str, ...], ...]
    buffers: tuple[int, ...]
    holds: Expr

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same for recurrences that have the same kernel."""
        stages = [w.stage for w in self.writer.writers]
        return (
            tuple((s.kernel.name, s.buffers, s.nest) for s in stages),
            self.writer.dims,
            tuple((step, str(count)) for step, count in self.writer.counts.items()),
            *(str(s.facts.ranges.get(d)) for s in stages for d in s.kernel.dims),
            str(stages[0].facts.divisible),
        )

    def writes(self) -> tuple[int, ...]:
        return tuple(self.buffers[n] for n in sorted(self.writer.written))


def resident(
    graph: Graph, groups: Sequence[Group], sites: Sites, buffer_of: Callable[[Ref], int]
) -> Resident:
    """The kernels of a recurrence as one. Raises Unfit."""
    if any(group.kind == "update" for group in groups):
        raise Unfit("a step updates what a session keeps")
    if any(whole(graph, g) or g.kind == "scan" and splits(graph, g) is not None for g in groups):
        raise Unfit(LONG)
    few = dotted(graph, groups)
    if few is None:
        raise Unfit(TILES)
    own, rows = few
    holds = graph.facts.simplify(1 - minimum(floordiv(rows, MOST_ROWS + 1), const(1)))
    if holds == const(0):
        raise Unfit(TILES)
    return _resident(graph, own, sites, buffer_of, holds)


def _resident(
    graph: Graph,
    groups: Sequence[Group],
    sites: Sites,
    buffer_of: Callable[[Ref], int],
    share: Expr,
) -> Resident:
    """The kernels of a recurrence as one, at most for sizes at which `share` is 1. Raises Unfit."""
    lowerings = [_lowering(graph, group, sites) for group in groups]
    lowered = tuple(finish(low, FORMS) for low in lowerings)
    numbers: dict[int, int] = {}
    stages = []
    for low, one, group in zip(lowerings, lowered, groups, strict=True):
        own = [buffer_of(ref) for ref in one.values]
        places = tuple(numbers.setdefault(number, len(numbers)) for number in own)
        steady = group.kind == "dots"
        stages.append(Stage(one.kernel, low.sizes, low.lines, places, group.nest, steady))
    steps = {step for group in groups for step in group.nest}
    counts = {
        n.primitive.step: n.primitive.count
        for n in graph.nodes.values()
        if isinstance(n.primitive, Recurrence) and n.primitive.step in steps
    }
    dims = {d for s in stages for d in s.kernel.dims}
    dims |= {name for count in counts.values() for name in count.symbols()}
    writer = ResidentWriter(
        stages, counts, len(numbers), sorted(dims - steps), graph.facts, SHARED_LIMIT
    )
    work = writer.work()
    holds = const(1)
    if not writer.apart:
        holds = 1 - minimum(floordiv(work, ROUNDS * MOST_BLOCKS + 1), const(1))
    holds = graph.facts.simplify(holds * share)
    if holds == const(0):
        raise Unfit(TOO_LARGE)
    nests = tuple(group.nest for group in groups)
    return Resident(writer, lowered, nests, tuple(numbers), holds)


def _lowering(graph: Graph, group: Group, sites: Sites) -> SourceLowering:
    """A kernel of a step as every arch can have it, for all sizes."""
    schedule = replace(GPU, chunk=WARP * 4)  # a vector of f32 for each lane
    return (DotLowering if group.kind == "dots" else SourceLowering)(graph, group, sites, schedule)


def start_kernel() -> Kernel:
    """What sets the counter of a recurrence to 0."""
    counter = Buffer("b0", DTYPES["i32"], (const(1),), "out")
    body = Store("b0", (Index(const(0)),), Const(0, DTYPES["i32"]))
    return Kernel("k_start", (counter,), (), (), (body,), "start")


def start_launch(start: Entry, counter: int) -> GpuLaunchPlan:
    nothing = {"bytes": "4", "flops": "0", "lines": [], "fused": [], "reasons": []}
    return GpuLaunchPlan(
        start.name, ("1", "1", "1"), (start.team.threads, 1, 1), (1, 1, 1), "0", (counter,),
        (), "start", nothing, (counter,),
    )  # fmt: skip


def launch_of(
    graph: Graph,
    found: Resident,
    entry: Entry,
    counters: Sequence[int],
    told: Sequence[dict[str, Any]],
) -> GpuLaunchPlan:
    """The launch of a recurrence, with its counter, if it has one, and what is `told` of each of
    its kernels."""
    grid = str(graph.facts.simplify(entry.grid * found.holds))
    return GpuLaunchPlan(
        entry.name, (grid, "1", "1"), (entry.team.threads, 1, 1), (1, 1, 1),
        str(entry.shared_bytes), (*found.buffers, *counters), found.writer.dims,
        found.lowered[0].label, {**_report(graph, found, told), **entry.said},
        (*found.writes(), *counters),
        any(x.reports for x in found.lowered), stays=entry.stays,
        together=entry.together,
    )  # fmt: skip


def _report(graph: Graph, found: Resident, told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is said of the whole, by what is told of each kernel in it: the work of all steps, and
    each buffer from memory once."""
    work = const(0)
    for one, nest in zip(found.lowered, found.nests, strict=True):
        turns = const(1)
        for step in nest:
            turns = turns * found.writer.counts[step]
        work = work + work_of(graph, one)[0] * turns
    sizes: dict[int, Expr] = {}
    for writer in found.writer.writers:
        stage = writer.stage
        for number, b in zip(stage.buffers, stage.kernel.buffers, strict=True):
            sizes[number] = size_of(b.shape) * b.dtype.itemsize
    return {
        "bytes": str(sum(sizes.values(), const(0))),
        "flops": str(work),
        "lines": sorted({line for notes in told for line in notes["lines"]}),
        "fused": [what for notes in told for what in notes["fused"]],
        "reasons": [
            reason(True, f"all steps are one kernel, in stages: {len(told)}"),
            *(one for notes in told for one in notes["reasons"]),
        ],
    }


def reason(fused: bool, because: str) -> dict[str, Any]:
    """Why a recurrence is one kernel, or is launched at each step."""
    return {"node": "recurrence", "fused": fused, "because": because}
