"""Functions are inlined, `If` is its branch or a choice, `Loop` and `Scan` are a `scan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx

from stagefuse.dsl.dims import const, sym

from . import scans, schemas
from .errors import Refused
from .node import Val
from .text import size_text

if TYPE_CHECKING:
    from .translate import Env, Translator

MAX_TRIPS = 256


def outer_names(graph: onnx.GraphProto) -> set[str]:
    """The values that a subgraph takes from around it."""
    own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    used = {o.name for o in graph.output}
    for node in graph.node:
        own.update(node.output)
        used.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                used |= outer_names(inner)
    return used - own


def inline(
    owner: Translator, function: onnx.FunctionProto, call: onnx.NodeProto, env: Env, depth: int
) -> None:
    """The nodes of a function in place of its call. Raises Refused."""
    inner: Env = {}
    for number, name in enumerate(function.input):
        given = call.input[number] if number < len(call.input) else ""
        inner[name] = env[given] if given else None
    absent = {n for n in function.input if inner[n] is None}
    attributes = schemas.default_attributes(call, owner.opsets)
    attributes |= {a.name: a for a in function.attribute_proto}
    attributes |= {a.name: a for a in call.attribute}
    saved, before = owner.opsets, len(owner.problems)
    owner.opsets = saved | {e.domain or "ai.onnx": e.version for e in function.opset_import}
    try:
        nodes = [_with_attributes(n, attributes, absent) for n in function.node]
        owner.nodes(nodes, inner, set(function.output), depth + 1)
    finally:
        owner.opsets = saved
    for problem in owner.problems[before:]:
        place = call.name or call.output[0]
        owner.problems.remove(problem)
        raise Refused(f"{problem.message} (in its node {problem.op})", problem.need,
                      problem.attribute, problem.inputs or (place,)[:0])  # fmt: skip
    for outside, inside in zip(call.output, function.output, strict=False):
        if outside:
            env[outside] = inner.get(inside)


def _with_attributes(
    node: onnx.NodeProto, given: dict[str, onnx.AttributeProto], absent: set[str]
) -> onnx.NodeProto:
    """A node of a function with the attributes of the call, and without inputs that it lacks."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    del made.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            source = given.get(attribute.ref_attr_name)
            if source is None:
                continue
            copy = made.attribute.add()
            copy.CopyFrom(source)
            copy.name = attribute.name
        else:
            copy = made.attribute.add()
            copy.CopyFrom(attribute)
            for graph in (copy.g, *copy.graphs):
                nodes = [_with_attributes(n, given, absent) for n in graph.node]
                del graph.node[:]
                graph.node.extend(nodes)
    for number, name in enumerate(made.input):
        if name in absent:
            made.input[number] = ""
    return made


def translate(owner: Translator, proto: onnx.NodeProto, env: Env, depth: int) -> bool:
    """Whether this was a node of control flow, and is translated. Raises Refused."""
    if proto.domain not in ("", "ai.onnx"):
        return False
    if proto.op_type == "If":
        _branch(owner, proto, env, depth)
    elif proto.op_type == "Loop":
        _loop(owner, proto, env, depth)
    elif proto.op_type == "Scan":
        _scan(owner, proto, env, depth)
    else:
        return False
    return True


def subgraph(
    owner: Translator, graph: onnx.GraphProto, env: Env, inputs: Sequence[Val | None], depth: int
) -> list[Val | None]:
    """The results of a subgraph. Raises Refused."""
    inner = dict(env)
    inner.update(zip([i.name for i in graph.input], inputs, strict=False))
    owner.initializers(graph, inner)
    owner.nodes(graph.node, inner, {o.name for o in graph.output}, depth + 1)
    return [inner.get(o.name) for o in graph.output]


