"""Pipelines to GPU plans: fused groups to launches, kernels to one module per arch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

from stagefuse.compiler.alike import Copies
from stagefuse.compiler.buffers import Buffers, size_of
from stagefuse.compiler.fuse import partition
from stagefuse.compiler.graph import Graph, Node, Scan
from stagefuse.compiler.groups import Group
from stagefuse.compiler.in_place import arrange
from stagefuse.compiler.join import join
from stagefuse.compiler.kernel_ir import Kernel, Value
from stagefuse.compiler.kernel_order import loops_of
from stagefuse.compiler.layers import Layers, Numbered
from stagefuse.compiler.lower import FORMS, Lowered, Sites, finish
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.plan import GpuLaunchPlan, GpuPlan, PipelinePlan, Plan, TensorMapPlan
from stagefuse.compiler.report import describe, report
from stagefuse.compiler.schedule import GPU, GPU_CHAIN, GPU_CODES, GPU_HALF, GPU_TMA, GPU_WGMMA
from stagefuse.dsl.dims import Expr, as_expr, const, floordiv, minimum
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.program import Pipeline

from .assemble import Usage
from .attend_roles import RolesWriter, attends
from .attention import lower_attention, suits_groups
from .attention_split import lower_joined, lower_pieces, split_of
from .boxes import Matrices
from .chain import LONGEST, lower_chain
from .columns import Written, lower_rows
from .contract import (
    holds_codes,
    lower_contract,
    matrices_of,
    operands_of,
    sums_roughly,
    tile_widths,
    whole_of,
)
from .emit import Entry, KernelWriter
from .few_tiles import enough_tiles, low_rows, lower_parts, lower_sum_of_parts, thin
from .mma import EIGHTS
from .modules import Modules
from .persistent import PersistentWriter, Whole
from .pieces import form_of
from .predict import largest
from .scatter import lower_ranges
from .split_scan import lower_stretch_scans, lower_stretches, splits
from .targets import ARCHES, SHARED_LIMIT, arithmetic_of, occupancy
from .teams import WARP_ROW
from .tensor_maps import TensorMap
from .tiles import choices
from .transposed import lower_elements
from .whole import lower_whole_parts, lower_whole_rest, whole

JOINS = ("placed", "attended", "chained", "gathered", "coded", "direct", "halved")
SHORT_ROWS = (256, 1024, 4096)
"""Rows up to these lengths have kernels of their own, whose lanes need no more registers."""
WGMMA = ("sm_90a",)
"""Arches with warpgroup instructions."""
Forms = Mapping[str, Callable[[Lowering], Parallel]]
GPU_FORMS = {
    **FORMS,
    "pointwise": lower_elements,
    "contract": lower_contract,
    "row": lower_rows,
    "scatter": lower_ranges,
    "chain": lower_chain,
    "attention": lower_attention,
}


class SourceLowering(Written):
    """A lowering that remembers the line that each value comes from. `whole`: the matrices of a
    product whose operands come by tensor copies."""

    whole: Whole | None = None

    def __init__(self, *args: Any) -> None:
        self.lines: dict[Value, int] = {}
        self.warpgroups = False
        self.boxes: Matrices | None = None
        self.eights = KernelWriter.eights
        super().__init__(*args)
        self.sizes = self.graph.facts

    def map(self, node: Node, at: tuple[Value, ...], guard: tuple[Value, ...]) -> Value:
        value = super().map(node, at, guard)
        if node.span is not None:
            self.lines.setdefault(value, node.span.line)
        return value


class Way(NamedTuple):
    """A kernel of a group for some arches, with a factor of its grid that is 1 or 0, and what part
    of the group it is."""

    arches: tuple[str, ...]
    entry: Entry
    share: Expr
    part: str


class GpuCompiler:
    """Compiles pipelines for arches; kernels are shared by all of a file."""

    def __init__(self, arches: Sequence[str], source_name: str) -> None:
        self.arches = tuple(arches)
        self.entries: dict[object, Entry] = {}
        self.arithmetic: dict[str, str] = {}  # of kernels, as `Target.rate` has it
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
        graph, found = arrange(
            graph, lambda g, apart: join(g, partition(g, apart), JOINS, LONGEST)
        )
        buffers = buffers_of(graph)
        reasons = {d.node: d for d in found.decisions}
        launches: dict[str, list[GpuLaunchPlan]] = {arch: [] for arch in self.arches}
        nests: dict[str, list[tuple[str, ...]]] = {arch: [] for arch in self.arches}
        uses: list[tuple[list[int], tuple[str, ...]]] = []  # what launches of all arches read
        layers, copies = Layers(graph), Copies[Way](graph)
        for group in found.groups:
            begun = {arch: len(done) for arch, done in launches.items()}
            own = layers.of(group)
            alike = copies.of(own.graph, group)
            if not alike.made:
                alike.keep(self._kernels(pipeline, own.graph, group, sites, fresh))
            for lowered, way in alike.made:
                lowered = replace(lowered, label=f"{lowered.label} {way.part}".strip())
                notes = report(graph, lowered, reasons, passed, group.nest)
                launch = self._launch(buffers, lowered, way, own, notes)
                self.modules.add(way.arches, way.entry)
                for arch in way.arches:
                    launches[arch].append(launch)
                    nests[arch].append(group.nest)
            for step in zip_longest(*(done[begun[arch] :] for arch, done in launches.items())):
                uses.append(([n for x in step if x for n in x.buffers], group.nest))
        slots = buffers.slots([used for used, _ in uses], loops_of(graph, [n for _, n in uses]))
        plans = tuple(buffers.plans)
        made = tuple(
            GpuPlan(arch, plans, tuple(x), slots, loops_of(graph, nests[arch]))
            for arch, x in launches.items()
        )
        return made, fresh

    def _kernels(
        self,
        pipeline: Pipeline,
        graph: Graph,
        group: Group,
        sites: Sites,
        fresh: list[tuple[Kernel, Graph]],
    ) -> list[tuple[Lowered, Way]]:
        """The kernels of a group, made; those that none before were are added to `fresh`."""
        made = []
        for arches in self._families(graph, group):
            for low, forms, share, part in self._lowerings(graph, group, sites, arches):
                if sums_roughly(graph, group):
                    low.eights = EIGHTS[arches[0]]
                lowered = finish(low, forms)
                kernel = lowered.kernel
                if self.kernels.setdefault(kernel.name, kernel) is kernel:
                    fresh.append((kernel, graph))
                name = f"{lowered.label} {part}".strip()
                entry = self._entry(pipeline, graph, lowered, low, name)
                made.append((lowered, Way(arches, entry, share, part)))
        return made

    def _families(self, graph: Graph, group: Group) -> list[tuple[str, ...]]:
        """The arches by what kernels of a group they have in common."""
        if sums_roughly(graph, group):
            return [(a,) for a in self.arches]
        groups = group.kind == "contract" and (
            operands_of(graph, group) is not None or bool(choices(graph, group))
        )
        if group.kind == "attention":
            groups = suits_groups(SourceLowering(graph, group, Sites(), GPU))
        if not groups:
            return [self.arches]
        families = [tuple(a for a in self.arches if (a in WGMMA) == has) for has in (False, True)]
        return [f for f in families if f]

    def _lowerings(
        self, graph: Graph, group: Group, sites: Sites, arches: Sequence[str]
    ) -> Iterator[tuple[SourceLowering, Forms, Expr, str]]:
        """The kernels of a group, each with a factor of its grid that is 1 or 0, and what part of
        the group it is."""
        if whole(graph, group):
            for form, name in ((lower_whole_parts, "parts"), (lower_whole_rest, "")):
                yield SourceLowering(graph, group, sites, GPU), {"row": form}, const(1), name
            return
        if group.kind in ("row", "scan"):
            yield from _rows(graph, group, sites)
            return
        if group.kind == "attention":
            yield from _attentions(graph, group, sites, arches)
            return
        schedule = GPU_CHAIN if group.kind == "chain" else GPU
        whole_product = enough = None
        kind = operands_of(graph, group) if group.kind == "contract" else None
        if kind is not None:
            schedule = GPU_HALF
            if arches[0] in WGMMA and holds_codes(graph, group):
                schedule = GPU_CODES
            elif arches[0] in WGMMA:
                whole_product = whole_of(SourceLowering(graph, group, sites, GPU_TMA))
                schedule = GPU_WGMMA if whole_product is None else GPU_TMA
                enough = enough_tiles(graph, group, whole_product)
        split = thin(graph, group, enough)
        others, summed = const(1), const(0)
        if split is not None and split.low != const(0):
            summed, others = split.low, 1 - split.low
            for rows, share in low_rows(graph, group, split):
                form = partial(lower_parts, split=split, tile_rows=rows)
                yield SourceLowering(graph, group, sites, GPU), {"contract": form}, share, "parts"
        found = choices(graph, group) if arches[0] in WGMMA and others != const(0) else ()
        for choice in found:
            low = SourceLowering(graph, group, sites, GPU)
            low.warpgroups, low.sizes = True, choice.facts
            low.boxes = matrices_of(low, choice.shape)
            share = choice.holds * others
            yield low, {"contract": partial(lower_contract, shape=choice.shape)}, share, ""
        others = others * (1 - sum((c.holds for c in found), const(0)))
        if split is not None:
            few = split.few * others
            if few != const(0):
                form = partial(lower_parts, split=split)
                yield SourceLowering(graph, group, sites, GPU), {"contract": form}, few, "parts"
            others, summed = others - few, summed + few
            if summed != const(0):
                form = partial(lower_sum_of_parts, split=split)
                yield SourceLowering(graph, group, sites, GPU), {"contract": form}, summed, "sum"
        if others == const(0):
            return
        if not schedule.tile_columns or holds_codes(graph, group):
            yield SourceLowering(graph, group, sites, schedule), GPU_FORMS, others, ""
            return
        cluster = 1 if whole_product is None else whole_product.cluster
        for width, best in tile_widths(graph, group, cluster):
            low = SourceLowering(graph, group, sites, replace(schedule, tile_columns=width))
            low.whole = whole_product
            yield low, GPU_FORMS, graph.facts.simplify(others * best), f"by {width}"

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
            *(str(facts.ranges.get(d)) for d in kernel.dims),
            str(facts.divisible),
        )
        if key not in self.entries:
            name = self._name(pipeline, label)
            limit = ARCHES["sm_90a"].block_shared if wide else SHARED_LIMIT
            if form is not None and low.whole is not None:
                writer: KernelWriter = PersistentWriter(
                    kernel, facts, limit, low.lines, form, low.whole
                )
            elif wide and attends(kernel):
                writer = RolesWriter(kernel, facts, limit, low.lines)
            else:
                writer = KernelWriter(kernel, facts, limit, low.lines, wide, low.boxes)
            writer.eights = low.eights
            self.entries[key] = writer.entry(name, _notes(graph, lowered))
            self.arithmetic[name] = arithmetic_of(self.entries[key].text)
        return self.entries[key]

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
            buffers.of(ref) if ref.node >= 0 else self._parts(buffers, lowered, n)
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

    def _parts(self, buffers: Buffers, lowered: Lowered, number: int) -> int:
        """The buffer of a product's parts: made by the kernel that writes them."""
        ref, buffer = lowered.values[number], lowered.kernel.buffers[number]
        if ref not in buffers.index:
            size = size_of(buffer.shape) * buffer.dtype.itemsize
            buffers.index[ref] = buffers.scratch(f"parts of t{-1 - ref.node}", size)
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
        arithmetic."""
        if launch.kernel not in usage:
            return {}
        used = usage[launch.kernel]
        shared = parse(launch.shared_bytes).evaluate(sizes) + used.shared
        resident, limit = occupancy(ARCHES[arch], launch.block[0], used.registers, shared)
        return {
            "registers": used.registers,
            "spill bytes": used.spill_stores + used.spill_loads,
            "shared bytes": shared,
            "blocks per SM": resident,
            "occupancy": round(resident * launch.block[0] / ARCHES[arch].threads, 3),
            "occupancy limit": limit,
            "arithmetic": self.arithmetic[launch.kernel],
        }


def _attentions(
    graph: Graph, group: Group, sites: Sites, arches: Sequence[str]
) -> Iterator[tuple[SourceLowering, Forms, Expr, str]]:
    """The kernels of attention: of few queries in two, the others in one."""
    asked = SourceLowering(graph, group, Sites(), GPU)
    split = split_of(asked)
    others = const(1)
    if split is not None:
        others = 1 - split.few
        for part, name in ((lower_pieces, "pieces"), (lower_joined, "joined")):
            low = SourceLowering(graph, group, sites, GPU)
            share = const(1) if name == "pieces" else split.few  # no piece, no block
            yield low, {"attention": partial(part, split=split)}, share, name
    if graph.facts.bounds(others)[1] != 0:
        schedule = GPU_WGMMA if arches[0] in WGMMA and suits_groups(asked) else GPU
        yield SourceLowering(graph, group, sites, schedule), GPU_FORMS, others, ""


def _rows(
    graph: Graph, group: Group, sites: Sites
) -> Iterator[tuple[SourceLowering, Forms, Expr, str]]:
    """The kernels of rows: of long scans in two, the others by how long rows are."""
    others, split = const(1), splits(graph, group)
    if split is not None:
        others = 1 - split
        for form, name in ((lower_stretches, "parts"), (lower_stretch_scans, "stretches")):
            yield SourceLowering(graph, group, sites, GPU), {"scan": form}, split, name
    for facts, name, share in _classes_of_rows(graph, group) or [(graph.facts, "", const(1))]:
        low = SourceLowering(graph, group, sites, GPU)
        low.sizes = facts
        yield low, GPU_FORMS, share * others, name


def _classes_of_rows(graph: Graph, group: Group) -> list[tuple[Facts, str, Expr]]:
    """For rows that may be short or long: what is known of sizes in each class of lengths, its
    name, and an expression that is 1 there and else 0."""
    axes = tuple(group.row_axes or ())
    if group.kind == "scan":
        scan = graph.nodes[group.roots[0].node].primitive
        axes = (scan.axis,) if isinstance(scan, Scan) and scan.axis == len(group.domain) - 1 else ()
    if group.kind not in ("row", "scan") or len(axes) != 1:
        return []
    (axis,) = axes
    length = group.domain[axis]
    name = length.as_symbol()
    if name is None or len(group.domain) == 1:
        return []
    low, high = graph.facts.ranges.get(name, (0, None))
    most = None if high is None else graph.facts.bounds(as_expr(high))[1]
    least = graph.facts.bounds(as_expr(low))[0]
    if least is None:
        return []
    limits = [n for n in SHORT_ROWS if least <= n and (most is None or n < most)]
    if group.kind == "scan":
        limits = [n for n in limits if n == WARP_ROW]
    found, above = [], const(1)
    for limit in limits:
        beyond = minimum(floordiv(length, limit + 1), const(1))
        facts = graph.facts.with_ranges({name: (low, limit)})
        found.append((facts, f"to {limit}", above - beyond))
        low, above = limit + 1, beyond
    if found:
        found.append((graph.facts.with_ranges({name: (low, high)}), "", above))
    return found


def _map_plan(
    kernel: Kernel, used: Sequence[int], found: TensorMap, own: Numbered
) -> TensorMapPlan:
    number = next(n for n, b in enumerate(kernel.buffers) if b.name == found.buffer)
    sizes, strides = (tuple(str(own.known(e)) for e in x) for x in (found.sizes, found.strides))
    return TensorMapPlan(
        used[number], str(own.known(found.offset)), sizes, strides, found.box, found.swizzle
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
