"""Pipelines to GPU plans: fused groups to launches, kernels to one module per arch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from stagefuse.compiler.buffers import Buffers, size_of
from stagefuse.compiler.fusion.alike import Copies
from stagefuse.compiler.fusion.beside import beside
from stagefuse.compiler.fusion.finish_wholes import finish_wholes
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.groups import Decision, Group, Partition
from stagefuse.compiler.fusion.in_place import arrange
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.fusion.layers import Layers, Numbered
from stagefuse.compiler.graph import Contract, Graph, Node
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.compiler.lower import Lowered, Sites, finish
from stagefuse.compiler.plan import GpuLaunchPlan, GpuPlan, PipelinePlan, Plan, TensorMapPlan
from stagefuse.compiler.report import describe, report
from stagefuse.compiler.tuned import RULES, Choices, Measured
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.program import Pipeline

from .again import again
from .aliases import alias_of
from .assemble import Usage
from .attention.chain import LONGEST
from .attention.warp_roles import RolesWriter, attends
from .draft import Draft, SourceLowering
from .drafts import drafts, families
from .emit import Entry, KernelWriter
from .flight import Flight, flight_of
from .launches import Launches
from .matmul.decoded_first import UnfoldedWriter
from .matmul.epilogue import form_of
from .matmul.mma import EIGHTS
from .matmul.operands import sums_roughly
from .matmul.persistent import PersistentWriter
from .matmul.pooled_epilogue import pooling_of
from .matmul.pooled_tiles import PooledWriter
from .modules import Modules
from .predict import largest
from .recurrence.lowering import (
    TILES,
    TOO_LARGE,
    Resident,
    launch_of,
    reason,
    regions,
    resident,
    start_kernel,
    start_launch,
)
from .recurrence.stage import Unfit
from .reductions.split_reductions import LEAST, whole
from .sequences.long_sorts import without_orders
from .structures import candidates, made_by
from .targets import ARCHES, SHARED_LIMIT, arithmetic_of, loaded_ahead, occupancy
from .tensor_maps import TensorMap

JOINS = (
    "placed", "attended", "decoded", "chained", "gathered", "coded", "halved", "direct", "turned",
    "placed", "chosen", "reduced", "finished", "pooled",
)  # fmt: skip
START = "sf_start"
"""The entry that sets a counter to 0."""
TUNED = ("contract", "attention")
"""Groups whose structure can be measured."""


def _kernels_of(graph: Graph, apart: frozenset[int]) -> Partition:
    """What each kernel computes."""
    found = beside(graph, join(graph, partition(graph, apart), JOINS, LONGEST), LEAST)
    return without_orders(graph, finish_wholes(graph, found, whole))


class Way(NamedTuple):
    """A kernel of a group for some arches, with a factor of its grid that is 1 or 0, what part of
    the group it is, and why there is one of its own, if that is to be said."""

    arches: tuple[str, ...]
    entry: Entry
    share: Expr
    part: str
    notes: Mapping[str, Any]
    why: str


class Region(NamedTuple):
    """The groups of a recurrence, and what they are part of."""

    pipeline: Pipeline
    graph: Graph
    groups: Sequence[Group]
    buffers: Buffers
    sites: Sites


class GpuCompiler:
    """Compiles pipelines for arches; kernels are shared by all of a file."""

    def __init__(self, arches: Sequence[str], source_name: str, choices: Choices = RULES) -> None:
        self.choices = choices
        self.arches = tuple(arches)
        self.entries: dict[object, Entry] = {}
        self.arithmetic: dict[str, str] = {}  # of kernels, as `Target.rate` has it
        self.flights: dict[str, Flight] = {}
        self.kernels: dict[str, Kernel] = {}
        self.modules = Modules(self.arches, source_name)

    def plan(
        self,
        pipeline: Pipeline,
        graph: Graph,
        buffers_of: Callable[[Graph], Buffers],
        sites: Sites,
        passed: Mapping[Any, str],
    ) -> tuple[tuple[GpuPlan, ...], list[tuple[Kernel, Graph]]]:
        """The plans of a pipeline whose graph has been through the passes, and the kernels that no
        pipeline before had, each with the graph that it is of."""
        fresh: list[tuple[Kernel, Graph]] = []
        graph, found = arrange(graph, _kernels_of)
        buffers = buffers_of(graph)
        reasons = {d.node: d for d in found.decisions}
        made = Launches(self.arches)
        layers, copies = Layers(graph, found.groups), Copies[Way](graph)
        for region in regions(found.groups):
            said: list[dict[str, Any]] | None = []
            if region[0].nest:
                said = self._recurrence(
                    Region(pipeline, graph, region, buffers, sites), reasons, passed, made, fresh
                )
            for group in () if said is None else region:
                own, stands = layers.of(group), alias_of(graph, group)
                if stands is not None:
                    buffers.alias(*stands)
                alike = copies.of(own.graph, group)
                if not alike.made:
                    alike.keep(self._kernels(pipeline, own.graph, group, sites, fresh))
                for lowered, way in alike.made:
                    lowered = replace(lowered, label=f"{lowered.label} {way.part}".strip())
                    notes = report(graph, lowered, reasons, passed, group.nest)
                    work, moved = again(graph, lowered, way.entry.workspace is not None)
                    for name, more in (("flops", work), ("bytes", moved)):
                        notes[name] = str(parse(notes[name]) + own.known(more))
                    notes.update(way.notes)
                    notes.update(way.entry.said)
                    notes["reasons"] += said or ()
                    if way.why:
                        because = {"node": "matmul", "fused": False, "because": way.why}
                        notes["reasons"].append(because)
                    launch = self._launch(buffers, lowered, way, own, notes)
                    made.add(way.arches, launch, group.nest)
                made.settle(group.nest)
        return made.plans(graph, buffers), fresh

    def _recurrence(
        self,
        region: Region,
        reasons: Mapping[int, Decision],
        passed: Mapping[Any, str],
        made: Launches,
        fresh: list[tuple[Kernel, Graph]],
    ) -> list[dict[str, Any]] | None:
        """Adds the launches of a recurrence as one kernel. Gives why there are launches at each
        step, None where there need be none."""
        graph = region.graph
        try:
            one = resident(graph, region.groups, region.sites, region.buffers.of)
            entry = self._resident(region, one)
        except Unfit as unfit:
            return [reason(False, str(unfit))]
        for x in one.lowered:
            if self.kernels.setdefault(x.kernel.name, x.kernel) is x.kernel:
                fresh.append((x.kernel, graph))
        told = [report(graph, x, reasons, passed) for x in one.lowered]
        waits = one.writer.waits
        counters = [region.buffers.counter(f"{entry.name} counter")] if waits else []
        starts = [start_launch(self._start(graph), counter) for counter in counters]
        for launch in (*starts, launch_of(graph, one, entry, counters, told)):
            made.add(self.arches, launch, ())
            made.settle(())
        if one.holds == const(1):
            return None
        made.shares[region.groups[0].nest[0]] = 1 - one.holds
        return [reason(False, f"at some sizes {TILES if one.writer.has_products else TOO_LARGE}")]

    def _resident(self, region: Region, one: Resident) -> Entry:
        """The entry of a recurrence, the same for those that are alike. Raises Unfit."""
        if one.key not in self.entries:
            name = self._name(region.pipeline, f"{one.lowered[0].label} steps")
            entry = one.writer.entry(
                name, [t for x in one.lowered for t in _notes(region.graph, x)]
            )
            self.entries[one.key] = entry
            self._describe(entry)
            self.modules.add(self.arches, entry)
        return self.entries[one.key]

    def _start(self, graph: Graph) -> Entry:
        """The entry that sets a counter to 0."""
        kernel = start_kernel()
        if kernel not in self.entries:
            writer = KernelWriter(kernel, graph.facts, SHARED_LIMIT, {})
            self.entries[kernel] = writer.entry(START, [])
            self._describe(self.entries[kernel])
            self.modules.add(self.arches, self.entries[kernel])
        return self.entries[kernel]

    def _kernels(
        self,
        pipeline: Pipeline,
        graph: Graph,
        group: Group,
        sites: Sites,
        fresh: list[tuple[Kernel, Graph]],
    ) -> list[tuple[Lowered, Way]]:
        """The kernels of a group, made; those that none before were are added to `fresh`."""
        made: list[tuple[Lowered, Way]] = []

        def add(
            draft: Draft, lowered: Lowered, arches: tuple[str, ...], share: Expr, notes: Any
        ) -> None:
            kernel = lowered.kernel
            if self.kernels.setdefault(kernel.name, kernel) is kernel:
                fresh.append((kernel, draft.low.graph))
            name = f"{lowered.label} {draft.part}".strip()
            entry = self._entry(pipeline, graph, lowered, draft.low, name)
            self.modules.add(arches, entry)
            made.append((lowered, Way(arches, entry, share, draft.part, notes, draft.why)))

        def lowered_of(draft: Draft, arch: str) -> Lowered:
            if sums_roughly(graph, group):
                draft.low.eights = EIGHTS[arch]
            return finish(draft.low, draft.forms)

        for arches in families(graph, group, self.arches):
            rules = [(d, lowered_of(d, arches[0])) for d in drafts(graph, group, sites, arches)]
            form = _form_of([lowered for _, lowered in rules])
            notes = {"form": form} if group.kind in TUNED else {}
            for same, entries in self._chosen(graph, group, arches, form, rules):
                others = const(1)
                for entry in entries:
                    found = made_by(entry.changes, graph, group, sites, same[0])
                    if found is None:
                        continue
                    share = graph.facts.simplify(_within(entry) * found.holds * others)
                    others = graph.facts.simplify(others - share)
                    said = {"tuned": {"entry": entry.name, "on": entry.device, **entry.changes}}
                    for draft in found.drafts if share != const(0) else ():
                        lowered = lowered_of(draft, same[0])
                        add(draft, lowered, same, share * draft.share, {**notes, **said})
                for draft, lowered in rules if others != const(0) else ():
                    add(draft, lowered, same, draft.share * others, notes)
        return made

    def _chosen(
        self,
        graph: Graph,
        group: Group,
        arches: Sequence[str],
        form: str,
        rules: Sequence[tuple[Draft, Lowered]],
    ) -> list[tuple[tuple[str, ...], Sequence[Measured]]]:
        """What is measured of a group, by the arches that it is the same for."""
        if group.kind not in TUNED:
            return [(tuple(arches), ())]
        dims = sorted({d for _, lowered in rules for d in lowered.kernel.dims})
        found: dict[tuple[str, ...], list[str]] = {}
        entries: dict[tuple[str, ...], Sequence[Measured]] = {}
        for arch in arches:
            options = partial(candidates, graph, group, arch)
            chosen = self.choices.structures(arch, form, dims, options)
            key = tuple(f"{e.device} {e.name} {e.changes}" for e in chosen)
            found.setdefault(key, []).append(arch)
            entries[key] = chosen
        return [(tuple(same), entries[key]) for key, same in found.items()]

    def _entry(
        self, pipeline: Pipeline, graph: Graph, lowered: Lowered, low: SourceLowering, label: str
    ) -> Entry:
        kernel = lowered.kernel
        facts = low.sizes
        wide = low.warpgroups or bool(low.schedule.tile_columns)
        form = None if low.whole is None else form_of(kernel)
        key = (
            kernel.name,
            wide,
            low.eights,
            str(low.whole),
            str(low.boxes),
            low.unfolds,
            *(str(facts.ranges.get(d)) for d in kernel.dims),
            str(facts.divisible),
        )
        if key not in self.entries:
            name = self._name(pipeline, label)
            limit = ARCHES["sm_90a"].block_shared if wide else SHARED_LIMIT
            if form is not None and low.whole is not None:
                kind = PooledWriter if pooling_of(graph, low.group) else PersistentWriter
                writer: KernelWriter = kind(kernel, facts, limit, low.lines, form, low.whole)
            elif wide and attends(kernel):
                writer = RolesWriter(kernel, facts, limit, low.lines)
            elif low.unfolds:
                writer = UnfoldedWriter(kernel, facts, limit, low.lines)
            else:
                writer = KernelWriter(kernel, facts, limit, low.lines, wide, low.boxes)
            writer.eights = low.eights
            self.entries[key] = writer.entry(name, _notes(graph, lowered))
            self._describe(self.entries[key])
        return self.entries[key]

    def _describe(self, entry: Entry) -> None:
        """Keeps what predictions need of an entry's text."""
        self.arithmetic[entry.name] = arithmetic_of(entry.text)
        self.flights[entry.name] = flight_of(entry.text, entry.turns)

    def _name(self, pipeline: Pipeline, label: str) -> str:
        """A name from the source, numbered in the order of the file."""
        stem = label if label.startswith(pipeline.name) else f"{pipeline.name} {label}"
        stem = re.sub(r"\W+", "_", stem).strip("_")
        return f"{stem}_{len(self.entries)}"

    def _launch(
        self, buffers: Buffers, lowered: Lowered, way: Way, own: Numbered, notes: dict[str, Any]
    ) -> GpuLaunchPlan:
        entry = way.entry
        used = [
            buffers.of(ref) if ref.node >= 0 else self._apart(buffers, lowered, n)
            for n, ref in enumerate(lowered.values)
        ]
        writes = [
            used[n] for n, b in enumerate(lowered.kernel.buffers) if b.mode in ("out", "inout")
        ]
        if entry.workspace is not None:
            size = own.known(entry.workspace)
            used.append(buffers.scratch(f"{entry.name} workspace", size))
            writes.append(used[-1])
        return GpuLaunchPlan(
            entry.name, (str(own.known(entry.grid * way.share)), "1", "1"),
            (entry.team.threads, 1, 1), (entry.cluster, 1, 1),
            str(own.known(entry.shared_bytes)), tuple(used), own.dims(lowered.kernel.dims),
            lowered.label, notes, tuple(dict.fromkeys(writes)), lowered.reports,
            lowered.kernel.guarded,
            tuple(_map_plan(lowered.kernel, used, found, own) for found in entry.maps),
            entry.stays,
        )  # fmt: skip

    def _apart(self, buffers: Buffers, lowered: Lowered, number: int) -> int:
        """The buffer of what is no value of the graph, made for the kernel that writes it: a
        product's parts, or a matrix that is unfolded. It takes no memory where none runs."""
        ref, buffer = lowered.values[number], lowered.kernel.buffers[number]
        if ref not in buffers.index:
            node = -1 - ref.node
            parts = isinstance(buffers.graph.nodes[node].primitive, Contract)
            name, size = "parts" if parts else "matrix", size_of(buffer.shape)
            buffers.index[ref] = buffers.scratch(f"{name} of t{node}", size, buffer.dtype)
        return buffers.index[ref]

    def start(self) -> None:
        """Has the last kernels assembled, when all pipelines are planned."""
        self.modules.start()

    def stop(self) -> None:
        """Ends what is not waited for."""
        self.modules.stop()

    def finish(self, plan: Plan) -> Plan:
        """The plan with modules, machine code and what is known of each launch."""
        self.modules.wait()
        usage = self.modules.usage()
        pipelines = tuple(self._reported(p, usage) for p in plan.pipelines)
        return replace(
            plan, pipelines=pipelines, ptx=self.modules.texts(), cubins=self.modules.cubins()
        )

    def _reported(
        self, pipeline: PipelinePlan, usage: Mapping[str, Mapping[str, Usage]]
    ) -> PipelinePlan:
        plans = []
        for gpu in pipeline.gpu:
            sizes, said = largest(pipeline.dims), usage[gpu.arch]
            launches = tuple(
                replace(x, report={**x.report, **self._figures(x, gpu.arch, said, sizes)})
                for x in gpu.launches
            )
            plans.append(replace(gpu, launches=launches))
        return replace(pipeline, gpu=tuple(plans))

    def _figures(
        self, launch: GpuLaunchPlan, arch: str, usage: Mapping[str, Usage], sizes: dict[str, int]
    ) -> dict[str, Any]:
        """What predictions need beside work and grid: registers, spills, occupancy at sizes,
        arithmetic; and the arch that the code was assembled for, if that is another."""
        if launch.kernel not in usage:
            return {}
        used, code = usage[launch.kernel], self.modules.assembled_for(arch, launch.kernel)
        shared = parse(launch.shared_bytes).evaluate(sizes) + used.shared
        resident, limit = occupancy(ARCHES[arch], launch.block[0], used.registers, shared)
        flight = self.flights[launch.kernel]
        issued = flight.instructions.as_int()
        return {
            "registers": used.registers,
            "spill bytes": used.spill_stores + used.spill_loads,
            "shared bytes": shared,
            "blocks per SM": resident,
            "occupancy": round(resident * launch.block[0] / ARCHES[arch].threads, 3),
            "occupancy limit": limit,
            "arithmetic": self.arithmetic[launch.kernel],
            "bytes ahead": loaded_ahead(flight.ahead, used.registers),
            "instructions": issued if issued is not None else str(flight.instructions),
            **({} if code == arch else {"code of": code}),
        }


