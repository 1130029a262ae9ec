"""What a compiled source file is: frozen records of its pipelines, machine code and weights.

The runtime reads plans and nothing else of the compiler, so this module imports only dimension
expressions and dtypes. `compiler.plan_file` has the file format, `compiler.plan_check` the rules
that a plan must keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stagefuse.dsl.frozen import frozen

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

FORMAT_VERSION = 4
ABI_VERSION = 1  # of kernels, `sf_run` and calls: StepPlan, GpuLaunchPlan, call_abi
LEVELS = ("v3", "v4")  # x86-64 levels that objects are compiled for
GPU_ARCHES = ("sm_80", "sm_89", "sm_90a")
TARGETS = {  # what a caller names: what code is made for
    "cpu": "cpu",
    "a100": "sm_80",
    "l20": "sm_89",
    "l40": "sm_89",
    "h100": "sm_90a",
    "h200": "sm_90a",
    "h20": "sm_90a",
}
ROLES = ("input", "result", "arena", "weight", "constant", "state")


@frozen
class ArgumentPlan:
    """An input or a result: its name (None for an unnamed result), type, and its buffer."""

    name: str | None
    dtype: str
    shape: tuple[str, ...]
    buffer: int


@frozen
class DimPlan:
    """A dimension variable with its inclusive range; the ends are expressions."""

    name: str
    low: str = "0"
    high: str | None = None


@frozen
class CheckPlan:
    """A condition on sizes tested at each new combination: `expr` is 0, or not negative."""

    expr: str
    relation: str  # "==0" or ">=0"
    message: str
    file: str = ""
    line: int = 0
    column: int = 0
    text: str = ""


@frozen
class BufferPlan:
    """Memory that kernels read or write, dense and row-major.

    `slot` places an arena buffer; `array` names the plan's array of a weight or a constant.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    role: str
    slot: int | None = None
    array: str | None = None


@frozen
class StatePlan:
    """What a session keeps between calls, in a buffer of its own.

    It begins as the plan's array `array`, or with all elements the bytes `initial`, hexadecimal.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    buffer: int
    initial: str
    array: str | None = None


UNITS = {"tiles": 1, "quads": 2, "pages": 4, "halves": 8, "quotients": 16}
"""What a processor may have beyond its level, as bits: AMX, AVX-512 VNNI, prefetching that ends
with a page, AVX512-BF16, and quick division of vectors of 512 bits."""
CUT_ROWS = 64
"""With fewer rows a product waits for its weights, and those in pieces are half as large again."""


def cut_bytes(depth: int, columns: int) -> int:
    """Of a panel in pieces: for every 32 rows three bf16 for an element, then 64 bytes of marks."""
    return -(-depth // 32) * 32 * columns * 6 + 64


@frozen
class PiecesPlan:
    """Packed panels that a step on AMX can have in pieces: the place of their buffer among the
    step's, and how many rows the step multiplies them by."""

    buffer: int
    rows: str


@frozen
class StepPlan:
    """One kernel launch: `symbol` over `count` iterations, handed out at least `grain` at a time.

    The kernel is `void symbol(ptr args, i64 begin, i64 end, ptr scratch, ptr status)`; `args`
    holds 8-byte slots, the pointers of `buffers` in order, the values of `dims`, and for each of
    `pieces` the address of what the kernel `sf_cut_N` makes of the panels, or 0.
    `scratch_bytes` is private memory of each thread.
    """

    symbol: str
    buffers: tuple[int, ...]
    dims: tuple[str, ...]
    count: str
    grain: str = "1"
    scratch_bytes: str = "0"
    label: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    pieces: tuple[PiecesPlan, ...] = ()


@frozen
class LoopPlan:
    """Steps (or launches) from `first` to before `end` run again for each of `count` values of
    the symbol `step`, from 0. A loop that contains another comes before it."""

    step: str
    count: str
    first: int
    end: int


