"""The plan of one pipeline: its graph through the passes, then a part for each target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stagefuse.dsl.dims import Expr, as_expr
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.program import Pipeline
from stagefuse.dsl.source import Span

from .buffers import Buffers
from .graph import Graph
from .patterns.panel_width import width_for
from .plan import (
    LEVELS,
    CheckPlan,
    DimPlan,
    GpuPlan,
    LoopPlan,
    PiecesPlan,
    PipelinePlan,
    SitePlan,
    StepPlan,
)
from .tuned import RULES, Choices, scheduled

if TYPE_CHECKING:
    import numpy as np

    from .fusion.layers import Numbered
    from .gpu.compile import GpuCompiler
    from .kernel_ir import Kernel
    from .lower import Lowered, Sites
    from .plan_writing import Writing
    from .proofs.bounds import Bounds


@frozen
class Begun:
    """A pipeline whose graph has been through the passes, with its plans for GPUs. `graph` is the
    CPU's, if there is code for one."""

    pipeline: Pipeline
    graph: Graph
    bounds: Bounds | None
    passed: Mapping[Any, str]
    sites: Sites
    gpu: tuple[GpuPlan, ...]


class Planner:
    """Compiles pipelines; kernels and arrays are shared by all of a file."""

    def __init__(
        self,
        load: Callable[[str, str], np.ndarray[Any, Any]],
        verify: bool,
        gpu: GpuCompiler | None = None,
        choices: Choices = RULES,
        cpu: bool = True,
        levels: Sequence[str] = LEVELS,
    ) -> None:
        self.load, self.verify, self.gpu, self.choices = load, verify, gpu, choices
        self.cpu = cpu
        self.panel = width_for(levels) if gpu is None else None
        self.kernels: dict[str, Kernel] = {}
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self.expected: dict[str, np.ndarray[Any, Any]] = {}  # of what is there for GPUs
        self.unverified: list[tuple[Kernel, Graph, Bounds]] = []

    def begin(self, pipeline: Pipeline, graph: Graph, write: Writing | None = None) -> Begun:
        """Runs the passes, and makes the kernels for GPUs: they take longest from here on. `write`
        begins once it is known which arrays they read, if they are the last that read any."""
        from .lower import Sites
        from .passes import pipeline_of
        from .passes.shorten_sorts import has_long_sorts
        from .patterns.byte_products import has_bytes
        from .patterns.convolved import has_images
        from .patterns.half_products import has_halves
        from .patterns.narrow import has_narrow
        from .patterns.single_query import single_query_sums
        from .run_passes import bounds_of, run_passes

        bounds = bounds_of(pipeline) if self.verify else None
        wants: dict[str, bool] = {}
        if self.gpu is not None:
            wants = {
                "narrow": has_narrow(graph) or has_bytes(graph) or has_halves(graph),
                "channels_last": has_images(graph),
                "shorten_sorts": has_long_sorts(graph),
                "single_queries": bool(single_query_sums(graph)),
            }
        given = graph
        filters = self.cpu and not wants.get("channels_last", False)
        integers = self.cpu and has_bytes(graph)
        own = integers and not any(wants.values())
        passes = pipeline_of(
            self.load, integers=own, filters=filters, panel=self.panel, **wants
        )
        graph, runs = run_passes(given, passes, bounds)
        passed = {place: text for run in runs for place, text in run.reasons.items()}
        sites = Sites()
        gpu: tuple[GpuPlan, ...] = ()
        if self.gpu is not None:

            def buffers_of(arranged: Graph) -> Buffers:
                buffers = self._buffers(pipeline, arranged)
                self.expected |= buffers.expected()
                if write is not None:
                    write.start(self.expected)
                return buffers

            gpu, kernels = self.gpu.plan(pipeline, graph, buffers_of, sites, passed)
            if bounds is not None:
                self.unverified += [(kernel, own, bounds) for kernel, own in kernels]
        if self.cpu and any(wants.values()):
            graph, _ = run_passes(given, pipeline_of(self.load, integers=integers), bounds)
        return Begun(pipeline, graph, bounds, passed, sites, gpu)

    def _buffers(self, pipeline: Pipeline, graph: Graph) -> Buffers:
        from .stored import weight_arrays

        for state in pipeline.states:
            if isinstance(state.initial, tuple):
                self.arrays["/".join(state.initial)] = self.load(*state.initial)
        return Buffers(pipeline, graph, weight_arrays(graph, self.load), self.arrays)

    def plan(self, begun: Begun) -> PipelinePlan:
        """The plan of a pipeline."""
        pipeline, sites = begun.pipeline, begun.sites
        if self.cpu:
            buffers, steps, loops = self._steps(begun)
        else:
            buffers, steps, loops = self._buffers(pipeline, begun.graph), [], ()
        slots = buffers.slots([s.buffers for s in steps], loops, in_turn=True)
        ranges = pipeline.facts.ranges
        dims = tuple(DimPlan(d, *_range_text(ranges.get(d, (0, None)))) for d in pipeline.dims)
        return PipelinePlan(
            pipeline.name, pipeline.doc, buffers.inputs, buffers.results, dims,
            tuple(buffers.plans), tuple(steps), slots, tuple(map(_check, pipeline.checks)),
            tuple(_site(*place) for place in sites.places), gpu=begun.gpu, loops=loops,
            states=buffers.states,
        )  # fmt: skip

    def _steps(self, begun: Begun) -> tuple[Buffers, list[StepPlan], tuple[LoopPlan, ...]]:
        """The buffers, steps and loops on the CPU."""
        from .fusion.alike import Copies
        from .fusion.beside import beside
        from .fusion.fuse import partition
        from .fusion.in_place import arrange
        from .fusion.join import join
        from .fusion.kernel_order import loops_of
        from .fusion.layers import Layers
        from .lower import lower
        from .report import report
        from .schedule import CPU, CPU_NARROW

        bounds, schedule = begun.bounds, CPU if self.panel is None else CPU_NARROW
        graph, found = arrange(
            begun.graph, lambda g, apart: beside(g, join(g, partition(g, apart)))
        )
        buffers = self._buffers(begun.pipeline, graph)
        reasons = {d.node: d for d in found.decisions}
        steps: list[StepPlan] = []
        layers, copies = Layers(graph, found.groups), Copies[Mapping[str, int]](graph)
        for group in found.groups:
            own = layers.of(group)
            alike = copies.of(own.graph, group)
            if not alike.made:
                lowered, changes = scheduled(
                    partial(lower, own.graph, group, begun.sites), schedule, "cpu", self.choices
                )
                alike.keep([(lowered, changes)])
                if bounds is not None and lowered.kernel.name not in self.kernels:
                    self.unverified.append((lowered.kernel, own.graph, bounds))
            ((lowered, changes),) = alike.made
            notes = report(graph, lowered, reasons, begun.passed, group.nest)
            if changes:
                notes["tuned"] = dict(changes)
            steps.append(self._step(buffers, lowered, own, notes))
        return buffers, steps, loops_of(graph, [group.nest for group in found.groups])

    def _step(
        self, buffers: Buffers, lowered: Lowered, own: Numbered, report: dict[str, Any]
    ) -> StepPlan:
        from .cpu.scratch import caches_of, scratch_bytes

        kernel = lowered.kernel
        self.kernels.setdefault(kernel.name, kernel)
        used = tuple(buffers.of(ref) for ref in lowered.values)
        places = {b.name: number for number, b in enumerate(kernel.buffers)}
        pieces = tuple(
            PiecesPlan(places[panel], str(cache.rows))
            for (_, panel, _), cache in caches_of(kernel).items()
            if cache.rows is not None
        )
        return StepPlan(
            kernel.name, used, own.dims(kernel.dims), str(own.known(lowered.count)),
            str(own.known(lowered.grain)), str(own.known(scratch_bytes(kernel))), lowered.label,
            report, pieces,
        )  # fmt: skip

    def verify_kernels(self) -> None:
        """Checks kernels, if that is wanted: apart, so that LLVM and ptxas can begin before."""
        from .run_passes import verified_kernel

        while self.unverified:
            verified_kernel(*self.unverified.pop(0))

    def ordered(self) -> Sequence[Kernel]:
        """The CPU's kernels by name."""
        return [self.kernels[name] for name in sorted(self.kernels)]


def _range_text(ends: tuple[Any, Any]) -> tuple[str, str | None]:
    low, high = ends
    return str(as_expr(low)), None if high is None else str(as_expr(high))


def _place(span: Span | None) -> dict[str, Any]:
    if span is None:
        return {"file": "", "line": 0, "column": 0, "text": ""}
    text = span.source.line(span.line)
    return {"file": span.source.name, "line": span.line, "column": span.column, "text": text}


def _site(span: Span | None, extent: Expr, length: Expr) -> SitePlan:
    message = ""
    if length.as_int() != 1:
        message = f"the start of this slice of {length} positions is out of range"
    return SitePlan(**_place(span), message=message, extent=str(extent))


def _check(check: Any) -> CheckPlan:
    return CheckPlan(str(check.expr), check.relation, check.message, **_place(check.span))
