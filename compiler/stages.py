"""The text of a program between two stages of the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stagefuse.dsl.diagnostics import CompileError
from stagefuse.dsl.program import Pipeline

from .build_graph import build_graph
from .driver import gpu_arches
from .front import check_source
from .fusion.beside import beside
from .fusion.fuse import partition
from .fusion.in_place import arrange
from .fusion.join import join
from .fusion.layers import Layers
from .graph_text import print_graph
from .kernel_text import print_kernel
from .lower import Sites, lower
from .passes import Pass, pipeline_of
from .patterns.byte_products import has_bytes
from .run_passes import bounds_of, run_passes, verified_kernel
from .schedule import CPU


def _no_weights(name: str, key: str) -> Any:
    raise LookupError(f"no weights are read to list passes: {name}/{key}")


def passes() -> tuple[Pass, ...]:
    """The passes in the order in which they run, to be looked at; some are for GPUs."""
    return pipeline_of(_no_weights, channels_last=True, shorten_sorts=True)


def names() -> tuple[str, ...]:
    """The stages whose text can be printed: the graph as built, after each pass, the kernels."""
    return ("graph", *(p.name for p in passes()), "kernels")


def text_after(
    path: Path,
    stage: str,
    weights: Mapping[str, Any],
    only: str | None = None,
    targets: Sequence[str] = ("cpu",),
) -> list[tuple[str, str]]:
    """Each pipeline's name, and its text after a stage; of kernels, those for the targets, a kernel
    of several GPUs or pipelines once. Raises CompileError, OSError."""
    program, found, load = check_source(path, weights)
    if found:
        raise CompileError(found)
    chosen = [p for p in program.pipelines if only in (None, p.name)]
    arches = gpu_arches(targets) if stage == "kernels" else ()
    if not arches:
        return [(p.name, _text(p, stage, load)) for p in chosen]
    texts = _on_gpus(chosen, arches, load, program.source.name)
    if "cpu" in targets:
        texts = [_text(p, stage, load) + "\n" + text for p, text in zip(chosen, texts, strict=True)]
    return [(p.name, text) for p, text in zip(chosen, texts, strict=True)]


def _on_gpus(
    pipelines: Sequence[Pipeline],
    arches: Sequence[str],
    load: Callable[[str, str], Any],
    source: str,
) -> list[str]:
    """The kernels of each pipeline for GPUs that none before it has."""
    from .gpu.compile import GpuCompiler
    from .planner import Planner

    gpu = GpuCompiler(arches, source)
    try:
        planner, texts = Planner(load, True, gpu, cpu=False), list[str]()
        for pipeline in pipelines:
            planner.begin(pipeline, build_graph(pipeline))
            texts.append("\n".join(print_kernel(kernel) for kernel, *_ in planner.unverified))
            planner.verify_kernels()
        return texts
    finally:
        gpu.stop()


def _text(pipeline: Pipeline, stage: str, load: Callable[[str, str], Any]) -> str:
    graph = build_graph(pipeline)
    on_gpu = stage in ("channels_last", "finish_products", "shorten_sorts")
    run = pipeline_of(
        load,
        integers=not on_gpu and has_bytes(graph),
        channels_last=stage in ("channels_last", "finish_products"),
        shorten_sorts=stage == "shorten_sorts",
    )
    stop = {p.name: n + 1 for n, p in enumerate(run)}.get(stage, len(run))
    bounds = bounds_of(pipeline)
    graph, _ = run_passes(graph, run[: 0 if stage == "graph" else stop], bounds)
    if stage != "kernels":
        return print_graph(graph)
    sites, seen = Sites(), dict[str, str]()
    graph, found = arrange(graph, lambda g, apart: beside(g, join(g, partition(g, apart))))
    layers = Layers(graph, found.groups)
    for group in found.groups:
        own = layers.of(group).graph
        kernel = lower(own, group, sites, CPU).kernel
        verified_kernel(kernel, own, bounds)
        seen.setdefault(kernel.name, print_kernel(kernel))
    return "\n".join(seen.values())
