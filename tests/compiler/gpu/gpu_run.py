"""Runs GPU plans in the emulator, and checks modules with ptxas and the instruction table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import stagefuse.compiler.gpu.compile  # noqa: F401  all of it, before a test changes a constant
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.plan import GpuPlan, PipelinePlan, Plan, TensorMapPlan
from stagefuse.compiler.ptx import check, read_module
from stagefuse.compiler.ptx.syntax import Instruction
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime.aliases import in_place, stand_ins

ARCHES = {"sm_80": "a100", "sm_89": "l40", "sm_90a": "h200"}


def compiled(path: Path, text: str, arches: tuple[str, ...] = tuple(ARCHES)) -> Plan:
    """The plan of a source text for GPUs alone."""
    path.write_text(text)
    return compile_file(path, targets=[ARCHES[a] for a in arches])


_read = lru_cache(maxsize=4)(read_module)
"""Modules are checked, and then run."""


def check_legal(plan: Plan) -> None:
    """Every instruction is a row of the table, for its target."""
    for text in plan.ptx.values():
        module = _read(text)
        for function in module.functions:
            for item in function.body:
                if isinstance(item, Instruction):
                    check(item, module.version, module.target[0])


def launches(plan: Plan) -> list[Any]:
    """All launches of a plan, of every arch."""
    return [x for p in plan.pipelines for g in p.gpu for x in g.launches]


def of_parts(found: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Of the launches of a pipeline those that store parts of sums, and those that sum them."""
    pairs = [(a, b) for a, b in pairwise(found) if " parts" in a.label]
    return [a for a, _ in pairs], [b for _, b in pairs]


def between(gpu: GpuPlan) -> list[tuple[str, ...]]:
    """The shapes of what kernels store for others, but for parts of sums."""
    parts = {n for launch in of_parts(gpu.launches)[0] for n in launch.writes}
    return [b.shape for n, b in enumerate(gpu.buffers) if b.slot is not None and n not in parts]


class Emulated:
    """A plan whose PTX the emulator runs."""

    def __init__(self, plan: Plan, arch: str = "sm_90a", pipeline: int = 0) -> None:
        from stagefuse.runtime import emulator

        self.plan, self.arch = plan, arch
        self.pipeline: PipelinePlan = plan.pipelines[pipeline]
        self.gpu: GpuPlan = next(g for g in self.pipeline.gpu if g.arch == arch)
        self.module = emulator.load(_read(plan.ptx[arch]))
        self.status = np.zeros(2, np.int64)

    def __call__(self, inputs: Mapping[str, Any], dims: Mapping[str, int]) -> list[Any]:
        """The results; `status` has what was reported."""
        from stagefuse.runtime import emulator

        def size(text: str) -> int:
            return parse(text).evaluate(dims)

        slots = [emulator.uninitialised((max(size(s), 16),), np.uint8) for s in self.gpu.slots]
        arrays: list[Any] = []
        results: list[tuple[Any, Any, tuple[int, ...]]] = []
        for buffer in self.gpu.buffers:
            dtype = DTYPES[buffer.dtype].numpy
            shape = tuple(size(d) for d in buffer.shape)
            if buffer.role == "input":
                arrays.append(_bytes(np.ascontiguousarray(inputs[buffer.name])))
            elif buffer.role in ("weight", "constant"):
                arrays.append(_bytes(np.ascontiguousarray(self.plan.arrays[str(buffer.array)])))
            elif buffer.role == "result":
                count = int(np.prod(shape, dtype=int)) * dtype.itemsize
                made = emulator.uninitialised((max(count, 1),), np.uint8)
                results.append((made, dtype, shape))
                arrays.append(made)
            else:
                arrays.append(slots[buffer.slot or 0])
        self.status[:] = 0
        for launch in in_place(self.gpu, stand_ins(self.gpu, size)):
            grid = tuple(size(n) for n in launch.grid)
            if 0 in grid:
                continue
            args = [arrays[n] for n in launch.buffers]
            args += [np.int64(dims[d]) for d in launch.dims]
            maps = [_map(m, self.gpu, arrays, size) for m in launch.maps]
            self.module.launch(
                launch.kernel, grid=grid, block=launch.block, cluster=launch.cluster,
                shared_bytes=size(launch.shared_bytes), args=[*args, self.status, *maps],
            )  # fmt: skip
        return [_array(*r) for r in results]


def _map(map: TensorMapPlan, gpu: GpuPlan, arrays: list[Any], size: Callable[[str], int]) -> Any:
    """A tensor map of one of a launch's buffers."""
    from stagefuse.runtime import emulator

    dtype = DTYPES[gpu.buffers[map.buffer].dtype].numpy
    sizes, strides = ([size(e) for e in listed] for listed in (map.sizes, map.strides))
    if 0 in sizes:
        return bytes(128)
    part = (
        arrays[map.buffer], size(map.offset) * dtype.itemsize, dtype, sizes,
        [n * dtype.itemsize for n in strides], map.box,
    )  # fmt: skip
    if map.steps:
        return emulator.Im2colMap.of_part(*part, map.swizzle, map.lower, map.upper, map.steps)
    return emulator.TensorMap.of_part(*part, map.swizzle)


def _bytes(array: Any) -> Any:
    """The bytes of an array, at least one."""
    found = array.reshape(-1).view(np.uint8)
    return found if found.size else np.zeros(1, np.uint8)


def _array(made: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    raw = np.asarray(getattr(made, "array", made))
    count = int(np.prod(shape, dtype=int))
    return raw[: count * dtype.itemsize].view(dtype).reshape(shape)