def _known(env: Env, name: str, what: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    value = env[name]
    assert value is not None
    if value.known is None or value.known.dtype == object:
        raise Refused(
            f"{what} must be known while importing", "a constant; `fixed=` gives inputs values",
            inputs=sorted(value.depends),
        )
    return value.known


def _branch(owner: Translator, proto: onnx.NodeProto, env: Env, depth: int) -> None:
    """The branch that a known condition chooses; of data, a choice between the results of both."""
    graphs = {a.name: a.g for a in proto.attribute}
    branches = [graphs["then_branch"], graphs["else_branch"]]
    condition = env[proto.input[0]]
    if condition is not None and condition.known is None:
        return _either(owner, proto, env, branches, depth)
    truth = bool(_known(env, proto.input[0], "the condition of `If`").reshape(-1)[0])
    chosen = branches[0 if truth else 1]
    for name, value in zip(proto.output, subgraph(owner, chosen, env, [], depth), strict=False):
        env[name] = value


def _either(
    owner: Translator, proto: onnx.NodeProto, env: Env, branches: Sequence[onnx.GraphProto],
    depth: int,
) -> None:  # fmt: skip
    """Each result of an `If` by a `Where`: what branches compute has no effects. Raises Refused.

    What is wrong in a branch, which may be for other sizes alone, says nothing of the sizes meant.
    """
    condition, before, noted = env[proto.input[0]], len(owner.problems), owner.guesses.copy()
    assert condition is not None

    def refused(why: str) -> Refused:
        return Refused(
            f"an `If` on what is computed, {why}",
            "a condition that is known while importing: `fixed=` gives inputs values, `sizes=` "
            "sizes",
            inputs=sorted(condition.depends),
        )

    both = [subgraph(owner, branch, env, [], depth) for branch in branches]
    if len(owner.problems) > before:
        inside = owner.problems[before]
        del owner.problems[before:]
        owner.guesses = noted
        raise refused(f"of which a branch is refused: {inside.message} (in its node {inside.op})")
    for name, (a, b) in zip(proto.output, zip(*both, strict=True), strict=False):
        if a is None or b is None:  # of what was refused before
            env[name] = None
        elif (a.type, a.held) != (b.type, b.held) or a.rows or b.rows:
            raise refused(f"whose branches give {a.type} and {b.type}")
        else:
            scalar = owner.constant("scalar", np.zeros(0, np.int64))
            inner: Env = {"c": condition, "a": a, "b": b, "scalar": scalar}
            if condition.rank:
                owner.node(onnx.helper.make_node("Reshape", ["c", "scalar"], ["c"]), inner, depth)
            owner.node(onnx.helper.make_node("Where", ["c", "a", "b"], [name]), inner, depth)
            env[name] = inner[name]


def _loop(owner: Translator, proto: onnx.NodeProto, env: Env, depth: int) -> None:
    """A loop of a known number of turns: a scan, or where its body is none, turn after turn."""
    (graph,) = [a.g for a in proto.attribute if a.name == "body"]
    trips = env[proto.input[0]] if proto.input[0] else None
    if trips is None:
        raise Refused("a loop without a number of turns", "a number of turns that is known")
    count = scans.count_of(trips)
    if count is None:
        raise Refused("the number of turns of `Loop` must be known while importing",
                      "a constant; `fixed=` gives inputs values", inputs=sorted(trips.depends))
    going = True
    if len(proto.input) > 1 and proto.input[1]:
        going = bool(_known(env, proto.input[1], "the condition of `Loop`").reshape(-1)[0])
    states = [v for i in proto.input[2:] if i and (v := env[i]) is not None]
    always = owner.constant("going", np.array(True))
    steps = scans.Steps(
        lambda inputs: subgraph(owner, graph, env, inputs, depth),
        count if going else const(0), states, _hints(proto),
        lambda turn, carried: [owner.constant(turn, np.array(sym(turn), object)), always, *carried],
        1,
    )
    try:
        carried, gathered = scans.write(owner, steps)
    except Refused as refused:
        number = count.as_int()
        if number is None or number > MAX_TRIPS:
            raise refused
        return _unrolled(owner, proto, graph, env, states, number if going else 0, depth)
    _bind(proto, env, [*carried, *gathered])


def _unrolled(
    owner: Translator, proto: onnx.NodeProto, graph: onnx.GraphProto, env: Env,
    states: Sequence[Val], trips: int, depth: int,
) -> None:
    """The turns of a loop one after another; it may end early, by a condition that is known."""
    carried: list[Val | None] = list(states)
    scanned: list[list[Val]] = [[] for _ in graph.output[1 + len(carried):]]
    for turn in range(trips):
        given = [owner.constant("turn", np.array(turn, np.int64)),
                 owner.constant("going", np.array(True)), *carried]
        found = subgraph(owner, graph, env, given, depth)
        if any(f is None for f in found):
            env.update({name: None for name in proto.output if name})
            return
        condition = found[0]
        if condition is None or condition.known is None:
            raise Refused("a loop whose end depends on data", "a number of turns that is known",
                          inputs=sorted(condition.depends) if condition is not None else ())
        carried = found[1 : 1 + len(carried)]
        for kept, value in zip(scanned, found[1 + len(carried) :], strict=True):
            assert value is not None
            kept.append(value)
        if not bool(condition.known.reshape(-1)[0]):
            break
    _finish(owner, proto, env, carried, scanned)


def _scan(owner: Translator, proto: onnx.NodeProto, env: Env, depth: int) -> None:
    """A scan over axes of some values; that of opset 8 is one for each element of a batch."""
    attributes = {a.name: a for a in proto.attribute}
    graph, number = attributes["body"].g, attributes["num_scan_inputs"].i
    batched = owner.opsets["ai.onnx"] < 9
    if batched and proto.input[0]:
        raise Refused("sequences of different lengths", "all of one length")
    values = [v for i in proto.input if i and (v := env[i]) is not None]
    if not 1 <= number <= len(values):
        raise Refused(f"a scan over {number} of its {len(values)} inputs")
    states, sources = values[: len(values) - number], values[len(values) - number :]
    outputs = len(graph.output) - len(states)

    def listed(name: str, length: int) -> list[int]:
        return list(attributes[name].ints) if name in attributes else [0] * length

    back = listed("directions" if batched else "scan_input_directions", number)
    axes, ahead = listed("scan_input_axes", number), listed("scan_output_directions", outputs)
    places = listed("scan_output_axes", outputs)

    def one(given: Sequence[Val | None]) -> list[Val]:
        """The results for states and sources."""
        there = [v for v in given if v is not None]
        states, sources = there[: len(there) - number], there[len(there) - number :]
        along = [a % v.rank for a, v in zip(axes, sources, strict=True)]
        count = sources[0].shape[along[0]]

        def inputs(turn: str, carried: list[Val]) -> list[Val]:
            at = [size_text(count - 1 - sym(turn)) if b else turn for b in back]
            cut = zip(sources, along, at, strict=True)
            return [*carried, *(_element(owner, v, axis, place) for v, axis, place in cut)]

        body = scans.Steps(lambda given: subgraph(owner, graph, env, given, depth), count, states,
                           _hints(proto), inputs, 0, ahead)  # fmt: skip
        carried, gathered = scans.write(owner, body)
        return [*carried, *(_moved(owner, v, a) for v, a in zip(gathered, places, strict=True))]

    if not batched:
        return _bind(proto, env, one(values))
    each = scans.Steps(one, sources[0].shape[0], [], _hints(proto),
                       lambda turn, _: [_element(owner, v, 0, turn) for v in values])  # fmt: skip
    _bind(proto, env, scans.write(owner, each)[1])


def _hints(proto: onnx.NodeProto) -> list[str]:
    return [name or "unused" for name in proto.output]


def _bind(proto: onnx.NodeProto, env: Env, values: Sequence[Val]) -> None:
    env.update((name, v) for name, v in zip(proto.output, values, strict=False) if name)


def _moved(owner: Translator, value: Val, axis: int) -> Val:
    """A value with its first axis at another place."""
    axis %= value.rank
    if axis == 0:
        return value
    order = [*range(1, axis + 1), 0, *range(axis + 1, value.rank)]
    name = owner.names.value(value.text)
    owner.body.add(f"{name} = transpose({value.text}, {order})")
    return Val(name, owner.body.tensor(name), None, value.depends)


def _element(owner: Translator, value: Val, axis: int, at: str) -> Val:
    """One position of an axis."""
    name, text = owner.names.value("part"), owner.materialize(value)
    cut = ", ".join(at if k == axis else ":" for k in range(value.rank))
    owner.body.add(f"{name} = {text}[{cut}]")
    return Val(name, owner.body.tensor(name), None, value.depends)


def _finish(
    owner: Translator, proto: onnx.NodeProto, env: Env, carried: list[Val | None],
    scanned: list[list[Val]],
) -> None:
    """The results: what was carried last, and what was kept of each turn, stacked."""
    results = list(carried)
    for values in scanned:
        if not values:
            raise Refused("a loop of no turns that stacks results", "results of a known shape")
        name = owner.names.value(proto.output[len(results)] or "stacked")
        parts = ", ".join(owner.materialize(v) for v in values)
        owner.body.add(f"{name} = stack([{parts}])")
        depends = frozenset[str]().union(*(v.depends for v in values))
        results.append(Val(name, owner.body.tensor(name), None, depends))
    for output, value in zip(proto.output, results, strict=False):
        if output:
            env[output] = value
