"""A group of nodes becomes one kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import (
    Graph,
    Ref,
)
from stagefuse.compiler.kernel_ir import Checked, Kernel, Load, Operand, Statement, Value
from stagefuse.compiler.kernel_text import values_of
from stagefuse.compiler.schedule import Schedule
from stagefuse.dsl.dims import Expr, const, floordiv
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.frozen import frozen

from .bands import in_bands
from .blocks import Parallel, Sites
from .convolution import lower_product
from .digits import in_digits
from .expressions import at_least_one, bound_names, exprs_of, product_of
from .pointwise import in_blocks, lower_pointwise
from .products import lower_chain
from .rows import lower_row
from .sequences import lower_scan, lower_scatter, lower_sort
from .short_rows import in_turned_rows
from .squares import CPU_SQUARES, in_squares
from .turned_panels import in_turned_panels
from .updates import lower_update
from .values import Lowering


@frozen
class Lowered:
    """A kernel with the graph values that its buffers are, in order."""

    kernel: Kernel
    values: tuple[Ref, ...]
    count: Expr
    grain: Expr
    label: str
    nodes: tuple[int, ...]
    reports: bool


FORMS: dict[str, Callable[[Lowering], Parallel]] = {
    "pointwise": lambda low: _pointwise(low, lower_pointwise(low)),
    "row": lambda low: in_turned_rows(low, lower_row(low)),
    "contract": lower_product,
    "chain": lower_chain,
    "scan": lower_scan,
    "sort": lower_sort,
    "scatter": lower_scatter,
    "update": lower_update,
}


def _pointwise(low: Lowering, made: Parallel) -> Parallel:
    """A pointwise kernel that was made, in the forms that help."""
    made = in_turned_panels(low, made)
    made = in_digits(low, in_squares(low, made, CPU_SQUARES))
    return in_bands(low, in_blocks(low, made))


def lower(graph: Graph, group: Group, sites: Sites, schedule: Schedule) -> Lowered:
    """The kernel of a group, named by its content."""
    return finish(Lowering(graph, group, sites, schedule), FORMS)


def finish(low: Lowering, forms: Mapping[str, Callable[[Lowering], Parallel]]) -> Lowered:
    """The kernel of a lowering that has made nothing yet."""
    graph, group = low.graph, low.group
    parallel, work = forms[group.kind](low)
    body = tuple(low.scopes[0].body)
    count = product_of([extent for _, extent in parallel]) * group.when
    used = _names_in(body)
    kept = {ref: b for ref, b in low.buffers.items() if b.mode != "in" or b.name in used}
    buffers = tuple(kept.values())
    exprs = exprs_of(body) | {e for b in buffers for e in b.shape} | {e for _, e in parallel}
    loops = {name for name, _ in parallel} | bound_names(body)
    dims = tuple(sorted(frozenset[str]().union(*(e.symbols() for e in exprs)) - loops))
    kernel = Kernel("", buffers, dims, tuple(parallel), body, guarded=group.kind == "update")
    digest = hashlib.sha256(fingerprint(kernel).encode()).hexdigest()[:10]
    label = label_of(graph, group)
    kernel = replace(kernel, name=f"k_{digest}", label=label)
    least = low.schedule.turn_flops if group.nest else low.schedule.step_flops
    grain = floordiv(const(least) + work - 1, at_least_one(work))
    nodes = tuple(sorted(group.members))
    return Lowered(kernel, tuple(kept), count, grain, label, nodes, _reports(body))


def _names_in(body: Sequence[Statement]) -> set[str]:
    """The buffers that statements name: some were asked for only to know where they lie."""
    found: set[str] = set()
    for statement in walk(body):
        own = [getattr(statement, f.name) for f in fields(statement)]
        found |= {x for x in own if isinstance(x, str)}
        found |= {x.buffer for x in own if isinstance(x, Operand)}
        parts = (p for value in values_of(statement) for p in post_order(value))
        found |= {p.buffer for p in parts if isinstance(p, Load)}
    return found


def label_of(graph: Graph, group: Group) -> str:
    """Where in the source the kernel of a group comes from."""
    return graph.nodes[group.source(group.roots[0]).node].label or "kernel"


def _reports(body: Sequence[Statement]) -> bool:
    """Whether statements may note a position in the status."""
    return any(
        isinstance(part, Checked) and not part.proved
        for statement in walk(body)
        for value in values_of(statement)
        for part in post_order(value)
    )


def fingerprint(kernel: Kernel) -> str:
    """A text that is the same for the same kernel; a shared value stands in it once."""
    numbers: dict[str, int] = {}
    known: dict[int, str] = {}

    def of(part: Any) -> str:
        if isinstance(part, tuple):
            return f"({','.join(map(of, part))})"
        if not is_dataclass(part) or isinstance(part, Expr | DType):
            return repr(part)
        if id(part) not in known:
            inside = (of(getattr(part, f.name)) for f in fields(part))
            text = f"{type(part).__name__}({','.join(inside)})"
            if isinstance(part, VALUES):
                text = f"%{numbers.setdefault(text, len(numbers))}"
            known[id(part)] = text
        return known[id(part)]

    whole = of(kernel)
    return "\n".join((*numbers, whole))


VALUES = get_args(Value)
