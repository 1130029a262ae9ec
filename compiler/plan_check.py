"""The rules of a plan, checked before anything of it runs.

1. Names: pipelines, inputs and dims are distinct identifiers.
2. Types: each dtype is one of the language's; each shape, count, size and bound is a dimension
   expression over the pipeline's dims, and every dim follows from the inputs' shapes, or stands in
   that of a state.
3. Buffers: each has one of the roles; an input, a result or a state names a buffer of that role and
   of its type, and each such buffer belongs to exactly one; a state begins as an element or as an
   array of its dtype; an arena buffer has a slot; a weight or a
   constant has an array of its dtype and shape.
4. Steps: buffers and dims exist; the symbol is a plain name. Loops lie within the steps, one
   inside another or apart; only steps inside a loop use its step.
5. Objects: ELF files of known levels.
6. GPU code: PTX of known arches, each for the arch that it is filed under; cubins are ELF files
   that go with it, and where there are some each kernel that is launched is in one. A pipeline has
   at most one GpuPlan an arch: rule 3 holds for its buffers, which give its inputs and results in
   order; its launches name entries of the arch's PTX and give as many parameters as those have, all
   of 8 bytes, and behind them their tensor maps, which are of buffers of theirs, and for sm_90a
   alone; their blocks and clusters are within the limits of the arch.

Sizes (that a buffer fits its slot, that counts are sane) depend on dims, so the runtime checks
them for each new combination of sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES, from_numpy

from .errors import PlanError
from .plan import (
    GPU_ARCHES,
    LEVELS,
    ROLES,
    ArgumentPlan,
    BufferPlan,
    GpuLaunchPlan,
    GpuPlan,
    LoopPlan,
    PiecesPlan,
    PipelinePlan,
    Plan,
    StatePlan,
    StepPlan,
    TensorMapPlan,
)

_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*\Z")
_SYMBOL = re.compile(r"[A-Za-z_.$][\w.$]*\Z")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?")
_PARAMETER = re.compile(r"\.param\s+\.(align\s+64\s+\.b8\s+[\w$]+\[128\]|\w+)")
_EIGHT_BYTES = frozenset(("u64", "s64", "b64"))
_TARGET = re.compile(r"^\s*\.target\s+(\w+)", re.MULTILINE)
WRITTEN = ("arena", "result", "state")
"""Roles of buffers that launches may write."""
_MAX_EXPRESSION = 20_000
"""Characters, each name counted as one: sizes have up to 2000 terms."""
_WORD = re.compile(r"\w+")
# CUDA programming guide, technical specifications per compute capability.
_MAX_BLOCK = (1024, 1024, 64)
_MAX_THREADS = 1024
_MAX_PIXELS, _MAX_STEP, _CORNERS = 1024, 8, {3: 1 << 15, 4: 1 << 7, 5: 1 << 4}
_MAX_BOX = 256
_SWIZZLES = (0, 32, 64, 128)
_MAX_CLUSTER = 16  # more than 8 is a kernel's own choice on Hopper


def check(plan: Plan) -> None:
    """Raise PlanError unless the plan keeps all rules."""
    if not plan.pipelines:
        raise PlanError("the plan holds no pipeline")
    _distinct((p.name for p in plan.pipelines), "pipeline")
    for level, code in plan.objects.items():
        if level not in LEVELS:
            raise PlanError(f"object of an unknown level {level!r}")
        if bytes(code[:4]) != b"\x7fELF":
            raise PlanError(f"the object for level {level} is not an ELF file")
    if plan.call and bytes(plan.call[:4]) != b"\x7fELF":
        raise PlanError("the object for calls is not an ELF file")
    _gpu_code(plan)
    for pipeline in plan.pipelines:
        _Pipeline(plan, pipeline).check()


def _gpu_code(plan: Plan) -> None:
    for arch, text in plan.ptx.items():
        if arch not in GPU_ARCHES:
            raise PlanError(f"PTX for the unknown arch {arch!r}")
        target = _TARGET.search(text)
        if target is None or target[1] != arch:
            found = "no target" if target is None else f"the target {target[1]}"
            raise PlanError(f"the PTX for {arch} names {found}")
    for arch, cubins in plan.cubins.items():
        if arch not in plan.ptx:
            raise PlanError(f"a cubin for {arch!r}, without the PTX that it comes from")
        for cubin in cubins:
            if bytes(cubin.code[:4]) != b"\x7fELF":
                raise PlanError(f"the cubin for {arch} is not an ELF file")
        _distinct((n for c in cubins for n in c.kernels), f"kernel in the cubins for {arch}:")


class _Pipeline:
    def __init__(self, plan: Plan, pipeline: PipelinePlan) -> None:
        self.plan, self.pipeline = plan, pipeline
        self.dims = frozenset(d.name for d in pipeline.dims)
        self.where = f"pipeline {pipeline.name}"
        self.seen: set[str] = set()

    def check(self) -> None:
        pipeline = self.pipeline
        if not _NAME.match(pipeline.name):
            raise PlanError(f"{pipeline.name!r} is not a name of a pipeline")
        _distinct((d.name for d in pipeline.dims), f"{self.where}: dim")
        _distinct((i.name or "" for i in pipeline.inputs), f"{self.where}: input")
        _distinct((r.name for r in pipeline.results if r.name), f"{self.where}: result")
        _distinct((s.name for s in pipeline.states), f"{self.where}: state")
        for dim in pipeline.dims:
            self.expression(dim.low, f"the range of {dim.name}")
            if dim.high is not None:
                self.expression(dim.high, f"the range of {dim.name}")
        for number, text in enumerate(pipeline.slots):
            self.expression(text, f"slot {number}")
        for number, buffer in enumerate(pipeline.buffers):
            self.buffer(buffer, f"buffer {number} ({buffer.name})", len(pipeline.slots))
        self.arguments("input", pipeline.inputs)
        self.arguments("result", pipeline.results)
        self.arguments("state", pipeline.states)
        for state in pipeline.states:
            self.state(state)
        self.steps()
        _distinct((g.arch for g in pipeline.gpu), f"{self.where}: code for the arch")
        for gpu in pipeline.gpu:
            self.gpu(gpu)
        self.others()
        unknown = undetermined(pipeline)
        if unknown:
            raise self.fault(f"no input's shape determines the dims {', '.join(unknown)}")

    def fault(self, message: str) -> PlanError:
        return PlanError(f"{self.where}: {message}")

    def expression(self, text: str, what: str, steps: frozenset[str] = frozenset()) -> None:
        """Checks an expression over the dims, and over the steps of loops around it."""
        if text in self.seen:
            return
        if len(text) > _MAX_EXPRESSION and len(_WORD.sub("n", text)) > _MAX_EXPRESSION:
            raise self.fault(f"{what} is an expression of {len(text)} characters")
        try:
            expr = parse(text)
        except (ValueError, RecursionError) as error:
            raise self.fault(f"{what}: {error}") from None
        unknown = sorted(expr.symbols() - self.dims - steps)
        if unknown:
            raise self.fault(f"{what} uses the unknown dim {unknown[0]!r} in {text!r}")
        if not steps:
            self.seen.add(text)

    def type(self, dtype: str, shape: Sequence[str], what: str) -> None:
        if dtype not in DTYPES:
            raise self.fault(f"{what} has the unknown dtype {dtype!r}")
        if len(shape) > 32:
            raise self.fault(f"{what} has {len(shape)} dimensions")
        for text in shape:
            self.expression(text, what)

    def buffer(self, buffer: BufferPlan, what: str, slots: int) -> None:
        self.type(buffer.dtype, buffer.shape, what)
        if buffer.role not in ROLES:
            raise self.fault(f"{what} has the unknown role {buffer.role!r}")
        if (buffer.slot is not None) != (buffer.role == "arena"):
            raise self.fault(f"{what}: a slot belongs to an arena buffer, and only to one")
        if buffer.slot is not None and not 0 <= buffer.slot < slots:
            raise self.fault(f"{what} is in slot {buffer.slot} of {slots}")
        if (buffer.array is not None) != (buffer.role in ("weight", "constant")):
            raise self.fault(f"{what}: an array belongs to a weight or a constant")
        if buffer.array is not None:
            self.array(buffer, what)

    def array(self, buffer: BufferPlan, what: str) -> None:
        array = self.plan.arrays.get(buffer.array or "")
        if array is None:
            raise self.fault(f"{what} reads the array {buffer.array!r}, which the plan lacks")
        dtype = from_numpy(array.dtype)
        shape = tuple(parse(text).as_int() for text in buffer.shape)
        if dtype is None or dtype.name != buffer.dtype or shape != array.shape:
            raise self.fault(
                f"{what} is {buffer.dtype}[{', '.join(buffer.shape)}], but its array is "
                f"{dtype or array.dtype}{list(array.shape)}"
            )

    def state(self, state: StatePlan) -> None:
        try:
            initial = bytes.fromhex(state.initial)
        except ValueError:
            initial = b""
        if len(initial) != DTYPES[state.dtype].itemsize:
            raise self.fault(f"state {state.name} begins as {state.initial!r}, no {state.dtype}")
        if state.array is not None:
            buffer = self.pipeline.buffers[state.buffer]
            self.array(replace(buffer, array=state.array), f"state {state.name}")

    def arguments(self, role: str, arguments: Sequence[ArgumentPlan | StatePlan]) -> None:
        for argument in arguments:
            what = f"{role} {argument.name or ''}".strip()
            name_needed = role != "result" or argument.name is not None
            if name_needed and not _NAME.match(argument.name or ""):
                raise self.fault(f"{argument.name!r} is not a name of an {role}")
            if not 0 <= argument.buffer < len(self.pipeline.buffers):
                raise self.fault(f"{what} is buffer {argument.buffer}, which does not exist")
            buffer = self.pipeline.buffers[argument.buffer]
            if buffer.role != role:
                raise self.fault(f"{what} is a buffer with the role {buffer.role!r}")
            if (buffer.dtype, buffer.shape) != (argument.dtype, argument.shape):
                raise self.fault(f"{what} and its buffer differ in type")
        used = sorted(argument.buffer for argument in arguments)
        if used != [i for i, b in enumerate(self.pipeline.buffers) if b.role == role]:
            raise self.fault(f"{role}s and buffers with that role do not match one to one")

    def steps(self) -> None:
        around = self.loops(self.pipeline.loops, len(self.pipeline.steps), "")
        for number, step in enumerate(self.pipeline.steps):
            what = f"step {number} ({step.symbol})"
            if not _SYMBOL.match(step.symbol):
                raise self.fault(f"step {number}: {step.symbol!r} is not a symbol")
            for buffer in step.buffers:
                if not 0 <= buffer < len(self.pipeline.buffers):
                    raise self.fault(f"{what} uses buffer {buffer}, which does not exist")
            for dim in step.dims:
                if dim not in around[number]:
                    self.expression(dim, what)
            for text in (step.count, step.grain, step.scratch_bytes):
                self.expression(text, what)
            for cut in step.pieces:
                self.pieces(step, cut, what)

    def pieces(self, step: StepPlan, cut: PiecesPlan, what: str) -> None:
        if not 0 <= cut.buffer < len(step.buffers):
            raise self.fault(f"{what} has pieces of its buffer {cut.buffer}, which does not exist")
        buffer = self.pipeline.buffers[step.buffers[cut.buffer]]
        if buffer.dtype != "f32" or len(buffer.shape) < 2:
            raise self.fault(f"{what} has pieces of {buffer.name}, which holds no panels of f32")
        self.expression(cut.rows, what)

    def loops(self, loops: Sequence[LoopPlan], steps: int, where: str) -> list[frozenset[str]]:
        """The steps of the loops around each of the plan's steps."""
        around = [frozenset[str]() for _ in range(steps)]
        for number, loop in enumerate(loops):
            what = f"{where}loop {number} ({loop.step})"
            if not _NAME.match(loop.step) or loop.step in self.dims:
                raise self.fault(f"{what} has no name of its own")
            self.expression(loop.count, what)
            if not 0 <= loop.first < loop.end <= steps:
                raise self.fault(f"{what} runs from {loop.first} to {loop.end} of {steps} steps")
            if len(set(around[loop.first : loop.end])) > 1 or loop.step in around[loop.first]:
                raise self.fault(f"{what} is neither inside another loop nor apart from it")
            for step in range(loop.first, loop.end):
                around[step] |= {loop.step}
        return around

    def gpu(self, gpu: GpuPlan) -> None:
        if gpu.arch not in self.plan.ptx:
            raise self.fault(f"launches for {gpu.arch!r}, for which the plan holds no PTX")
        for number, text in enumerate(gpu.slots):
            self.expression(text, f"{gpu.arch}, slot {number}")
        for number, buffer in enumerate(gpu.buffers):
            self.buffer(buffer, f"{gpu.arch}, buffer {number} ({buffer.name})", len(gpu.slots))
        given: tuple[tuple[str, Sequence[ArgumentPlan | StatePlan]], ...] = (
            ("input", self.pipeline.inputs), ("result", self.pipeline.results),
            ("state", self.pipeline.states),
        )  # fmt: skip
        for role, arguments in given:
            types = [(a.dtype, a.shape) for a in arguments]
            if types != [(b.dtype, b.shape) for b in gpu.buffers if b.role == role]:
                raise self.fault(f"{gpu.arch}: {role}s and buffers with that role differ")
        for number in range(len(gpu.aliases)):
            self.alias(gpu, number, f"{gpu.arch}, alias {number}")
        entries = dict(_ENTRY.findall(self.plan.ptx[gpu.arch]))
        around = self.loops(gpu.loops, len(gpu.launches), f"{gpu.arch}, ")
        for number, launch in enumerate(gpu.launches):
            what = f"{gpu.arch}, launch {number} ({launch.kernel})"
            self.launch(gpu, launch, what, entries, around[number])

    def alias(self, gpu: GpuPlan, number: int, what: str) -> None:
        alias = gpu.aliases[number]
        if not all(0 <= n < len(gpu.buffers) for n in (alias.buffer, alias.of)):
            raise self.fault(f"{what} uses a buffer that does not exist")
        own, other = gpu.buffers[alias.buffer], gpu.buffers[alias.of]
        if own.role != "arena" or other.role == "state" or own.dtype != other.dtype:
            raise self.fault(f"{what}: {other.name} can't stand for {own.name}")
        if alias.buffer in [alias.of, *(n for a in gpu.aliases[:number] for n in (a.buffer, a.of))]:
            raise self.fault(f"{what}: {own.name} has a place already")
        self.expression(alias.when, what)

    def launch(
        self, gpu: GpuPlan, launch: GpuLaunchPlan, what: str, entries: Mapping[str, str],
        steps: frozenset[str],
    ) -> None:
        if launch.kernel not in entries:
            raise self.fault(f"{what}: the PTX has no such entry")
        cubins = self.plan.cubins.get(gpu.arch)
        if cubins is not None and not any(launch.kernel in c.kernels for c in cubins):
            raise self.fault(f"{what}: no cubin for {gpu.arch} holds the kernel {launch.kernel}")
        taken = _PARAMETER.findall(entries[launch.kernel])
        given = len(launch.buffers) + len(launch.dims) + 1
        maps = [kind for kind in taken if kind.startswith("align")]
        plain = taken[: len(taken) - len(maps)]
        if len(plain) != given or not _EIGHT_BYTES.issuperset(plain):
            raise self.fault(f"{what} gives {given} parameters of 8 bytes, not {', '.join(taken)}")
        if len(maps) != len(launch.maps):
            raise self.fault(f"{what} gives {len(launch.maps)} tensor maps, not {len(maps)}")
        for buffer in launch.buffers:
            if not 0 <= buffer < len(gpu.buffers):
                raise self.fault(f"{what} uses buffer {buffer}, which does not exist")
        for buffer in launch.writes:
            if buffer not in launch.buffers or gpu.buffers[buffer].role not in WRITTEN:
                raise self.fault(f"{what} can't write buffer {buffer}")
        for number, found in enumerate(launch.maps):
            self.map(gpu, launch, found, f"{what}, map {number}", steps)
        dims = [d for d in launch.dims if d not in steps]
        for text in (*launch.grid, launch.shared_bytes, *dims):
            self.expression(text, what)
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        sides = zip(launch.block, _MAX_BLOCK, strict=True)
        if threads > _MAX_THREADS or not all(1 <= n <= limit for n, limit in sides):
            raise self.fault(f"{what}: no block has {launch.block} threads")
        if launch.together and not launch.stays or launch.together < 0:
            raise self.fault(f"{what}: blocks that wait for each other must stay")
        blocks = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
        if min(launch.cluster) < 1 or blocks > (_MAX_CLUSTER if gpu.arch == "sm_90a" else 1):
            raise self.fault(f"{what}: {gpu.arch} has no cluster of {launch.cluster} blocks")

    def map(
        self, gpu: GpuPlan, launch: GpuLaunchPlan, found: TensorMapPlan, what: str,
        steps: frozenset[str],
    ) -> None:
        """Limits of tensor maps: CUDA driver API, "Tensor Map Object Management"."""
        if gpu.arch != "sm_90a":
            raise self.fault(f"{what}: {gpu.arch} has no tensor maps")
        if found.buffer not in launch.buffers:
            raise self.fault(f"{what} is of buffer {found.buffer}, which the launch does not use")
        rank = len(found.sizes)
        axes, most = (rank, _MAX_BOX) if not found.steps else (2, _MAX_PIXELS)
        if not 1 <= rank <= 5 or len(found.strides) != rank - 1 or len(found.box) != axes:
            raise self.fault(
                f"{what} has {rank} sizes, {len(found.strides)} strides and boxes of {found.box}"
            )
        inner = found.box[-1] * DTYPES[gpu.buffers[found.buffer].dtype].itemsize
        sides = zip(found.box, (most, _MAX_BOX) if found.steps else (most,) * rank, strict=True)
        if not all(1 <= n <= limit for n, limit in sides) or inner % 16:
            raise self.fault(f"{what} has boxes of {found.box} elements")
        if found.swizzle not in _SWIZZLES or (found.swizzle and inner > found.swizzle):
            raise self.fault(f"{what} has rows of {inner} bytes, swizzled in {found.swizzle}")
        if found.steps:
            self.pixels(found, rank, what)
        for text in (found.offset, *found.sizes, *found.strides):
            self.expression(text, what, steps)

    def pixels(self, found: TensorMapPlan, rank: int, what: str) -> None:
        """The same of those whose copies take columns of pixels."""
        corners, most = (*found.lower, *found.upper), _CORNERS.get(rank, 0)
        if len(found.lower) != rank - 2 or len(found.upper) != rank - 2 or not most:
            raise self.fault(f"{what} has corners {found.lower} and {found.upper} of {rank} sizes")
        if not all(-most <= c < most for c in corners):
            raise self.fault(f"{what} has corners {found.lower} and {found.upper}")
        if len(found.steps) != rank or not all(1 <= s <= _MAX_STEP for s in found.steps):
            raise self.fault(f"{what} takes pixels in steps of {found.steps}")

    def others(self) -> None:
        for check in self.pipeline.checks:
            self.expression(check.expr, "a check")
            if check.relation not in ("==0", ">=0"):
                raise self.fault(f"a check has the unknown relation {check.relation!r}")
        for site in self.pipeline.sites:
            if site.extent:
                self.expression(site.extent, "a site")


