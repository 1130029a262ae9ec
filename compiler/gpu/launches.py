"""The launches of a pipeline on each arch, as they are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from stagefuse.compiler.buffers import Buffers
from stagefuse.compiler.fusion.kernel_order import loops_of
from stagefuse.compiler.graph import Graph
from stagefuse.compiler.plan import GpuLaunchPlan, GpuPlan, LoopPlan
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dims_text import parse


class Launches:
    """Launches in order, and the recurrences at whose steps each runs.

    Those of a recurrence in `shares` run at all its steps times an expression, which is 1 or 0.
    """

    def __init__(self, arches: Sequence[str]) -> None:
        self.made: dict[str, list[GpuLaunchPlan]] = {arch: [] for arch in arches}
        self.nests: dict[str, list[tuple[str, ...]]] = {arch: [] for arch in arches}
        self.shares: dict[str, Expr] = {}
        self._settled = dict.fromkeys(arches, 0)
        self._uses: list[tuple[list[int], tuple[str, ...]]] = []

    def add(self, arches: Sequence[str], launch: GpuLaunchPlan, nest: tuple[str, ...]) -> None:
        for arch in arches:
            self.made[arch].append(launch)
            self.nests[arch].append(nest)

    def settle(self, nest: tuple[str, ...]) -> None:
        """What was added since is one group's: its first launches on all arches come at one time,
        then the second ones."""
        fresh = [done[self._settled[arch] :] for arch, done in self.made.items()]
        for step in zip_longest(*fresh):
            self._uses.append(([n for x in step if x for n in x.buffers], nest))
        self._settled = {arch: len(done) for arch, done in self.made.items()}

    def plans(self, graph: Graph, buffers: Buffers) -> tuple[GpuPlan, ...]:
        """The plan of each arch, its buffers in slots."""
        nests = [nest for _, nest in self._uses]
        slots = buffers.slots([used for used, _ in self._uses], loops_of(graph, nests))
        plans, aliases = tuple(buffers.plans), tuple(buffers.aliases)
        return tuple(
            GpuPlan(arch, plans, tuple(found), slots, self._loops(graph, arch), aliases)
            for arch, found in self.made.items()
        )

    def _loops(self, graph: Graph, arch: str) -> tuple[LoopPlan, ...]:
        return tuple(
            replace(loop, count=str(parse(loop.count) * self.shares[loop.step]))
            if loop.step in self.shares
            else loop
            for loop in loops_of(graph, self.nests[arch])
        )
