"""The buffers of a pipeline on one target: inputs, results, stored arrays, the arena's slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES, U8, DType
from stagefuse.dsl.numpy_later import np
from stagefuse.dsl.program import Pipeline

from .graph import Graph, Input, Node, Recurrence, Ref, State, Update, Weight
from .plan import AliasPlan, ArgumentPlan, BufferPlan, LoopPlan, StatePlan, constant_name
from .scalar import convert

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]


class Buffers:
    """Buffers in the order in which they are first asked for; inputs and results come first.

    `stored` are the arrays of weights and constants, by value of the graph; `arrays` collects
    those in use, by name, for all pipelines of a file.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        graph: Graph,
        stored: Mapping[Ref, Array],
        arrays: dict[str, Array],
    ) -> None:
        self.pipeline, self.graph, self.stored, self.arrays = pipeline, graph, stored, arrays
        self.plans: list[BufferPlan] = []
        self.index: dict[Ref, int] = {}
        self.aliases: list[AliasPlan] = []
        self.named: dict[Ref, tuple[str, str]] = {}  # the role and name of stored arrays
        self.inputs = self._inputs()
        self.results = self._results()
        self.states = self._states()

    def _inputs(self) -> tuple[ArgumentPlan, ...]:
        found: list[ArgumentPlan] = []
        nodes = {n.primitive.name: n for n in self.graph.nodes.values()
                 if isinstance(n.primitive, Input)}  # fmt: skip
        for name, type, _ in self.pipeline.inputs:
            number = len(self.plans)
            shape = shape_text(type.shape)
            self.plans.append(BufferPlan(name, str(type.dtype), shape, "input"))
            if name in nodes:
                self.index[Ref(nodes[name].id)] = number
            found.append(ArgumentPlan(name, str(type.dtype), shape, number))
        return tuple(found)

    def _results(self) -> tuple[ArgumentPlan, ...]:
        found: list[ArgumentPlan] = []
        for number, (name, _) in enumerate(self.pipeline.results):
            ref = self.graph.results[number]
            type, at = self.graph.type(ref), len(self.plans)
            dtype, shape = str(type.dtype), shape_text(type.shape)
            self.index[ref] = self.index[self._home(ref)] = at
            self.plans.append(BufferPlan(name or f"result{number}", dtype, shape, "result"))
            found.append(ArgumentPlan(name, dtype, shape, at))
        return tuple(found)

    def _states(self) -> tuple[StatePlan, ...]:
        found: list[StatePlan] = []
        nodes = {n.primitive.name: n for n in self.graph.nodes.values()
                 if isinstance(n.primitive, State)}  # fmt: skip
        for state in self.pipeline.states:
            number = len(self.plans)
            dtype, shape = state.type.dtype, shape_text(state.type.shape)
            self.plans.append(BufferPlan(state.name, str(dtype), shape, "state"))
            if state.name in nodes:
                self.index[Ref(nodes[state.name].id)] = number
            value, array = state.initial, None
            if isinstance(value, tuple):
                array, value = "/".join(value), 0
            initial = convert(np.asarray(value), dtype).astype(dtype.numpy).tobytes().hex()
            found.append(StatePlan(state.name, str(dtype), shape, number, initial, array))
        return tuple(found)

    def of(self, ref: Ref) -> int:
        """The buffer of a value, made if there is none yet.

        What a recurrence carried last lies where it is carried, and an update where its base lies.
        """
        ref = self._home(ref)
        if ref not in self.index:
            type = self.graph.type(ref)
            self.index[ref] = len(self.plans)
            role, array = "arena", None
            if ref in self.stored:
                role, array = self._name(ref)
                self.arrays.setdefault(array, self.stored[ref])
            name = self.graph.nodes[ref.node].label or f"t{ref.node}"
            shape = shape_text(type.shape)
            self.plans.append(BufferPlan(name, str(type.dtype), shape, role, None, array))
        return self.index[ref]

    def _home(self, ref: Ref) -> Ref:
        """The value in whose memory a value lies."""
        while ref.node >= 0:
            node = self.graph.nodes[ref.node]
            if isinstance(node.primitive, Recurrence) and ref.result < node.primitive.carried:
                ref = node.operands[ref.result]
            elif isinstance(node.primitive, Update):
                ref = node.operands[0]
            else:
                break
        return ref

    def scratch(self, name: str, size: Expr, dtype: DType = U8) -> int:
        """A new buffer of so many elements for one step."""
        self.plans.append(BufferPlan(name, str(dtype), (str(size),), "arena"))
        return len(self.plans) - 1

    def counter(self, name: str) -> int:
        """A new buffer of one number, by which the blocks of a kernel wait for each other."""
        self.plans.append(BufferPlan(name, "i32", ("1",), "arena"))
        return len(self.plans) - 1

    def alias(self, ref: Ref, of: Ref, when: Expr) -> None:
        """Says that a value is another one at sizes at which an expression is 1, not 0: it is read
        where that one lies, which lives as long."""
        self.aliases.append(AliasPlan(self.of(ref), self.of(of), str(when)))

    def expected(self) -> dict[str, Array]:
        """`arrays` with those that nodes read: what it will be, unless a kernel does without."""
        used = {ref for node in self.graph.nodes.values() for ref in node.operands}
        used.update(self.graph.results)
        read = {self._name(ref)[1]: array for ref, array in self.stored.items() if ref in used}
        return {**self.arrays, **read}

    def _name(self, ref: Ref) -> tuple[str, str]:
        if ref not in self.named:
            self.named[ref] = _role_and_name(self.graph.nodes[ref.node], self.stored[ref])
        return self.named[ref]

    def slots(
        self, steps: Sequence[Sequence[int]], loops: Sequence[LoopPlan] = (), in_turn: bool = False
    ) -> tuple[str, ...]:
        """Places arena buffers, given those that each step uses: those of one size that live at
        different times share a slot. So do those of known other sizes where steps run `in_turn`,
        so that none of them waits for that: the slot is as large as the largest, which leaves more
        of the caches to the others. Gives the slots' sizes."""
        last: dict[int, int] = {}
        first: dict[int, int] = {}
        stands = {alias.buffer: alias.of for alias in self.aliases}
        for number, buffers in enumerate(steps):
            for used in with_stand_ins(buffers, stands):
                last[used] = number
                first.setdefault(used, number)
        for loop in reversed(loops):  # what lives into or out of a loop lives all through it
            for used, begin in first.items():
                touches = begin < loop.end and last[used] >= loop.first
                if touches and (begin < loop.first or last[used] >= loop.end):
                    first[used] = min(begin, loop.first)
                    last[used] = max(last[used], loop.end - 1)
        slots: list[tuple[Expr, int]] = []  # size and the last step of the present tenant
        for index in sorted(first, key=lambda b: (first[b], b)):
            buffer = self.plans[index]
            if buffer.role != "arena":
                continue
            size = _bytes(buffer)
            free = [n for n, (_, until) in enumerate(slots) if until < first[index]]
            fit = {n: fits for n in free if (fits := _fit(slots[n][0], size, in_turn)) is not None}
            slot = min(fit, key=lambda n: (fit[n], n), default=len(slots))
            has = slots[slot][0] if slot in fit and fit[slot] < (1, 0) else size
            slots[slot : slot + 1] = [(has, last[index])]
            self.plans[index] = replace(buffer, slot=slot)
        return tuple(str(size) for size, _ in slots)


