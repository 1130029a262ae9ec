"""From a source file to a plan: the one place that strings the phases together and reads files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stagefuse.dsl.diagnostics import CompileError, Diagnostic
from stagefuse.dsl.dims import Expr, as_expr, const
from stagefuse.dsl.program import Pipeline, Program
from stagefuse.dsl.source import Source, Span

from .graph import Contract, Graph, Input, Map, Node, Reduce, Ref
from .plan import (
    LEVELS,
    ArgumentPlan,
    BufferPlan,
    CheckPlan,
    DimPlan,
    PipelinePlan,
    Plan,
    SitePlan,
    StepPlan,
)

ALIGNMENT = 64


def check_file(
    path: str | Path, weights: Mapping[str, Any] | None = None
) -> tuple[Program, tuple[Diagnostic, ...]]:
    """The checked program of a file and what is wrong with it. Raises OSError."""
    from .front import check_source

    program, found, _ = check_source(Path(path), weights or {})
    return program, found


def compile_file(
    path: str | Path,
    *,
    targets: Sequence[str] = ("cpu",),
    weights: Mapping[str, Any] | None = None,
    pipeline: str | None = None,
    levels: Sequence[str] = LEVELS,
    verify: bool = True,
) -> Plan:
    """The plan of a file's pipelines, or of one of them, with CPU code for some levels.

    `verify` checks the graph after every pass, and every kernel. Raises CompileError, OSError.
    """
    from .front import check_source

    begin = time.perf_counter()
    program, found, load = check_source(Path(path), weights or {})
    if found:
        raise CompileError(found)
    return compile_program(program, load, pipeline, begin, levels, verify)


def compile_program(
    program: Program,
    load: Callable[[str, str], np.ndarray[Any, Any]],
    only: str | None = None,
    begin: float | None = None,
    levels: Sequence[str] = LEVELS,
    verify: bool = True,
) -> Plan:
    """The plan of a checked program; `load` gives a weight file's tensor by name and key."""
    from .build_graph import build_graph

    chosen = [p for p in program.pipelines if only in (None, p.name)]
    graphs = [(p, build_graph(p)) for p in chosen]
    return compile_graphs(graphs, load, program.source, levels, verify)


def compile_graphs(
    graphs: Sequence[tuple[Pipeline, Graph]],
    load: Callable[[str, str], np.ndarray[Any, Any]],
    source: Source,
    levels: Sequence[str] = LEVELS,
    verify: bool = True,
) -> Plan:
    """The plan of pipelines given as graphs; of each `Pipeline` only the signature is read."""
    from .cpu.build import build_levels

    kernels: dict[str, Any] = {}
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    plans = tuple(_Planner(p, load, kernels, arrays, verify).plan(graph) for p, graph in graphs)
    ordered = [kernels[name] for name in sorted(kernels)]
    objects = build_levels(ordered, levels)
    return Plan(plans, objects, arrays, source.text, source.name, {})


