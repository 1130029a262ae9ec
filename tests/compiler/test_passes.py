"""Passes: found, ordered, checked, timed; each keeps the meaning and does all it does at once."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse import cli
from stagefuse.compiler import driver, stages
from stagefuse.compiler.errors import InternalError
from stagefuse.compiler.graph import Graph, Map
from stagefuse.compiler.graph_text import parse_graph, print_graph, same_graph
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.passes import INVARIANTS, Pass, discovered, pipeline_of
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.run_passes import run_passes
from stagefuse.dsl.frozen import frozen

from .ir_cases import EXAMPLES, no_weights, of_text, random_graph, with_node
from .test_fused_graphs import SIZES, feeds_for


def test_every_pass_that_is_found_is_in_the_list_once() -> None:
    every = {"integers": True, "channels_last": True, "shorten_sorts": True}
    names = [p.name for p in pipeline_of(no_weights, **every)]
    assert sorted(names) == sorted(discovered())
    for name, kind in discovered().items():
        assert kind.__module__.endswith(f".passes.{name}")
        assert (kind.__doc__ or "").strip().endswith(".")
        for invariant in (*kind.requires, *kind.establishes, *kind.breaks):
            assert invariant in INVARIANTS


def shape_of(graph: Graph) -> list[object]:
    """A graph's nodes with operands by place, so that only ids may differ."""
    place = {number: at for at, number in enumerate(graph.nodes)}
    nodes = graph.nodes.values()
    return [
        *((n.primitive, [(place[r.node], r.result) for r in n.operands], n.types) for n in nodes),
        [(place[r.node], r.result) for r in graph.results],
    ]


@given(st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_passes_keep_the_meaning_and_are_idempotent(seed: int) -> None:
    graph = random_graph(seed).graph
    rng = np.random.default_rng(seed)
    for step in pipeline_of(no_weights, channels_last=True, shorten_sorts=True):
        after = step.run(graph)
        assert shape_of(step.run(after)) == shape_of(after), step.name
        for sizes in SIZES[1:3]:
            feeds = feeds_for(graph, sizes, rng)
            wanted, found = evaluate(graph, feeds, sizes), evaluate(after, feeds, sizes)
            for a, b in zip(wanted, found, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        graph = after


def test_a_pass_needs_what_it_requires() -> None:
    graph = random_graph(1).graph
    last = [p for p in pipeline_of(no_weights) if p.requires][-1]
    with pytest.raises(InternalError, match=f"the pass {last.name} requires"):
        run_passes(graph, [last])


@frozen
class Wrong(Pass):
    """Makes the last map an unknown function."""

    name: ClassVar[str] = "wrong"
    fn: str = "no_such_function"

    def run(self, graph: Graph) -> Graph:
        maps = [n.id for n in graph.nodes.values() if isinstance(n.primitive, Map)]
        return with_node(graph, maps[-1], primitive=Map(self.fn))


@frozen
class Unknown(Pass):
    """Names an invariant that does not exist."""

    name: ClassVar[str] = "unknown"
    establishes: ClassVar[tuple[str, ...]] = ("all-is-well",)


def test_a_wrong_graph_is_an_internal_error_with_a_reproducer() -> None:
    graph = of_text("pipeline p(x: f32[N]) -> f32[N]:\n    exp(x) + 1.0\n").graph
    with pytest.raises(InternalError) as caught:
        run_passes(graph, [Wrong(fn="exq")], Bounds())
    message = str(caught.value)
    assert "the pass Wrong(fn='exq') gave a wrong graph: invariant 4" in message
    path = Path(message.rpartition("reproducer: ")[2])
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert "# the pass Wrong(fn='exq')\n# invariant 4" in text
    assert same_graph(parse_graph(text), graph)
    after, _ = run_passes(graph, [Wrong()])
    assert isinstance(after, Graph)


def test_an_unknown_invariant_is_an_internal_error() -> None:
    with pytest.raises(InternalError, match="which is no invariant"):
        run_passes(random_graph(1).graph, [Unknown()])


def test_runs_are_counted_and_seen() -> None:
    seen: list[str] = []
    graph = random_graph(3).graph
    after, runs = run_passes(
        graph, pipeline_of(no_weights), observe=lambda name, graph: seen.append(name)
    )
    assert [r.name for r in runs] == seen == [p.name for p in pipeline_of(no_weights)]
    assert runs[0].nodes_before == len(graph.nodes)
    assert runs[-1].nodes_after == len(after.nodes)
    assert all(r.seconds >= 0 for r in runs)


def test_verification_changes_nothing() -> None:
    plans = [driver.compile_file(EXAMPLES[0], verify=v) for v in (True, False)]
    assert plans[0].pipelines == plans[1].pipelines
    assert plans[0].objects == plans[1].objects


@pytest.mark.parametrize("stage", stages.names())
def test_every_stage_prints(stage: str) -> None:
    found = CliRunner().invoke(cli.commands, ["explain", str(EXAMPLES[0]), "--ir", stage])
    assert found.exit_code == 0, found.output
    if stage == "kernels":
        assert found.output.startswith("stagefuse kernel 1\n")
    else:
        assert print_graph(parse_graph(found.output)).startswith("stagefuse graph 1\n")


def test_kernels_are_those_of_the_targets() -> None:
    def shown(targets: str) -> str:
        arguments = ["explain", str(EXAMPLES[0]), "--ir", "kernels", "--target", targets]
        found = CliRunner().invoke(cli.commands, arguments)
        assert found.exit_code == 0, found.output
        return found.output

    cpu, gpu = shown("cpu"), shown("h200,a100")
    assert cpu != gpu and gpu.startswith("stagefuse kernel 1\n")
    assert shown("cpu,a100,h200") == cpu + "\n" + gpu


def test_an_unknown_stage_is_a_usage_error() -> None:
    found = CliRunner().invoke(cli.commands, ["explain", str(EXAMPLES[0]), "--ir", "smplify"])
    assert found.exit_code == 2
    assert "there is no stage 'smplify'; there is graph, " in found.output


def test_passes_are_listed_without_a_file() -> None:
    found = CliRunner().invoke(cli.commands, ["explain", "--passes"])
    assert found.exit_code == 0
    assert [line.split()[0] for line in found.output.splitlines() if line[0] != " "] == [
        p.name for p in pipeline_of(no_weights, channels_last=True, shorten_sorts=True)
    ]