def session_dims(pipeline: PipelinePlan) -> tuple[str, ...]:
    """The dims that a session fixes: those in the shapes of its states."""
    texts = {text for state in pipeline.states for text in state.shape}
    used = frozenset[str]().union(*(parse(text).symbols() for text in texts))
    return tuple(d.name for d in pipeline.dims if d.name in used)


def undetermined(pipeline: PipelinePlan) -> list[str]:
    """The dims that neither follow from the inputs' shapes nor are a session's."""
    given = session_dims(pipeline)
    known = {name for name, *_ in solve_order(pipeline.inputs, given)}.union(given)
    return [d.name for d in pipeline.dims if d.name not in known]


def solve_order(
    inputs: Sequence[ArgumentPlan], given: Iterable[str] = ()
) -> list[tuple[str, int, int, Expr, int]]:
    """How dims follow from the inputs' shapes, one after the other, and from dims that are given.

    Each entry is (dim, input, axis, rest, factor): the size of the axis is
    `factor * dim + rest`, where `rest` holds only dims of earlier entries.
    """
    axes = [
        (i, axis, parse(text))
        for i, argument in enumerate(inputs)
        for axis, text in enumerate(argument.shape)
    ]
    axes.sort(key=lambda entry: entry[2].as_symbol() is None)
    order: list[tuple[str, int, int, Expr, int]] = []
    known = set(given)
    progress = True
    while progress:
        progress = False
        for i, axis, expr in axes:
            free = expr.symbols() - known
            if len(free) != 1:
                continue
            (name,) = free
            slope = expr.coefficient(name)
            factor = None if slope is None else slope.as_int()
            if not factor:
                continue
            order.append((name, i, axis, expr.substitute({name: 0}), factor))
            known.add(name)
            progress = True
    return order


def _distinct(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PlanError(f"{what} {name!r} is there twice")
        seen.add(name)
