"""Runs passes in order: checks what they require, verifies after each, times and counts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence

from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.program import Pipeline

from .errors import InternalError, VerifyError
from .graph import Graph
from .graph_text import print_graph
from .graph_verify import verify_graph
from .kernel_ir import Kernel
from .kernel_text import print_kernel
from .kernel_verify import verify_kernel
from .passes import INVARIANTS, Pass
from .passes.record import Place
from .proofs.bounds import Bounds

REPRODUCER_BYTES = 1 << 24
"""A reproducer holds the bytes of constants if they are no more than this."""


@frozen
class PassRun:
    """What one pass did: seconds it took, without verification, and the nodes around it."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    reasons: dict[Place, str]


def bounds_of(pipeline: Pipeline) -> Bounds:
    """The conditions on sizes that a pipeline's calls check."""
    given = []
    for check in pipeline.checks:
        given.append(check.expr)
        if check.relation == "==0":
            given.append(-check.expr)
    return Bounds(tuple(given))


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    bounds: Bounds | None = None,
    observe: Callable[[str, Graph], None] | None = None,
) -> tuple[Graph, tuple[PassRun, ...]]:
    """The graph after all passes, and what each did; verified before and after each.

    Without `bounds` nothing is verified. `observe` gets every pass's name and result. Raises
    InternalError if a pass breaks the graph, or lacks what it requires.
    """
    holds: set[str] = set()
    runs: list[PassRun] = []
    if bounds is not None:
        _verified(graph, bounds, None, graph)
    for step in passes:
        _require(step, holds)
        begin = time.perf_counter()
        after = step.run(graph)
        seconds = time.perf_counter() - begin
        if bounds is not None:
            _verified(after, bounds, step, graph)
        before, left = len(graph.nodes), len(after.nodes)
        runs.append(PassRun(step.name, seconds, before, left, step.reasons(graph)))
        holds = (holds - set(step.breaks)) | set(step.establishes)
        graph = after
        if observe is not None:
            observe(step.name, graph)
    return graph, tuple(runs)


def _require(step: Pass, holds: set[str]) -> None:
    for name in (*step.requires, *step.establishes, *step.breaks):
        if name not in INVARIANTS:
            raise InternalError(f"the pass {step.name} names `{name}`, which is no invariant")
    missing = [name for name in step.requires if name not in holds]
    if missing:
        raise InternalError(f"the pass {step.name} requires {', '.join(missing)}")


def _verified(graph: Graph, bounds: Bounds, step: Pass | None, before: Graph) -> None:
    try:
        verify_graph(graph, bounds)
    except VerifyError as error:
        raised = "building the graph" if step is None else f"the pass {step!r}"
        path = write_reproducer(f"{raised}\n{error}", graph_text(before))
        message = f"{raised} gave a wrong graph: {error}\n  reproducer: {path}"
        raise InternalError(message) from error


def verified_kernel(kernel: Kernel, graph: Graph, bounds: Bounds) -> None:
    """Raises InternalError if a kernel is wrong."""
    try:
        verify_kernel(kernel, graph.facts, bounds)
    except VerifyError as error:
        path = write_reproducer(f"lowering\n{error}", print_kernel(kernel))
        message = f"lowering gave a wrong kernel: {error}\n  reproducer: {path}"
        raise InternalError(message) from error


def graph_text(graph: Graph) -> str:
    """A graph's text, with the bytes of constants unless they are many."""
    sizes = (len(getattr(n.primitive, "data", b"")) for n in graph.nodes.values())
    return print_graph(graph, data=sum(sizes) <= REPRODUCER_BYTES)


def write_reproducer(why: str, text: str) -> str:
    """The path of a new file with an IR's text, which reads back, and why it was written."""
    first, _, rest = text.partition("\n")
    comment = "".join(f"# {line}\n" for line in why.splitlines())
    with tempfile.NamedTemporaryFile(
        "w", prefix="stagefuse-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"{first}\n{comment}{rest}")
    return file.name