class _Planner:
    """Compiles one pipeline; kernels and arrays are shared with the file's others."""

    def __init__(
        self,
        pipeline: Pipeline,
        load: Callable[[str, str], np.ndarray[Any, Any]],
        kernels: dict[str, Any],
        arrays: dict[str, np.ndarray[Any, Any]],
        verify: bool,
    ) -> None:
        self.pipeline, self.load, self.verify = pipeline, load, verify
        self.kernels, self.arrays = kernels, arrays
        self.buffers: list[BufferPlan] = []
        self.index: dict[Ref, int] = {}
        self.steps: list[StepPlan] = []

    def plan(self, graph: Graph) -> PipelinePlan:
        from .fuse import partition
        from .join import join
        from .lower import Sites, lower
        from .passes import pipeline_of
        from .run_passes import bounds_of, run_passes, verified_kernel
        from .schedule import CPU
        from .stored import weight_arrays

        bounds = bounds_of(self.pipeline) if self.verify else None
        graph, runs = run_passes(graph, pipeline_of(self.load), bounds)
        self.passed = {place: text for run in runs for place, text in run.reasons.items()}
        self.stored = weight_arrays(graph, self.load)
        sites = Sites()
        found = join(graph, partition(graph))
        self.reasons = {d.node: d for d in found.decisions}
        inputs = self._inputs(graph)
        self._results(graph)
        for group in found.groups:
            lowered = lower(graph, group, sites, CPU)
            if bounds is not None and lowered.kernel.name not in self.kernels:
                verified_kernel(lowered.kernel, graph, bounds)
            self._step(graph, lowered)
        results = tuple(
            ArgumentPlan(name, str(t.dtype), _text(t.shape), self.index[ref])
            for (name, _), ref in zip(self.pipeline.results, graph.results, strict=True)
            for t in (graph.type(ref),)
        )
        slots = self._slots()
        facts = self.pipeline.facts
        dims = tuple(DimPlan(d, *_range_text(facts.ranges.get(d, (0, None)))) for d in
                     self.pipeline.dims)  # fmt: skip
        return PipelinePlan(
            self.pipeline.name, self.pipeline.doc, inputs, results, dims, tuple(self.buffers),
            tuple(self.steps), slots, tuple(map(_check, self.pipeline.checks)),
            tuple(_site(s) for s in sites.spans),
        )  # fmt: skip

    def _inputs(self, graph: Graph) -> tuple[ArgumentPlan, ...]:
        found: list[ArgumentPlan] = []
        nodes = {n.primitive.name: n for n in graph.nodes.values()
                 if isinstance(n.primitive, Input)}  # fmt: skip
        for name, type, _ in self.pipeline.inputs:
            number = len(self.buffers)
            shape = _text(type.shape)
            self.buffers.append(BufferPlan(name, str(type.dtype), shape, "input"))
            if name in nodes:
                self.index[Ref(nodes[name].id)] = number
            found.append(ArgumentPlan(name, str(type.dtype), shape, number))
        return tuple(found)

    def _results(self, graph: Graph) -> None:
        for number, ref in enumerate(graph.results):
            type = graph.type(ref)
            self.index[ref] = len(self.buffers)
            name = self.pipeline.results[number][0] or f"result{number}"
            self.buffers.append(BufferPlan(name, str(type.dtype), _text(type.shape), "result"))

    def _buffer(self, graph: Graph, ref: Ref) -> int:
        if ref not in self.index:
            type = graph.type(ref)
            self.index[ref] = len(self.buffers)
            role, array = "arena", None
            if ref in self.stored:
                role, array = self._array(graph.nodes[ref.node], self.stored[ref])
            node = graph.nodes[ref.node]
            name = node.label or f"t{ref.node}"
            self.buffers.append(
                BufferPlan(name, str(type.dtype), _text(type.shape), role, None, array)
            )
        return self.index[ref]

    def _array(self, node: Node, array: np.ndarray[Any, Any]) -> tuple[str, str]:
        from .graph import Weight

        if isinstance(node.primitive, Weight):
            name = f"{node.primitive.weights}/{node.primitive.key}"
            self.arrays[name] = array
            return "weight", name
        digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:16]
        name = f"constant/{digest}"
        self.arrays.setdefault(name, array)
        return "constant", name

    def _step(self, graph: Graph, lowered: Any) -> None:
        from .cpu.scratch import scratch_bytes

        kernel = lowered.kernel
        self.kernels.setdefault(kernel.name, kernel)
        buffers = tuple(self._buffer(graph, ref) for ref in lowered.values)
        self.steps.append(
            StepPlan(
                kernel.name, buffers, kernel.dims, str(lowered.count), str(lowered.grain),
                str(scratch_bytes(kernel)), lowered.label, self._report(graph, lowered),
            )
        )  # fmt: skip

    def _report(self, graph: Graph, lowered: Any) -> dict[str, Any]:
        from .fuse import flops as per_element

        nodes = [graph.nodes[n] for n in lowered.nodes]
        work, moved = const(0), const(0)
        for node in nodes:
            work = work + _flops(graph, node, per_element)
        for ref in lowered.values:
            type = graph.type(ref)
            moved = moved + _size(type.shape) * type.dtype.itemsize
        lines = sorted({n.span.line for n in nodes if n.span is not None})
        fused = [_describe(n) for n in nodes if isinstance(n.primitive, Map | Reduce) or
                 type_name(n) in ("Contract", "Scan", "Sort", "Scatter", "Gather")]  # fmt: skip
        reasons = [
            {"node": _describe(graph.nodes[n]), "fused": self.reasons[n].fused,
             "because": self.reasons[n].reason}
            for n in lowered.nodes if n in self.reasons
        ]  # fmt: skip
        reasons += [
            {"node": _describe(n), "fused": not text.startswith("not "), "because": text}
            for n in nodes if isinstance(n.primitive, Contract)
            for text in (self.passed.get((n.span, n.stack)),) if text is not None
        ]  # fmt: skip
        return {
            "bytes": str(moved), "flops": str(work), "lines": lines, "fused": fused,
            "reasons": reasons,
        }  # fmt: skip

    def _slots(self) -> tuple[str, ...]:
        """Places arena buffers: those of one size that live at different times share a slot."""
        last: dict[int, int] = {}
        first: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for used in step.buffers:
                last[used] = number
                first.setdefault(used, number)
        slots: list[tuple[str, int]] = []  # size and the last step of the present tenant
        for index in sorted(first, key=lambda b: (first[b], b)):
            buffer = self.buffers[index]
            if buffer.role != "arena":
                continue
            size = str(_bytes(buffer))
            for slot, (has, until) in enumerate(slots):
                if has == size and until < first[index]:
                    slots[slot] = (size, last[index])
                    self.buffers[index] = replace(buffer, slot=slot)
                    break
            else:
                self.buffers[index] = replace(buffer, slot=len(slots))
                slots.append((size, last[index]))
        return tuple(size for size, _ in slots)


