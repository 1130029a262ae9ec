"""Graphs and kernels to try the IRs on: the examples, the standard library, random ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.front import check_source, check_text
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.graph import Graph, Node, Primitive, Ref
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.compiler.kernel_text import parse_kernel, print_kernel
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.compiler.lower import Sites, lower
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.run_passes import bounds_of, run_passes
from stagefuse.compiler.schedule import CPU
from stagefuse.dsl.dtypes import F32, DType
from stagefuse.dsl.program import Program
from stagefuse.dsl.source import Source
from stagefuse.dsl.types import TensorType

from ..test_std import CASES
from .graph_run import graph_of
from .test_fused_graphs import _Random

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = [p.stem for p in (ROOT / "dsl" / "std").glob("*.pipe")]


def _is_whole(source: str) -> bool:
    """Whether it needs neither weights nor other sources, which are made by scripts."""
    imports = re.findall(r"^import ([\w, ]+)", source, re.MULTILINE)
    named = {name.strip() for line in imports for name in line.split(",")}
    return "\nweights " not in source and named <= set(LIBRARY)


EXAMPLES = [
    p for p in sorted((ROOT / "examples").glob("*.pipe")) if _is_whole(p.read_text("utf-8"))
]


@dataclass(frozen=True)
class Built:
    """A graph with what its passes need."""

    graph: Graph
    load: Callable[[str, str], Any]
    bounds: Bounds

    def passed(self) -> Graph:
        return run_passes(self.graph, pipeline_of(self.load), self.bounds)[0]


def no_weights(name: str, key: str) -> Any:
    raise LookupError(f"{name}/{key}")


def of_program(program: Program, load: Callable[[str, str], Any]) -> Built:
    pipeline = program.pipelines[0]
    return Built(build_graph(pipeline), load, bounds_of(pipeline))


def example(path: Path) -> Built:
    program, found, load = check_source(path, {})
    assert not found
    return of_program(program, load)


def of_text(text: str, weights: dict[str, Any] | None = None) -> Built:
    program, found, load = check_text(Source("test.pipe", text), ROOT, weights or {})
    assert not found, found
    return of_program(program, load)


def random_graph(seed: int, dtype: DType = F32, steps: int = 8) -> Built:
    grown = _Random(seed, dtype)
    for _ in range(steps):
        grown.step()
    results = [r for r in grown.values[-3:] if grown.b.type(r).rank <= 4]
    return Built(graph_of(grown.b, results), no_weights, Bounds())


BUILT: dict[str, Callable[[], Built]] = {
    **{p.stem: (lambda p=p: example(p)) for p in EXAMPLES},
    **{
        f"{number}-{c.covers}": (
            lambda c=c: of_text(c.source, {"w": dict(c.weights)} if c.weights else {})
        )
        for number, c in enumerate(CASES)
    },
}
"""Graphs by name: every example, and every case of the standard library's tests."""


def kernels_of(graph: Graph) -> Iterator[Kernel]:
    """The kernels of a graph that has been through the passes."""
    sites = Sites()
    for group in join(graph, partition(graph)).groups:
        yield lower(graph, group, sites, CPU).kernel


def lowered(text: str) -> list[Kernel]:
    """The kernels of a pipeline without weights, whose accesses are all proved to be inside."""
    program, found, load = check_text(Source("p.pipe", text), Path(), {})
    assert not found
    graph, _ = run_passes(build_graph(program.pipelines[0]), pipeline_of(load), Bounds())
    made = list(kernels_of(graph))
    assert all(verify_kernel(kernel, graph.facts).open == [] for kernel in made)
    assert [parse_kernel(print_kernel(kernel)) for kernel in made] == made
    return made


def with_node(graph: Graph, number: int, **changes: Any) -> Graph:
    """The graph with a node's fields replaced, without any check."""
    made = Graph(graph.facts, results=graph.results)
    for node in graph.nodes.values():
        made.add(replace(node, **changes) if node.id == number else node)
    return made


def single(
    primitive: Primitive, operands: list[TensorType], *types: TensorType, facts: Any
) -> Graph:
    """A graph of inputs and one node that reads them all."""
    from stagefuse.compiler.graph import Input

    graph = Graph(facts)
    for number, type in enumerate(operands):
        graph.add(Node(number, Input(f"x{number}"), (), (type,)))
    refs = tuple(Ref(n) for n in range(len(operands)))
    graph.add(Node(len(operands), primitive, refs, types))
    graph.results = tuple(Ref(len(operands), i) for i in range(len(types)))
    return graph
