"""How long a launch takes at given sizes on a device, from what its plan says of it.

A model for comparing kernels with each other and with what is measured: a kernel at the speed that
the device's memory or arithmetic allows, as far as the grid fills the device; what kernels hand to
each other is in the L2 cache if it fits in half of it. What a real kernel loses on top is what
there is to win. Constants are from kernels measured on an H100 and an H200.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from stagefuse.compiler.plan import BufferPlan, DimPlan, GpuLaunchPlan, GpuPlan
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.frozen import frozen

from .targets import TARGETS, Target, predicted

UNLIMITED = 4096
"""The size that stands for one without a limit."""


@frozen
class Prediction:
    """A launch at some sizes: what it touches of its buffers and computes, and by device the
    microseconds that it takes at least, and what bounds them."""

    bytes: int
    flops: int
    devices: Mapping[str, tuple[float, str]]


def largest(dims: tuple[DimPlan, ...]) -> dict[str, int]:
    """The largest sizes that dims may have, in order; `UNLIMITED` for those without a limit."""
    sizes: dict[str, int] = {}
    for dim in dims:
        low, high = (None if t is None else parse(t) for t in (dim.low, dim.high))
        if high is not None and high.symbols() <= sizes.keys():
            sizes[dim.name] = high.evaluate(sizes)
        else:
            least = low.evaluate(sizes) if low is not None and low.symbols() <= sizes.keys() else 0
            sizes[dim.name] = max(UNLIMITED, least)
    return sizes


def devices_of(arch: str) -> list[Target]:
    return [t for t in TARGETS.values() if t.arch.name == arch]


def predict(gpu: GpuPlan, launch: GpuLaunchPlan, sizes: Mapping[str, int]) -> Prediction | None:
    """The launch at sizes, in the middle of the recurrences around it.

    None where its report does not say enough: without `ptxas` nobody knows what fits at once.
    """
    notes = launch.report
    if "blocks per SM" not in notes or "bytes" not in notes:
        return None
    known = dict(sizes)
    for loop in gpu.loops:
        known[loop.step] = max(parse(loop.count).evaluate(known) - 1, 0) // 2
    x, y, z = (max(parse(side).evaluate(known), 0) for side in launch.grid)
    moved, flops = (parse(str(notes[key])).evaluate(known) for key in ("bytes", "flops"))
    issued = max(parse(str(notes.get("instructions", 0))).evaluate(known), 0)
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    own = {b: gpu.buffers[b] for b in launch.buffers}
    handed = sum(_bytes(b, known) for b in own.values() if b.slot is not None)
    written = sum(_bytes(own[n], known) for n in launch.writes)
    found = {
        device.name: predicted(
            device, moved, flops, x * y * z, threads, int(notes["blocks per SM"]),
            str(notes.get("arithmetic", "f32")), min(handed, moved), max(moved - written, 0),
            int(notes.get("bytes ahead", 0)), issued,
        )
        for device in devices_of(gpu.arch)
    }  # fmt: skip
    return Prediction(moved, flops, found)


def _bytes(buffer: BufferPlan, sizes: Mapping[str, int]) -> int:
    count = prod(max(parse(extent).evaluate(sizes), 0) for extent in buffer.shape)
    return count * DTYPES[buffer.dtype].itemsize