def type_name(node: Node) -> str:
    return type(node.primitive).__name__


def _describe(node: Node) -> str:
    primitive = node.primitive
    if isinstance(primitive, Map):
        return primitive.fn
    if isinstance(primitive, Reduce):
        return primitive.kind
    return {"Contract": "matmul"}.get(type_name(node), type_name(node).lower())


def _flops(graph: Graph, node: Node, per_element: Callable[[Node], int]) -> Expr:
    if isinstance(node.primitive, Contract):
        return _size(node.type.shape) * node.primitive.depth * 2
    if isinstance(node.primitive, Reduce):
        return _size(graph.type(node.operands[0]).shape)
    return _size(node.type.shape) * per_element(node)


def _size(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total


def _bytes(buffer: BufferPlan) -> Expr:
    from stagefuse.dsl.dims import parse
    from stagefuse.dsl.dtypes import DTYPES

    return _size([parse(d) for d in buffer.shape]) * DTYPES[buffer.dtype].itemsize


def _text(shape: Sequence[Expr]) -> tuple[str, ...]:
    return tuple(map(str, shape))


def _range_text(ends: tuple[Any, Any]) -> tuple[str, str | None]:
    low, high = ends
    return str(as_expr(low)), None if high is None else str(as_expr(high))


def _place(span: Span | None) -> dict[str, Any]:
    if span is None:
        return {"file": "", "line": 0, "column": 0, "text": ""}
    text = span.source.line(span.line)
    return {"file": span.source.name, "line": span.line, "column": span.column, "text": text}


def _site(span: Span | None) -> SitePlan:
    return SitePlan(**_place(span))


def _check(check: Any) -> CheckPlan:
    return CheckPlan(str(check.expr), check.relation, check.message, **_place(check.span))