def with_stand_ins(buffers: Sequence[int], stands: Mapping[int, int]) -> Iterator[int]:
    """Buffers, and after each one that others may stand for those."""
    for used in buffers:
        yield used
        while used in stands:
            used = stands[used]
            yield used


def _fit(has: Expr, size: Expr, any_size: bool) -> tuple[int, int] | None:
    """How well a slot suits a buffer, if it does: whether it has to grow, and by how many bytes the
    two differ."""
    if has == size:
        return 0, 0
    there, wanted = has.as_int(), size.as_int()
    if not any_size or there is None or wanted is None:
        return None
    return int(there < wanted), abs(there - wanted)


def _role_and_name(node: Node, array: Array) -> tuple[str, str]:
    """What a stored array is, and its name: of a constant, by its content."""
    if isinstance(node.primitive, Weight):
        return "weight", f"{node.primitive.weights}/{node.primitive.key}"
    return "constant", constant_name(array)


def size_of(shape: Sequence[Expr]) -> Expr:
    """The number of elements."""
    total = const(1)
    for size in shape:
        total = total * size
    return total


def _bytes(buffer: BufferPlan) -> Expr:
    return size_of([parse(d) for d in buffer.shape]) * DTYPES[buffer.dtype].itemsize


def shape_text(shape: Sequence[Expr]) -> tuple[str, ...]:
    return tuple(map(str, shape))
