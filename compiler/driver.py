"""From a source file to a plan: the one place that strings the phases together and reads files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagefuse.dsl.collector import collector_rests
from stagefuse.dsl.diagnostics import CompileError, Diagnostic
from stagefuse.dsl.program import Pipeline, Program
from stagefuse.dsl.source import Source

from .graph import Graph
from .plan import GPU_ARCHES, LEVELS, TARGETS, Plan
from .tuned import RULES, Choices, beside

if TYPE_CHECKING:
    import numpy as np

    from .plan_writing import Writing

LARGE = 150
"""Nodes of graphs whose kernels surely are a large module."""


def check_file(
    path: str | Path, weights: Mapping[str, Any] | None = None
) -> tuple[Program, tuple[Diagnostic, ...]]:
    """The checked program of a file and what is wrong with it. Raises OSError."""
    from .front import check_source

    program, found, _ = check_source(Path(path), weights or {})
    return program, found


@collector_rests()
def compile_file(
    path: str | Path,
    *,
    targets: Sequence[str] = ("cpu",),
    weights: Mapping[str, Any] | None = None,
    pipeline: str | None = None,
    levels: Sequence[str] = LEVELS,
    verify: bool = True,
    write: Writing | None = None,
) -> Plan:
    """The plan of a file's pipelines, or of one of them, with CPU code for some levels.

    `targets` are cpu, names of GPUs, and arches. `verify` checks the graph after every pass, and
    every kernel. Schedules are those of the lock file beside the source, if there is one. `write`
    gets the arrays as soon as they are known, then the plan, if it has pipelines.
    Raises CompileError, OSError, and PlanError for a lock file that is none.
    """
    from .front import check_source

    program, found, load = check_source(Path(path), weights or {})
    if found:
        raise CompileError(found)
    choices = beside(Path(path))
    return compile_program(program, load, pipeline, levels, verify, targets, choices, write)


@collector_rests()
def compile_program(
    program: Program,
    load: Callable[[str, str], np.ndarray[Any, Any]],
    only: str | None = None,
    levels: Sequence[str] = LEVELS,
    verify: bool = True,
    targets: Sequence[str] = ("cpu",),
    choices: Choices = RULES,
    write: Writing | None = None,
) -> Plan:
    """The plan of a checked program; `load` gives a weight file's tensor by name and key."""
    from .build_graph import build_graph

    chosen = [p for p in program.pipelines if only in (None, p.name)]
    graphs = [(p, build_graph(p)) for p in chosen]
    return compile_graphs(graphs, load, program.source, levels, verify, targets, choices, write)


@collector_rests()
def compile_graphs(
    graphs: Sequence[tuple[Pipeline, Graph]],
    load: Callable[[str, str], np.ndarray[Any, Any]],
    source: Source,
    levels: Sequence[str] = LEVELS,
    verify: bool = True,
    targets: Sequence[str] = ("cpu",),
    choices: Choices = RULES,
    write: Writing | None = None,
) -> Plan:
    """The plan of pipelines given as graphs; of each `Pipeline` only the signature is read."""
    from .planner import Planner

    arches = gpu_arches(targets)
    gpu = None
    if arches:
        from .gpu.compile import GpuCompiler

        gpu = GpuCompiler(arches, source.name, choices)
    planner = Planner(load, verify, gpu, choices, "cpu" in targets, levels)
    build = None
    try:
        if "cpu" in targets:
            from .cpu.build import LevelBuild

            build = LevelBuild(levels, sum(len(graph.nodes) for _, graph in graphs) > LARGE)
        begun = []
        for number, (p, graph) in enumerate(graphs):
            early = write if number == len(graphs) - 1 and build is None else None
            begun.append(planner.begin(p, graph, early))
        if gpu is not None:
            gpu.start()
        plans = tuple(planner.plan(b) for b in begun)
        if build is not None:
            build.start(planner.ordered())
            if write is not None and plans:
                write.start(planner.arrays)
        planner.verify_kernels()
        plan = Plan(plans, {}, planner.arrays, source.text, source.name, {})
        if build is not None:
            plan = replace(plan, objects=build.objects(), call=build.call())
        if gpu is not None:
            plan = gpu.finish(plan)
        if write is not None and plans:
            write.finish(plan)
        return plan
    finally:
        for running in (build, gpu, write):
            if running is not None:
                running.stop()


def gpu_arches(targets: Sequence[str]) -> tuple[str, ...]:
    """The arches that targets need, in order. Raises ValueError for an unknown target."""
    wanted = {TARGETS.get(t, t) for t in targets}
    unknown = sorted(wanted - {"cpu", *GPU_ARCHES})
    if unknown:
        raise ValueError(f"unknown target {unknown[0]!r}: there are {', '.join(TARGETS)}")
    return tuple(a for a in GPU_ARCHES if a in wanted)