@frozen
class TensorMapPlan:
    """A tensor map of a launch: what tensor copies know of one of its buffers.

    The elements of `buffer` from `offset` on, as an array of `sizes`, outermost dimension first;
    elements of all but the last dimension, which is contiguous, are `strides` elements apart.
    Copies move boxes of `box` elements, whose rows are swizzled in `swizzle` bytes (0: not at
    all); beyond the sizes there are zeros. Offset, sizes and strides are expressions over the dims.
    One with a size of 0 may not be used by the kernel.
    With `steps` copies move columns of pixels of an array [N][D][H][W][C], or without D or D and H
    (`cuTensorMapEncodeIm2col`): `box` is pixels and channels of a column, each `steps`-th element
    of a dimension is taken, and of D, H and W a bounding box from `lower` beyond the first pixel to
    `upper` beyond the last.
    """

    buffer: int
    offset: str
    sizes: tuple[str, ...]
    strides: tuple[str, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


@frozen
class GpuLaunchPlan:
    """One launch of the entry `kernel` of the arch's PTX; sizes are expressions over the dims.

    `grid` counts blocks, also where `cluster` is not (1, 1, 1); `shared_bytes` is the dynamic
    shared memory of a block. The parameters of the entry are 8 bytes each: a u64 pointer for each
    of `buffers` (indices into the GpuPlan's), an s64 for each of `dims`, and a u64 pointer to the
    status, two s64: the number of a site plus one (0: nothing to report) and the value found there;
    behind them 128 bytes, aligned to 64, for each of `maps`, which are of `buffers`. The blocks of
    one that `stays` share its work whatever their number: a device with fewer multiprocessors than
    `grid` has blocks gets one for each, as far as clusters divide.
    The blocks of one that goes `together` wait for each other: all must be at work at once, so that
    it `stays` with as many for each multiprocessor at most, which are known to fit.
    `writes` are those of `buffers` that it writes; () leaves it open, and then it may write each
    one that is not an input, a weight or a constant. One that `reports` may write the status; one
    that is `guarded` reads it, so that it comes after all before it that report.
    """

    kernel: str
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: str
    buffers: tuple[int, ...]
    dims: tuple[str, ...]
    label: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    writes: tuple[int, ...] = ()
    reports: bool = False
    guarded: bool = False
    maps: tuple[TensorMapPlan, ...] = ()
    stays: bool = False
    together: int = 0


@frozen
class AliasPlan:
    """A buffer of the arena that holds what the buffer `of` does at sizes at which `when`, an
    expression over the dims, is 1, not 0. Launches use that one in its place there, and none that
    would write it runs."""

    buffer: int
    of: int
    when: str


@frozen
class GpuPlan:
    """A pipeline on one arch: its launches in an order that is right one after the other.

    The buffers with the role input are the pipeline's inputs, in order, those with the role result
    its results, those with the role state its states. `slots` are sizes in bytes of the arena's
    parts, as a PipelinePlan's. In `aliases` one that is of another's buffer comes after it.
    """

    arch: str
    buffers: tuple[BufferPlan, ...]
    launches: tuple[GpuLaunchPlan, ...]
    slots: tuple[str, ...] = ()
    loops: tuple[LoopPlan, ...] = ()
    aliases: tuple[AliasPlan, ...] = ()


@frozen
class SitePlan:
    """A place in the source that indexes with values of a tensor; kernels report its number.

    `extent` is the size of the indexed axis where it is one expression.
    """

    file: str
    line: int
    column: int
    text: str = ""
    message: str = ""
    extent: str = ""


@frozen
class PipelinePlan:
    """An entry point: its signature, its buffers and its steps in order.

    `slots` are sizes in bytes of the arena's parts; buffers that live at different times may
    share one. Steps run one after the other, those of a loop many times. `gpu` holds the same
    pipeline for GPUs, an arch each. A session fixes the dims in the shapes of `states`.
    """

    name: str
    doc: str
    inputs: tuple[ArgumentPlan, ...]
    results: tuple[ArgumentPlan, ...]
    dims: tuple[DimPlan, ...]
    buffers: tuple[BufferPlan, ...]
    steps: tuple[StepPlan, ...]
    slots: tuple[str, ...] = ()
    checks: tuple[CheckPlan, ...] = ()
    sites: tuple[SitePlan, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    gpu: tuple[GpuPlan, ...] = ()
    loops: tuple[LoopPlan, ...] = ()
    states: tuple[StatePlan, ...] = ()


CONSTANT = "constant/"
"""Before the names of arrays that are called by what is in them."""


def constant_name(array: np.ndarray[Any, Any]) -> str:
    """The name of a constant, by its content."""
    import numpy as np

    kind = f"{array.dtype}{array.shape}"  # zeros of i32 have the bytes of zeros of f32
    digest = hashlib.sha256(kind.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return f"{CONSTANT}{digest.hexdigest()[:16]}"


@frozen
class Cubin:
    """Machine code of some of an arch's kernels: an ELF file for the arch, or for an earlier one of
    its major version."""

    kernels: tuple[str, ...]
    code: bytes


@frozen
class Plan:
    """A compiled source file.

    `objects` maps an instruction-set level to one ELF object with the kernels of all pipelines
    and `sf_run`; `arrays` are weights and constants by name. `ptx` maps an arch to one module with
    the GPU kernels of all pipelines, `cubins` to the same kernels assembled, in parts. `call` is an
    ELF object with what calls them from Python, the same in each plan (`cpu.native_calls`).
    """

    pipelines: tuple[PipelinePlan, ...]
    objects: Mapping[str, bytes]
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    source: str = ""
    source_name: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    ptx: Mapping[str, str] = field(default_factory=dict)
    cubins: Mapping[str, tuple[Cubin, ...]] = field(default_factory=dict)
    call: bytes = b""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The pipelines' names, in source order."""
        return tuple(p.name for p in self.pipelines)


def write(plan: Plan, path: str | Path) -> None:
    """Write a plan file, the same bytes for the same plan; see `plan_file.write`."""
    from . import plan_file

    plan_file.write(plan, path)


def read(path: str | Path, *, verify: bool = False) -> Plan:
    """Read and check a plan file, mapping its arrays; see `plan_file.read`."""
    from . import plan_file

    return plan_file.read(path, verify=verify)
