"""A checked pipeline becomes a dataflow graph: each operation lowers to primitives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.program import Apply, Pipeline, State

from .graph import Graph, Ref
from .graph_builder import Builder
from .ops import BUILTINS
from .recurrence import carried, latest, recurrence


def build_graph(pipeline: Pipeline) -> Graph:
    """The graph of a pipeline, without operations that no result needs."""
    builder = Builder(pipeline.facts)
    values: dict[int, Ref] = {}
    for apply in pipeline.body:
        with builder.at(apply.span, apply.stack, apply.label):
            made = _lower(builder, pipeline, apply, [values[v] for v in apply.operands])
        values.update(zip(apply.results, made, strict=True))
    kept = [_kept(builder, values, state) for state in pipeline.states]
    results = [values[v] for _, v in pipeline.results]
    builder.graph.results = (*results, *(ref for ref in kept if ref is not None))
    return builder.graph.live()


def _kept(b: Builder, values: Mapping[int, Ref], state: State) -> Ref | None:
    """The update that gives a state its value after the call; None if it stays as it was."""
    if state.after == state.before:
        return None
    after = values[state.after]
    if state.after == state.updated:
        return after
    with b.at(state.span, (), state.name):
        return b.whole_update(values[state.updated], after, state.name)


def _lower(b: Builder, pipeline: Pipeline, apply: Apply, operands: list[Ref]) -> list[Ref]:
    attributes = dict(apply.attributes)
    types = tuple(pipeline.types[v] for v in apply.results)
    if apply.op == "input":
        return [b.input(attributes["name"], types[0])]
    if apply.op == "state":
        return [b.state(attributes["name"], types[0])]
    if apply.op == "weight":
        return [b.weight(attributes["weights"], attributes["key"], types[0])]
    if apply.op == "constant":
        return [b.scalar(attributes["value"], types[0].dtype, types[0].shape)]
    if apply.op == "dim":
        expr = attributes["expr"]
        assert isinstance(expr, Expr)
        return [b.position((), (), expr)]
    if apply.op == "carried":
        return [carried(b, attributes["step"], attributes["number"], operands[0])]
    if apply.op == "recurrence":
        return _recurrence(b, attributes, operands)
    made = BUILTINS[apply.op].lower(b, operands, attributes, types)
    return list(made)


def _recurrence(b: Builder, attributes: dict[str, Any], operands: list[Ref]) -> list[Ref]:
    """What is carried last and what is gathered; of the carried values, operands are views."""
    step, count, number = attributes["step"], attributes["count"], attributes["carried"]
    held = [b.graph.nodes[ref.node].operands[0] for ref in operands[:number]]
    gathered = list(zip(operands[2 * number :], attributes["places"], strict=True))
    made = recurrence(b, step, count, held, operands[number : 2 * number], gathered)
    return [*(latest(b, ref, count) for ref in made[:number]), *made[number:]]