def _form_of(rules: Sequence[Lowered]) -> str:
    """A name for what the rules make of a group, by its content."""
    names = " ".join(lowered.kernel.name for lowered in rules)
    return f"p_{hashlib.sha256(names.encode()).hexdigest()[:10]}"


def _within(entry: Measured) -> Expr:
    """1 for sizes that an entry holds for, else 0."""
    share = const(1)
    for dim, low, high in entry.ranges:
        if low:
            share = share * minimum(floordiv(sym(dim), low), const(1))
        share = share * (1 - minimum(floordiv(sym(dim), high + 1), const(1)))
    return share


def _map_plan(
    kernel: Kernel, used: Sequence[int], found: TensorMap, own: Numbered
) -> TensorMapPlan:
    number = next(n for n, b in enumerate(kernel.buffers) if b.name == found.buffer)
    sizes, strides = (tuple(str(own.known(e)) for e in x) for x in (found.sizes, found.strides))
    return TensorMapPlan(
        used[number], str(own.known(found.offset)), sizes, strides, found.box, found.swizzle,
        found.lower, found.upper, found.steps,
    )  # fmt: skip


def _notes(graph: Graph, lowered: Lowered) -> list[str]:
    """One comment for each node that a kernel computes."""
    found = []
    for number in lowered.nodes:
        node: Node = graph.nodes[number]
        line = "" if node.span is None else f", line {node.span.line}"
        shape = ", ".join(map(str, node.type.shape))
        found.append(f"node {number}: {describe(node)} {node.type.dtype}[{shape}]{line}")
    return found
