"""Buffers that others stand for at some sizes: the launches as they are at those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from stagefuse.compiler.plan import GpuLaunchPlan, GpuPlan

NO_BLOCKS = ("0", "1", "1")


def stand_ins(gpu: GpuPlan, evaluate: Callable[[str], int]) -> dict[int, int]:
    """The buffers of a plan that others stand for at sizes, and which."""
    found: dict[int, int] = {}
    for alias in gpu.aliases:
        if evaluate(alias.when):
            found[alias.buffer] = found.get(alias.of, alias.of)
    return found


def in_place(gpu: GpuPlan, known: Mapping[int, int]) -> tuple[GpuLaunchPlan, ...]:
    """The launches of a plan on the buffers that stand for others; those that would write one of
    these others have no blocks."""
    return tuple(
        launch if known.keys().isdisjoint(launch.buffers) else _launch(launch, known)
        for launch in gpu.launches
    )


def _launch(launch: GpuLaunchPlan, known: Mapping[int, int]) -> GpuLaunchPlan:
    if not known.keys().isdisjoint(launch.writes):
        return replace(launch, grid=NO_BLOCKS)
    return replace(
        launch,
        buffers=tuple(known.get(n, n) for n in launch.buffers),
        maps=tuple(replace(m, buffer=known.get(m.buffer, m.buffer)) for m in launch.maps),
    )
